"""Memory that is used again in every step, for what is needed for a moment."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class Workspace:
    """Buffers that live as long as the loop, for one thread.

    Fresh memory costs a page fault for every 4 KB: on a CPU that made a softmax over the vocabulary
    take twice its time. And what is freed between two tensors that stay until backward leaves a
    hole: glibc (2.36) seldom finds it again for an aligned tensor of the same size, so that a
    training step had come to two thirds more memory than its tensors.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def take(self, name: str, size: Sequence[int], dtype: torch.dtype, like: Tensor) -> Tensor:
        """A tensor of this size with any content, valid until ``name`` is taken again."""
        key, count = (name, dtype, like.device), math.prod(size)
        held = self._buffers.get(key)
        if held is None or held.numel() < count:
            del held  # and let the smaller one go before the larger is made
            self._buffers.pop(key, None)
            with torch.inference_mode(False):
                held = self._buffers[key] = torch.empty(count, dtype=dtype, device=like.device)
        return held[:count].view(size)


_MOMENTARY = Workspace()


def momentary(name: str, size: Sequence[int], dtype: torch.dtype, like: Tensor) -> Tensor:
    """The same for a layer's functions: in one buffer on a CPU, else fresh.

    Other devices have an allocator that finds its holes, and torch.compile plans memory itself.
    """
    if like.device.type != "cpu" or torch.compiler.is_compiling():
        return torch.empty(size, dtype=dtype, device=like.device)
    return _MOMENTARY.take(name, size, dtype, like)
