"""How large a step is, as a function of how far the training is."""

from __future__ import annotations

import math


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
