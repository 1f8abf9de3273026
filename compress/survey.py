"""The survey: the teacher alone passes over some windows, and what stays of each layer is chosen.

Legend: B windows, T positions, E teacher hidden, H query heads, K key/value heads, C head dim,
Q query rows, F neurons, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from compress.basis import add_stream_gram, principal_basis
from compress.checkpointing import TrainingState
from compress.depth import layers_by_divergence
from compress.greedy import keep_heads, keep_inputs
from compress.importance import (
    PartScores,
    channel_energy,
    cosine_distance,
    head_importance,
    magnitude_scores,
    neuron_importance,
    relative_energy,
)
from compress.layer import (
    ATTENTION,
    MLP,
    LayerMath,
    LayerWeights,
    batches,
    normed,
    openings,
    read_layer,
)
from compress.reconstruct import add_gram
from compress.selection import LayerSelection, Plan, choose_heads, choose_layers, top
from compress.settings import PruneSettings
from compress.streams import Streams
from compress.taylor import taylor_scores
from shearling import Progress, silent
from students.shape import Shape
from teachers.checkpoint import Checkpoint
from teachers.layout import EMBEDDING, FINAL_NORM

SURVEY_TOKENS, GREEDY_TOKENS = 16384, 32768
"""Importances are means over positions and settle early; the second moments from which parts are
removed greedily want more, and refits all calibration windows."""
FINAL_POSITIONS = 4096
"""Final hidden states that are kept: the output head's metric has E² numbers, each a mean."""


HEAD_SHARE = 0.25
"""The output head's part in choosing the stream's subspace; the layers' norms share the rest. It
reads the stream once, but what it can't see no later layer mends."""


