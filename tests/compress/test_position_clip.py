"""The gradient at one position, held to a multiple of its window's median."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from compress.data import make_batch
from compress.lean import make_lean
from compress.position_clip import PositionClip, clip_positions


def lengths(grad_BTD: Tensor) -> Tensor:
    return grad_BTD.norm(dim=-1)


def clipped(grad_BTD: Tensor, times: float, counts_BT: Tensor | None = None) -> Tensor:
    everywhere_BT = torch.ones(grad_BTD.shape[:2], dtype=torch.bool)
    return clip_positions(grad_BTD, times, everywhere_BT if counts_BT is None else counts_BT)


def test_only_what_stands_out_is_shortened_and_keeps_its_direction() -> None:
    grad_BTD = nn.functional.normalize(torch.randn(2, 9, 4), dim=-1)
    grad_BTD[1, 3] *= 100
    clipped_BTD = clipped(grad_BTD, 5.0)
    assert lengths(clipped_BTD)[1, 3].item() == pytest.approx(5.0, rel=1e-5)
    cosine = nn.functional.cosine_similarity(clipped_BTD[1, 3], grad_BTD[1, 3], dim=0)
    assert cosine.item() == pytest.approx(1.0)
    others_BT = torch.ones(2, 9, dtype=torch.bool)
    others_BT[1, 3] = False
    assert torch.equal(clipped_BTD[others_BT], grad_BTD[others_BT])


def test_positions_that_do_not_count_or_have_no_gradient_have_no_part_in_the_median() -> None:
    grad_BTD = torch.zeros(1, 10, 3)
    grad_BTD[0, :8] = torch.tensor([1.0, 2.0, 2.0])  # norm 3, and two positions behind them
    grad_BTD[0, :6] /= 30  # a prompt
    grad_BTD[0, 0] *= 3000  # its first position
    counts_BT = torch.arange(10)[None] >= 6
    expected = [15, *[0.1] * 5, 3, 3, 0, 0]
    assert lengths(clipped(grad_BTD, 5.0, counts_BT))[0].tolist() == pytest.approx(expected)


def test_a_window_in_which_nothing_counts_stays_as_it_is() -> None:
    grad_BTD = torch.randn(2, 4, 3).mul(4).exp()
    nothing_BT = torch.zeros(2, 4, dtype=torch.bool)
    assert torch.equal(clipped(grad_BTD, 5.0, nothing_BT), grad_BTD)
    assert torch.equal(clipped(torch.zeros(2, 4, 3), 5.0), torch.zeros(2, 4, 3))


@pytest.mark.parametrize("odd", [math.nan, math.inf, 3e38])
def test_what_has_no_finite_norm_is_not_hidden(odd: float) -> None:
    grad_BTD = torch.ones(1, 8, 2)
    grad_BTD[0, 2] = odd
    assert not clipped(grad_BTD, 5.0).norm().isfinite()


@given(st.integers(0, 2**31), st.sampled_from([torch.float32, torch.bfloat16]))
def test_windows_do_not_see_each_other_and_the_dtype_is_kept(seed: int, dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(seed)
    size_BT1 = torch.randn(3, 6, 1, generator=draw).mul(3).exp()
    grad_BTD = (torch.randn(3, 6, 4, generator=draw) * size_BT1).to(dtype)
    together = clipped(grad_BTD, 2.0)
    assert together.dtype == dtype
    alone = [clipped(window_1TD, 2.0) for window_1TD in grad_BTD.split(1)]
    assert torch.equal(together, torch.cat(alone))
    assert (lengths(together.float()) <= lengths(grad_BTD.float()) * (1 + 1e-2)).all()


class Watched:
    """A tiny model whose stream's gradients are kept, as they are behind the clipping."""

    def __init__(self, folder: Path, times: float) -> None:
        self.model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(folder)
        make_lean(self.model)
        self.clip = PositionClip(self.model, times) if times else None
        self.seen: list[Tensor] = []
        for part in (self.model.model.embed_tokens, *self.model.model.layers):
            part.register_forward_hook(self.look)

    def look(self, module: nn.Module, arguments: Any, stream_BTD: Tensor) -> None:
        """Behind the clipping: hooks of a tensor run in the order in which they were made."""
        if stream_BTD.requires_grad:
            stream_BTD.register_hook(lambda grad_BTD: self.seen.append(grad_BTD.clone()))

    def learn(self, counts_BT: Tensor, steep: float = 1.0) -> list[Tensor]:
        """Gradients of a loss at the positions that count, the first of them ``steep`` times."""
        ids_BT = torch.arange(counts_BT.shape[1])[None] % 7
        positions_BT = torch.arange(counts_BT.shape[1])[None]
        batch = make_batch(ids_BT, positions_BT, torch.device("cpu"), loss_mask_BT=counts_BT)
        if self.clip is not None:
            self.clip.expect(batch)
        self.seen.clear()
        logits_NV = batch.pick(self.model(ids_BT).logits)
        (logits_NV[0].square().sum() * steep + logits_NV.square().sum()).backward()
        return list(self.seen)


def test_every_layer_s_stream_is_clipped_and_only_in_training(tiny_llama: Path) -> None:
    everywhere_BT = torch.ones(1, 40, dtype=torch.bool)
    free, held = Watched(tiny_llama, 0), Watched(tiny_llama, 3.0)

    def stands_out(grads: list[Tensor]) -> list[float]:
        return [(lengths(grad).max() / lengths(grad).median()).item() for grad in grads]

    before = stands_out(free.learn(everywhere_BT, steep=1e3))
    after = stands_out(held.learn(everywhere_BT, steep=1e3))
    assert len(before) == len(after) == 1 + len(held.model.model.layers)
    assert min(before) > 10
    assert max(after) == pytest.approx(3.0, rel=1e-4)
    with torch.no_grad():
        held.model(torch.arange(5)[None])  # nothing to watch


def test_answers_behind_a_long_prompt_are_no_spikes(tiny_llama: Path) -> None:
    """The prompt's positions have a gradient too, through attention, and it is small."""
    answer_BT = torch.arange(40)[None] >= 32
    free = Watched(tiny_llama, 0).learn(answer_BT)
    held = Watched(tiny_llama, 3.0).learn(answer_BT)
    lengths_T, held_T = lengths(free[1])[0], lengths(held[1])[0]  # [0] is behind the last layer
    counts_T = answer_BT[0]
    assert lengths_T[counts_T].median() > 3 * lengths_T[~counts_T].median()
    assert held_T[counts_T].median().item() == pytest.approx(lengths_T[counts_T].median().item())
