"""How much each part of a model matters: pure functions from activations to scores.

Legend: B windows, T positions, D channels, L layers, E hidden, H query heads, F neurons.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from students.shape import Shape


@dataclass(frozen=True, kw_only=True)
class PartScores:
    """One layer's importances: its share of each hidden dim's, squared where activations or
    weights are measured, so that layers add up; of each query head; of each FFN neuron."""

    hidden_E: Tensor
    heads_H: Tensor
    neurons_F: Tensor


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


def magnitude_scores(weights: Mapping[str, Tensor], shape: Shape) -> PartScores:
    """The L2 norm of all weights of a part: the baseline that looks at no text.

    A key/value head's weights count for each of its query heads. Hidden dims are squared norms.
    Source: Li et al., "Pruning Filters for Efficient ConvNets", 2017 (arXiv:1608.08710), with the
    groups of Fang et al., "DepGraph", 2023 (arXiv:2301.12900).
    """
    squared = {name: weight.double().square() for name, weight in weights.items()}

    def of(name: str, dim: int) -> Tensor:
        return squared[f"{name}.weight"].sum(dim)

    query_Q, output_Q = of("self_attn.q_proj", 1), of("self_attn.o_proj", 0)
    shared_K = of("self_attn.k_proj", 1) + of("self_attn.v_proj", 1)
    shared_H = shared_K.view(-1, shape.head_dim).sum(1).repeat_interleave(shape.group_size)
    hidden_E = sum(of(name, 0) for name in _READERS) + of("self_attn.o_proj", 1)
    return PartScores(
        hidden_E=hidden_E + of("mlp.down_proj", 1),
        heads_H=((query_Q + output_Q).view(-1, shape.head_dim).sum(1) + shared_H).sqrt(),
        neurons_F=(of("mlp.gate_proj", 1) + of("mlp.up_proj", 1) + of("mlp.down_proj", 0)).sqrt(),
    )


_READERS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
)
