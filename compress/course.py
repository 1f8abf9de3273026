"""What a training run carries: models, data, optimizers, how far it is, and how to go on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from compress.answers import Answers, Taught, open_answers
from compress.attention import choose_attention
from compress.checkpointing import TrainingState, fill, random_tensors, restore_random
from compress.data import StepData, vocabulary_of
from compress.fused import FusedLoss, Term
from compress.hidden import HiddenMatch, open_matches
from compress.lean import make_lean
from compress.memory import reuse_freed_memory
from compress.optimizers import (
    build_optimizers,
    optimizer_tensors,
    restore_optimizers,
    wide_products,
)
from compress.parallel import Inside, leader_says, open_split, processes, put, sum_gradients
from compress.position_clip import PositionClip
from compress.precision import PrecisionChoice, fast_dtype
from compress.saving import load_model
from compress.schedule import at_step
from compress.settings import DistillSettings, Ramp
from shearling import Progress, ShearlingError
from teachers.checkpoint import Checkpoint
from teachers.transfer_set import TransferSet


@dataclass(kw_only=True)
class Course:
    """All that the steps share: models, data, optimizers, and what has happened so far."""

    settings: DistillSettings
    device: torch.device
    precision: PrecisionChoice
    inside: Inside
    """The student's root; its passes run inside, for the case that it is split."""
    answers: Answers
    data: StepData
    loss: FusedLoss
    """The loss with its buffers; its weights and temperature are those of `loss_at`."""
    matches: tuple[HiddenMatch, ...]
    optimizers: dict[str, torch.optim.Optimizer]
    wide_muon: bool
    """Whether Muon multiplies in float32."""
    average: dict[str, Tensor] | None
    position_clip: PositionClip | None = None
    alone: bool = False
    """Whether there is no teacher."""
    targets_facts: dict[str, Any] = field(default_factory=dict)
    step: int = 0
    saved_step: int = 0
    """Of the last checkpoint, 0 where there is none."""
    seconds: float = 0.0
    running_loss: float | None = None
    """Of the steps that were taken; None before the first."""
    skipped: int = 0
    """Steps that were left out for a spike, one after the other, up to now."""
    best: dict[str, float] | None = None
    first: dict[str, float] | None = None
    latest: dict[str, float] | None = None

    @property
    def student(self) -> LlamaForCausalLM:
        """The student itself; when it is split, each weight is this process's part."""
        return self.inside.model

    def value(self, given: float | Ramp) -> float:
        """A number of the recipe as it is in this step."""
        return at_step(given, self.step, self.data.steps)

    def loss_now(self) -> FusedLoss:
        """The loss with this step's weights and temperature."""
        settings = self.settings
        return replace(
            self.loss,
            terms=tuple(
                replace(term, weight=self.value(getattr(settings, term.name)))
                for term in self.loss.terms
            ),
            cross_entropy=self.value(settings.cross_entropy),
            temperature=self.value(settings.temperature),
        )

    def weight_now(self) -> float:
        """The sum of this step's weights."""
        loss, compared = self.loss_now(), [self.value(match.weight) for match in self.matches]
        return loss.cross_entropy + sum(term.weight for term in loss.terms) + sum(compared)


def open_course(
    teachers: Sequence[Taught],
    student_folder: Path,
    text: TransferSet,
    settings: DistillSettings,
    *,
    selection: Path | None,
    seed: int,
    device: torch.device,
    cache: Path,
    checkpoint: TrainingState | None,
    progress: Progress,
) -> Course:
    """Load and build everything; put a checkpoint's state back where there is one.

    Without teachers the labels are all that is learnt. With several, layers are compared with
    those of the first.
    """
    if settings.on_policy and processes() > 1:
        raise ShearlingError(
            f"on_policy can't be used with {processes()} processes: a split student can't write.",
            hint="Set on_policy to 0, or start one process.",
        )
    torch.manual_seed(seed)
    if device.type == "cpu":
        reuse_freed_memory()
    # What was measured before, lest a busy machine change the arithmetic now; a device of another
    # kind has its own.
    known = checkpoint.state if checkpoint else {}
    known = known if known.get("device", device.type) == device.type else {}
    measured = known.get("precision") or fast_dtype(device, settings.precision).to_dict()
    precision = PrecisionChoice(**leader_says(measured))
    inside = _open_student(student_folder, device, precision)
    student = inside.model
    wide = known.get("wide_muon")
    wide = bool(leader_says(wide_products(student, settings) if wide is None else wide))
    student.set_attn_implementation(choose_attention(device, precision.dtype, text.window))
    make_lean(student)
    clip = PositionClip(student, settings.position_clip) if settings.position_clip else None
    if settings.gradient_checkpointing:
        student.activation_checkpointing_enable()
    if settings.compile:
        for layer in student.model.layers:
            layer.compile()
    student.train()
    data = StepData(text, settings, seed=seed, device=device)
    matches: tuple[HiddenMatch, ...] = ()
    if teachers:
        config = Checkpoint(teachers[0].folder).config
        matches = open_matches(config, student, selection, settings)
    vocabulary = vocabulary_of([*(teacher.folder for teacher in teachers), student_folder], text)
    answers, facts = open_answers(
        teachers,
        settings,
        data,
        matches,
        precision,
        device,
        cache / "targets",
        progress,
        vocabulary,
    )
    course = Course(
        settings=settings,
        device=device,
        precision=precision,
        inside=inside,
        answers=answers,
        data=data,
        loss=_fused_loss(settings, precision, vocabulary, device),
        matches=matches,
        optimizers=build_optimizers(student, settings, wide=wide),
        wide_muon=wide,
        average=weights_copy(student) if settings.ema else None,
        position_clip=clip,
        alone=not teachers,
        targets_facts=facts,
    )
    if checkpoint:
        restore(course, checkpoint)
    return course


