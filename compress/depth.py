"""Which layers can go, measured by what their absence does to the teacher's answers.

Legend: B windows, T positions, N positions, E teacher hidden, C candidates, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.layer import LayerMath, normed, read_layer
from compress.losses import forward_kl
from shearling import Progress, silent
from teachers.checkpoint import Checkpoint
from teachers.layout import EMBEDDING, FINAL_NORM, HEAD

DEPTH_TOKENS = 2048
"""Positions on which each absence is measured."""


def layers_by_divergence(
    source: Checkpoint,
    windows_BT: Tensor,
    count: int,
    device: torch.device,
    dtype: torch.dtype,
    vocabulary: int,
    progress: Progress = silent,
) -> list[int]:
    """Numbers of the ``count`` layers that stay, ascending.

    One layer goes at a time: the one without which, beside those that are gone already, the
    model's answers diverge least from the whole teacher's (forward KL). All candidates walk
    through the layers together, so a round reads each layer's weights once; in memory are one
    layer and a stream for each candidate.

    Source of the greedy order: Zhong et al., "BlockPruner", 2024 (arXiv:2406.10594).
    """
    tokens_BT = windows_BT[: max(1, DEPTH_TOKENS // windows_BT.shape[1])]
    search = DepthSearch(source, tokens_BT, device, dtype, vocabulary)
    kept = list(range(source.shape.num_hidden_layers))
    rounds = len(kept) - count
    for number in range(rounds):
        progress("depth", number, rounds)
        without_C, whole_NE = search.absences(kept)
        search.reference_NE = whole_NE if number == 0 else search.reference_NE
        divergences = [search.divergence(without_NE) for without_NE in without_C]
        kept.pop(divergences.index(min(divergences)))
    return kept


class DepthSearch:
    """The teacher, some text, and what becomes of the teacher without one layer or another."""

    def __init__(
        self,
        source: Checkpoint,
        tokens_BT: Tensor,
        device: torch.device,
        dtype: torch.dtype,
        vocabulary: int,
    ) -> None:
        self.source, self.device = source, device
        self.maths = LayerMath(source.config, tokens_BT.shape[1], device, dtype)
        self.start_BTE = source.tensor(EMBEDDING)[tokens_BT].float()
        self.head_VE = source.tensor(HEAD)[:vocabulary].to(device, dtype)
        self.norm_E = source.tensor(FINAL_NORM, torch.float32).to(device)
        self.reference_NE = torch.empty(0)

    def absences(self, kept: list[int]) -> tuple[list[Tensor], Tensor]:
        """Final hidden states [N, E] without each of the ``kept`` layers, and with all of them."""
        whole_BTE = self.start_BTE.clone()
        without: list[Tensor] = []
        for layer in kept:
            weights = read_layer(self.source, layer, self.device)
            skipped_BTE = whole_BTE.clone()
            for stream_BTE in [*without, whole_BTE]:
                self.maths.advance(stream_BTE, weights)
            without.append(skipped_BTE)
        return [self._final(stream) for stream in without], self._final(whole_BTE)

    def _final(self, stream_BTE: Tensor) -> Tensor:
        final_BTE = normed(stream_BTE.to(self.device), self.maths.eps) * self.norm_E
        return final_BTE.flatten(0, 1).to(self.head_VE.dtype)

    def divergence(self, hidden_NE: Tensor) -> float:
        """KL(teacher || without), mean over the positions, in nats."""
        total = 0.0
        for ours, theirs in zip(
            torch.split(hidden_NE, 512), torch.split(self.reference_NE, 512), strict=True
        ):
            student_NV, teacher_NV = (part @ self.head_VE.T for part in (ours, theirs))
            total += float(forward_kl(student_NV.float(), teacher_NV.float()).sum())
        return total / len(hidden_NE)
