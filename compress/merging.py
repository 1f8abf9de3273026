"""One matrix for both ends of the student, out of the teacher's embedding and its output head.

A tied student embeds tokens and scores them with the same matrix. Both of the teacher's are read
a part of the vocabulary at a time: of an 8B each would take 2 GB in float32.

Legend: V vocabulary, R rows of a part of it, D student hidden, E teacher hidden, X = 2E.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.coupling import narrowed
from compress.reconstruct import add_gram

MERGED_FLOOR = 0.5
"""Least singular value of the kept dims in the joint subspace, as a share of the mean."""

_ROWS = 16384


@dataclass(frozen=True)
class BothEnds:
    """The teacher's embedding, [V, E], and its head, [V, E], with the final norm's weights, [E]."""

    embedding_VE: Tensor
    head_VE: Tensor
    norm_E: Tensor
    vocabulary: int
    """How many tokens there are; rows from there on are padding."""

    def parts(self, rows: int | None = None) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Some rows at a time: which, the embedding's, and the head's behind the norm; float32.

        All rows, or the first ``rows``.
        """
        count = len(self.embedding_VE) if rows is None else rows
        for first in range(0, count, _ROWS):
            rows_R = slice(first, min(first + _ROWS, count))
            head_RE = self.head_VE[rows_R].to(self.norm_E) * self.norm_E
            yield rows_R, self.embedding_VE[rows_R].to(self.norm_E), head_RE


def split_ends(both: BothEnds, stream: Tensor) -> tuple[Tensor, Tensor]:
    """Half of the kept dims for the input, half for the output: matrix [V, D] and final norm [D].

    Each half takes the dims that matter more at its end. Output dims hold the head's columns,
    shrunk to the embedding's size, and the norm stretches them again; it silences input dims.
    """
    size_in_D, size_out_D = torch.zeros(2, len(stream), dtype=torch.float64).to(both.norm_E.device)
    for _, embedding_RE, head_RE in both.parts(both.vocabulary):
        size_in_D += narrowed(embedding_RE, stream).square().sum(0)
        size_out_D += narrowed(head_RE, stream).square().sum(0)
    favour_D = size_out_D / size_in_D.clamp_min(1e-24)
    output_D = torch.zeros(len(stream), dtype=torch.bool).to(favour_D.device)
    output_D[favour_D.argsort(descending=True)[: len(stream) // 2]] = True
    shrink = float((size_in_D.sum() / size_out_D.sum()).sqrt())
    merged_VD = torch.empty(len(both.head_VE), len(stream)).to(both.norm_E)
    for rows, embedding_RE, head_RE in both.parts():
        kept_in, kept_out = narrowed(embedding_RE, stream), narrowed(head_RE, stream)
        merged_VD[rows] = torch.where(output_D, kept_out * shrink, kept_in)
    return merged_VD, output_D.float() / shrink


def joint_ends(both: BothEnds, stream: Tensor) -> tuple[Tensor, Tensor]:
    """Least squares over both ends: matrix [V, D] and a constant final norm [D].

    The D directions of vocabulary space in which both matrices, each at size one, lie best (their
    leading left singular vectors) hold both ends; in them the matrix is the one nearest to the
    kept dims of the embedding, so that the stream keeps the teacher's basis. Its small singular
    values are raised: the head needs those directions too.
    """
    teacher, count = len(both.norm_E), len(stream)
    gram_XX = torch.zeros(2 * teacher, 2 * teacher).to(both.norm_E)
    for _, embedding_RE, head_RE in both.parts(both.vocabulary):
        add_gram(gram_XX, torch.cat([embedding_RE, head_RE], 1), torch.float32)
    energy_X = gram_XX.diagonal()
    size_in, size_out = energy_X[:teacher].sum().sqrt(), energy_X[teacher:].sum().sqrt()
    scale_X = torch.cat([1 / size_in.expand(teacher), 1 / size_out.expand(teacher)])
    gram_XX *= scale_X[:, None] * scale_X
    # In float32, as the sums are: of an 8B teacher float64 takes minutes and moves nothing.
    values, vectors_XX = torch.linalg.eigh(gram_XX)
    leading_XD = vectors_XX[:, -count:] / values[-count:].clamp_min(1e-12).sqrt()
    del vectors_XX
    # Where the directions meet the kept dims of the embedding; both are in the Gram matrix.
    meeting_DD = leading_XD.T @ narrowed(gram_XX[:, :teacher], stream) * size_in
    left, sizes_D, right = torch.linalg.svd(meeting_DD)
    raised_D = sizes_D.clamp_min(float(MERGED_FLOOR * sizes_D.mean()))
    map_XD = scale_X[:, None] * leading_XD @ ((left * raised_D) @ right)
    merged_VD = torch.empty(len(both.head_VE), count).to(both.norm_E)
    for rows, embedding_RE, head_RE in both.parts():
        merged_VD[rows] = torch.cat([embedding_RE, head_RE], 1) @ map_XD
    size = merged_VD[: both.vocabulary].norm()
    return merged_VD, torch.full((count,), float(size_out / size)).to(both.norm_E)


Merge = Callable[[BothEnds, Tensor], tuple[Tensor, Tensor]]
MERGES: dict[str, Merge] = {"split": split_ends, "least_squares": joint_ends}
