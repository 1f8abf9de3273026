"""The walk: teacher and student advance together, and each layer of the student is refitted.

Each linear map of the student learns to do what the teacher does at the same place, with the
student's own activations as inputs, so what earlier layers got wrong is seen and partly mended.
One layer's weights, the embeddings and the two residual streams are in memory.

Legend: B windows, T positions, N positions of a batch, E teacher hidden, D student hidden,
O outputs, K key/value heads, C teacher head dim, c student head dim.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from compress.coupling import HIDDEN, KEY_VALUE, NEURONS, QUERY, derive_coupling
from compress.layer import (
    ATTENTION,
    BLOCKS,
    MLP,
    Block,
    LayerMath,
    LayerWeights,
    batches,
    normed,
    read_layer,
)
from compress.reconstruct import (
    HELD_OUT,
    Moments,
    SplitMoments,
    final_norm_refit,
    scale_of_norm,
)
from compress.selection import Plan, rotary_channels, rows_of_heads
from compress.settings import PruneSettings
from shearling import Progress, silent
from students.build import StudentWriter, student_config
from students.shape import Shape
from teachers.checkpoint import Checkpoint

FIRST_POSITION_WEIGHT = 0.1
"""The first position is the attention sink: its stream is a hundred times larger than all others
and the same in every window. It stays in each fit, but doesn't decide it."""

FINAL_NORM_RIDGE = 0.01
"""The final norm has a number a hidden dim and every token to fit it, so it needs little."""

EMBEDDING, HEAD, FINAL_NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


def _flat(activations_BTD: Tensor) -> Tensor:
    return activations_BTD.reshape(-1, activations_BTD.shape[-1])


