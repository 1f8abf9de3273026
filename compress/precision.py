"""Which arithmetic is fast here: measured, because processors differ by a factor of nine.

A CPU with AMX or AVX512-BF16 multiplies bfloat16 matrices several times faster than float32 ones;
one without them emulates bfloat16 at half the speed of float32.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch
from transformers import PreTrainedModel

from compress.settings import Precision

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_AT_LEAST = 5
_SHAPE_MKN = (1024, 576, 1536)
"""Rows, inner and outer size of the measured product: the order of a small model's layers."""
_LARGE_MKN = (4096, 4096, 4096)
"""Elsewhere than on a CPU, where a small product takes less time than its call."""


@dataclass(frozen=True, kw_only=True)
class PrecisionChoice:
    """The dtype of matrix products, why, and what was measured (FLOP/s, 0 where nothing was)."""

    name: str
    reason: str
    float32_flops: float = 0.0
    bfloat16_flops: float = 0.0

    @property
    def dtype(self) -> torch.dtype:
        return _DTYPES[self.name]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def in_precision(model: PreTrainedModel, precision: PrecisionChoice) -> torch.autocast:
    """A model's passes inside multiply in ``precision``.

    Where the weights are wider (the student's) autocast narrows them for the products only.
    """
    narrow = precision.dtype != torch.float32 and model.dtype != precision.dtype
    return torch.autocast(model.device.type, precision.dtype, enabled=narrow)


def product_rate(
    dtype: torch.dtype,
    device: torch.device,
    seconds: float = 0.1,
    *,
    size: tuple[int, int, int] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """FLOP/s of matrix products in ``dtype``: the best of as many as fit into ``seconds``.

    The best, not the mean: other programs on the machine only ever make a product slower.
    ``size`` is rows, inner and outer size of the product, by default those of a small model;
    ``clock`` may count the processor's time instead of the wall's.
    """
    rows, inner, outer = size or _SHAPE_MKN
    left = torch.ones(rows, inner, device=device, dtype=dtype)
    right = torch.ones(inner, outer, device=device, dtype=dtype)
    left @ right  # the first product sets the libraries up
    best, products, end = float("inf"), 0, time.perf_counter() + seconds
    while products < _AT_LEAST or time.perf_counter() < end:
        _wait(device)
        start = clock()
        left @ right
        _wait(device)
        best, products = min(best, clock() - start), products + 1
    return 2.0 * rows * inner * outer / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def undisturbed_rate(dtype: torch.dtype, device: torch.device, seconds: float = 0.1) -> float:
    """FLOP/s of matrix products on all of a device.

    A CPU may be busy with other things just now: there one thread is measured by the processor
    time it takes, and the others are taken to do as much.
    """
    if device.type != "cpu":
        return product_rate(dtype, device, seconds, size=_LARGE_MKN)
    return torch.get_num_threads() * _thread_rate(dtype, seconds)


@cache  # where bfloat16 is imitated, measuring takes seconds
def _thread_rate(dtype: torch.dtype, seconds: float) -> float:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return product_rate(dtype, torch.device("cpu"), seconds, clock=time.thread_time)
    finally:
        torch.set_num_threads(threads)


def fast_dtype(device: torch.device | str, precision: Precision) -> PrecisionChoice:
    """Choose the dtype of matrix products; ``auto`` measures both and takes the faster."""
    if precision != "auto":
        return PrecisionChoice(name=precision, reason="set in the recipe")
    device = torch.device(device)
    narrow, wide = (undisturbed_rate(_DTYPES[name], device) for name in ("bfloat16", "float32"))
    # The casts around bfloat16 products cost time too, and its rounding costs accuracy.
    name = "bfloat16" if narrow > 1.3 * wide else "float32"
    return PrecisionChoice(
        name=name,
        reason=f"measured on {device.type}: matrix products at {narrow / 1e9:.0f} GFLOP/s in "
        f"bfloat16 and {wide / 1e9:.0f} in float32",
        float32_flops=wide,
        bfloat16_flops=narrow,
    )
