"""The gradient at one position held to a multiple of its window's median.

A Llama's first position is the sink on which every head rests, and the loss's gradient in its
stream is tens of times that of others. Where a cut student takes a second position for a first one
it is a thousand times: that position alone is the step's direction, and clipping the norm of the
whole gradient takes from all others what is taken from it. As the clipping of the whole gradient
(Pascanu, Mikolov and Bengio 2013, https://arxiv.org/abs/1211.5063), position by position. What was
measured stands in docs/LOG.md (2026-11-27).

The median is that of the positions that count: behind all layers but the last, those of a prompt
have some gradient too, a thirtieth of an answer's.

Legend: B windows, T positions, D hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from compress.data import Batch


def clip_positions(grad_BTD: Tensor, times: float, counts_BT: Tensor) -> Tensor:
    """Shorten each position's gradient to at most ``times`` the median norm of its window's
    positions that count; those of them without a gradient (padding) have no part in it.

    What is not finite, or has a norm that isn't, stays as it is, and is noticed where the norm of
    the whole gradient is taken.
    """
    norm_BT1 = torch.linalg.vector_norm(grad_BTD, dim=-1, keepdim=True, dtype=torch.float32)
    counts_BT1 = counts_BT.unsqueeze(-1) & (norm_BT1 > 0)
    median_B11 = norm_BT1.where(counts_BT1, torch.nan).nanmedian(dim=1, keepdim=True).values
    scale_BT1 = (times * median_B11 / norm_BT1).clamp(max=1.0)
    held_BT1 = norm_BT1.isfinite() & scale_BT1.isfinite()
    scaled: Tensor = grad_BTD * scale_BT1.where(held_BT1, 1.0).to(grad_BTD.dtype)
    return scaled


class PositionClip:
    """Clips the stream's gradient behind embeddings and each layer, in every backward pass."""

    def __init__(self, model: LlamaForCausalLM, times: float) -> None:
        self.times = times
        self.counts_BT: Tensor | None = None
        for part in (model.model.embed_tokens, *model.model.layers):
            part.register_forward_hook(self._watch)

    def expect(self, batch: Batch) -> None:
        """The batch whose pass comes next."""
        shape, rows_N = batch.mask_BT.shape, batch.rows_N
        counts_BT = torch.zeros(shape, dtype=torch.bool, device=rows_N.device)
        counts_BT.view(-1).index_fill_(0, rows_N, True)
        self.counts_BT = counts_BT

    def _watch(self, module: nn.Module, arguments: Any, stream_BTD: Tensor) -> None:
        if stream_BTD.requires_grad:
            stream_BTD.register_hook(self._clip)  # type: ignore[no-untyped-call]

    def _clip(self, grad_BTD: Tensor) -> Tensor:
        assert self.counts_BT is not None
        return clip_positions(grad_BTD, self.times, self.counts_BT)
