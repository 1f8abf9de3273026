"""The pruning engine: a walk through teacher and student, one decoder layer at a time.

First a survey: the teacher alone passes over some calibration windows, and every layer's inputs
say how much each hidden dim, head, neuron and layer matters. Then the walk: both models advance
together. Each linear map of the student is refitted to what the teacher does at the same place,
with the student's own activations as inputs, so what earlier layers got wrong is seen and partly
mended by later ones. Only one layer's weights and the two residual streams are in memory.

Legend: B windows, T positions, N positions of a batch, E teacher hidden, D student hidden,
H query heads, K key/value heads, C teacher head dim, c student head dim.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from compress.coupling import HIDDEN, KEY_VALUE, NEURONS, QUERY, Coupling, derive_coupling
from compress.importance import (
    channel_energy,
    cosine_distance,
    head_importance,
    neuron_importance,
)
from compress.layer import INPUT_NORM, POST_NORM, LayerMath, LayerWeights, normed
from compress.memory import reuse_freed_memory
from compress.precision import PrecisionChoice, fast_dtype
from compress.reconstruct import Moments, final_norm_refit, ridge_refit, scale_of_norm
from compress.saving import copy_tokenizer
from compress.selection import (
    LayerSelection,
    choose_heads,
    choose_layers,
    rotary_channels,
    rows_of_heads,
    to_json,
    top,
)
from compress.settings import PruneSettings
from shearling import Progress, ShearlingError, silent, write_json
from students.build import StudentWriter, student_config
from students.shape import Shape
from teachers.checkpoint import Checkpoint, open_checkpoint
from teachers.transfer_set import TransferSet

BATCH_TOKENS = 4096
SURVEY_TOKENS = 16384
FIRST_POSITION_WEIGHT = 0.1
"""The first position is the attention sink: its stream is a hundred times larger than all others
and the same in every window. It stays in each fit, but doesn't decide it."""

EMBEDDING, HEAD, FINAL_NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
_ATTENTION_INPUTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_MLP_INPUTS = ("mlp.gate_proj", "mlp.up_proj")


def prune(
    teacher: Path,
    out: Path,
    shape: Shape,
    transfer_set: Path,
    settings: PruneSettings,
    *,
    seed: int,
    device: str = "cpu",
    progress: Progress = silent,
) -> dict[str, Any]:
    """Cut the model in ``teacher`` to ``shape``; writes ``out/model`` and ``out/selection.json``.

    ``model`` is a stock Hugging Face folder with the teacher's tokenizer, in the teacher's dtype.
    Returns the numbers that a report shows.

    Raises:
        ShearlingError: the teacher can't be read or pruned, or the saved student does not answer
            as the one in memory does.
    """
    reuse_freed_memory()
    source = open_checkpoint(teacher)
    problems = shape.problems_as_student_of(source.shape)
    if problems:
        raise ShearlingError(
            "The student's shape does not fit: " + "; ".join(problems) + ".",
            hint="Change `shape` in the recipe's prune stage.",
        )
    windows = TransferSet(transfer_set).calibration(settings.calibration_tokens, seed)
    place = torch.device(device)
    precision = fast_dtype(place, settings.precision)
    with torch.no_grad():
        survey = take_survey(source, windows, place, precision.dtype, progress)
        plan = choose(survey, shape, settings)
        walk = Walk(source, shape, plan, windows, settings, place, precision.dtype, out / "model")
        reconstruction = walk.run(progress)
        logit_error = _gate(walk, teacher, out / "model", shape)
    write_json(
        out / "selection.json",
        to_json(plan.layers, plan.hidden, plan.chosen)
        | {"importance": survey.to_json(), "reconstruction": reconstruction},
    )
    return _summary(walk, windows, precision, reconstruction, logit_error)


# --- the survey


