"""Gradients that walk layer by layer against autograd through transformers' own model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from compress.streams import Streams
from compress.taylor import taylor_scores
from teachers.checkpoint import Checkpoint
from teachers.transfer_set import TransferSet


def slopes(model: LlamaForCausalLM, window: Tensor, module: str) -> Tensor:
    """Σ a ∂L/∂a over the positions of one window, for the inputs a of a linear map: [I]."""
    taken: list[Tensor] = []

    def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        inputs[0].retain_grad()
        taken.append(inputs[0])

    handle = model.get_submodule(module).register_forward_pre_hook(keep)
    logits = model(window[None], use_cache=False).logits[0]
    nn.functional.cross_entropy(logits[:-1], window[1:], reduction="sum").backward()
    handle.remove()
    gradient = taken[0].grad
    assert gradient is not None
    return (taken[0].detach() * gradient)[0].sum(0)


@pytest.mark.parametrize("layer", [0, 3])
def test_scores_are_what_autograd_says(
    tiny_llama: Path, tiny_transfer_set: Path, tmp_path: Path, layer: int
) -> None:
    windows = TransferSet(tiny_transfer_set).calibration(128, 0)
    streams = Streams(tmp_path, torch.float32, limit_bytes=0)
    device = torch.device("cpu")
    source = Checkpoint(tiny_llama)
    found = taylor_scores(source, windows, streams, device, torch.float32, source.shape.vocab_size)
    model = LlamaForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    part = f"model.layers.{layer}"
    down = torch.stack([slopes(model, w, f"{part}.mlp.down_proj") for w in windows])
    torch.testing.assert_close(found[layer].neurons_F, down.abs().sum(0), rtol=1e-4, atol=1e-6)
    heads = torch.stack([slopes(model, w, f"{part}.self_attn.o_proj") for w in windows])
    heads = heads.view(len(windows), source.shape.num_attention_heads, -1).sum(2)
    torch.testing.assert_close(found[layer].heads_H, heads.abs().sum(0), rtol=1e-4, atol=1e-6)
    assert len(found) == source.shape.num_hidden_layers
    assert bool((found[layer].hidden_E > 0).all())
