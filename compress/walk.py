"""The walk: teacher and student advance together, and each layer of the student is refitted.

Each linear map of the student learns to do what the teacher does at the same place, with the
student's own activations as inputs, so what earlier layers got wrong is seen and partly mended.
One layer's weights, the embeddings, the two residual streams and what a block's output map reads
are in memory.

Legend: B windows, T positions, N positions of a batch, E teacher hidden, D student hidden,
O outputs, K key/value heads, C teacher head dim, c student head dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.checkpointing import TrainingState
from compress.ends import Ends
from compress.layer import (
    ATTENTION,
    BLOCKS,
    MLP,
    Block,
    LayerMath,
    LayerWeights,
    alone,
    batches,
    normed,
    openings,
    read_layer,
)
from compress.reconstruct import (
    Moments,
    SplitMoments,
    final_norm_refit,
    judging,
)
from compress.settings import PruneSettings
from compress.slicing import Slicer
from compress.streams import Streams
from shearling import Progress, silent
from students.build import StudentWriter
from teachers.checkpoint import Checkpoint
from teachers.layout import EMBEDDING, FINAL_NORM, HEAD

FINAL_NORM_RIDGE = 0.01
"""The final norm has a number a hidden dim and every token to fit it, so it needs little."""


GAUGE_EVERY = 4
"""Of so many windows one tells how far the student's stream is from what it should be."""


def _flat(activations_BTD: Tensor) -> Tensor:
    return activations_BTD.reshape(-1, activations_BTD.shape[-1])


@dataclass(frozen=True, kw_only=True)
class Track:
    """Windows of one length on their way through the layers: both residual streams [B, T, E] and
    [B, T, D], and the arithmetic of that length.

    What an output map reads is made once and read twice, for its fit and behind it: ``mixed``.
    ``judges_BT`` says which positions are held out to judge the ridge, ``gauged_B`` on which
    windows the stream's error is measured.
    """

    teacher: Tensor
    student: Tensor
    mixed: Tensor
    teacher_math: LayerMath
    student_math: LayerMath
    judges_BT: Tensor
    gauged_B: Tensor

    def heldout(self, rows: slice) -> Tensor:
        """Which positions of some windows are held out, [N]."""
        return self.judges_BT[rows].flatten()


