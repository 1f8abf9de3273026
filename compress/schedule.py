"""What changes with the steps: the learning rate, and weights that the recipe lets change."""

from __future__ import annotations

import math

from compress.settings import Ramp


def warmup_then_cosine(step: int, steps: int, *, peak: float, warmup: float, final: float) -> float:
    """Learning rate of ``step`` (from 0): linear to ``peak``, then half a cosine to final · peak.

    ``warmup`` and ``final`` are shares, of ``steps`` and of ``peak``. The last step has exactly
    final · peak. Loshchilov & Hutter 2016, https://arxiv.org/abs/1608.03983; the Llama papers
    (https://arxiv.org/abs/2302.13971) end at a tenth of the peak.
    """
    rising = round(warmup * steps)
    if step < rising:
        return peak * (step + 1) / rising
    done = (step - rising + 1) / max(steps - rising, 1)
    return peak * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done)))


def at_step(value: float | Ramp, step: int, steps: int) -> float:
    """A number of the recipe in ``step`` (from 0): constant, or on its way from start to end."""
    if not isinstance(value, Ramp):
        return value
    done = step / max(steps - 1, 1)
    if value.shape == "cosine":
        done = 0.5 * (1 - math.cos(math.pi * done))
    return value.start + (value.end - value.start) * done
