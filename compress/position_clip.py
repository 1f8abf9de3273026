"""The gradient at one position held to a multiple of its window's median.

A Llama's first position is the sink on which every head rests, and the loss's gradient in its
stream is tens of times that of others. Where a cut student takes a second position for a first one
it is a thousand times: that position alone is the step's direction, and clipping the norm of the
whole gradient takes from all others what is taken from it. As the clipping of the whole gradient
(Pascanu, Mikolov and Bengio 2013, https://arxiv.org/abs/1211.5063), position by position. What was
measured stands in docs/LOG.md (2026-11-27).

Legend: B windows, T positions, D hidden.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM


def clip_positions(grad_BTD: Tensor, times: float) -> Tensor:
    """Shorten each position's gradient to at most ``times`` its window's median norm.

    Positions without a gradient (padding, what comes behind the last one that counts) have no part
    in the median. What is not finite stays so, and is noticed where the whole norm is taken.
    """
    norm_BT1: Tensor = torch.linalg.vector_norm(grad_BTD, dim=-1, keepdim=True, dtype=torch.float32)
    some_BT1 = norm_BT1.masked_fill(norm_BT1 == 0, torch.nan)
    longest_B11 = times * some_BT1.nanmedian(dim=1, keepdim=True).values
    scale_BT1 = (longest_B11 / norm_BT1).clamp_(max=1.0).nan_to_num_(nan=1.0)
    return grad_BTD * scale_BT1.to(grad_BTD.dtype)


def clip_at_positions(model: LlamaForCausalLM, times: float) -> None:
    """Have every backward pass clip the stream's gradient behind embeddings and each layer."""
    clip = partial(clip_positions, times=times)

    def watch(module: nn.Module, arguments: Any, stream_BTD: Tensor) -> None:
        if stream_BTD.requires_grad:
            stream_BTD.register_hook(clip)  # type: ignore[no-untyped-call]

    for part in (model.model.embed_tokens, *model.model.layers):
        part.register_forward_hook(watch)
