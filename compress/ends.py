"""The student's two ends: its embedding, its output head, and what its last layer aims at.

What the output head makes of a hidden state is what counts there, so distances between hidden
states are measured by the divergence they cause. To second order

    KL(p_a || p_{a+d})  ≈  ½ dᵀ F d,      F = Hᵀ (diag(p) - p pᵀ) H

with the teacher's probabilities p at that position; F is averaged over calibration positions.
Source: Amari, "Natural Gradient Works Efficiently in Learning", 1998 (the Fisher metric).

Legend: N positions, V vocabulary, D student hidden, E teacher hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from compress.coupling import narrowed
from compress.merging import MERGES, BothEnds
from compress.slicing import Slicer
from teachers.checkpoint import Checkpoint
from teachers.layout import EMBEDDING, FINAL_NORM, HEAD

MAP_RIDGE = 0.001
"""Keeps small what a dropped dim adds where the metric hardly sees it."""
BASIS_RIDGE = 0.1
"""Keeps the last hidden state near the basis: one layer can turn the stream by a little only."""
MERGED_LAYERS = 4
"""A merged head speaks another language than the stream: every fourth of the layers, the last
ones, turn the stream toward it step by step."""

_CHUNK = 512
_ROWS = 16384


@dataclass(frozen=True, kw_only=True)
class Ends:
    """Embedding and head of the student, and how its last hidden states become the teacher's.

    ``map_DE`` is what the stream behind the last layer should be of the teacher's, ``stream_DE``
    what it is before. With a sliced head the ramp is one layer long, and the map near the stream;
    a merged head takes more of the last layers, and turns the stream away.
    """

    embedding_VD: Tensor
    head_VD: Tensor
    norm_E: Tensor
    norm_D: Tensor
    metric_DD: Tensor
    metric_DE: Tensor
    map_DE: Tensor
    stream_DE: Tensor
    ramp: int
    merged: bool

    def turned(self, layers: int) -> list[int]:
        """Numbers of the student's layers whose stream speaks the merged head's language."""
        return list(range(layers - self.ramp, layers)) if self.merged else []

    def target_map(self, number: int, layers: int) -> Tensor | None:
        """What layer ``number`` of ``layers`` aims at, [D, E]; None is the stream as it was."""
        share = (number + 1 - (layers - self.ramp)) / self.ramp
        if share <= 0:
            return None
        return self.stream_DE.lerp(self.map_DE, share)


def student_ends(
    source: Checkpoint,
    slicer: Slicer,
    final_NE: Tensor,
    way: Literal["split", "least_squares"],
    dtype: torch.dtype,
    vocabulary: int,
    written: tuple[Tensor, Tensor] | None = None,
) -> Ends:
    """The ends of the student that ``slicer`` cuts; ``final_NE`` are final hidden states of the
    teacher as its head reads them. ``way`` is how two matrices become one, where they have to.
    Rows from ``vocabulary`` on are padding: cut as the others are, with no say in how.

    ``written`` are embedding and final norm of a walk that goes on: with another number of threads
    two matrices would not become quite the same one, with the same norm behind it.
    """
    device, plan = final_NE.device, slicer.plan
    norm_E = source.tensor(FINAL_NORM, torch.float32).to(device)
    head_VE = source.tensor(HEAD).to(device)
    ramp = 1
    merged = slicer.student.merges_ends_of(slicer.teacher)
    if merged:
        both = BothEnds(source.tensor(EMBEDDING), head_VE, norm_E, vocabulary)
        embedding_VD, norm_D = written or MERGES[way](both, plan.stream)
        head_VD = embedding_VD
        ramp = max(1, slicer.student.num_hidden_layers // MERGED_LAYERS)
    else:
        embedding_VD = slicer.outside_layers(EMBEDDING, source.tensor(EMBEDDING))
        head_VD, norm_D = _narrowed_head(slicer, embedding_VD, head_VE, norm_E)
    # As they will be stored: in float32 an 8B's would be the largest thing in memory.
    tied, stored = head_VD is embedding_VD, source.torch_dtype
    embedding_VD = embedding_VD.to("cpu", stored)
    head_VD = embedding_VD if tied else head_VD.to("cpu", stored)
    heads = head_VE[:vocabulary], head_VD[:vocabulary].to(device)
    metric_DD, metric_DE = fisher_metric(final_NE, *heads, dtype)
    stream_DE = narrowed(torch.eye(len(norm_E)), plan.stream, 0).to(device)
    near_DE = None if merged or plan.basis_DE is None else stream_DE
    map_DE = final_map(metric_DD, metric_DE, norm_D, norm_E, near_DE)
    if not merged and plan.basis_DE is None:
        map_DE = keeping(map_DE, plan.hidden)
    return Ends(
        embedding_VD=embedding_VD,
        head_VD=head_VD,
        norm_E=norm_E,
        norm_D=norm_D,
        metric_DD=metric_DD,
        metric_DE=metric_DE,
        map_DE=map_DE,
        stream_DE=stream_DE,
        ramp=ramp,
        merged=merged,
    )


def fisher_metric(
    normed_NE: Tensor, head_VE: Tensor, student_VD: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The metric between columns of the student's head, [D, D], and the teacher's, [D, E].

    The mean over the rows of ``normed_NE`` of Kᵀ (diag(p) - p pᵀ) H with the teacher's head H,
    its probabilities p, and for K the student's head; float32, products in ``dtype``.

    A row that all tokens share moves no probability, but it would drown the rest in products of a
    narrow dtype (SmolLM2's mean row is two thirds of the others' size), so it is left out.
    """
    parts = [slice(first, first + _ROWS) for first in range(0, len(head_VE), _ROWS)]
    mean_D, mean_E = (head.mean(0, dtype=torch.float32) for head in (student_VD, head_VE))

    # Both heads in another dtype a part at a time: of an 8B they would be 4 GB in float32.
    def ours(rows: slice) -> Tensor:
        return student_VD[rows].float() - mean_D

    def theirs(rows: slice) -> Tensor:
        return head_VE[rows].float() - mean_E

    mean_V = torch.zeros(len(head_VE), device=head_VE.device)
    students, teachers = student_VD.shape[1], head_VE.shape[1]
    outer_DX = torch.zeros(students, students + teachers, device=head_VE.device)
    for part_NE in torch.split(normed_NE, _CHUNK):
        narrow_NE = part_NE.to(dtype)
        logits = [(narrow_NE @ theirs(rows).to(dtype).T).float() for rows in parts]
        probability_NV = torch.softmax(torch.cat(logits, 1), dim=-1)
        mean_V += probability_NV.sum(0)
        expected_NX = torch.zeros(len(part_NE), students + teachers, device=head_VE.device)
        for rows in parts:
            narrow_NV = probability_NV[:, rows].to(dtype)
            expected_NX[:, :students] += (narrow_NV @ ours(rows).to(dtype)).float()
            expected_NX[:, students:] += (narrow_NV @ theirs(rows).to(dtype)).float()
        outer_DX += expected_NX[:, :students].T @ expected_NX
    metric_DX = -outer_DX
    for rows in parts:
        both_RX = torch.cat([ours(rows), theirs(rows)], 1)
        metric_DX += (both_RX[:, :students] * mean_V[rows, None]).T @ both_RX
    metric_DD, metric_DE = torch.split(metric_DX / len(normed_NE), [students, teachers], dim=1)
    return metric_DD, metric_DE


