"""Greedy removal of inputs of a linear map, with the rest refitted after each removal.

With the Gram matrix G = Σ x xᵀ of a map's inputs, the least-squares weights that do the work of W
without some of its inputs, and the error that stays, follow from G⁻¹ alone. Removing the group b
of inputs raises the squared error by tr(W_b (G⁻¹_bb)⁻¹ W_bᵀ); the others' weights become
W - W_b (G⁻¹_bb)⁻¹ G⁻¹_b:. This is the Optimal Brain Surgeon for whole columns.

Source: Meng et al., "OSSCAR: One-Shot Structured Pruning in Vision and Language Models with
Combinatorial Optimization", 2024 (arXiv:2403.12983); Hassibi and Stork, 1993.

Legend: I inputs, L those that are left, R removed, O outputs, G groups of inputs, W width of one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

Chosen = TypeVar("Chosen")

DAMPING = 0.01
"""Added to the Gram matrix's diagonal, as a share of its mean: what GPTQ and OSSCAR use."""
ROUNDS = 96
"""Scorings in which all inputs of a map would go."""
DENSE = 7 / 8
"""Share of a matrix's rows that may be left before the rest is moved together."""
_ROWS = 512
"""Rows and columns of a block of the inverse."""


def invert_factor(factor_II: Tensor) -> None:
    """Put (L Lᵀ)⁻¹ where the Cholesky factor L is; what lies above the diagonal means nothing.

    Products of blocks: as fast as ``torch.cholesky_inverse`` on an idle CPU, without another
    matrix, and several times faster where other work runs on the cores (docs/LOG.md).
    """
    blocks = [slice(first, first + _ROWS) for first in range(0, len(factor_II), _ROWS)]
    for number, own in reversed(list(enumerate(blocks))):  # L⁻¹, from its last columns on
        corner = factor_II[own, own]
        one = torch.eye(len(corner)).to(corner)
        corner.copy_(torch.linalg.solve_triangular(corner, one, upper=False))
        below_LR = -factor_II[own.stop :, own] @ corner
        for rows in blocks[number + 1 :]:
            inner = slice(own.stop, rows.stop)
            factor_II[rows, own] = factor_II[rows, inner] @ below_LR[: rows.stop - own.stop]
    for own in blocks:  # L⁻ᵀ L⁻¹; its later rows need none of L⁻¹'s earlier ones
        below = slice(own.start, None)
        factor_II[own, : own.stop] = factor_II[below, own].T @ factor_II[below, : own.stop]


class Removal:
    """A linear map whose inputs go away one group after another.

    ``gram_II`` holds the inputs' second moments, ``weight_OI`` the map. Computed in ``dtype``, with
    two matrices of the Gram matrix's size at most beside it: of an 8B's neurons one has 0.8 GB in
    float32. Of the inverse only the lower triangle is brought up to date, and what has gone is cut
    off from time to time: from 14,336 neurons to 8,192 a third of the work on the whole matrix.

    Raises:
        torch.linalg.LinAlgError: too ill-conditioned for ``dtype``; so does ``remove``.
    """

    def __init__(self, gram_II: Tensor, weight_OI: Tensor, dtype: torch.dtype) -> None:
        damped_II = gram_II.to(dtype, copy=True)
        mean = damped_II.diagonal().mean().clamp_min(torch.finfo(dtype).tiny)
        damped_II.diagonal().add_(DAMPING * mean)
        self.inverse_LL = torch.linalg.cholesky(damped_II)
        del damped_II
        invert_factor(self.inverse_LL)
        self.weight_LO = weight_OI.T.to(dtype, copy=True, memory_format=torch.contiguous_format)
        self.left_I = torch.ones(len(gram_II), dtype=torch.bool, device=gram_II.device)
        self._row_I = torch.arange(len(gram_II), device=gram_II.device)

    def costs(self, groups_GW: Tensor) -> Tensor:
        """How much the squared error rises when each group alone goes, [G]."""
        # One by one: a batch is divided among threads, and inside of them MKL's own can stand still
        # (LU, two threads, minutes; docs/LOG.md).
        return torch.stack([self._cost(self._row_I[group_W]) for group_W in groups_GW])

    def _cost(self, rows_W: Tensor) -> Tensor:
        """tr(Wᵀ B⁻¹ W) for the rows W of the weight and their block B = L Lᵀ of G⁻¹: ‖L⁻¹ W‖²."""
        factor_WW = torch.linalg.cholesky(self._inverse(rows_W[:, None], rows_W))
        halved_WO = torch.linalg.solve_triangular(factor_WW, self.weight_LO[rows_W], upper=False)
        cost: Tensor = halved_WO.square().sum()
        return cost

    def single_costs(self) -> Tensor:
        """How much the squared error rises when each input alone goes, [I]; infinity if it has."""
        norms_L = torch.linalg.vector_norm(self.weight_LO, dim=1)
        costs_L: Tensor = norms_L.square() / self.inverse_LL.diagonal()
        return costs_L[self._row_I].masked_fill(~self.left_I, torch.inf)

    def remove(self, inputs: Tensor) -> None:
        """Take ``inputs`` (their numbers) out and refit the rest."""
        rows_R = self._row_I[inputs]
        size = len(self.inverse_LL)
        gone_RL = self._inverse(rows_R[:, None], torch.arange(size, device=rows_R.device))
        step_RL = torch.cholesky_solve(gone_RL, torch.linalg.cholesky(gone_RL[:, rows_R]))
        self.weight_LO.addmm_(step_RL.T, self.weight_LO[rows_R], alpha=-1)
        for first in range(0, size, _ROWS):
            rows, upto = slice(first, first + _ROWS), slice(0, first + _ROWS)
            self.inverse_LL[rows, upto].addmm_(gone_RL[:, rows].T, step_RL[:, upto], alpha=-1)
        self.left_I[inputs] = False
        if int(self.left_I.sum()) < DENSE * size:
            self._cut_off()

    def _inverse(self, row: Tensor, column: Tensor) -> Tensor:
        """Elements of G⁻¹ of what is left, which is symmetric, by its lower triangle."""
        lower: Tensor = self.inverse_LL[torch.maximum(row, column), torch.minimum(row, column)]
        return lower

    def _cut_off(self) -> None:
        """Move the rows and columns of what is left together, in their order."""
        rows_L = self._row_I[self.left_I]
        size = len(rows_L)
        for first in range(0, size, _ROWS):  # in place: none is read after it is written
            rows, upto = rows_L[first : first + _ROWS], rows_L[: first + _ROWS]
            moved = self.inverse_LL[rows][:, upto]
            self.inverse_LL[first : first + len(rows), : len(upto)] = moved
        self.inverse_LL = self.inverse_LL[:size, :size]
        self.weight_LO = self.weight_LO[rows_L]
        self._row_I = (self.left_I.cumsum(0) - 1).clamp_min(0)


