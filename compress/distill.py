"""Teach the student: windows of text go through both models, and the student learns to agree.

The way through this file: `distill` opens everything and ends everything, `_train` runs the
steps, `train_step` is one step. The losses are in `compress.losses`, the teacher's and student's
hidden states meet in `compress.hidden`, evaluation on held-out windows is `evaluate`.

Legend of shape suffixes: B windows, T positions, N positions that count, V vocabulary,
D student hidden, E teacher hidden.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from compress import checkpointing
from compress.answers import Answers, LiveAnswers, cached_answers, head, open_teacher, trunk
from compress.attention import choose_attention
from compress.checkpointing import TrainingState, load_checkpoint, save_checkpoint
from compress.data import StepData
from compress.fused import Comparison, FusedLoss, Term, compare
from compress.hidden import HiddenMatch, hidden_outputs, open_hidden_match
from compress.interrupts import StopRequest
from compress.memory import reuse_freed_memory
from compress.optimizers import (
    build_optimizers,
    optimizer_tensors,
    restore_optimizers,
    set_learning_rate,
)
from compress.precision import PrecisionChoice, fast_dtype
from compress.saving import load_model, save_student
from compress.schedule import warmup_then_cosine
from compress.settings import DistillSettings
from shearling import Progress, ShearlingError, sha256_of_json, silent
from teachers.checkpoint import Checkpoint
from teachers.fetch import default_cache
from teachers.transfer_set import TransferSet

OnMetrics = Callable[[dict[str, Any]], None]

_EXPLODED = 4.0
"""A loss this many times its running mean is taken for divergence, not for noise."""
_RUNNING = 0.9
_SETTLED = 10
"""Steps after which the running mean of the loss is trusted."""


@dataclass(kw_only=True)
class Course:
    """All that the steps share: models, data, optimizers, and what has happened so far."""

    settings: DistillSettings
    device: torch.device
    precision: PrecisionChoice
    student: LlamaForCausalLM
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


def distill(
    teacher: Path,
    student: Path,
    out: Path,
    transfer_set: Path,
    settings: DistillSettings,
    *,
    selection: Path | None = None,
    seed: int = 0,
    device: str = "cpu",
    cache: Path | None = None,
    progress: Progress = silent,
    on_metrics: OnMetrics | None = None,
) -> dict[str, Any]:
    """Distil ``teacher`` into ``student`` (both Hugging Face folders); give the stage's summary.

    Writes ``out/model`` (the student's dtype, its tokenizer), ``out/metrics.jsonl`` and, while it
    runs, ``out/resume``: called again with the same arguments it goes on from there, on one
    thread to the same bits. The caller removes ``out/resume`` when it no longer needs it.
    ``cache`` is where kept targets lie, by default the cache folder of downloads.

    Raises:
        ShearlingError: the inputs don't fit together, or the loss became NaN or exploded.
        KeyboardInterrupt: after SIGINT or SIGTERM, when the step was finished and saved.
    """
    identity = sha256_of_json([settings.model_dump(exclude={"save_every_seconds"}), seed])
    checkpoint = load_checkpoint(out / "resume")
    if checkpoint and checkpoint.state["identity"] != identity:
        raise ShearlingError(
            f"{out / 'resume'} holds a checkpoint of other settings.",
            hint=f"Delete {out / 'resume'} to start this stage from its beginning.",
        )
    course = _open_course(
        teacher,
        student,
        TransferSet(transfer_set),
        settings,
        selection,
        seed,
        device,
        checkpoint,
        cache or default_cache(),
        progress,
    )
    with StopRequest() as stop, _open_metrics(out, checkpoint) as metrics:
        _train(course, out, metrics, stop, identity, progress, on_metrics)
    return _finish(course, student, out)


def _open_course(
    teacher_folder: Path,
    student_folder: Path,
    text: TransferSet,
    settings: DistillSettings,
    selection: Path | None,
    seed: int,
    device_name: str,
    checkpoint: TrainingState | None,
    cache: Path,
    progress: Progress,
) -> Course:
    """Load and build everything; put a checkpoint's state back where there is one."""
    device = torch.device(device_name)
    torch.manual_seed(seed)
    if device.type == "cpu":
        reuse_freed_memory()
    if checkpoint:  # what was measured then, lest a busy machine change the arithmetic now
        precision = PrecisionChoice(**checkpoint.state["precision"])
    else:
        precision = fast_dtype(device, settings.precision)
    student = load_model(student_folder, torch.float32, device)
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
        teacher = open_teacher(teacher_folder, precision, device, text.window)
        answers = LiveAnswers(teacher, precision, hidden)
    else:
        answers, facts = cached_answers(
            teacher_folder, cache / "targets", data, settings, precision, device, progress
        )
    course = Course(
        settings=settings,
        device=device,
        precision=precision,
        student=student,
        answers=answers,
        data=data,
        loss=_fused_loss(settings, precision),
        hidden=hidden,
        optimizers=build_optimizers(student, settings),
        average=_weights_copy(student) if settings.ema else None,
        targets_facts=facts,
    )
    if checkpoint:
        _restore(course, checkpoint)
    return course


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


# --- the steps -------------------------------------------------------------------------------


def _train(
    course: Course,
    out: Path,
    metrics: TextIO,
    stop: StopRequest,
    identity: str,
    progress: Progress,
    on_metrics: OnMetrics | None,
) -> None:
    """Run the steps that are left, with evaluations, checkpoints and lines between them."""
    settings, steps = course.settings, course.data.steps

    def log(line: dict[str, Any]) -> None:
        metrics.write(json.dumps(line) + "\n")
        metrics.flush()
        if on_metrics:
            on_metrics(line)

    def save() -> None:
        save_checkpoint(out / "resume", _checkpoint(course, identity, metrics.tell()))

    started, saved = time.monotonic() - course.seconds, time.monotonic()
    if course.step == 0:
        log(_evaluate_and_keep(course, out))
    while course.step < steps:
        line = train_step(course)
        course.seconds = time.monotonic() - started
        log({**line, "seconds": round(course.seconds, 3)})
        progress("distill", course.step, steps, **_shown(line))
        every = settings.evaluate_every
        if course.step == steps or (every and course.step % every == 0):
            log(_evaluate_and_keep(course, out))
        due = time.monotonic() - saved >= settings.save_every_seconds
        if stop.asked or (due and course.step < steps):
            course.seconds = time.monotonic() - started
            save()
            saved = time.monotonic()
        if stop.asked:
            raise KeyboardInterrupt
    course.seconds = time.monotonic() - started


def train_step(course: Course) -> dict[str, Any]:
    """One optimizer step: forward, loss, backward, clip, step, log. Gives the line for the log."""
    started = time.perf_counter()
    settings, student = course.settings, course.student
    batches = course.data.step(course.step)
    counted = {
        "positions": sum(batch.positions for batch in batches),
        "labelled": sum(batch.labelled for batch in batches),
    }
    sums: dict[str, Tensor] = {}

    for batch in batches:
        targets, taught = course.answers.targets(batch)
        with hidden_outputs(student, course.hidden, "student") as learnt:
            student_ND = trunk(student, batch, course.precision)
        loss, parts = course.loss(student_ND, head(student), targets, batch.labels_N, **counted)
        if course.hidden:
            parts["hidden"] = course.hidden.loss(learnt, taught, batch.mask_BT)
            loss = loss + settings.hidden.weight * parts["hidden"] / counted["positions"]
        parts["loss"] = loss
        loss.backward()  # type: ignore[no-untyped-call]
        for name, part in parts.items():
            sums[name] = sums.get(name, torch.zeros_like(part)) + part.detach()

    norm = torch.nn.utils.clip_grad_norm_(student.parameters(), settings.clip)
    line = _line(course, sums, counted, norm.item())  # .item(): the one wait for the device
    _refuse_divergence(course, line)
    set_learning_rate(course.optimizers, line["learning_rate"])
    for optimizer in course.optimizers.values():
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    if course.average is not None:
        _update_average(course.average, student, settings.ema)

    course.step += 1
    line["tokens_per_second"] = round(course.data.step_tokens / (time.perf_counter() - started), 2)
    return line


def _line(
    course: Course, sums: Mapping[str, Tensor], counted: Mapping[str, int], norm: float
) -> dict[str, Any]:
    settings, data = course.settings, course.data
    numbers = {name: value.item() for name, value in sums.items()}
    line: dict[str, Any] = {
        "step": course.step + 1,
        "steps": data.steps,
        "tokens": (course.step + 1) * data.step_tokens,
        "loss": numbers.pop("loss"),
        "cross_entropy": numbers.pop("cross_entropy") / max(counted["labelled"], 1),
    }
    line |= {name: value / max(counted["positions"], 1) for name, value in numbers.items()}
    line["learning_rate"] = warmup_then_cosine(
        course.step,
        data.steps,
        peak=settings.learning_rate,
        warmup=settings.warmup,
        final=settings.final_learning_rate,
    )
    line["gradient_norm"] = norm
    return line


def _shown(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line that a progress display has room for."""
    hidden = {"step", "steps", "tokens", "gradient_norm"}
    return {name: value for name, value in line.items() if name not in hidden}


def _refuse_divergence(course: Course, line: Mapping[str, Any]) -> None:
    """Stop before the weights are touched when the loss is no number or far above its mean."""
    loss, step = line["loss"], line["step"]
    remedy = (
        f"Lower learning_rate (now {course.settings.learning_rate:g}) or clip "
        f"(now {course.settings.clip:g}), or lengthen warmup (now {course.settings.warmup:g})"
    )
    if not math.isfinite(loss) or not math.isfinite(line["gradient_norm"]):
        raise ShearlingError(
            f"The loss became {loss} with a gradient of norm {line['gradient_norm']} "
            f"in step {step}.",
            hint=f"{remedy}, or set precision to float32. The last good checkpoint was kept.",
        )
    if course.step >= _SETTLED and loss > _EXPLODED * course.running_loss:
        raise ShearlingError(
            f"The loss jumped from about {course.running_loss:.3g} to {loss:.3g} in step {step}.",
            hint=f"{remedy}. The last good checkpoint was kept.",
        )
    share = _RUNNING if course.step else 0.0
    course.running_loss = share * course.running_loss + (1 - share) * loss


# --- evaluation ------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(course: Course) -> dict[str, float]:
    """KL to the teacher, perplexity, and how often the first choices agree, on held-out windows."""
    student, total = course.student, None
    student.eval()
    for number, batch in enumerate(course.data.heldout()):
        part = compare(
            trunk(student, batch, course.precision),
            head(student),
            course.answers.heldout(number, batch),
            batch.labels_N,
            course.loss,
        )
        total = part if total is None else total + part
    student.train()
    assert total is not None, "a transfer set has held-out windows"
    return _evaluation(total)


def _evaluation(total: Comparison) -> dict[str, float]:
    labelled, positions = max(total.labelled, 1), max(total.positions, 1)
    return {
        "heldout_kl": total.forward_kl / positions,
        "heldout_perplexity": math.exp(min(total.cross_entropy / labelled, 700.0)),
        "heldout_top1_agreement": total.agreements / positions,
        "heldout_teacher_perplexity": math.exp(min(total.teacher_cross_entropy / labelled, 700.0)),
    }


def _evaluate_and_keep(course: Course, out: Path) -> dict[str, Any]:
    """Evaluate the weights that would be kept; keep them aside when they are the best so far."""
    with _averaged(course):
        numbers = evaluate(course)
        course.latest = {"step": course.step, **numbers}
        course.first = course.first or course.latest
        if course.best is None or numbers["heldout_kl"] < course.best["heldout_kl"]:
            course.best = course.latest
            # The start and the end need no copy: one is the input, the other is in memory.
            if 0 < course.step < course.data.steps and course.settings.keep == "best":
                checkpointing.save_best(out / "resume", course.step, _weights(course.student))
    tokens = course.step * course.data.step_tokens
    return {"step": course.step, "tokens": tokens, **numbers}


# --- weights, checkpoints, the end ------------------------------------------------------------


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights by name, shared ones once: what safetensors can hold."""
    return {name: p.detach() for name, p in model.named_parameters()}


def _weights_copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in _weights(model).items()}


@torch.no_grad()
def _put_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(weights[name])


@torch.no_grad()
def _update_average(average: Mapping[str, Tensor], model: nn.Module, decay: float) -> None:
    """average ← decay · average + (1 - decay) · weights."""
    for name, parameter in model.named_parameters():
        average[name].lerp_(parameter, 1 - decay)


class _averaged:
    """While open, the student carries the running average of its weights, where there is one."""

    def __init__(self, course: Course) -> None:
        self.course = course

    def __enter__(self) -> None:
        self._swap()

    def __exit__(self, *_: object) -> None:
        self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self.course.student.named_parameters():
            if self.course.average is not None:
                kept = parameter.detach().clone()
                parameter.copy_(self.course.average[name])
                self.course.average[name].copy_(kept)


def _checkpoint(course: Course, identity: str, metrics_bytes: int) -> TrainingState:
    tensors: dict[str, Mapping[str, Tensor]] = {
        "student": _weights(course.student),
        "optimizer": optimizer_tensors(course.student, course.optimizers),
        "random": checkpointing.random_tensors(),
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


def _restore(course: Course, checkpoint: TrainingState) -> None:
    state, tensors = checkpoint.state, checkpoint.tensors
    _put_weights(course.student, tensors["student"])
    restore_optimizers(course.student, course.optimizers, tensors["optimizer"])
    checkpointing.restore_random(tensors["random"])
    if course.average is not None:
        for name, weight in tensors["average"].items():
            course.average[name].copy_(weight)
    course.step, course.seconds = checkpoint.step, state["seconds"]
    course.running_loss = state["running_loss"]
    course.best, course.first, course.latest = state["best"], state["first"], state["latest"]


def _open_metrics(out: Path, checkpoint: TrainingState | None) -> TextIO:
    """Open metrics.jsonl, cut to where the checkpoint was written; later lines come again."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "metrics.jsonl"
    path.touch()
    metrics = path.open("r+", encoding="utf-8")
    metrics.truncate(checkpoint.state["metrics_bytes"] if checkpoint else 0)
    metrics.seek(0, 2)
    return metrics


def _finish(course: Course, student: Path, out: Path) -> dict[str, Any]:
    """Put the weights to be kept into the student, save it, and give the summary."""
    assert course.best, "the end was evaluated"
    assert course.latest, "the end was evaluated"
    if course.average is not None:
        _put_weights(course.student, course.average)
    kept = course.best if course.settings.keep == "best" else course.latest
    if kept["step"] == 0:  # the training only made it worse
        _put_weights(course.student, _weights(load_model(student, torch.float32, course.device)))
    elif kept["step"] != course.step:
        best = checkpointing.load_best(out / "resume", int(kept["step"]))
        _put_weights(course.student, best)
    save_student(course.student, student, out / "model")
    tokens = course.step * course.data.step_tokens
    return {
        "steps": course.step,
        "tokens": tokens,
        "seconds": round(course.seconds, 3),
        "tokens_per_second": round(tokens / max(course.seconds, 1e-9), 2),
        "parameters": sum(p.numel() for p in course.student.parameters()),
        "precision": course.precision.to_dict(),
        "heldout_start": course.first,
        "heldout_end": course.latest,
        "heldout_best": course.best,
        "kept_step": kept["step"],
        **({"targets": course.targets_facts} if course.targets_facts else {}),
    }