def final_map(
    metric_DD: Tensor,
    metric_DE: Tensor,
    norm_D: Tensor,
    norm_E: Tensor,
    near_DE: Tensor | None = None,
) -> Tensor:
    """What the student's last hidden state should be of the teacher's, [D, E].

    The map T with K diag(norm_D) T x nearest to H diag(norm_E) x for every x, in the metric; K is
    the student's head, H the teacher's. A ridge holds it near ``near_DE``, or near zero.
    """
    scaled_DD = (norm_D[:, None] * metric_DD * norm_D).double()
    rows_DE = (norm_D[:, None] * metric_DE * norm_E).double()
    ridge = MAP_RIDGE if near_DE is None else BASIS_RIDGE
    damping = ridge * scaled_DD.diagonal().mean() * torch.eye(len(scaled_DD)).to(scaled_DD)
    start_DE = torch.zeros_like(rows_DE) if near_DE is None else near_DE.to(rows_DE)
    change_DE = torch.linalg.solve(scaled_DD + damping, rows_DE - scaled_DD @ start_DE)
    map_DE: Tensor = start_DE + change_DE
    return map_DE.float()


def keeping(map_DE: Tensor, hidden_D: Tensor) -> Tensor:
    """The map with the kept dims as they are: only what dropped dims said is said anew."""
    kept_DE = map_DE.clone()
    kept_DE[:, hidden_D] = torch.eye(len(hidden_D)).to(map_DE)
    return kept_DE


def _narrowed_head(
    slicer: Slicer, embedding_VD: Tensor, head_VE: Tensor, norm_E: Tensor
) -> tuple[Tensor, Tensor]:
    """The output head, [V, D], and the final norm, [D], in the student's hidden dims.

    A tied head is the embedding as it is, so the norm gets the mean of the weights along each
    direction; a head of its own takes in what a norm can't hold, as a layer's maps do.
    """
    tied, basis_DE = slicer.student.tie_word_embeddings, slicer.plan.basis_DE
    if basis_DE is None:
        norm_D = slicer.norm(norm_E)
        return embedding_VD if tied else slicer.outside_layers(HEAD, head_VE), norm_D
    if tied:
        return embedding_VD, basis_DE.square().to(norm_E) @ norm_E
    norm_D = slicer.norm(norm_E)
    # The norms go into the small matrix: a large vocabulary's head in float32 would be gigabytes.
    through_DE = basis_DE.to(norm_E) * norm_E / norm_D[:, None]
    return narrowed(head_VE, through_DE), norm_D