def exactly_enough(choose: Callable[[torch.dtype], Chosen]) -> Chosen:
    """What ``choose`` finds in float32, or in float64 where that is too coarse to factorise.

    With this damping float32 makes the same choice (docs/LOG.md) in half of the memory and time;
    accelerators for the desk have a thirtieth of their speed in float64.
    """
    try:
        return choose(torch.float32)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return choose(torch.float64)


def keep_inputs(
    gram_II: Tensor, weight_OI: Tensor, count: int, at_once: int | None = None
) -> Tensor:
    """Numbers of the ``count`` inputs that stay, ascending; ``at_once`` go between two scorings,
    by default one of ROUNDS parts of all."""
    group = at_once or -(-len(gram_II) // ROUNDS)

    def choose(dtype: torch.dtype) -> Tensor:
        removal = Removal(gram_II, weight_OI, dtype)
        while (surplus := int(removal.left_I.sum()) - count) > 0:
            cheapest = removal.single_costs().argsort(stable=True)
            removal.remove(cheapest[: min(group, surplus)])
        return removal.left_I.nonzero().flatten().cpu()

    return exactly_enough(choose)


def keep_heads(
    gram_QQ: Tensor, weight_OQ: Tensor, head_dim: int, groups: int, groups_kept: int, kept: int
) -> tuple[Tensor, Tensor]:
    """Numbers of the query heads and of the key/value heads that stay, ascending.

    Of ``groups`` key/value heads ``groups_kept`` stay: whole groups go first, each with its query
    heads; then query heads go wherever a group has more than its share of the ``kept``.
    ``gram_QQ`` are the second moments of ``o_proj``'s inputs, ``weight_OQ`` is its weight.
    """
    rows_HC = torch.arange(len(gram_QQ), device=gram_QQ.device).view(-1, head_dim)
    size, share = len(rows_HC) // groups, kept // groups_kept

    def choose(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        removal = Removal(gram_QQ, weight_OQ, dtype)
        members = {group: list(range(group * size, (group + 1) * size)) for group in range(groups)}
        while len(members) > groups_kept:
            rows_GW = torch.stack([rows_HC[heads].flatten() for heads in members.values()])
            gone = list(members)[int(removal.costs(rows_GW).argmin())]
            removal.remove(rows_HC[members.pop(gone)].flatten())
        while rest := [head for heads in members.values() if len(heads) > share for head in heads]:
            gone = rest[int(removal.costs(rows_HC[rest]).argmin())]
            removal.remove(rows_HC[gone])
            members[gone // size].remove(gone)
        heads_kept = [head for heads in members.values() for head in heads]
        return torch.tensor(heads_kept), torch.tensor(list(members))

    return exactly_enough(choose)