class Walk:
    """Teacher and student side by side; ``run`` takes them from the embedding to the last norm.

    Afterwards ``probe_logits`` holds what the student's weights, in memory and in float32, say
    about ``probe_tokens``.
    """

    def __init__(
        self,
        source: Checkpoint,
        shape: Shape,
        plan: Plan,
        windows_BT: Tensor,
        settings: PruneSettings,
        *,
        device: torch.device,
        dtype: torch.dtype,
        folder: Path,
    ) -> None:
        self.source, self.shape, self.plan, self.settings = source, shape, plan, settings
        self.device = device
        self.coupling = derive_coupling(source.config)
        config = student_config(source.config, shape)
        self.teacher_math = LayerMath(source.config, windows_BT.shape[1], device, dtype)
        self.student_math = LayerMath(config, windows_BT.shape[1], device, dtype)
        embedding_VE = source.tensor(EMBEDDING, torch.float32)
        self.embedding_VD = embedding_VE[:, plan.hidden]
        self.writer = StudentWriter(folder, config, source.tensor(FINAL_NORM).dtype)
        walked = windows_BT if settings.refit else windows_BT[:0]  # slicing looks at nothing
        self.teacher_stream = embedding_VE[walked]
        self.student_stream = self.embedding_VD[walked]
        self.probe_tokens = windows_BT[:1, :64]
        self.probe_math = LayerMath(config, self.probe_tokens.shape[1], device, torch.float32)
        self.probe_stream = self._stored(self.embedding_VD)[self.probe_tokens].to(device)
        self.probe_logits = torch.empty(0)

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
            for name, weight in weights.items():
                self.writer.add(f"model.layers.{number}.{name}", weight)
            self.probe_stream = self.probe_math.layer(self.probe_stream, weights)
            errors.append({"layer": layer} | error)
        self._finish()
        progress("walk", len(errors), len(errors))
        return errors

    def _layer(self, number: int, layer: int) -> tuple[LayerWeights, dict[str, float]]:
        """The student's layer ``number``, cut from the teacher's ``layer``; the streams pass it."""
        teacher = read_layer(self.source, layer, self.device)
        student = self._sliced(number, teacher)
        error: dict[str, float] = {}
        if self.settings.refit:
            for block in BLOCKS:
                error |= self._fit_inputs(number, block, teacher, student)
                if block is MLP:
                    self._pass_dropped_layers(number)
                error |= self._fit_output(block, student)
        return {name: self._stored(weight) for name, weight in student.items()}, error

    def _fit_inputs(
        self, number: int, block: Block, teacher: LayerWeights, student: LayerWeights
    ) -> dict[str, float]:
        """Refit the maps that read the stream; the teacher's stream passes the block."""
        fit = InputFit(student, block)
        for rows in batches(self.teacher_stream):
            before = self.teacher_stream[rows].to(self.device)
            input_BTE, parts = self.teacher_math.read(block, before, teacher)
            targets = [
                self._target(number, name, _flat(part))
                for name, part in zip(block.inputs, parts, strict=True)
            ]
            fit.add(
                self._student_normed(rows),
                self._kept(input_BTE),
                targets,
                _weights(before),
                _held_out(rows, before),
            )
            written = self.teacher_math.linear(
                self.teacher_math.mix(block, parts), teacher, block.output
            )
            self.teacher_stream[rows] = (before + written).to(self.teacher_stream.device)
        return fit.solve(student, self.settings.ridge)

    def _pass_dropped_layers(self, number: int) -> None:
        """Take the teacher through the layers that the student lacks.

        The down projection before the gap is then fitted to the stream behind it.
        """
        layers = [*self.plan.layers, self.source.shape.num_hidden_layers]
        for layer in range(layers[number] + 1, layers[number + 1]):
            weights = read_layer(self.source, layer, self.device)
            for rows in batches(self.teacher_stream):
                passed = self.teacher_math.layer(self.teacher_stream[rows].to(self.device), weights)
                self.teacher_stream[rows] = passed.to(self.teacher_stream.device)

    def _fit_output(self, block: Block, student: LayerWeights) -> dict[str, float]:
        """Refit the map that writes into the stream; the student's stream passes the block.

        The target is the teacher's stream minus the student's, so earlier errors are corrected.
        """
        weight_name, bias = f"{block.output}.weight", student.get(f"{block.output}.bias")
        sliced_OI = student[weight_name]
        moments = SplitMoments(sliced_OI.shape[1], sliced_OI.shape[0], self.device)
        mixed: list[Tensor] = []  # kept for the second loop, in the dtype that it multiplies in
        for rows in batches(self.student_stream):
            stream = self.student_stream[rows].to(self.device)
            _, parts = self.student_math.read(block, stream, student)
            mixed_BTI = self.student_math.mix(block, parts)
            mixed.append(mixed_BTI.to("cpu", self.student_math.dtype))
            wanted = self._kept(self.teacher_stream[rows].to(self.device))
            target_NO = _flat(wanted - stream)
            if bias is not None:
                target_NO = target_NO - bias
            # Relative errors count: the next norm divides each position by its size.
            size_N = _flat(wanted).square().mean(1).clamp_min(1e-12)
            weight_N = _weights(wanted) / size_N
            moments.add(_flat(mixed_BTI), target_NO, weight_N, _held_out(rows, wanted))
        refit = moments.refit(sliced_OI, self.settings.ridge)
        student[weight_name] = refit.weight_OI
        wrong = 0.0
        for rows, mixed_BTI in zip(batches(self.student_stream), mixed, strict=True):
            stream = self.student_stream[rows].to(self.device)
            written = self.student_math.linear(mixed_BTI.to(self.device), student, block.output)
            after = stream + written
            self.student_stream[rows] = after.to(self.student_stream.device)
            wrong += _relative_distance(after, self._kept(self.teacher_stream[rows].to(after)))
        short = block.output.rpartition(".")[2]
        return {
            f"{short}_sliced": refit.sliced_error,
            short: refit.error,
            f"{short}_ridge": refit.ridge,
            f"stream_after_{short}": wrong / self.student_stream[..., 0].numel(),
        }

    def _student_normed(self, rows: slice) -> Tensor:
        return _flat(normed(self.student_stream[rows].to(self.device), self.student_math.eps))

    def _kept(self, stream_BTE: Tensor) -> Tensor:
        return stream_BTE.index_select(-1, self.plan.hidden.to(stream_BTE.device))

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
            side = rotated if name.startswith(ATTENTION.inputs[:2]) else whole
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
        for name in [n for n in student if n.startswith(ATTENTION.inputs[0])]:
            student[name] = student[name] * scale
        for name in [n for n in student if n.startswith(ATTENTION.inputs[2])]:
            value = student[name].view(len(basis_KCc), wide, -1)
            projected = torch.einsum("kci,kcd->kdi", value, basis_KCc).flatten(0, 1)
            student[name] = projected.reshape(-1, *student[name].shape[1:])
        name = f"{ATTENTION.output}.weight"
        output = student[name].view(-1, len(basis_KCc), self.shape.group_size, wide)
        student[name] = torch.einsum("ekgc,kcd->ekgd", output, basis_KCc).flatten(1)

    def _target(self, number: int, name: str, output_NO: Tensor) -> Tensor:
        """What the teacher's q, k, v, gate or up output becomes in the student's shape."""
        chosen, basis = self.plan.chosen[number], self.plan.value_basis_KCc[number]
        if name in MLP.inputs:
            return output_NO[:, chosen.neurons]
        wide = self.source.shape.head_dim
        heads = chosen.heads if name == ATTENTION.inputs[0] else chosen.key_value_heads
        if name == ATTENTION.inputs[2]:
            value = output_NO.view(len(output_NO), -1, wide)[:, heads]
            if basis is not None:
                value = torch.einsum("nkc,kcd->nkd", value, basis.to(value))
            return value.flatten(1)
        rows = rows_of_heads(heads, rotary_channels(wide, self.shape.head_dim), wide)
        target = output_NO[:, rows.to(output_NO.device)]
        if name == ATTENTION.inputs[0]:
            target = target * math.sqrt(self.shape.head_dim / wide)
        return target

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
        moments = Moments.zeros(len(norm_D), len(norm_E), self.device)
        for rows in batches(self.teacher_stream):
            before = self.teacher_stream[rows].to(self.device)
            target_NE = _flat(normed(before, self.teacher_math.eps) * norm_E)
            moments.add(self._student_normed(rows), target_NE, _weights(before))
        return final_norm_refit(
            moments.gram_II, moments.cross_IO, head_VD, head_VE, norm_D, FINAL_NORM_RIDGE
        )


