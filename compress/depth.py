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
CHUNK = 512
"""Positions whose logits are in memory at one time."""


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
        without, whole_BTE = search.absences(kept)
        if number == 0:
            search.reference_NE = search.final(whole_BTE)
        divergences = [search.divergence(stream_BTE) for stream_BTE in without]
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
        """The stream behind the last layer without each of the ``kept`` ones, and with all."""
        whole_BTE = self.start_BTE.clone()
        without: list[Tensor] = []
        for layer in kept:
            weights = read_layer(self.source, layer, self.device)
            skipped_BTE = whole_BTE.clone()
            for stream_BTE in [*without, whole_BTE]:
                self.maths.advance(stream_BTE, weights)
            without.append(skipped_BTE)
        return without, whole_BTE

    def final(self, stream_BTE: Tensor) -> Tensor:
        """What the output head reads of it, [N, E]."""
        final_BTE = normed(stream_BTE.to(self.device), self.maths.eps) * self.norm_E
        return final_BTE.flatten(0, 1).to(self.head_VE.dtype)

    def divergence(self, stream_BTE: Tensor) -> float:
        """KL(teacher || without), mean over the positions, in nats."""
        total, hidden_NE = 0.0, self.final(stream_BTE)
        for ours, theirs in zip(
            torch.split(hidden_NE, CHUNK), torch.split(self.reference_NE, CHUNK), strict=True
        ):
            student_NV, teacher_NV = (part @ self.head_VE.T for part in (ours, theirs))
            total += float(forward_kl(student_NV.float(), teacher_NV.float()).sum())
        return total / len(hidden_NE)