@dataclass
class Survey:
    """What the teacher's activations say about each part; see ``compress.importance``."""

    hidden_E: Tensor
    heads_LH: list[Tensor]
    neurons_LF: list[Tensor]
    distances: list[float]
    value_gram_LKCC: list[Tensor]

    def to_json(self) -> dict[str, Any]:
        def rounded(scores: Tensor) -> list[float]:
            return [float(f"{score:.4g}") for score in scores.tolist()]

        return {
            "hidden": rounded(self.hidden_E),
            "layers": [float(f"{distance:.4g}") for distance in self.distances],
            "heads": [rounded(scores) for scores in self.heads_LH],
            "neurons_kept_from": [float(f"{scores.min():.4g}") for scores in self.neurons_LF],
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
    config, shape = source.config, source.shape
    maths = LayerMath(config, windows_BT.shape[1], device, dtype)
    stream = source.tensor(EMBEDDING, torch.float32)[windows_BT]
    hidden = torch.zeros(shape.hidden_size, dtype=torch.float64, device=device)
    survey = Survey(hidden, [], [], [], [])
    for number in range(shape.num_hidden_layers):
        progress("survey", number, shape.num_hidden_layers)
        _survey_layer(survey, maths, shape, stream, read_layer(source, number, device))
    final_norm = source.tensor(FINAL_NORM, torch.float32).to(device)
    for rows in batches(stream):
        hidden += channel_energy(normed(stream[rows].to(device), maths.eps) * final_norm)
    survey.hidden_E = hidden.sqrt().cpu()
    return survey


def _survey_layer(
    survey: Survey, maths: LayerMath, shape: Shape, stream: Tensor, weights: LayerWeights
) -> None:
    """One layer over all windows; advances ``stream`` in place and appends to ``survey``."""
    device = weights[INPUT_NORM].device
    query_Q = torch.zeros(shape.query_size, dtype=torch.float64, device=device)
    neurons_F = torch.zeros(shape.intermediate_size, dtype=torch.float64, device=device)
    split = (shape.num_key_value_heads, shape.group_size, shape.head_dim)
    gram_KCC = torch.zeros(split[0], split[2], split[2], device=device)
    distance = 0.0
    for rows in batches(stream):
        before = stream[rows].to(device)
        input_BTE, *parts = maths.attention_inputs(before, weights)
        mixed = maths.attend(*parts)
        middle = before + maths.linear(mixed, weights, "self_attn.o_proj")
        post_BTE, gate, up = maths.mlp_inputs(middle, weights)
        active = maths.gate(gate, up)
        after = middle + maths.linear(active, weights, "mlp.down_proj")
        survey.hidden_E += channel_energy(input_BTE) + channel_energy(post_BTE)
        query_Q += channel_energy(mixed)
        neurons_F += channel_energy(active)
        per_group = mixed.view(-1, *split)
        gram_KCC += torch.einsum("nkgc,nkgd->kcd", per_group, per_group)
        distance += float(cosine_distance(before, after))
        stream[rows] = after.to(stream.device)
    survey.distances.append(distance / (stream.shape[0] * stream.shape[1]))
    output, down = weights["self_attn.o_proj.weight"], weights["mlp.down_proj.weight"]
    survey.heads_LH.append(head_importance(query_Q.sqrt(), output, shape.head_dim).cpu())
    survey.neurons_LF.append(neuron_importance(neurons_F.sqrt(), down).cpu())
    survey.value_gram_LKCC.append(gram_KCC.cpu())


# --- the choice


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What stays: layers, hidden dims, and of each kept layer heads, neurons, value basis."""

    layers: list[int]
    hidden: Tensor
    chosen: list[LayerSelection]
    value_basis_KCc: list[Tensor | None]


def choose(survey: Survey, shape: Shape, settings: PruneSettings) -> Plan:
    """Turn importances into the selection that has exactly the student's shape."""
    layers = choose_layers(survey.distances, shape.num_hidden_layers, settings.depth)
    chosen, bases = [], []
    for layer in layers:
        gram_KCC = survey.value_gram_LKCC[layer]
        heads, groups = choose_heads(
            survey.heads_LH[layer],
            len(gram_KCC),
            shape.num_key_value_heads,
            shape.num_attention_heads,
        )
        neurons = top(survey.neurons_LF[layer], shape.intermediate_size)
        chosen.append(LayerSelection(heads=heads, key_value_heads=groups, neurons=neurons))
        bases.append(_value_basis(gram_KCC[groups], shape.head_dim))
    hidden = top(survey.hidden_E, shape.hidden_size)
    return Plan(layers=layers, hidden=hidden, chosen=chosen, value_basis_KCc=bases)


def _value_basis(gram_KCC: Tensor, head_dim: int) -> Tensor | None:
    """The subspace of each key/value head's values that attention's output uses most.

    Values aren't rotated, so unlike queries and keys they may be projected: [K, C, c], orthonormal
    columns. None where the head dim stays.
    """
    if gram_KCC.shape[-1] == head_dim:
        return None
    return torch.linalg.eigh(gram_KCC.double()).eigenvectors[..., -head_dim:].float()


# --- the walk


def batches(stream: Tensor) -> Iterator[slice]:
    """Slices of whole windows, about BATCH_TOKENS positions each."""
    step = max(1, BATCH_TOKENS // stream.shape[1])
    for first in range(0, stream.shape[0], step):
        yield slice(first, min(first + step, stream.shape[0]))


def read_layer(source: Checkpoint, number: int, device: torch.device) -> LayerWeights:
    """All weights of one decoder layer in float32 on the device, by their name inside it."""
    prefix = f"model.layers.{number}."
    return {
        name.removeprefix(prefix): source.tensor(name, torch.float32).to(device)
        for name in source.names()
        if name.startswith(prefix)
    }


def _flat(activations_BTD: Tensor) -> Tensor:
    return activations_BTD.reshape(-1, activations_BTD.shape[-1])


class Walk:
    """Teacher and student side by side; ``run`` takes them from the embedding to the last norm."""

    def __init__(
        self,
        source: Checkpoint,
        shape: Shape,
        plan: Plan,
        windows_BT: Tensor,
        settings: PruneSettings,
        device: torch.device,
        dtype: torch.dtype,
        folder: Path,
    ) -> None:
        self.source, self.shape, self.plan, self.settings = source, shape, plan, settings
        self.device = device
        self.coupling: Coupling = derive_coupling(source.config)
        config = student_config(source.config, shape)
        length = windows_BT.shape[1]
        self.teacher_math = LayerMath(source.config, length, device, dtype)
        self.student_math = LayerMath(config, length, device, dtype)
        embedding_VE = source.tensor(EMBEDDING, torch.float32)
        self.embedding_VD = embedding_VE[:, plan.hidden]
        stored = source.tensor(FINAL_NORM).dtype
        self.writer = StudentWriter(folder, config, stored)
        self.teacher_stream = embedding_VE[windows_BT] if settings.refit else None
        self.student_stream = self.embedding_VD[windows_BT] if settings.refit else None
        # A few positions go through the finished weights in float32: the stock model that is
        # loaded from the saved folder has to say the same about them.
        self.probe_tokens = windows_BT[:1, :64]
        self.probe_math = LayerMath(config, self.probe_tokens.shape[1], device, torch.float32)
        self.probe_stream = self._stored(self.embedding_VD)[self.probe_tokens].to(device)

    def _stored(self, tensor: Tensor) -> Tensor:
        """As the tensor will be read back: rounded to the stored dtype."""
        return tensor.to(self.writer.dtype).float()

    def run(self, progress: Progress = silent) -> list[dict[str, float]]:
        """Make and write every layer; returns each layer's reconstruction errors."""
        errors = []
        self.writer.add(EMBEDDING, self.embedding_VD)
        for number, layer in enumerate(self.plan.layers):
            progress("walk", number, len(self.plan.layers))
            weights, error = self._layer(number, layer)
            weights = {name: self._stored(weight) for name, weight in weights.items()}
            for name, weight in weights.items():
                self.writer.add(f"model.layers.{number}.{name}", weight)
            self.probe_stream = self.probe_math.layer(self.probe_stream, weights)
            errors.append({"layer": layer} | error)
        self._finish()
        progress("walk", len(errors), len(errors))
        return errors

    def _layer(self, number: int, layer: int) -> tuple[LayerWeights, dict[str, float]]:
        teacher = read_layer(self.source, layer, self.device)
        student = self._sliced(number, teacher)
        if not self.settings.refit:
            return student, {}
        error = self._fit_attention(number, teacher, student)
        error |= self._fit_mlp(number, teacher, student)
        return student, error

    def _sliced(self, number: int, teacher: LayerWeights) -> LayerWeights:
        """The teacher's layer cut to the student's shape, not yet refitted."""
        chosen, basis = self.plan.chosen[number], self.plan.value_basis_KCc[number]
        wide = self.source.shape.head_dim
        rotary = rotary_channels(wide, self.shape.head_dim)
        every = torch.arange(wide)
        kept = {HIDDEN: self.plan.hidden, NEURONS: chosen.neurons}
        rotated = kept | {
            QUERY: rows_of_heads(chosen.heads, rotary, wide),
            KEY_VALUE: rows_of_heads(chosen.key_value_heads, rotary, wide),
        }
        whole = kept | {
            QUERY: rows_of_heads(chosen.heads, every, wide),
            KEY_VALUE: rows_of_heads(chosen.key_value_heads, every, wide),
        }
        student = {}
        for name, tensor in teacher.items():
            side = rotated if name.startswith(_ATTENTION_INPUTS[:2]) else whole
            student[name] = self.coupling.cut(name, tensor, side)
        if basis is not None:
            self._narrow_heads(student, basis.to(self.device))
        return student

    def _narrow_heads(self, student: LayerWeights, basis_KCc: Tensor) -> None:
        """Project values onto their basis and let the queries carry the change of softmax scale.

        A stock model divides scores by the square root of its own, smaller head dim.
        """
        wide, narrow = basis_KCc.shape[1:]
        scale = math.sqrt(narrow / wide)
        for name in [n for n in student if n.startswith(_ATTENTION_INPUTS[0])]:
            student[name] = student[name] * scale
        for name in [n for n in student if n.startswith(_ATTENTION_INPUTS[2])]:
            value = student[name].view(len(basis_KCc), wide, -1)
            projected = torch.einsum("kci,kcd->kdi", value, basis_KCc).flatten(0, 1)
            student[name] = projected.reshape(-1, *student[name].shape[1:])
        name = "self_attn.o_proj.weight"
        output = student[name].view(-1, len(basis_KCc), self.shape.group_size, wide)
        student[name] = torch.einsum("ekgc,kcd->ekgd", output, basis_KCc).flatten(1)

    def _targets(self, number: int, name: str, output_NO: Tensor) -> Tensor:
        """What the teacher's q, k, v, gate or up output becomes in the student's shape."""
        chosen, basis = self.plan.chosen[number], self.plan.value_basis_KCc[number]
        if name in _MLP_INPUTS:
            return output_NO[:, chosen.neurons]
        wide = self.source.shape.head_dim
        heads = chosen.heads if name == _ATTENTION_INPUTS[0] else chosen.key_value_heads
        if name == _ATTENTION_INPUTS[2]:
            value = output_NO.view(len(output_NO), -1, wide)[:, heads]
            if basis is not None:
                value = torch.einsum("nkc,kcd->nkd", value, basis.to(value))
            return value.flatten(1)
        rows = rows_of_heads(heads, rotary_channels(wide, self.shape.head_dim), wide)
        target = output_NO[:, rows.to(output_NO.device)]
        if name == _ATTENTION_INPUTS[0]:
            target = target * math.sqrt(self.shape.head_dim / wide)
        return target

    def _fit_attention(
        self, number: int, teacher: LayerWeights, student: LayerWeights
    ) -> dict[str, float]:
        """Refit q, k, v on the student's stream, then o_proj; both streams pass the attention."""
        assert self.teacher_stream is not None
        assert self.student_stream is not None
        inputs = InputFit(student, INPUT_NORM, _ATTENTION_INPUTS)
        for rows in batches(self.teacher_stream):
            before = self.teacher_stream[rows].to(self.device)
            input_BTE, *parts = self.teacher_math.attention_inputs(before, teacher)
            targets = [
                self._targets(number, name, _flat(part))
                for name, part in zip(_ATTENTION_INPUTS, parts, strict=True)
            ]
            inputs.add(
                self._student_normed(rows), self._kept(input_BTE), targets, self._weights(before)
            )
            mixed = self.teacher_math.attend(*parts)
            after = before + self.teacher_math.linear(mixed, teacher, "self_attn.o_proj")
            self.teacher_stream[rows] = after.to(self.teacher_stream.device)
        error = inputs.solve(student, self.settings.ridge)

        def mixed_of(rows: slice, stream: Tensor) -> Tensor:
            _, *parts = self.student_math.attention_inputs(stream, student)
            return self.student_math.attend(*parts)

        return error | self._fit_output(student, "self_attn.o_proj", mixed_of)

    def _fit_mlp(
        self, number: int, teacher: LayerWeights, student: LayerWeights
    ) -> dict[str, float]:
        """Refit gate and up, then down_proj; the teacher goes on to the next layer that is kept."""
        assert self.teacher_stream is not None
        inputs = InputFit(student, POST_NORM, _MLP_INPUTS)
        for rows in batches(self.teacher_stream):
            before = self.teacher_stream[rows].to(self.device)
            input_BTE, *parts = self.teacher_math.mlp_inputs(before, teacher)
            targets = [
                self._targets(number, name, _flat(part))
                for name, part in zip(_MLP_INPUTS, parts, strict=True)
            ]
            inputs.add(
                self._student_normed(rows), self._kept(input_BTE), targets, self._weights(before)
            )
            active = self.teacher_math.gate(*parts)
            after = before + self.teacher_math.linear(active, teacher, "mlp.down_proj")
            self.teacher_stream[rows] = after.to(self.teacher_stream.device)
        error = inputs.solve(student, self.settings.ridge)
        self._pass_dropped_layers(number)

        def active_of(rows: slice, stream: Tensor) -> Tensor:
            _, gate, up = self.student_math.mlp_inputs(stream, student)
            return self.student_math.gate(gate, up)

        return error | self._fit_output(student, "mlp.down_proj", active_of)

    def _pass_dropped_layers(self, number: int) -> None:
        """Take the teacher through the layers that the student lacks.

        The down projection before the gap is then fitted to the stream behind it.
        """
        assert self.teacher_stream is not None
        layers = [*self.plan.layers, self.source.shape.num_hidden_layers]
        for layer in range(layers[number] + 1, layers[number + 1]):
            weights = read_layer(self.source, layer, self.device)
            for rows in batches(self.teacher_stream):
                stream = self.teacher_stream[rows].to(self.device)
                self.teacher_stream[rows] = self.teacher_math.layer(stream, weights).to(
                    self.teacher_stream.device
                )

    def _fit_output(self, student: LayerWeights, name: str, inputs_of: Any) -> dict[str, float]:
        """Refit a map that writes into the stream; its target is the teacher's stream minus the
        student's, so what went wrong before is corrected. The student's stream moves on."""
        assert self.teacher_stream is not None
        assert self.student_stream is not None
        weight, bias = student[f"{name}.weight"], student.get(f"{name}.bias")
        moments = Moments.zeros(weight.shape[1], weight.shape[0], self.device)
        for rows in batches(self.student_stream):
            stream = self.student_stream[rows].to(self.device)
            wanted = self._kept(self.teacher_stream[rows].to(self.device))
            target = _flat(wanted - stream)
            if bias is not None:
                target = target - bias
            # Relative errors count: the next norm divides each position by its size.
            size_N = _flat(wanted).square().mean(1).clamp_min(1e-12)
            weight_N = self._weights(wanted) / size_N
            moments.add(_flat(inputs_of(rows, stream)), target, weight_N)
        sliced_error = moments.relative_error(weight)
        student[f"{name}.weight"] = weight = ridge_refit(moments, weight, self.settings.ridge)
        for rows in batches(self.student_stream):
            stream = self.student_stream[rows].to(self.device)
            written = self.student_math.linear(inputs_of(rows, stream), student, name)
            self.student_stream[rows] = (stream + written).to(self.student_stream.device)
        short = name.rpartition(".")[2]
        return {
            f"{short}_sliced": sliced_error,
            short: moments.relative_error(weight),
            f"stream_after_{short}": self._stream_error(),
        }

    def _student_normed(self, rows: slice) -> Tensor:
        assert self.student_stream is not None
        return _flat(normed(self.student_stream[rows].to(self.device), self.student_math.eps))

    def _kept(self, stream_BTE: Tensor) -> Tensor:
        return stream_BTE.index_select(-1, self.plan.hidden.to(stream_BTE.device))

    def _weights(self, stream_BTD: Tensor) -> Tensor:
        """How much each position of a batch counts, [N]."""
        weight_BT = torch.ones(stream_BTD.shape[:2], device=stream_BTD.device)
        weight_BT[:, 0] = FIRST_POSITION_WEIGHT
        return weight_BT.flatten()

    def _stream_error(self) -> float:
        """Mean over positions of the student's squared distance over the teacher's square size."""
        assert self.teacher_stream is not None
        assert self.student_stream is not None
        total = 0.0
        for rows in batches(self.student_stream):
            wanted = self._kept(self.teacher_stream[rows])
            wrong = (self.student_stream[rows] - wanted).square().sum(-1)
            total += float((wrong / wanted.square().sum(-1).clamp_min(1e-12)).sum())
        return total / self.student_stream[..., 0].numel()

    def _finish(self) -> None:
        """The final norm and, untied, the output head; then the folder is complete."""
        kept = {HIDDEN: self.plan.hidden}
        norm_E = self.source.tensor(FINAL_NORM, torch.float32).to(self.device)
        head_VE = self.source.tensor(HEAD, torch.float32).to(self.device)
        norm_D = self.coupling.cut(FINAL_NORM, norm_E, kept)
        head_VD = self.embedding_VD.to(self.device)
        if not self.shape.tie_word_embeddings:
            head_VD = self.coupling.cut(HEAD, head_VE, kept)
            self.writer.add(HEAD, head_VD)
        if self.settings.refit:
            norm_D = self._fit_final_norm(norm_E, head_VE, norm_D, head_VD)
        self.writer.add(FINAL_NORM, norm_D)
        last = normed(self.probe_stream, self.probe_math.eps) * self._stored(norm_D)
        self.probe_logits = last @ self._stored(head_VD).T
        self.writer.finish()

    def _fit_final_norm(
        self, norm_E: Tensor, head_VE: Tensor, norm_D: Tensor, head_VD: Tensor
    ) -> Tensor:
        assert self.teacher_stream is not None
        moments = Moments.zeros(len(norm_D), len(norm_E), self.device)
        for rows in batches(self.teacher_stream):
            before = self.teacher_stream[rows].to(self.device)
            target_NE = _flat(normed(before, self.teacher_math.eps) * norm_E)
            moments.add(self._student_normed(rows), target_NE, self._weights(before))
        return final_norm_refit(
            moments.gram_II, moments.cross_IO, head_VD, head_VE, norm_D, self.settings.ridge
        )


class InputFit:
    """The refit of the maps that read the stream through one norm: q, k, v, or gate and up."""

    def __init__(self, student: LayerWeights, norm: str, names: Sequence[str]) -> None:
        self.norm, self.names = norm, names
        self.norm_D = student[norm]
        self.biases = [student.get(f"{name}.bias") for name in names]
        self.widths = [len(student[f"{name}.weight"]) for name in names]
        self.moments = Moments.zeros(len(self.norm_D), sum(self.widths), self.norm_D.device)
        self._shared = self._energy = 0.0

    def add(
        self, normed_ND: Tensor, teacher_ND: Tensor, targets: Sequence[Tensor], weight_N: Tensor
    ) -> None:
        """Take in a batch: the student's stream divided by its size, the teacher's normed input
        on the kept dims, the wanted output of each map, and how much each position counts."""
        input_ND = normed_ND * self.norm_D
        unbiased = [
            target if bias is None else target - bias
            for target, bias in zip(targets, self.biases, strict=True)
        ]
        self.moments.add(input_ND, torch.cat(unbiased, dim=1), weight_N)
        shared, energy = scale_of_norm(input_ND, _flat(teacher_ND), weight_N)
        self._shared += shared
        self._energy += energy

    def solve(self, student: LayerWeights, ridge: float) -> dict[str, float]:
        """Put the refitted weights and the rescaled norm into ``student``; returns the errors."""
        scale = self._shared / self._energy if self._energy else 1.0
        student[self.norm] = self.norm_D * scale
        self.moments.gram_II *= scale**2
        self.moments.cross_IO *= scale
        sliced_OI = torch.cat([student[f"{name}.weight"] for name in self.names])
        refitted_OI = ridge_refit(self.moments, sliced_OI, ridge)
        parts = refitted_OI.split(self.widths)
        for name, weight in zip(self.names, parts, strict=True):
            student[f"{name}.weight"] = weight.contiguous()
        short = "qkv" if self.norm == INPUT_NORM else "gate_up"
        return {
            f"{short}_sliced": self.moments.relative_error(sliced_OI),
            short: self.moments.relative_error(refitted_OI),
        }


# --- the gate


def _gate(walk: Walk, teacher: Path, folder: Path, shape: Shape) -> float:
    """Open the saved student as any user would, and hold it against the one in memory.

    Returns the largest difference of a logit over the largest logit.
    """
    copy_tokenizer(teacher, folder)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    counted = sum(parameter.numel() for parameter in model.parameters())
    if Shape.from_config(model.config) != shape or counted != shape.parameters:
        raise ShearlingError(
            f"The pruned model has {counted:,} parameters, its shape asks for "
            f"{shape.parameters:,}.",
            hint="This is a bug in shearling; please report it with the recipe.",
        )
    logits = model.to(walk.device).eval()(walk.probe_tokens.to(walk.device)).logits
    error = float((logits - walk.probe_logits).abs().max() / walk.probe_logits.abs().max())
    if not error < 1e-3:
        raise ShearlingError(
            f"The pruned model saved in {folder} does not answer as the one in memory: its logits "
            f"differ by {error:.2g} of the largest.",
            hint="This is a bug in shearling or a failing disk; run the stage again.",
        )
    return error


def _summary(
    walk: Walk,
    windows_BT: Tensor,
    precision: PrecisionChoice,
    reconstruction: Sequence[Mapping[str, float]],
    logit_error: float,
) -> dict[str, Any]:
    dropped = sorted(set(range(walk.source.shape.num_hidden_layers)) - set(walk.plan.layers))
    return {
        "shape": walk.shape.to_dict(),
        "parameters": walk.shape.parameters,
        "teacher_parameters": walk.source.shape.parameters,
        "calibration_tokens": windows_BT.numel(),
        "dropped_layers": dropped,
        "refit": walk.settings.refit,
        "stream_error": reconstruction[-1].get("stream_after_down_proj"),
        "reload_logit_error": logit_error,
        "precision": precision.to_dict(),
    }
