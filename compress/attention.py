"""Attention for short windows: two batched products and a softmax, with a gradient by hand.

PyTorch's CPU kernel for attention is made for long sequences. On windows of some hundred tokens
it reaches a twentieth of the speed of matrix products, and was a third of the training step;
this does the same arithmetic in half the time. What it keeps for backward are the probabilities
in the products' dtype, up to B · H · T² of them, so it serves short windows only. As nobody looks
ahead, queries are taken in blocks, each with the keys up to its own end: of four blocks that saves
three eighths.

Legend: B windows, H query heads, K key/value heads, G query heads a key/value head (H = K·G),
T positions, C head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from compress.workspace import momentary

NAME = "shearling_short_windows"
LONGEST = 1024
"""Above this many positions PyTorch's own kernel is used: it needs no T² memory."""
BLOCK = 128
"""Queries at a time: fewer save more, in products that are too small to be fast."""


class _Attention(torch.autograd.Function):
    """softmax(q kᵀ · scale + bias) v for grouped heads; the softmax in float32."""

    @staticmethod
    def forward(
        ctx: Any, query_BHTC: Tensor, key_BKTC: Tensor, value_BKTC: Tensor, bias: Tensor, s: float
    ) -> Tensor:
        batch, heads, length, dim = query_BHTC.shape
        groups = batch * key_BKTC.shape[1]
        key = key_BKTC.reshape(groups, length, dim)
        value = value_BKTC.reshape(groups, length, dim)
        mixed_BHTC = torch.empty_like(query_BHTC, memory_format=torch.contiguous_format)
        probabilities = []
        for start, end in _blocks(length):
            query = query_BHTC[:, :, start:end].reshape(groups, -1, dim)
            scores = torch.bmm(query, key[:, :end].transpose(1, 2))
            scores = scores.view(batch, heads, end - start, end)
            wide = momentary("scores", scores.shape, torch.float32, scores)
            torch.add(bias[:, :, start:end, :end], scores, alpha=s, out=wide)
            torch.ops.aten._softmax.out(wide, -1, False, out=wide)
            probability = scores.copy_(wide).view(groups, -1, end)
            mixed = torch.bmm(probability, value[:, :end])
            mixed_BHTC[:, :, start:end] = mixed.view(batch, heads, end - start, dim)
            probabilities.append(probability)
        ctx.save_for_backward(query_BHTC, key, value, *probabilities)
        ctx.scale, ctx.key_shape = s, key_BKTC.shape
        return mixed_BHTC

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query_BHTC, key, value, *probabilities = ctx.saved_tensors
        batch, heads, length, dim = query_BHTC.shape
        grad_query_BHTC = torch.empty_like(query_BHTC, memory_format=torch.contiguous_format)
        # Summed over the blocks in float32.
        grad_key, grad_value = (
            torch.zeros_like(each, dtype=torch.float32) for each in (key, value)
        )
        for (start, end), probability in zip(_blocks(length), probabilities, strict=True):
            query = query_BHTC[:, :, start:end].reshape(len(key), -1, dim)
            grad = grads[0][:, :, start:end].reshape(query.shape)
            grad_value[:, :end] += torch.bmm(probability.transpose(1, 2), grad)
            grad_probability = torch.bmm(grad, value[:, :end].transpose(1, 2))
            # softmax's own backward: p (dp - Σ p dp), in one pass
            grad_scores = torch.ops.aten._softmax_backward_data(
                grad_probability, probability, -1, probability.dtype
            )
            grad_query = torch.bmm(grad_scores, key[:, :end])
            grad_query_BHTC[:, :, start:end] = grad_query.view(batch, heads, end - start, dim)
            grad_key[:, :end] += torch.bmm(grad_scores.transpose(1, 2), query)
        return (
            grad_query_BHTC.mul_(ctx.scale),
            grad_key.mul_(ctx.scale).to(key.dtype).view(ctx.key_shape),
            grad_value.to(value.dtype).view(ctx.key_shape),
            None,
            None,
        )


def _blocks(length: int) -> list[tuple[int, int]]:
    """Start and end of each block of queries."""
    return [(start, min(start + BLOCK, length)) for start in range(0, length, BLOCK)]


def short_window_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: [B, heads, T, C] each, to [B, T, H, C]."""
    kind = query.device.type
    if torch.is_autocast_enabled(kind):
        narrow = torch.get_autocast_dtype(kind)
        query, key, value = query.to(narrow), key.to(narrow), value.to(narrow)
    with torch.autocast(kind, enabled=False):
        mixed_BHTC: Tensor = _Attention.apply(  # type: ignore[no-untyped-call]
            query, key, value, attention_mask, scaling
        )
    return mixed_BHTC.transpose(1, 2).contiguous(), None


def additive_mask(*arguments: Any, **named: Any) -> Tensor:
    """The mask as a float32 bias, [B, 1, T, T]: 0 where a position is seen, else -infinity.

    Made once a forward pass, so the layers need not translate a boolean mask each.
    """
    seen = sdpa_mask(*arguments, **{**named, "allow_is_causal_skip": False})
    assert seen is not None, "without the causal shortcut there is always a mask"
    return torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, float("-inf"))


AttentionInterface.register(NAME, short_window_attention)
AttentionMaskInterface.register(NAME, additive_mask)


def choose_attention(device: torch.device, dtype: torch.dtype, window: int) -> str:
    """The name of the attention that is fastest here, as transformers knows it."""
    short = window <= LONGEST and device.type == "cpu" and dtype == torch.bfloat16
    return NAME if short else "sdpa"