@dataclass
class Survey:
    """What the teacher's activations say about each part; see ``compress.importance``.

    ``layers`` are the numbers of those that stay; ``chosen`` is what each of the teacher's layers
    keeps, if it is kept itself.
    ``value_gram_LKCC`` holds, for each key/value head, the second moments of what its query heads
    hand to o_proj. ``neuron_shares`` says how much of all neurons' importance a layer's kept ones
    have. ``gram_EE`` are the stream's second moments, empty where dims are picked.
    ``final_NE`` are some of the final hidden states as the output head reads them.
    """

    hidden_E: Tensor
    gram_EE: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    final_NE: Tensor = field(default_factory=lambda: torch.empty(0))
    layers: list[int] = field(default_factory=list)
    distances: list[float] = field(default_factory=list)
    heads_LH: list[Tensor] = field(default_factory=list)
    neuron_shares: list[float] = field(default_factory=list)
    chosen: list[LayerSelection] = field(default_factory=list)
    value_gram_LKCC: list[Tensor] = field(default_factory=list)

    def plan(self, shape: Shape) -> Plan:
        """The selection that has exactly the student's shape, as the survey was made for it."""
        hidden = top(self.hidden_E, shape.hidden_size)
        chosen = [self.chosen[layer] for layer in self.layers]
        grams = [
            self.value_gram_LKCC[layer][kept.key_value_heads]
            for layer, kept in zip(self.layers, chosen, strict=True)
        ]
        return Plan(
            layers=self.layers,
            hidden=hidden,
            basis_DE=principal_basis(self.gram_EE, hidden) if len(self.gram_EE) else None,
            chosen=chosen,
            value_basis_KCc=[_value_basis(gram_KCC, shape.head_dim) for gram_KCC in grams],
        )

    def to_json(self) -> dict[str, Any]:
        """The part of ``selection.json`` that says what the teacher's parts were worth."""

        def rounded(scores: Tensor) -> list[float]:
            return [float(f"{score:.4g}") for score in scores.tolist()]

        return {
            "hidden": rounded(self.hidden_E),
            "layers": [float(f"{distance:.4g}") for distance in self.distances],
            "heads": [rounded(scores) for scores in self.heads_LH],
            "neurons": [float(f"{share:.4g}") for share in self.neuron_shares],
        }

    def to_tensors(self) -> dict[str, Tensor]:
        """All of it as named tensors, for a walk that goes on in another process."""
        return {
            "hidden": self.hidden_E,
            "gram": self.gram_EE,
            "final": self.final_NE,
            "layers": torch.tensor(self.layers),
            "distances": torch.tensor(self.distances, dtype=torch.float64),
            "heads": torch.stack(self.heads_LH),
            "neuron_shares": torch.tensor(self.neuron_shares, dtype=torch.float64),
            "value_gram": torch.stack(self.value_gram_LKCC),
            "kept_heads": torch.stack([kept.heads for kept in self.chosen]),
            "kept_key_value_heads": torch.stack([kept.key_value_heads for kept in self.chosen]),
            "kept_neurons": torch.stack([kept.neurons for kept in self.chosen]),
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Survey:
        """What ``to_tensors`` gave."""
        kept = zip(
            tensors["kept_heads"],
            tensors["kept_key_value_heads"],
            tensors["kept_neurons"],
            strict=True,
        )
        return cls(
            hidden_E=tensors["hidden"],
            gram_EE=tensors["gram"],
            final_NE=tensors["final"],
            layers=tensors["layers"].tolist(),
            distances=tensors["distances"].tolist(),
            heads_LH=list(tensors["heads"]),
            neuron_shares=tensors["neuron_shares"].tolist(),
            chosen=[
                LayerSelection(heads=heads, key_value_heads=groups, neurons=neurons)
                for heads, groups, neurons in kept
            ],
            value_gram_LKCC=list(tensors["value_gram"]),
        )


def _value_basis(gram_KCC: Tensor, head_dim: int) -> Tensor | None:
    """The subspace of each key/value head's values that attention's output uses most.

    Values aren't rotated, so unlike queries and keys they may be projected: [K, C, c], orthonormal
    columns. None where the head dim stays.
    """
    if gram_KCC.shape[-1] == head_dim:
        return None
    vectors: Tensor = torch.linalg.eigh(gram_KCC.double()).eigenvectors
    return vectors[..., -head_dim:].float()


def take_survey(
    source: Checkpoint,
    target: Shape,
    windows_BT: Tensor,
    settings: PruneSettings,
    streams: Streams,
    device: torch.device,
    dtype: torch.dtype,
    vocabulary: int,
    progress: Progress = silent,
    begun: TrainingState | None = None,
    between: Callable[[Callable[[], TrainingState]], None] = lambda _: None,
) -> Survey:
    """Pass the teacher over the first windows; score its parts and choose inside its layers.

    What it would say counts among the first ``vocabulary`` tokens; the others are padding.
    ``between`` is called after each layer, with a function that gives all that a survey needs to
    go on in another process; ``begun`` is what that gave.
    """
    shape = source.shape
    by_taylor = settings.chosen_by == "taylor"
    cuts_depth = target.num_hidden_layers < shape.num_hidden_layers
    taylor: list[PartScores] | None = None
    divergent: list[int] | None = begun.state["divergent"] if begun else None
    if by_taylor and begun:
        taylor = _scores_of(begun.whole("taylor"))
    elif by_taylor:
        taylor = taylor_scores(source, windows_BT, streams, device, dtype, vocabulary, progress)
    if settings.depth == "divergence" and cuts_depth and not begun:
        divergent = layers_by_divergence(
            source, windows_BT, target.num_hidden_layers, device, dtype, vocabulary, progress
        )
    greedy = settings.chosen_by == "greedy"
    # In layers that a list drops nothing needs to be chosen well.
    wanted = settings.depth if isinstance(settings.depth, list) else None
    tokens = GREEDY_TOKENS if greedy else SURVEY_TOKENS
    windows_BT = windows_BT[: max(1, tokens // windows_BT.shape[1])]
    short_BT = openings(windows_BT, source.config)
    maths, short_maths = (
        LayerMath(source.config, tokens_BT.shape[1], device, dtype)
        for tokens_BT in (windows_BT, short_BT)
    )
    projects = settings.basis_for(shape, target) == "principal"
    if begun:
        survey = Survey.from_tensors(begun.whole("survey"))
        survey.hidden_E = survey.hidden_E.to(device)
        stream_BTE, short_BTE = (begun.whole("streams")[name] for name in ("windows", "openings"))
    else:
        survey = Survey(torch.zeros(shape.hidden_size, dtype=torch.float64, device=device))
        if projects:
            survey.gram_EE = torch.zeros(shape.hidden_size, shape.hidden_size)
        embedding_VE = source.tensor(EMBEDDING)
        stream_BTE, short_BTE = (embedding_VE[tokens].float() for tokens in (windows_BT, short_BT))

    def state() -> TrainingState:
        return TrainingState(
            step=len(survey.chosen),
            state={"divergent": divergent},
            tensors={
                "survey": survey.to_tensors(),
                "streams": {"windows": stream_BTE, "openings": short_BTE},
                **({"taylor": _stacked(taylor)} if taylor else {}),
            },
        )

    for number in range(len(survey.chosen), shape.num_hidden_layers):
        progress("survey", number, shape.num_hidden_layers)
        weights = read_layer(source, number, device, dtype=None)
        chooses = greedy and (wanted is None or number in wanted)
        layer = LayerSurvey(shape, target, weights, device, chooses, projects)
        for math, stream, opening in ((maths, stream_BTE, False), (short_maths, short_BTE, True)):
            for rows in batches(stream):
                stream[rows] = layer.add(math, stream[rows].to(device), opening).to(stream)
        if not bool(torch.isfinite(stream_BTE).all()):
            raise FloatingPointError(f"the teacher overflows in its layer {number}")
        scores = taylor[number] if taylor else layer.scores(settings.chosen_by)
        survey.hidden_E += scores.hidden_E.to(survey.hidden_E)
        if projects:
            survey.gram_EE += layer.gram_EE.cpu()
        survey.distances.append(float(layer.distance) / stream_BTE[..., 0].numel())
        survey.heads_LH.append(scores.heads_H.cpu())
        survey.value_gram_LKCC.append(layer.gram_KCC.cpu())
        kept = layer.choose(scores)
        survey.chosen.append(kept)
        worth_F = scores.neurons_F.cpu()
        survey.neuron_shares.append(
            float(worth_F[kept.neurons].sum() / worth_F.sum().clamp_min(1e-12))
        )
        between(state)
    last_E, last_EE = torch.zeros_like(survey.hidden_E), torch.zeros_like(survey.gram_EE)
    for rows in batches(stream_BTE):
        last_E += relative_energy(stream_BTE[rows]).to(last_E)
        if projects:
            add_stream_gram(last_EE, stream_BTE[rows], maths.eps, dtype)
    if projects:
        add_stream_gram(last_EE, short_BTE, maths.eps, dtype)
    reads = 2 * shape.num_hidden_layers
    if taylor is None and settings.chosen_by != "magnitude":
        survey.hidden_E.mul_((1 - HEAD_SHARE) / reads).add_(last_E, alpha=HEAD_SHARE)
    survey.gram_EE.mul_((1 - HEAD_SHARE) / reads).add_(last_EE, alpha=HEAD_SHARE)
    survey.hidden_E = survey.hidden_E.sqrt().cpu()
    final_NE = stream_BTE.flatten(0, 1)
    # Drawn, for a stride would meet the same place of every window, or none but the first.
    drawn_N = torch.randperm(len(final_NE), generator=torch.Generator().manual_seed(0))
    final_NE = final_NE[drawn_N[:FINAL_POSITIONS]]
    norm_E = source.tensor(FINAL_NORM, torch.float32)
    survey.final_NE = normed(final_NE, maths.eps) * norm_E
    survey.layers = divergent or choose_layers(
        survey.distances, target.num_hidden_layers, settings.depth
    )
    return survey


def _stacked(scores: Sequence[PartScores]) -> dict[str, Tensor]:
    """All layers' scores as named tensors."""
    return {
        "hidden": torch.stack([layer.hidden_E for layer in scores]),
        "heads": torch.stack([layer.heads_H for layer in scores]),
        "neurons": torch.stack([layer.neurons_F for layer in scores]),
    }


def _scores_of(stacked: Mapping[str, Tensor]) -> list[PartScores]:
    """What ``_stacked`` was given."""
    layers = zip(stacked["hidden"], stacked["heads"], stacked["neurons"], strict=True)
    return [PartScores(hidden_E=e, heads_H=h, neurons_F=f) for e, h, f in layers]


class LayerSurvey:
    """One layer of the teacher: sums over positions, and the choice that follows from them."""

    def __init__(
        self,
        shape: Shape,
        target: Shape,
        weights: LayerWeights,
        device: torch.device,
        greedy: bool,
        projects: bool,
    ) -> None:
        self.shape, self.target, self.weights = shape, target, weights
        self.projects = projects

        def zeros(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        self.query_Q = zeros(shape.query_size, dtype=torch.float64)
        self.neurons_F = zeros(shape.intermediate_size, dtype=torch.float64)
        self.hidden_E = zeros(shape.hidden_size, dtype=torch.float64)
        self.distance = zeros(dtype=torch.float64)
        self.gram_KCC = zeros(shape.num_key_value_heads, shape.head_dim, shape.head_dim)
        if projects:
            self.gram_EE = zeros(shape.hidden_size, shape.hidden_size)
        # Moments from which parts are removed greedily, where any are.
        self.gram_QQ = self.gram_FF = None
        if greedy and target.num_attention_heads < shape.num_attention_heads:
            self.gram_QQ = zeros(shape.query_size, shape.query_size)
        if greedy and target.intermediate_size < shape.intermediate_size:
            self.gram_FF = zeros(shape.intermediate_size, shape.intermediate_size)

    def add(self, maths: LayerMath, before_BTE: Tensor, opening: bool) -> Tensor:
        """Take in a batch; returns the stream behind the layer.

        Openings count where fits are foreseen, not in what a part is worth on ordinary text.
        """
        weights = self.weights
        _, parts = maths.read(ATTENTION, before_BTE, weights)
        mixed = maths.mix(ATTENTION, parts)
        middle = before_BTE + maths.linear(mixed, weights, ATTENTION.output)
        _, parts = maths.read(MLP, middle, weights)
        active = maths.mix(MLP, parts)
        after = middle + maths.linear(active, weights, MLP.output)
        if not opening:
            self.hidden_E += relative_energy(before_BTE) + relative_energy(middle)
            self.query_Q += channel_energy(mixed)
            self.neurons_F += channel_energy(active)
            self.distance += cosine_distance(before_BTE, after)
        by_group = mixed.view(-1, len(self.gram_KCC), self.shape.group_size, self.shape.head_dim)
        self.gram_KCC += torch.einsum("nkgc,nkgd->kcd", by_group, by_group)
        if self.projects:
            add_stream_gram(self.gram_EE, before_BTE, maths.eps, maths.dtype)
            add_stream_gram(self.gram_EE, middle, maths.eps, maths.dtype)
        # As the refits will judge: relative to the stream.
        for gram_II, inputs, stream in (
            (self.gram_QQ, mixed, middle),
            (self.gram_FF, active, after),
        ):
            if gram_II is not None:
                size_BT1 = stream.square().mean(-1, keepdim=True).clamp_min(1e-12)
                add_gram(gram_II, (inputs / size_BT1.sqrt()).flatten(0, 1), maths.dtype)
        return after

    def scores(self, importance: str) -> PartScores:
        """What each part is worth by its weights' size, or by its activations."""
        if importance == "magnitude":
            return magnitude_scores(self.weights, self.shape)
        output = self.weights[f"{ATTENTION.output}.weight"].float()
        down = self.weights[f"{MLP.output}.weight"].float()
        return PartScores(
            hidden_E=self.hidden_E,
            heads_H=head_importance(self.query_Q.sqrt(), output, self.shape.head_dim),
            neurons_F=neuron_importance(self.neurons_F.sqrt(), down),
        )

    def choose(self, scores: PartScores) -> LayerSelection:
        """What this layer keeps."""
        shape, target = self.shape, self.target
        sizes = (shape.num_key_value_heads, target.num_key_value_heads, target.num_attention_heads)
        if self.gram_QQ is None:
            heads, groups = choose_heads(scores.heads_H.cpu(), *sizes)
        else:
            output = self.weights[f"{ATTENTION.output}.weight"]
            heads, groups = keep_heads(self.gram_QQ, output, shape.head_dim, *sizes)
        if self.gram_FF is None:
            neurons = top(scores.neurons_F.cpu(), target.intermediate_size)
        else:
            down = self.weights[f"{MLP.output}.weight"]
            neurons = keep_inputs(self.gram_FF, down, target.intermediate_size)
        return LayerSelection(heads=heads, key_value_heads=groups, neurons=neurons)
