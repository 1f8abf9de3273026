"""Greedy removal of inputs of a linear map, with the rest refitted after each removal.

With the Gram matrix G = Σ x xᵀ of a map's inputs, the least-squares weights that do the work of W
without some of its inputs, and the error that stays, follow from G⁻¹ alone. Removing the group b
of inputs raises the squared error by tr(W_b (G⁻¹_bb)⁻¹ W_bᵀ); the others' weights become
W - W_b (G⁻¹_bb)⁻¹ G⁻¹_b:. This is the Optimal Brain Surgeon for whole columns.

Source: Meng et al., "OSSCAR: One-Shot Structured Pruning in Vision and Language Models with
Combinatorial Optimization", 2024 (arXiv:2403.12983); Hassibi and Stork, 1993.

Legend: I inputs, O outputs, G groups of inputs, W width of a group.
"""

from __future__ import annotations

import torch
from torch import Tensor

DAMPING = 0.01
"""Added to the Gram matrix's diagonal, as a share of its mean: what GPTQ and OSSCAR use."""
ROUNDS = 96
"""Scorings in which all inputs of a map would go."""


class Removal:
    """A linear map whose inputs go away one group after another.

    ``gram_II`` holds the inputs' second moments, ``weight_OI`` the map. Computed in float64, with
    two matrices of the Gram matrix's size at most beside it: of an 8B's neurons one has 1.6 GB.
    """

    def __init__(self, gram_II: Tensor, weight_OI: Tensor) -> None:
        damped_II = gram_II.to(torch.float64, copy=True)
        mean = damped_II.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
        damped_II.diagonal().add_(DAMPING * mean)
        factor_II = torch.linalg.cholesky(damped_II)
        del damped_II
        self.inverse_II = torch.cholesky_inverse(factor_II)
        self.weight_OI = weight_OI.to(torch.float64, copy=True)
        self.left_I = torch.ones(len(gram_II), dtype=torch.bool, device=gram_II.device)

    def costs(self, groups_GW: Tensor) -> Tensor:
        """How much the squared error rises when each group alone goes, [G]."""
        blocks_GWW = self.inverse_II[groups_GW[:, :, None], groups_GW[:, None, :]]
        columns_GWO = self.weight_OI.T[groups_GW]
        costs_G: Tensor = (columns_GWO * torch.linalg.solve(blocks_GWW, columns_GWO)).sum((1, 2))
        return costs_G

    def single_costs(self) -> Tensor:
        """How much the squared error rises when each input alone goes, [I]; infinity if it has."""
        norms_I = torch.linalg.vector_norm(self.weight_OI, dim=0)
        costs_I: Tensor = norms_I.square() / self.inverse_II.diagonal()
        return costs_I.masked_fill(~self.left_I, torch.inf)

    def remove(self, inputs: Tensor) -> None:
        """Take ``inputs`` (their numbers) out and refit the rest."""
        block = self.inverse_II[inputs][:, inputs]
        step = torch.linalg.solve(block, self.inverse_II[inputs])
        self.weight_OI.addmm_(self.weight_OI[:, inputs], step, alpha=-1)
        self.inverse_II.addmm_(self.inverse_II[:, inputs], step, alpha=-1)
        self.left_I[inputs] = False


def keep_inputs(
    gram_II: Tensor, weight_OI: Tensor, count: int, at_once: int | None = None
) -> Tensor:
    """Numbers of the ``count`` inputs that stay, ascending; ``at_once`` go between two scorings,
    by default one of ROUNDS parts of all."""
    removal = Removal(gram_II, weight_OI)
    at_once = at_once or -(-len(gram_II) // ROUNDS)
    while (surplus := int(removal.left_I.sum()) - count) > 0:
        cheapest = removal.single_costs().argsort(stable=True)
        removal.remove(cheapest[: min(at_once, surplus)])
    return removal.left_I.nonzero().flatten().cpu()


def keep_heads(
    gram_QQ: Tensor, weight_OQ: Tensor, head_dim: int, groups: int, groups_kept: int, kept: int
) -> tuple[Tensor, Tensor]:
    """Numbers of the query heads and of the key/value heads that stay, ascending.

    Of ``groups`` key/value heads ``groups_kept`` stay: whole groups go first, each with its query
    heads; then query heads go wherever a group has more than its share of the ``kept``.
    ``gram_QQ`` are the second moments of ``o_proj``'s inputs, ``weight_OQ`` is its weight.
    """
    removal = Removal(gram_QQ, weight_OQ)
    rows_HC = torch.arange(len(gram_QQ), device=gram_QQ.device).view(-1, head_dim)
    size = len(rows_HC) // groups
    members = {group: list(range(group * size, (group + 1) * size)) for group in range(groups)}
    while len(members) > groups_kept:
        rows_GW = torch.stack([rows_HC[heads].flatten() for heads in members.values()])
        gone = list(members)[int(removal.costs(rows_GW).argmin())]
        removal.remove(rows_HC[members.pop(gone)].flatten())
    share = kept // groups_kept
    while surplus := [head for heads in members.values() if len(heads) > share for head in heads]:
        gone = surplus[int(removal.costs(rows_HC[surplus]).argmin())]
        removal.remove(rows_HC[gone])
        members[gone // size].remove(gone)
    heads_kept = [head for heads in members.values() for head in heads]
    return torch.tensor(heads_kept), torch.tensor(list(members))
