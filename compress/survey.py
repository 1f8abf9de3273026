"""The survey: the teacher alone passes over some windows, and its activations are scored.

Legend: B windows, T positions, E teacher hidden, H query heads, K key/value heads, C head dim,
Q query rows, F neurons, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from compress.importance import (
    channel_energy,
    cosine_distance,
    head_importance,
    neuron_importance,
)
from compress.layer import ATTENTION, MLP, LayerMath, LayerWeights, batches, normed, read_layer
from shearling import Progress, silent
from students.shape import Shape
from teachers.checkpoint import Checkpoint

SURVEY_TOKENS = 16384
"""Importances are means over positions and settle early; refits want all calibration windows."""


@dataclass
class Survey:
    """What the teacher's activations say about each part; see ``compress.importance``.

    ``value_gram_LKCC`` holds, for each key/value head, the second moments of what its query heads
    hand to o_proj.
    """

    hidden_E: Tensor
    heads_LH: list[Tensor] = field(default_factory=list)
    neurons_LF: list[Tensor] = field(default_factory=list)
    distances: list[float] = field(default_factory=list)
    value_gram_LKCC: list[Tensor] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        def rounded(scores: Tensor) -> list[float]:
            return [float(f"{score:.4g}") for score in scores.tolist()]

        return {
            "hidden": rounded(self.hidden_E),
            "layers": [float(f"{distance:.4g}") for distance in self.distances],
            "heads": [rounded(scores) for scores in self.heads_LH],
        }


def take_survey(
    source: Checkpoint,
    windows_BT: Tensor,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress = silent,
) -> Survey:
    """Pass the teacher over the first windows and add up every part's importance."""
    windows_BT = windows_BT[: max(1, SURVEY_TOKENS // windows_BT.shape[1])]
    shape = source.shape
    maths = LayerMath(source.config, windows_BT.shape[1], device, dtype)
    stream_BTE = source.tensor("model.embed_tokens.weight", torch.float32)[windows_BT]
    survey = Survey(torch.zeros(shape.hidden_size, dtype=torch.float64, device=device))
    for number in range(shape.num_hidden_layers):
        progress("survey", number, shape.num_hidden_layers)
        _survey_layer(survey, maths, shape, stream_BTE, read_layer(source, number, device))
    final_norm_E = source.tensor("model.norm.weight", torch.float32).to(device)
    for rows in batches(stream_BTE):
        last_BTE = normed(stream_BTE[rows].to(device), maths.eps) * final_norm_E
        survey.hidden_E += channel_energy(last_BTE)
    survey.hidden_E = survey.hidden_E.sqrt().cpu()
    return survey


def _survey_layer(
    survey: Survey, maths: LayerMath, shape: Shape, stream_BTE: Tensor, weights: LayerWeights
) -> None:
    """One layer over all windows; advances the stream in place and appends to ``survey``."""
    device = survey.hidden_E.device
    query_Q = torch.zeros(shape.query_size, dtype=torch.float64, device=device)
    neurons_F = torch.zeros(shape.intermediate_size, dtype=torch.float64, device=device)
    split = (shape.num_key_value_heads, shape.group_size, shape.head_dim)
    gram_KCC = torch.zeros(split[0], split[2], split[2], device=device)
    distance = torch.zeros((), dtype=torch.float64, device=device)
    for rows in batches(stream_BTE):
        before = stream_BTE[rows].to(device)
        input_BTE, parts = maths.read(ATTENTION, before, weights)
        mixed = maths.mix(ATTENTION, parts)
        middle = before + maths.linear(mixed, weights, ATTENTION.output)
        post_BTE, parts = maths.read(MLP, middle, weights)
        active = maths.mix(MLP, parts)
        after = middle + maths.linear(active, weights, MLP.output)
        survey.hidden_E += channel_energy(input_BTE) + channel_energy(post_BTE)
        query_Q += channel_energy(mixed)
        neurons_F += channel_energy(active)
        by_group = mixed.view(-1, *split)
        gram_KCC += torch.einsum("nkgc,nkgd->kcd", by_group, by_group)
        distance += cosine_distance(before, after)
        stream_BTE[rows] = after.to(stream_BTE.device)
    survey.distances.append(float(distance) / stream_BTE[..., 0].numel())
    output, down = weights[f"{ATTENTION.output}.weight"], weights[f"{MLP.output}.weight"]
    survey.heads_LH.append(head_importance(query_Q.sqrt(), output, shape.head_dim).cpu())
    survey.neurons_LF.append(neuron_importance(neurons_F.sqrt(), down).cpu())
    survey.value_gram_LKCC.append(gram_KCC.cpu())