def _open_student(folder: Path, device: torch.device, precision: PrecisionChoice) -> Inside:
    """The student in float32; split over the processes where there are several."""
    if processes() == 1:
        return Inside(load_model(folder, torch.float32, device))
    inside = open_split(folder, torch.float32, device, precision.dtype)
    sum_gradients(inside)
    return inside


def _fused_loss(
    settings: DistillSettings, precision: PrecisionChoice, vocabulary: int, device: torch.device
) -> FusedLoss:
    beta, skew = {"beta": settings.jensen_shannon_beta}, {"skew": settings.skew}
    arguments: dict[str, dict[str, float]] = {
        "forward_kl": {},
        "reverse_kl": {},
        "jensen_shannon": beta,
        "skewed_kl": skew,
        "skewed_reverse_kl": skew,
    }
    # The forward KL is always there, at weight 0 if need be: it is what the log shows.
    used = [name for name in arguments if getattr(settings, name) or name == "forward_kl"]
    return FusedLoss(
        terms=tuple(Term(name, 0.0, arguments[name]) for name in used),
        chunk=settings.chunk(on_cpu=device.type == "cpu"),
        dtype=precision.dtype,
        vocabulary=vocabulary,
    )


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """The weights by name, shared ones once: what safetensors can hold."""
    return {name: p.detach() for name, p in model.named_parameters()}


def weights_copy(model: nn.Module) -> dict[str, Tensor]:
    """The weights by name, in memory of their own."""
    return {name: weight.clone() for name, weight in weights_of(model).items()}


@torch.no_grad()
def put_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy weights by name into the model."""
    for name, parameter in model.named_parameters():
        put(parameter, weights[name])


@torch.no_grad()
def update_average(average: Mapping[str, Tensor], model: nn.Module, most: float, step: int) -> None:
    """average ← decay · average + (1 - decay) · weights, behind ``step`` steps (from 0).

    The decay rises with the steps up to ``most``, as min(most, (1 + step) / (10 + step)): else the
    average of a short run would be the weights that it began with. (TensorFlow's
    ExponentialMovingAverage.)
    """
    decay = min(most, (1 + step) / (10 + step))
    for name, parameter in model.named_parameters():
        average[name].lerp_(parameter, 1 - decay)


@contextmanager
def averaged(course: Course) -> Iterator[None]:
    """While open, the student carries the running average of its weights, where there is one."""
    if course.average is None:
        yield
        return
    trained = weights_copy(course.student)
    put_weights(course.student, course.average)
    yield
    put_weights(course.student, trained)


def training_state(course: Course, identity: str, metrics_bytes: int) -> TrainingState:
    """All that `restore` needs, and how long metrics.jsonl is."""
    tensors: dict[str, Mapping[str, Tensor]] = {
        "student": weights_of(course.student),
        "optimizer": optimizer_tensors(course.student, course.optimizers),
        "random": random_tensors(),
    }
    if course.average is not None:
        tensors["average"] = course.average
    state = {
        "identity": identity,
        "metrics_bytes": metrics_bytes,
        "seconds": course.seconds,
        "running_loss": course.running_loss,
        "skipped": course.skipped,
        "best": course.best,
        "best_step": course.best["step"] if course.best else -1,
        "first": course.first,
        "latest": course.latest,
        "precision": course.precision.to_dict(),
        "wide_muon": course.wide_muon,
        "device": course.student.device.type,
        "mix": course.data.mix.history if course.data.mix else None,
    }
    return TrainingState(step=course.step, state=state, tensors=tensors)


def restore(course: Course, checkpoint: TrainingState) -> None:
    """Put a checkpoint's state into a freshly opened course."""
    state, tensors = checkpoint.state, checkpoint.tensors
    fill(dict(course.student.named_parameters()), tensors["student"])
    restore_optimizers(course.student, course.optimizers, tensors["optimizer"])
    restore_random(checkpoint.whole("random"))
    if course.average is not None:
        fill(course.average, tensors["average"])
    course.step = course.saved_step = checkpoint.step
    course.seconds = state["seconds"]
    course.running_loss, course.skipped = state["running_loss"], state.get("skipped", 0)
    course.best, course.first, course.latest = state["best"], state["first"], state["latest"]
    if course.data.mix is not None:
        course.data.mix.restore(state["mix"])
