"""The student's end: what its last layer aims at, and its final norm.

What the output head makes of a hidden state is what counts there, so distances between hidden
states are measured by the divergence they cause. To second order

    KL(p_a || p_{a+d})  ≈  ½ dᵀ F d,      F = Hᵀ (diag(p) - p pᵀ) H

with the teacher's probabilities p at that position; F is averaged over calibration positions.
Source: Amari, "Natural Gradient Works Efficiently in Learning", 1998 (the Fisher metric).

Legend: N positions, V vocabulary, D student hidden, E teacher hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

METRIC_POSITIONS = 4096
"""A mean over so many positions is enough: F has E² numbers, each of them a mean."""
_CHUNK = 512


def fisher_metric(normed_NE: Tensor, head_VE: Tensor, dtype: torch.dtype) -> Tensor:
    """F of the module's formula, averaged over the rows of ``normed_NE``: [E, E], float32.

    ``normed_NE`` holds final hidden states as the head reads them; products run in ``dtype``.
    """
    mean_V = torch.zeros(len(head_VE), device=head_VE.device)
    outer_EE = torch.zeros(head_VE.shape[1], head_VE.shape[1], device=head_VE.device)
    narrow_VE = head_VE.to(dtype)
    for part_NE in torch.split(normed_NE, _CHUNK):
        probability_NV = torch.softmax((part_NE.to(dtype) @ narrow_VE.T).float(), dim=-1)
        mean_V += probability_NV.sum(0)
        expected_NE = (probability_NV.to(dtype) @ narrow_VE).float()
        outer_EE += expected_NE.T @ expected_NE
    return ((head_VE * mean_V[:, None]).T @ head_VE - outer_EE) / len(normed_NE)


def final_map(metric_EE: Tensor, norm_E: Tensor, hidden_D: Tensor, ridge: float) -> Tensor:
    """What the student's last hidden state should be of the teacher's, [D, E].

    The student's head has no columns for the dropped dims, but the kept ones can say part of what
    those said: the map T with T x on the kept dims is the nearest, in the metric, to all of x.
    On the kept dims T is the identity. ``norm_E`` are the teacher's final norm weights, which
    scale both ends; ``hidden_D`` are the kept dims; ``ridge`` times the mean of the kept
    diagonal keeps what dropped dims add small where the metric says little.
    """
    scaled_EE = (norm_E[:, None] * metric_EE * norm_E).double()
    rows_DE = scaled_EE[hidden_D]
    kept_DD = rows_DE[:, hidden_D]
    damping = ridge * kept_DD.diagonal().mean() * torch.eye(len(hidden_D)).to(kept_DD)
    map_DE: Tensor = torch.linalg.solve(kept_DD + damping, rows_DE)
    map_DE[:, hidden_D] = torch.eye(len(hidden_D)).to(map_DE)
    return map_DE.float()