class Walk:
    """Teacher and student side by side; ``run`` takes them from the embedding to the last layer,
    ``finish`` through the last norm.

    Afterwards ``probe_logits`` holds what the student's weights, in memory and in float32, say
    about ``probe_tokens``. Between two layers ``state`` gives all that a walk needs to go on in
    another process, and ``restore`` puts it back.
    """

    def __init__(
        self,
        source: Checkpoint,
        slicer: Slicer,
        ends: Ends,
        windows_BT: Tensor,
        settings: PruneSettings,
        streams: Streams,
        writer: StudentWriter,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.source, self.settings = source, settings
        self.device, self.dtype = device, dtype
        self.slicer, self.ends = slicer, ends
        config, self.writer = writer.config, writer
        self.tracks: dict[str, Track] = {}
        if settings.refit:  # slicing looks at nothing
            widest = max(slicer.student.query_size, slicer.student.intermediate_size)
            judging_BT = judging(*windows_BT.shape)
            for name, tokens_BT, judges_BT in (
                ("windows", windows_BT, judging_BT),
                ("openings", openings(windows_BT, source.config), alone(judging_BT)),
            ):
                length = tokens_BT.shape[1]
                self.tracks[name] = Track(
                    teacher=streams.embedded(
                        f"{name}-teacher", source.tensor(EMBEDDING), tokens_BT
                    ),
                    student=streams.embedded(f"{name}-student", ends.embedding_VD, tokens_BT),
                    mixed=streams.empty(f"{name}-mixed", (*tokens_BT.shape, widest), dtype),
                    teacher_math=LayerMath(source.config, length, device, dtype),
                    student_math=LayerMath(config, length, device, dtype),
                    judges_BT=judges_BT,
                    gauged_B=(torch.arange(len(tokens_BT)) % GAUGE_EVERY == 0)
                    & (name == "windows"),
                )
        self.eps = float(config.rms_norm_eps)
        self.probe_tokens = windows_BT[:1, :64]
        self.probe_math = LayerMath(config, self.probe_tokens.shape[1], device, torch.float32)
        self.probe_stream = self._stored(ends.embedding_VD[self.probe_tokens]).to(device)
        self.probe_logits = torch.empty(0)
        self.errors: list[dict[str, float]] = []

    def _stored(self, tensor: Tensor) -> Tensor:
        """As the tensor will be read back: rounded to the stored dtype."""
        return tensor.to(self.writer.dtype).float()

    def state(self) -> TrainingState:
        """Where the walk is, the written layers safe on the disk."""
        return TrainingState(
            step=len(self.errors),
            state={"errors": self.errors, "shards": self.writer.checkpoint()},
            tensors={
                "streams": {"probe": self.probe_stream}
                | {f"{name}-teacher": track.teacher for name, track in self.tracks.items()}
                | {f"{name}-student": track.student for name, track in self.tracks.items()},
                "ends": {"norm": self.ends.norm_D},
            },
        )

    def restore(self, saved: TrainingState) -> None:
        """Go on where ``state`` was taken, with the ends and the writer that it had."""
        streams = saved.whole("streams")
        for name, track in self.tracks.items():
            track.teacher.copy_(streams[f"{name}-teacher"])
            track.student.copy_(streams[f"{name}-student"])
        self.probe_stream = streams["probe"].to(self.device)
        self.errors = list(saved.state["errors"])

    def run(self, progress: Progress = silent, between: Callable[[], None] = lambda: None) -> None:
        """Make and write the layers that are left; ``between`` is called after each of them.

        ``errors`` then holds each layer's reconstruction errors. ``finish`` does the rest.
        """
        layers = self.slicer.plan.layers
        if not self.errors:
            self.writer.restore([])  # nothing of an earlier attempt stays beside what is written
            self.writer.add(EMBEDDING, self.ends.embedding_VD)
            self._pass_dropped_layers(0, layers[0])
        for number in range(len(self.errors), len(layers)):
            progress("walk", number, len(layers))
            weights, error = self._layer(number)
            for name, weight in weights.items():
                self.writer.add(f"model.layers.{number}.{name}", weight)
            self.probe_stream = self.probe_math.layer(self.probe_stream, weights)
            self.errors.append({"layer": layers[number]} | error)
            between()

    def _layer(self, number: int) -> tuple[LayerWeights, dict[str, float]]:
        """The student's layer ``number``; both streams pass it."""
        plan = self.slicer.plan
        teacher = read_layer(self.source, plan.layers[number], self.device, dtype=None)
        student = self.slicer.layer(number, {n: w.float() for n, w in teacher.items()})
        error: dict[str, float] = {}
        if self.settings.refit:
            for block in BLOCKS:
                error |= self._fit_inputs(number, block, teacher, student)
                if block is MLP:
                    ends = [*plan.layers, self.source.shape.num_hidden_layers]
                    self._pass_dropped_layers(ends[number] + 1, ends[number + 1])
                error |= self._fit_output(block, student, self._aim(number, block))
        return {name: self._stored(weight) for name, weight in student.items()}, error

    def _fit_inputs(
        self, number: int, block: Block, teacher: LayerWeights, student: LayerWeights
    ) -> dict[str, float]:
        """Refit the maps that read the stream; the teacher's stream passes the block."""
        map_EO = torch.cat(  # no list is kept beside it: of an 8B another 200 MB
            [
                self.slicer.target(number, name, teacher[f"{name}.weight"].float().T)
                for name in block.inputs
            ],
            dim=1,
        )
        map_EO *= teacher[block.norm][:, None]
        fit = InputFit(student, block, map_EO, self.dtype)
        for track, rows in self._batches():
            before = self._read(track.teacher, rows)
            normed_BTE, parts = track.teacher_math.read(block, before, teacher)
            targets = [
                self.slicer.target(number, name, _flat(part))
                for name, part in zip(block.inputs, parts, strict=True)
            ]
            fit.add(
                self._student_normed(track, rows),
                _flat(normed_BTE),
                targets,
                track.heldout(rows).to(self.device),
            )
            written = track.teacher_math.linear(
                track.teacher_math.mix(block, parts), teacher, block.output
            )
            track.teacher[rows] = (before + written).to(track.teacher)
        near = self._ridge_before(fit.short)
        error = fit.solve(student, self.ends.stream_DE, self.settings.ridge, near)
        # What follows is fitted to the student as it will be read back.
        student.update({name: self._stored(weight) for name, weight in student.items()})
        return error

    def _pass_dropped_layers(self, first: int, upto: int) -> None:
        """Take the teacher through layers ``first`` to ``upto - 1``, which the student lacks.

        The down projection before the gap is then fitted to the stream behind it.
        """
        if self.tracks:
            for layer in range(first, upto):
                weights = read_layer(self.source, layer, self.device, dtype=None)
                for track in self.tracks.values():
                    track.teacher_math.advance(track.teacher, weights)

    def _fit_output(
        self, block: Block, student: LayerWeights, map_DE: Tensor | None
    ) -> dict[str, float]:
        """Refit the map that writes into the stream; the student's stream passes the block.

        The target is the teacher's stream minus the student's, so earlier errors are corrected:
        the kept dims of the teacher's, or what ``map_DE`` makes of all of them.
        """

        def wanted_of(stream_BTE: Tensor) -> Tensor:
            return self.slicer.kept(stream_BTE) if map_DE is None else stream_BTE @ map_DE.T

        weight_name, bias = f"{block.output}.weight", student.get(f"{block.output}.bias")
        sliced_OI = student[weight_name]
        moments = SplitMoments(sliced_OI.shape[1], sliced_OI.shape[0], self.device, self.dtype)
        inputs = sliced_OI.shape[1]
        for track, rows in self._batches():
            stream = self._read(track.student, rows)
            _, parts = track.student_math.read(block, stream, student)
            read = track.student_math.mix(block, parts)
            track.mixed[rows, :, :inputs] = read.to(track.mixed)
            wanted = wanted_of(self._read(track.teacher, rows))
            target_NO = _flat(wanted - stream)
            if bias is not None:
                target_NO = target_NO - bias
            # Relative errors count: the next norm divides each position by its size. A position
            # that the sliced map makes a sink of (two of 4,096 were) counts by the size that it
            # has then: by its own, those few would outweigh all and the true sink be given up.
            sliced = stream + track.student_math.linear(read, student, block.output)
            weight_N = 1 / _larger_energy(sliced, wanted).flatten()
            moments.add(_flat(read), target_NO, weight_N, track.heldout(rows).to(self.device))
        short = block.output.rpartition(".")[2]
        near = self._ridge_before(short)
        refit = moments.refit(sliced_OI, self.settings.ridge, near=near)
        student[weight_name] = self._stored(refit.weight_OI)
        gauge = Gauge()
        for track, rows in self._batches():
            stream = self._read(track.student, rows)
            read = track.mixed[rows, :, :inputs].to(self.device)
            after = stream + track.student_math.linear(read, student, block.output)
            track.student[rows] = after.to(track.student)
            gauged_B = track.gauged_B[rows]
            if bool(gauged_B.any()):
                gauge.add(after[gauged_B], wanted_of(self._read(track.teacher, rows)[gauged_B]))
        return {
            f"{short}_sliced": refit.sliced_error,
            short: refit.error,
            f"{short}_ridge": refit.ridge,
            f"stream_after_{short}": gauge.wrong(),
            **(gauge.sink() if block is MLP else {}),
        }

    def _ridge_before(self, short: str) -> float | None:
        """The ridge of the same map a layer earlier: that of this layer is seldom far from it."""
        given = self.settings.ridge is not None
        return None if given or not self.errors else self.errors[-1][f"{short}_ridge"]

    def _read(self, stream_BTD: Tensor, rows: slice) -> Tensor:
        """Some windows of a stream, where they are computed, in float32."""
        return stream_BTD[rows].to(self.device, torch.float32)

    def _student_normed(self, track: Track, rows: slice) -> Tensor:
        return _flat(normed(self._read(track.student, rows), self.eps))

    def _batches(self) -> Iterator[tuple[Track, slice]]:
        """Some windows of a track after another."""
        for track in self.tracks.values():
            for rows in batches(track.teacher):
                yield track, rows

    def _aim(self, number: int, block: Block) -> Tensor | None:
        """What the stream behind a block should be of the teacher's; None: its kept dims."""
        if block is not MLP:
            number -= 1  # attention of a layer still aims where the layer before it did
        layers = len(self.slicer.plan.layers)
        return self.ends.target_map(number, layers)

    def finish(self, progress: Progress = silent) -> None:
        """The final norm and, untied, the output head; then the folder is complete."""
        ends = self.ends
        if not self.slicer.student.tie_word_embeddings:
            self.writer.add(HEAD, ends.head_VD)
        norm_D = self._fit_final_norm() if self.settings.refit else ends.norm_D
        self.writer.add(FINAL_NORM, norm_D)
        last_BTD = normed(self.probe_stream, self.eps) * self._stored(norm_D)
        self.probe_logits = last_BTD @ self._stored(ends.head_VD).to(self.device).T
        self.writer.finish()
        progress("walk", len(self.errors), len(self.errors))

    def _fit_final_norm(self) -> Tensor:
        ends = self.ends
        moments = Moments.zeros(len(ends.norm_D), len(ends.norm_E), self.device, self.dtype)
        for track, rows in self._batches():
            before = self._read(track.teacher, rows)
            target_NE = _flat(normed(before, track.teacher_math.eps) * ends.norm_E)
            moments.add(self._student_normed(track, rows), target_NE, None)
        return final_norm_refit(
            moments.gram_II,
            moments.cross_IO,
            ends.metric_DD,
            ends.metric_DE,
            ends.norm_D,
            FINAL_NORM_RIDGE,
        )


def _larger_energy(one_BTD: Tensor, other_BTD: Tensor) -> Tensor:
    """The larger of two streams' squared sizes at each position, [B, T]."""
    energies = (stream.square().sum(-1) for stream in (one_BTD, other_BTD))
    return torch.maximum(*energies).clamp_min(1e-12)


class Gauge:
    """How far the student's stream is from what it should be, and how large both are at the first
    position.

    Where the first is large, heads that have nothing to say attend there: an attention sink, made
    by massive activations (Sun et al. 2024, arXiv:2402.17762). It is one position of hundreds, so
    no mean over positions tells that a student has lost it.
    """

    def __init__(self) -> None:
        self._wrong = self._ours = self._theirs = self._others = 0.0
        self._windows = self._positions = 0

    def add(self, ours_BTD: Tensor, theirs_BTD: Tensor) -> None:
        """Take in a batch of the student's stream, and what it should be of the teacher's."""
        wrong_BT = (ours_BTD - theirs_BTD).square().sum(-1)
        self._wrong += float((wrong_BT / _larger_energy(ours_BTD, theirs_BTD)).sum())
        self._ours += float(ours_BTD[:, 0].square().sum())
        self._theirs += float(theirs_BTD[:, 0].square().sum())
        self._others += float(theirs_BTD[:, 1:].square().sum())
        self._windows += len(theirs_BTD)
        self._positions += wrong_BT.numel()

    def wrong(self) -> float:
        """The mean over positions of the squared distance over the larger squared size."""
        return self._wrong / self._positions

    def sink(self) -> dict[str, float]:
        """``sink``: the teacher's first position over its others; ``sink_kept``: the student's
        over the teacher's; both of root mean squares."""
        others = self._others / max(self._positions - self._windows, 1)
        return {
            "sink": math.sqrt(self._theirs / self._windows / max(others, 1e-30)),
            "sink_kept": math.sqrt(self._ours / max(self._theirs, 1e-30)),
        }


class InputFit:
    """The refit of the maps that read the stream through one norm: q, k, v, or gate and up.

    What the maps should say is a linear map of what the teacher's norm reads, ``map_EO``. So only
    the products of the two streams are added up, which are fewer than those with all outputs.
    """

    def __init__(
        self, student: LayerWeights, block: Block, map_EO: Tensor, dtype: torch.dtype
    ) -> None:
        self.block, self.map_EO = block, map_EO
        self.short = "qkv" if block is ATTENTION else "gate_up"
        self.norm_D = student[block.norm]
        self.biases = [student.get(f"{name}.bias") for name in block.inputs]
        self.moments = SplitMoments(len(self.norm_D), len(map_EO), self.norm_D.device, dtype)

    def add(
        self, student_ND: Tensor, teacher_NE: Tensor, targets: Sequence[Tensor], heldout_N: Tensor
    ) -> None:
        """Take in a batch: both streams divided by their size, the wanted output of each map, and
        which positions judge."""
        energy_N = torch.zeros_like(student_ND[:, 0])
        for target, bias in zip(targets, self.biases, strict=True):
            energy_N += (target if bias is None else target - bias).square().sum(1)
        self.moments.add(student_ND * self.norm_D, teacher_NE, None, heldout_N, energy_N)

    def solve(
        self, student: LayerWeights, stream_DE: Tensor, ridge: float | None, near: float | None
    ) -> dict[str, float]:
        """Put the refitted weights and the rescaled norm into ``student``; returns the errors.

        An RMSNorm divides by the size of the channels that are left, so its weights take the
        change of scale: they bring the student's stream nearest to ``stream_DE`` times the
        teacher's. ``ridge`` and ``near`` as of ``SplitMoments.refit``.
        """
        scale = self.moments.scale_toward(self.norm_D[:, None] * stream_DE)
        student[self.block.norm] = self.norm_D * scale
        self.moments.rescale_inputs(scale)
        sliced = [student[f"{name}.weight"] for name in self.block.inputs]
        refit = self.moments.refit(torch.cat(sliced), ridge, self.map_EO, near)
        parts = torch.split(refit.weight_OI, [len(weight_OI) for weight_OI in sliced])
        for name, weight in zip(self.block.inputs, parts, strict=True):
            student[f"{name}.weight"] = weight.contiguous()
        return {
            f"{self.short}_sliced": refit.sliced_error,
            self.short: refit.error,
            f"{self.short}_ridge": refit.ridge,
        }
