"""What a training run carries: models, data, optimizers, how far it is, and how to go on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from compress.answers import Answers, LiveAnswers, cached_answers, open_teacher
from compress.attention import choose_attention
from compress.checkpointing import TrainingState, fill, random_tensors, restore_random
from compress.data import StepData
from compress.fused import FusedLoss, Term
from compress.hidden import HiddenMatch, open_hidden_match
from compress.memory import reuse_freed_memory
from compress.optimizers import build_optimizers, optimizer_tensors, restore_optimizers
from compress.parallel import Inside, leader_says, open_split, processes, put, sum_gradients
from compress.precision import PrecisionChoice, fast_dtype
from compress.saving import load_model
from compress.settings import DistillSettings
from shearling import Progress
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
    hidden: HiddenMatch | None
    optimizers: dict[str, torch.optim.Optimizer]
    average: dict[str, Tensor] | None
    targets_facts: dict[str, Any] = field(default_factory=dict)
    step: int = 0
    seconds: float = 0.0
    running_loss: float = 0.0
    best: dict[str, float] | None = None
    first: dict[str, float] | None = None
    latest: dict[str, float] | None = None

    @property
    def student(self) -> LlamaForCausalLM:
        """The student itself; when it is split, each weight is this process's part."""
        return self.inside.model


def open_course(
    teacher_folder: Path,
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
    """Load and build everything; put a checkpoint's state back where there is one."""
    torch.manual_seed(seed)
    if device.type == "cpu":
        reuse_freed_memory()
    if checkpoint:  # what was measured then, lest a busy machine change the arithmetic now
        precision = PrecisionChoice(**checkpoint.state["precision"])
    else:
        measured = fast_dtype(device, settings.precision)
        precision = PrecisionChoice(**leader_says(measured.to_dict()))
    inside = _open_student(student_folder, device, precision)
    student = inside.model
    student.set_attn_implementation(choose_attention(device, precision.dtype, text.window))
    if settings.gradient_checkpointing:
        student.activation_checkpointing_enable()
    student.train()
    data = StepData(text, settings, seed=seed, device=device)
    teacher_config = Checkpoint(teacher_folder).config
    hidden = open_hidden_match(teacher_config, student, selection, settings.hidden)
    answers: Answers
    facts: dict[str, Any] = {}
    if settings.targets == "live":
        asked = open_teacher(teacher_folder, precision, device, text.window)
        answers = LiveAnswers(asked, precision, hidden)
    else:
        answers, facts = cached_answers(
            teacher_folder, cache / "targets", data, settings, precision, device, progress
        )
    course = Course(
        settings=settings,
        device=device,
        precision=precision,
        inside=inside,
        answers=answers,
        data=data,
        loss=_fused_loss(settings, precision),
        hidden=hidden,
        optimizers=build_optimizers(student, settings),
        average=weights_copy(student) if settings.ema else None,
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


def _fused_loss(settings: DistillSettings, precision: PrecisionChoice) -> FusedLoss:
    beta, skew = {"beta": settings.jensen_shannon_beta}, {"skew": settings.skew}
    terms = (
        Term("forward_kl", settings.forward_kl),
        Term("reverse_kl", settings.reverse_kl),
        Term("jensen_shannon", settings.jensen_shannon, beta),
        Term("skewed_kl", settings.skewed_kl, skew),
        Term("skewed_reverse_kl", settings.skewed_reverse_kl, skew),
    )
    return FusedLoss(
        # The forward KL is always there, at weight 0 if need be: it is what the log shows.
        terms=tuple(term for term in terms if term.weight or term.name == "forward_kl"),
        cross_entropy=settings.cross_entropy,
        temperature=settings.temperature,
        chunk=settings.chunk_tokens,
        dtype=precision.dtype,
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
def update_average(average: Mapping[str, Tensor], model: nn.Module, decay: float) -> None:
    """average ← decay · average + (1 - decay) · weights."""
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
        "windows_seen": course.step * course.data.step_windows,
        "metrics_bytes": metrics_bytes,
        "seconds": course.seconds,
        "running_loss": course.running_loss,
        "best": course.best,
        "best_step": course.best["step"] if course.best else -1,
        "first": course.first,
        "latest": course.latest,
        "precision": course.precision.to_dict(),
    }
    return TrainingState(step=course.step, state=state, tensors=tensors)


def restore(course: Course, checkpoint: TrainingState) -> None:
    """Put a checkpoint's state into a freshly opened course."""
    state, tensors = checkpoint.state, checkpoint.tensors
    fill(dict(course.student.named_parameters()), tensors["student"])
    restore_optimizers(course.student, course.optimizers, tensors["optimizer"])
    random = tensors["random"]
    assert not isinstance(random, Path), "random states are one file"
    restore_random(random)
    if course.average is not None:
        fill(course.average, tensors["average"])
    course.step, course.seconds = checkpoint.step, state["seconds"]
    course.running_loss = state["running_loss"]
    course.best, course.first, course.latest = state["best"], state["first"], state["latest"]
