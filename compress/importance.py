"""How much each part of a model matters: pure functions from activations to scores.

Legend: B windows, T positions, D channels, L layers.
"""

from __future__ import annotations

import torch
from torch import Tensor


def channel_energy(activations_BTD: Tensor) -> Tensor:
    """Per-channel importance of one batch, squared so that batches add up: [D], float64.

    The mean absolute activation over the sequence, then the L2 norm over the batch; the square
    root of the sum of all batches' energies is the importance.

    Source: Muralidharan et al., "Compact Language Models via Pruning and Knowledge Distillation"
    (Minitron), 2024 (arXiv:2407.14679), section 2.2.
    """
    return activations_BTD.abs().mean(1).double().square().sum(0)


def relative_energy(stream_BTE: Tensor) -> Tensor:
    """Energy of each hidden dim in the stream divided by the stream's size, [E], float64.

    A sum over windows and positions but the first, whose huge values all windows share. That is
    what a norm hands on before its weights, so a dim counts as much as the layers can see of it.
    """
    size_BT = stream_BTE.square().mean(-1, keepdim=True).clamp_min(1e-12)
    return (stream_BTE.square() / size_BT)[:, 1:].double().sum((0, 1))


def cosine_distance(before_BTD: Tensor, after_BTD: Tensor) -> Tensor:
    """1 - cos(before, after), summed over all positions: how much a layer turns the stream.

    A scalar, float64. Source: Men et al., "ShortGPT", 2024 (arXiv:2403.03853), block influence.
    """
    cosine = torch.nn.functional.cosine_similarity(before_BTD, after_BTD, dim=-1)
    return (1 - cosine).double().sum()


def head_importance(channels_Q: Tensor, output_weight_DQ: Tensor, head_dim: int) -> Tensor:
    """Importance of each query head, [H]: the L2 norm of what its channels put into the stream.

    ``channels_Q`` is the importance of each of ``o_proj``'s inputs, [H * head_dim];
    each is weighed by the norm of its column in ``o_proj``, so a head that speaks loudly into
    small weights does not count as much as one that is heard.
    """
    heard_Q = channels_Q * output_weight_DQ.norm(dim=0).to(channels_Q)
    scores_H: Tensor = heard_Q.view(-1, head_dim).norm(dim=1)
    return scores_H


def neuron_importance(channels_F: Tensor, down_weight_DF: Tensor) -> Tensor:
    """Importance of each FFN neuron, [F]: its activation times the norm of its column.

    The activation is taken at ``down_proj``'s input. Source for the product of activation and
    weight norm: Sun et al., "Wanda", 2023 (arXiv:2306.11695), here for whole columns.
    """
    scores_F: Tensor = channels_F * down_weight_DF.norm(dim=0).to(channels_F)
    return scores_F