def _weights(stream_BTD: Tensor) -> Tensor:
    """How much each position of a batch counts, [N]."""
    weight_BT = torch.ones(stream_BTD.shape[:2], device=stream_BTD.device)
    weight_BT[:, 0] = FIRST_POSITION_WEIGHT
    return weight_BT.flatten()


def _held_out(rows: slice, stream_BTD: Tensor) -> Tensor:
    """Which positions of a batch belong to windows that judge the ridge, [N]."""
    windows = torch.arange(rows.start, rows.stop, device=stream_BTD.device)
    return (windows % HELD_OUT == HELD_OUT - 1).repeat_interleave(stream_BTD.shape[1])


def _relative_distance(ours_BTD: Tensor, theirs_BTD: Tensor) -> float:
    """Sum over positions of the squared distance over their squared size."""
    wrong = (ours_BTD - theirs_BTD).square().sum(-1)
    return float((wrong / theirs_BTD.square().sum(-1).clamp_min(1e-12)).sum())


class InputFit:
    """The refit of the maps that read the stream through one norm: q, k, v, or gate and up."""

    def __init__(self, student: LayerWeights, block: Block) -> None:
        self.block = block
        self.norm_D = student[block.norm]
        self.biases = [student.get(f"{name}.bias") for name in block.inputs]
        self.widths = [len(student[f"{name}.weight"]) for name in block.inputs]
        self.moments = SplitMoments(len(self.norm_D), sum(self.widths), self.norm_D.device)
        self._shared = self._energy = 0.0

    def add(
        self,
        normed_ND: Tensor,
        teacher_ND: Tensor,
        targets: Sequence[Tensor],
        weight_N: Tensor,
        heldout_N: Tensor,
    ) -> None:
        """Take in a batch: the student's stream divided by its size, the teacher's normed input
        on the kept dims, the wanted output of each map, and how much each position counts."""
        input_ND = normed_ND * self.norm_D
        unbiased = [
            target if bias is None else target - bias
            for target, bias in zip(targets, self.biases, strict=True)
        ]
        self.moments.add(input_ND, torch.cat(unbiased, dim=1), weight_N, heldout_N)
        shared, energy = scale_of_norm(input_ND, _flat(teacher_ND), weight_N)
        self._shared += shared
        self._energy += energy

    def solve(self, student: LayerWeights, ridge: float | None) -> dict[str, float]:
        """Put the refitted weights and the rescaled norm into ``student``; returns the errors."""
        scale = self._shared / self._energy if self._energy else 1.0
        student[self.block.norm] = self.norm_D * scale
        self.moments.rescale_inputs(scale)
        sliced_OI = torch.cat([student[f"{name}.weight"] for name in self.block.inputs])
        refit = self.moments.refit(sliced_OI, ridge)
        parts = torch.split(refit.weight_OI, self.widths)
        for name, weight in zip(self.block.inputs, parts, strict=True):
            student[f"{name}.weight"] = weight.contiguous()
        short = "qkv" if self.block is ATTENTION else "gate_up"
        return {
            f"{short}_sliced": refit.sliced_error,
            short: refit.error,
            f"{short}_ridge": refit.ridge,
        }
