"""Perplexity where every model with the same tokenizer predicts the very same tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import LlamaForCausalLM

from reports.lm import score_positions
from shearling import Progress, ShearlingError, silent

Floats = npt.NDArray[np.float64]

FIRST_PLACES = 16
"""The first stretch of positions is shorter than this; each after it is twice as long."""


@torch.inference_mode()
def position_losses(
    model: LlamaForCausalLM,
    tokenizer: Any,
    text: str,
    *,
    length: int,
    windows: int,
    progress: Progress = silent,
) -> Floats:
    """Negative log-likelihoods (nats) in ``windows`` token windows of the text.

    [window, position]: ``spread_windows`` of ``length`` tokens; no special tokens are added;
    the first token of a window is not predicted, so there are ``length - 1`` positions. A text of
    less than one window is a ShearlingError.
    """
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    ids_WT = spread_windows(tokens, length, windows)
    if not len(ids_WT):
        raise ShearlingError(
            f"The text has {len(tokens)} tokens, fewer than one window of {length}.",
            hint="Use a longer text.",
        )
    losses = np.empty((len(ids_WT), length - 1))
    for window, ids_T in enumerate(ids_WT):
        progress(f"perplexity at {length}", window, len(ids_WT))
        ids = ids_T.to(model.device)
        hidden_TD = model.model(ids[None], use_cache=False).last_hidden_state[0]
        places = torch.arange(length - 1, device=model.device)
        logprob_T, _ = score_positions(hidden_TD, model.lm_head.weight, places, ids[1:])
        losses[window] = -logprob_T.cpu().numpy()
    return losses


def spread_windows(tokens: Sequence[int], length: int, windows: int) -> torch.Tensor:
    """[W, length]: windows that don't overlap, evenly spread over a text, or all that it has.

    From its start, a few articles would stand for all of them, and neighbours for independent
    samples. A last, shorter window is left out.
    """
    there = len(tokens) // length
    count = min(windows, there)
    starts = (number * there // count * length for number in range(count))
    found = [list(tokens[start : start + length]) for start in starts]
    return torch.tensor(found, dtype=torch.long).view(-1, length)


def losses_by_position(losses_WP: Floats) -> list[dict[str, float | int | None]]:
    """Mean losses (nats) and standard errors of stretches of positions, each twice the last.

    ``first`` and ``last`` count the tokens that the model had read before those it predicts.
    """
    rows: list[dict[str, float | int | None]] = []
    start, positions = 1, losses_WP.shape[1]
    while start <= positions:
        end = min(max(FIRST_PLACES, 2 * start), positions + 1)
        means_W = losses_WP[:, start - 1 : end - 1].mean(axis=1)
        error = (
            float(np.std(means_W, ddof=1)) / math.sqrt(len(means_W)) if len(means_W) > 1 else None
        )
        loss = float(means_W.mean())
        known = math.isfinite(loss)
        rows.append(
            {
                "first": start,
                "last": end - 1,
                "loss": loss if known else None,
                "stderr": error if known else None,
            }
        )
        start = end
    return rows


def perplexity_of_windows(losses: Sequence[float]) -> tuple[float, float | None]:
    """(perplexity, its standard error): exp of the mean loss, and that times the mean's error."""
    mean = float(np.mean(losses))
    value = math.exp(mean) if not mean > 709 else math.inf  # exp(710) raises OverflowError
    if len(losses) < 2:
        return value, None
    error = float(np.std(losses, ddof=1)) / math.sqrt(len(losses))
    return value, value * error


def ratio_error(sums: Sequence[float], weights: Sequence[float]) -> float | None:
    """Standard error of sum(sums) / sum(weights) over documents, by linearisation.

    Cochran, Sampling Techniques, 6.4: the ratio's residuals are treated as a sample.
    """
    count, total = len(sums), float(np.sum(weights))
    if count < 2 or total == 0:
        return None
    ratio = float(np.sum(sums)) / total
    residuals = np.asarray(sums) - ratio * np.asarray(weights)
    return math.sqrt(count / (count - 1) * float(np.sum(residuals**2))) / total
