"""Teach the student: windows of text go through both models, and the student learns to agree.

The way through this file: `distill` opens everything and ends everything, `_train` runs the
steps, `train_step` is one step, `evaluate` measures on held-out windows. The losses are in
`compress.losses` and `compress.fused`, the teacher speaks through `compress.answers`, what the
steps share is a `compress.course.Course`.

Legend of shape suffixes: N positions that count, D student hidden.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial, reduce
from operator import add
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from compress.answers import Taught, first_teacher, head, trunk
from compress.checkpointing import (
    best_name,
    fill,
    load_best,
    load_checkpoint,
    save_best,
    save_checkpoint,
)
from compress.course import (
    Course,
    averaged,
    open_course,
    put_weights,
    training_state,
    update_average,
    weights_of,
)
from compress.data import Batch
from compress.fused import Comparison, compare
from compress.hidden import Collected, hidden_outputs
from compress.interrupts import StopRequest
from compress.losses import LiveAnswer, LiveTargets, Targets
from compress.on_policy import continued
from compress.optimizers import set_learning_rate
from compress.parallel import (
    agreed,
    leader_says,
    leads,
    own_device,
    processes,
    put,
    total,
    whole,
)
from compress.saving import save_student
from compress.schedule import warmup_then_cosine
from compress.selection import mapping_fingerprint
from compress.settings import DistillSettings, deciding
from shearling import Progress, ShearlingError, disk_errors, sha256_of_json, silent, sync
from teachers.checkpoint import Checkpoint
from teachers.fetch import default_cache
from teachers.transfer_set import TransferSet

OnMetrics = Callable[[dict[str, Any]], None]

_EXPLODED = 4.0
"""A loss this many times its running mean is taken for divergence, not for noise."""
_MANY_POSITIONS = 64
"""Of fewer positions that count, a mean may lie further off before it is divergence."""
_NOTICEABLE = 0.1
"""A loss below this many nats a token is no divergence, however small it was before."""
_NEAR = 0.25
"""A held-out KL that is this small may grow several times over without divergence."""
_RUNNING = 0.9
_SETTLED = 10
"""Steps after which the running mean of the loss is trusted."""
_SAVING_PART = 20
"""Between two checkpoints lies this many times the seconds that the last one took."""
_SPIKES_IN_A_ROW = 5
"""Steps that may be left out one after the other: more is divergence."""


def distill(
    teacher: Path | None,
    student: Path,
    out: Path,
    transfer_set: Path,
    settings: DistillSettings,
    *,
    teachers: Sequence[Taught] = (),
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
    ``cache`` is where kept targets lie, by default the cache folder of downloads. ``teachers``,
    where given, are mixed, and ``teacher`` must be the first of them. Without any teacher the
    student learns the labels alone.

    Raises:
        ShearlingError: the inputs don't fit together, or the loss became NaN or exploded.
        KeyboardInterrupt: after SIGINT or SIGTERM, when the step was finished and saved.
    """
    text = TransferSet(transfer_set)
    taught_by = teachers or ([Taught(teacher)] if teacher else [])
    found = _identity(taught_by, student, text, settings, selection, seed) if leads() else None
    identity = leader_says(found, patiently=True)  # it hashes large files
    if identity is None:  # rank 0 failed, or was told to stop
        raise KeyboardInterrupt
    checkpoint = load_checkpoint(out / "resume")
    if checkpoint and checkpoint.state["identity"] != identity:
        raise ShearlingError(
            f"{out / 'resume'} holds a checkpoint of other settings, models or text.",
            hint=f"Delete {out / 'resume'} to start this stage from its beginning.",
        )
    course = open_course(
        taught_by,
        student,
        text,
        settings,
        selection=selection,
        seed=seed,
        device=own_device(device),
        cache=cache or default_cache(),
        checkpoint=checkpoint,
        progress=progress if leads() else silent,
    )
    written = checkpoint.state["metrics_bytes"] if checkpoint else 0
    del checkpoint  # a second student and optimizer, mapped from files that the next one replaces
    with disk_errors(out):
        with StopRequest() as stop, _open_metrics(out, written) as metrics:
            _train(course, out, metrics, stop, identity, progress, on_metrics)
        # Not inside: no step follows that would look at `stop`, so Ctrl-C acts at once here.
        return _finish(course, student, out)


