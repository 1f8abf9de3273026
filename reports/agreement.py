"""Does a model know when it is right, and how often does it say what its teacher says?

Both are measured on the same windows of text, token by token. What is kept of a model is its last
hidden states and its output matrix, so that teacher and student need not be in memory together.

Shapes: W windows, P predicted positions of a window (its length - 1), D hidden, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from transformers import LlamaForCausalLM

from shearling import Progress, silent

Floats = npt.NDArray[np.float64]

BINS = 15
"""Of confidence, as in Guo et al. 2017."""
BOOTSTRAPS = 1000
PROJECTED_AT_ONCE = 256


@dataclass(frozen=True)
class Reading:
    """What a model thought at each predicted position of some windows."""

    ids_WT: torch.Tensor
    hidden_WPD: torch.Tensor
    vocabulary_VD: torch.Tensor

    def logprobs(self, window: int, start: int) -> torch.Tensor:
        """[C, V]: log-probabilities at the window's positions from ``start`` on."""
        hidden_CD = self.hidden_WPD[window, start : start + PROJECTED_AT_ONCE]
        return (hidden_CD @ self.vocabulary_VD.T).float().log_softmax(dim=-1)

    def of_rows(self, rows: int) -> Reading:
        """The same with the vocabulary's first ``rows`` alone."""
        return replace(self, vocabulary_VD=self.vocabulary_VD[:rows])

    def chunks(self) -> list[tuple[int, int]]:
        """(window, first position) of every piece that is projected at one time."""
        windows, positions, _ = self.hidden_WPD.shape
        return [(w, p) for w in range(windows) for p in range(0, positions, PROJECTED_AT_ONCE)]


@torch.inference_mode()
def read_windows(
    model: LlamaForCausalLM, ids_WT: torch.Tensor, progress: Progress = silent
) -> Reading:
    """Run a model over the windows, one at a time."""
    hidden = []
    for done, ids_T in enumerate(ids_WT):
        progress("agreement with the teacher", done, len(ids_WT))
        ids_1T = ids_T[None].to(model.device)
        hidden.append(model.model(ids_1T, use_cache=False).last_hidden_state[0, :-1])
    return Reading(ids_WT.to(model.device), torch.stack(hidden), model.lm_head.weight.detach())


@torch.inference_mode()
def confidences(reading: Reading) -> tuple[Floats, Floats]:
    """(probability of the likeliest token, 1 where it was right), each [W, P]."""
    windows, positions, _ = reading.hidden_WPD.shape
    confidence_WP, right_WP = np.zeros((windows, positions)), np.zeros((windows, positions))
    for window, start in reading.chunks():
        best_C, token_C = reading.logprobs(window, start).max(dim=-1)
        end = start + len(best_C)
        confidence_WP[window, start:end] = best_C.exp().cpu()
        next_C = reading.ids_WT[window, start + 1 : end + 1]
        right_WP[window, start:end] = (token_C == next_C).cpu()
    return confidence_WP, right_WP


def calibration_error(
    confidence_WP: Floats, right_WP: Floats, *, seed: int = 0
) -> tuple[float, float | None]:
    """(expected calibration error, its standard error from a bootstrap over the windows).

    Guo et al. 2017, https://arxiv.org/abs/1706.04599: the mean distance of confidence and accuracy
    over bins of equal width, weighted by how many predictions are in each.
    """
    bins_WP = np.minimum((confidence_WP * BINS).astype(int), BINS - 1)
    gaps_WB = np.stack(
        [((confidence_WP - right_WP) * (bins_WP == each)).sum(axis=1) for each in range(BINS)],
        axis=1,
    )
    value = float(np.abs(gaps_WB.sum(axis=0)).sum() / confidence_WP.size)
    if len(gaps_WB) < 2:
        return value, None
    picks = np.random.default_rng(seed).integers(len(gaps_WB), size=(BOOTSTRAPS, len(gaps_WB)))
    drawn = np.abs(gaps_WB[picks].sum(axis=1)).sum(axis=1) / confidence_WP.size
    return value, float(drawn.std(ddof=1))


@torch.inference_mode()
def agreement(
    teacher: Reading, student: Reading, progress: Progress = silent
) -> tuple[list[float], list[float]]:
    """Per window: mean KL(teacher || student) in nats a token, share of equal first choices."""
    windows, positions, _ = teacher.hidden_WPD.shape
    kl_W, same_W = [0.0] * windows, [0.0] * windows
    for done, (window, start) in enumerate(teacher.chunks()):
        progress("agreement with the teacher", done, len(teacher.chunks()))
        theirs_CV, mine_CV = teacher.logprobs(window, start), student.logprobs(window, start)
        kl_C = (theirs_CV.exp() * (theirs_CV - mine_CV)).sum(dim=-1)
        same_C = theirs_CV.argmax(dim=-1) == mine_CV.argmax(dim=-1)
        kl_W[window] += float(kl_C.sum()) / positions
        same_W[window] += float(same_C.sum()) / positions
    return kl_W, same_W


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """(mean, its standard error; None for a single value)."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, None
    return mean, float(np.std(values, ddof=1)) / math.sqrt(len(values))
