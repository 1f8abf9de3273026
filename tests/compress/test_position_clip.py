"""The gradient at one position, held to a multiple of its window's median."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import LlamaForCausalLM

from compress.lean import make_lean
from compress.position_clip import clip_at_positions, clip_positions


def lengths(grad_BTD: torch.Tensor) -> torch.Tensor:
    return grad_BTD.norm(dim=-1)


def test_only_what_stands_out_is_shortened_and_keeps_its_direction() -> None:
    grad_BTD = torch.nn.functional.normalize(torch.randn(2, 9, 4), dim=-1)
    grad_BTD[1, 3] *= 100
    clipped_BTD = clip_positions(grad_BTD, 5.0)
    assert lengths(clipped_BTD)[1, 3].item() == pytest.approx(5.0, rel=1e-5)
    cosine = torch.nn.functional.cosine_similarity(clipped_BTD[1, 3], grad_BTD[1, 3], dim=0)
    assert cosine.item() == pytest.approx(1.0)
    others_BT = torch.ones(2, 9, dtype=torch.bool)
    others_BT[1, 3] = False
    assert torch.equal(clipped_BTD[others_BT], grad_BTD[others_BT])


def test_positions_without_a_gradient_have_no_part_in_the_median() -> None:
    grad_BTD = torch.zeros(1, 10, 3)
    grad_BTD[0, :3] = torch.tensor([1.0, 2.0, 2.0])  # norm 3, and seven positions behind them
    grad_BTD[0, 0] *= 40
    clipped_BTD = clip_positions(grad_BTD, 5.0)
    assert lengths(clipped_BTD)[0].tolist() == pytest.approx([15, 3, 3] + [0] * 7)


def test_nothing_comes_of_nothing() -> None:
    assert torch.equal(clip_positions(torch.zeros(2, 4, 3), 5.0), torch.zeros(2, 4, 3))


@pytest.mark.parametrize("odd", [math.nan, math.inf])
def test_what_is_not_finite_is_not_hidden(odd: float) -> None:
    grad_BTD = torch.ones(1, 8, 2)
    grad_BTD[0, 2, 1] = odd
    assert not clip_positions(grad_BTD, 5.0).isfinite().all()


@given(st.integers(0, 2**31), st.sampled_from([torch.float32, torch.bfloat16]))
def test_windows_do_not_see_each_other_and_the_dtype_is_kept(seed: int, dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(seed)
    size_BT1 = torch.randn(3, 6, 1, generator=draw).mul(3).exp()
    grad_BTD = (torch.randn(3, 6, 4, generator=draw) * size_BT1).to(dtype)
    together = clip_positions(grad_BTD, 2.0)
    assert together.dtype == dtype
    assert torch.equal(
        together, torch.cat([clip_positions(grad_BTD[i : i + 1], 2.0) for i in range(3)])
    )
    assert (lengths(together.float()) <= lengths(grad_BTD.float()) * (1 + 1e-2)).all()


def test_every_layer_s_stream_is_watched_in_training_alone(tiny_llama: Path) -> None:
    """Steep layers: without clipping the first position's gradient stands out behind each."""
    model = LlamaForCausalLM.from_pretrained(tiny_llama)
    make_lean(model)
    ids_BT = torch.arange(40)[None] % 7
    seen: list[torch.Tensor] = []

    def look(module: nn.Module, arguments: Any, stream_BTD: torch.Tensor) -> None:
        """Behind the clipping: hooks of a tensor run in the order in which they were made."""
        if stream_BTD.requires_grad:
            stream_BTD.register_hook(lambda grad_BTD: seen.append(grad_BTD.clone()))

    def spy(times: float) -> list[float]:
        watched = copy.deepcopy(model)
        if times:
            clip_at_positions(watched, times)
        seen.clear()
        for part in (watched.model.embed_tokens, *watched.model.layers):
            part.register_forward_hook(look)
        logits_BTV = watched(ids_BT).logits
        (logits_BTV[0, 0].square().sum() * 1e3 + logits_BTV.square().sum()).backward()
        with torch.no_grad():
            watched(ids_BT)  # nothing to watch
        return [(lengths(grad).max() / lengths(grad).median()).item() for grad in seen]

    free, held = spy(0), spy(3.0)
    assert len(free) == len(held) == 1 + len(model.model.layers)
    assert min(free) > 10
    assert max(held) == pytest.approx(3.0, rel=1e-4)