def _identity(
    teachers: Sequence[Taught],
    student: Path,
    text: TransferSet,
    settings: DistillSettings,
    selection: Path | None,
    seed: int,
) -> str:
    """A hash of all that results depend on, models and text by their contents."""
    compares = settings.hidden.weight != 0 or settings.attention.weight != 0
    return sha256_of_json(
        [
            deciding(settings, DistillSettings),
            seed,
            [[Checkpoint(each.folder).fingerprint(), each.weight] for each in teachers],
            Checkpoint(student).fingerprint(),
            text.facts["sha256"],
            mapping_fingerprint(selection) if selection and compares else None,
        ]
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
        if not leads():
            return
        metrics.write(json.dumps(line) + "\n")
        metrics.flush()
        if on_metrics:
            on_metrics(line)

    def save() -> None:
        if leads():
            sync(out / "metrics.jsonl")  # before the checkpoint that counts its bytes
        save_checkpoint(out / "resume", training_state(course, identity, metrics.tell()))
        course.saved_step = course.step

    started, saving = time.monotonic() - course.seconds, SavingTimes(settings.save_every_seconds)
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
        # At the end too: writing and opening the model may fail, and then nothing is trained anew.
        due = saving.due(last=course.step == steps)
        asked, due = agreed(stop.asked, leads() and due)
        if asked or due:
            course.seconds = time.monotonic() - started
            with saving:
                save()
        if asked:
            raise KeyboardInterrupt
    course.seconds = time.monotonic() - started


class SavingTimes:
    """When a checkpoint is due: every so many seconds, or later where saving would take more than
    a twentieth of the time (an 8B's state has 100 GB). Entered while one is saved."""

    def __init__(self, every_seconds: float) -> None:
        self.every = self._wait = every_seconds
        self._since = time.monotonic()

    def due(self, last: bool = False) -> bool:
        """Whether it is time; behind the last step however long saving takes."""
        return time.monotonic() - self._since >= (self.every if last else self._wait)

    def __enter__(self) -> None:
        self._since = time.monotonic()

    def __exit__(self, *_: object) -> None:
        took, self._since = time.monotonic() - self._since, time.monotonic()
        if self.every:  # 0 asks for one after every step
            self._wait = max(self.every, _SAVING_PART * took)


def train_step(course: Course) -> dict[str, Any]:
    """One optimizer step: forward, loss, backward, clip, step, log. Gives the line for the log."""
    started = time.perf_counter()
    settings, student = course.settings, course.student
    batches = _batches(course)
    counted = _counted(batches)
    sums: dict[str, Tensor] = {}

    for batch in batches:
        targets, taught = course.answers.targets(batch)
        # Inside: a split student has its head, and its gradients their way back, only there.
        loss, parts = course.inside(partial(_losses, course, batch, targets, taught, counted))
        loss.backward()
        for name, part in parts.items():
            sums[name] = sums.get(name, torch.zeros_like(part)) + part.detach()

    norm = whole(torch.nn.utils.clip_grad_norm_(student.parameters(), settings.clip))
    sums = {name: total(part) for name, part in sums.items()}
    line = _line(course, sums, counted, norm.item())  # .item(): the one wait for the device
    skipped = _is_spike(course, line, counted["positions"])
    set_learning_rate(course.optimizers, line["learning_rate"])
    for optimizer in course.optimizers.values():
        if not skipped:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    if course.average is not None and not skipped:
        update_average(course.average, student, settings.ema, course.step)

    course.step += 1
    line["tokens_per_second"] = round(course.data.step_tokens / (time.perf_counter() - started), 2)
    if skipped:
        line = {name: _finite(value) for name, value in line.items()} | {"skipped": True}
    return line


def _finite(value: Any) -> Any:
    """JSON has no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _batches(course: Course) -> list[Batch]:
    """The step's micro-batches, some of their text written by a model where that is wanted."""
    batches, settings = course.data.step(course.step), course.settings
    if not settings.on_policy:
        return batches
    by_teacher = settings.on_policy_writer == "teacher"
    return [
        continued(
            first_teacher(course.answers) if by_teacher else course.student,
            batch,
            share=settings.on_policy,
            temperature=settings.on_policy_temperature,
            seed=[course.data.seed, course.step, number],
            precision=course.precision,
            vocabulary=course.loss.vocabulary,
        )
        for number, batch in enumerate(batches)
    ]


def _counted(batches: list[Batch]) -> dict[str, int]:
    """What the losses' sums are divided by: the whole step's positions, of all processes."""
    counts = [sum(b.positions for b in batches), sum(b.labelled for b in batches)]
    positions, labelled = total(torch.tensor(counts)).tolist()
    return {"positions": positions, "labelled": labelled}


def _losses(
    course: Course,
    batch: Batch,
    targets: Targets,
    taught: Collected,
    counted: Mapping[str, int],
    student: LlamaForCausalLM,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The student's part of the step's loss on one micro-batch, and each term's sum."""
    if course.position_clip is not None:
        course.position_clip.expect(batch)
    with hidden_outputs(student, course.matches, "student") as learnt:
        student_ND = trunk(student, batch, course.precision)
    loss, parts = course.loss_now()(student_ND, head(student), targets, batch.labels_N, **counted)
    for match in course.matches:
        part = match.loss(learnt[match.place], taught[match.place], batch)
        parts[match.place] = part
        loss = loss + course.value(match.weight) * part / max(counted["positions"], 1)
    return loss, {**parts, "loss": loss}


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
    if course.alone:
        numbers = {}  # there is no teacher to be far from
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


def _too_high(settings: DistillSettings) -> str:
    """What to lower where training diverges: first what no published recipe has above 1."""
    suspects = ("embedding_learning_rate", "weight_decay")
    unusual = [name for name in suspects if getattr(settings, name) > 1]
    *names, last = [
        f"{name} (now {getattr(settings, name):g})" for name in (*unusual, "learning_rate", "clip")
    ]
    return f"{', '.join(names)} or {last}"


def _is_spike(course: Course, line: Mapping[str, Any], positions: int) -> bool:
    """Whether the step is to be left out: its loss is no number, or far above its mean.

    Called before the weights are touched.

    Raises:
        ShearlingError: where the recipe says stop, or too many steps in a row are like that.
    """
    mean, usual = _mean_loss(course, line), course.running_loss
    what = _what_is_wrong(course, line, mean, positions)
    if what is None:
        course.running_loss = mean if usual is None else usual + (1 - _RUNNING) * (mean - usual)
        course.skipped = 0
        return False
    course.skipped += 1
    if course.settings.spikes == "skip" and course.skipped <= _SPIKES_IN_A_ROW:
        return True
    raise ShearlingError(
        what + (f" So it was in {course.skipped} steps in a row." if course.skipped > 1 else ""),
        hint=_after_divergence(course),
    )


def _after_divergence(course: Course) -> str:
    """What to change, what the same settings do, and what of the work is left."""
    settings, saved = course.settings, course.saved_step
    best = int(course.best["step"]) if course.best and settings.keep == "best" else 0
    said = [
        f"Lower {_too_high(settings)}, or lengthen warmup (now {settings.warmup:g}), or set "
        "precision to float32; with other settings the stage starts anew.",
        f"With the same ones it goes on behind step {saved}, whose checkpoint was kept."
        if saved
        else "No checkpoint had been written yet (see save_every_seconds).",
    ]
    if best:
        said.append(
            f"The weights of step {best}, the best on held-out text, lie in the stage's folder as "
            f"resume/{best_name(best)}."
        )
    return " ".join(said)


def _what_is_wrong(
    course: Course, line: Mapping[str, Any], mean: float, positions: int
) -> str | None:
    loss, norm, step = line["loss"], line["gradient_norm"], line["step"]
    if not math.isfinite(loss) or not math.isfinite(norm):
        return f"The loss became {loss} with a gradient of norm {norm} in step {step}."
    usual = course.running_loss
    if course.step < _SETTLED or usual is None:
        return None
    # The mean of a few positions is far from that of many, and nothing has diverged.
    few = max(1.0, math.sqrt(_MANY_POSITIONS / max(positions, 1)))
    if mean > max(_EXPLODED * few * usual, _NOTICEABLE):
        return f"The loss jumped from about {usual:.3g} to {mean:.3g} in step {step}."
    return None


def _mean_loss(course: Course, line: Mapping[str, Any]) -> float:
    """The step's loss as a mean of its parts: weights that change are no divergence."""
    weight = course.weight_now()
    return float(line["loss"]) / weight if weight else 0.0


# --- evaluation ------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(course: Course) -> list[Comparison]:
    """Student beside teacher on held-out windows: all of it, or one for each source in a mix."""
    found: list[Comparison] = []
    course.inside.eval()
    for number, batch in course.data.my_heldout():
        targets = course.answers.heldout(number, batch)
        parts = course.inside(partial(_compare, course, batch, targets))
        found = list(map(add, found, parts)) if found else parts
    course.inside.train()
    course.inside.release()
    assert found, "a transfer set has held-out windows"
    return [part.of_all() for part in found]


def _compare(
    course: Course, batch: Batch, targets: LiveAnswer | None, student: LlamaForCausalLM
) -> list[Comparison]:
    student_ND, head_VD = trunk(student, batch, course.precision), head(student)
    # Without a teacher the student is compared with itself, for its perplexity.
    targets = targets or LiveTargets(student_ND, head_VD)
    if course.data.mix is None:
        return [compare(student_ND, head_VD, targets, batch.labels_N, course.loss)]
    assert batch.sources_BT is not None, "held-out windows know their sources"
    source_N = batch.sources_BT[batch.mask_BT].to(student_ND.device)
    mine = (source_N == source for source in range(len(course.data.mix.names)))
    return [
        compare(student_ND[m], head_VD, targets.rows(m), batch.labels_N[m], course.loss)
        for m in mine
    ]


def _evaluation(found: Comparison, *, taught: bool) -> dict[str, float]:
    labelled, positions = max(found.labelled, 1), max(found.positions, 1)
    perplexity = math.exp(min(found.cross_entropy / labelled, 700.0))
    if not taught:
        return {"heldout_perplexity": perplexity}
    return {
        "heldout_kl": found.forward_kl / positions,
        "heldout_perplexity": perplexity,
        "heldout_top1_agreement": found.agreements / positions,
        "heldout_teacher_perplexity": math.exp(min(found.teacher_cross_entropy / labelled, 700.0)),
    }


def _measure(course: Course) -> tuple[str, str]:
    """The number that the best weights have the least of, and its name in words."""
    return ("heldout_perplexity", "perplexity") if course.alone else ("heldout_kl", "KL")


def _evaluate_and_keep(course: Course, out: Path) -> dict[str, Any]:
    """Evaluate the weights that would be kept; keep them aside when they are the best so far."""
    with averaged(course):
        found = evaluate(course)
        numbers = _evaluation(reduce(add, found), taught=not course.alone)
        measure, said = _measure(course)
        if not math.isfinite(numbers[measure]):
            raise ShearlingError(
                f"After step {course.step} the {said} on held-out text is {numbers[measure]}: "
                "teacher or student has weights that are no numbers.",
                hint="Set precision to float32, or if training began lower "
                f"{_too_high(course.settings)}.",
            )
        if course.best and numbers[measure] > _EXPLODED * max(course.best[measure], _NEAR):
            raise ShearlingError(
                f"After step {course.step} the {said} on held-out text is {numbers[measure]:.3g}, "
                f"after step {course.best['step']} it was {course.best[measure]:.3g}.",
                hint=_after_divergence(course),
            )
        course.latest = {"step": course.step, **numbers}
        course.first = course.first or course.latest
        if course.best is None or numbers[measure] < course.best[measure]:
            course.best = course.latest
            # The start and the end need no copy: one is the input, the other is in memory.
            if 0 < course.step < course.data.steps and course.settings.keep == "best":
                save_best(out / "resume", course.step, weights_of(course.student))
    tokens = course.step * course.data.step_tokens
    return {"step": course.step, "tokens": tokens, **numbers, **_adapt_mix(course, found)}


def _adapt_mix(course: Course, found: Sequence[Comparison]) -> dict[str, Any]:
    """Give the sources that lag a larger share of the steps to come; says what it did."""
    mix = course.data.mix
    if mix is None:
        return {}
    lags = {
        name: (part.cross_entropy - part.teacher_cross_entropy) / part.labelled
        for name, part in zip(mix.names, found, strict=True)
        if part.labelled
    }
    if 0 < course.step < course.data.steps:
        mix.update(course.step, lags, course.settings.adaptive_mix)
    shares = mix.shares(course.step).round(6).tolist()
    return {"lag": lags, "mix": dict(zip(mix.names, shares, strict=True))}


# --- beginning and end ----------------------------------------------------------------------


def _open_metrics(out: Path, written: int) -> TextIO:
    """Open metrics.jsonl, cut to the ``written`` bytes of a checkpoint; later lines come again."""
    if not leads():
        return open(os.devnull, "w", encoding="utf-8")
    out.mkdir(parents=True, exist_ok=True)
    path = out / "metrics.jsonl"
    kept = path.read_bytes()[:written] if written and path.exists() else b""
    with path.open("ab") as file:  # of a file that was damaged whole lines stay
        file.truncate(kept.rfind(b"\n") + 1)
    return path.open("a", encoding="utf-8")


def _finish(course: Course, student: Path, out: Path) -> dict[str, Any]:
    """Put the weights to be kept into the student, save it, and give the summary."""
    assert course.best, "the end was evaluated"
    assert course.latest, "the end was evaluated"
    if course.average is not None:
        put_weights(course.student, course.average)
    kept = course.best if course.settings.keep == "best" else course.latest
    if kept["step"] == 0:  # the training only made it worse
        start = Checkpoint(student)
        for name, parameter in weights_of(course.student).items():
            put(parameter, start.tensor(name, torch.float32))
    elif kept["step"] != course.step:
        best = load_best(out / "resume", int(kept["step"]))
        fill(dict(course.student.named_parameters()), best)
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
        "notes": _notes(course, kept),
        **({"processes": processes()} if processes() > 1 else {}),
        **({"targets": course.targets_facts} if course.targets_facts else {}),
        **_mix_facts(course),
    }


def _notes(course: Course, kept: Mapping[str, float]) -> list[str]:
    """That other weights than the last were kept, in words."""
    _, said = _measure(course)
    if kept["step"] == course.step:
        return []
    if kept["step"] == 0:
        return [
            f"No evaluation found a lower held-out {said} than at the start, so the weights are "
            "those that training began with: lower learning_rate, or give it more tokens."
        ]
    return [
        f"The weights of step {kept['step']} of {course.step} were kept: the held-out {said} was "
        "lowest there."
    ]


def _mix_facts(course: Course) -> dict[str, Any]:
    """The sources' shares at the start and the end, and the tokens that each gave."""
    mix = course.data.mix
    if mix is None:
        return {}
    tokens = mix.taken(course.step) * course.data.text.window
    kept = {
        "start": mix.natural_S.round(6).tolist(),
        "end": mix.shares(course.step).round(6).tolist(),
        "tokens": tokens.tolist(),
    }
    return {"mix": {what: dict(zip(mix.names, of, strict=True)) for what, of in kept.items()}}
