"""Pruning: a survey of the teacher, a selection, a walk that refits what was cut, and a gate."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from compress.checkpointing import TrainingState, load_checkpoint, save_checkpoint_alone
from compress.coupling import derive_coupling
from compress.data import vocabulary_of
from compress.ends import student_ends
from compress.interrupts import StopRequest
from compress.memory import give_back_freed_memory
from compress.precision import PrecisionChoice, fast_dtype
from compress.selection import check_rotary, write_selection
from compress.settings import PruneSettings, deciding
from compress.slicing import Slicer
from compress.streams import DTYPES, Streams
from compress.survey import Survey, take_survey
from compress.walk import Walk
from shearling import (
    Progress,
    ShearlingError,
    disk_errors,
    sha256_of_json,
    silent,
)
from students.build import StudentWriter, student_config
from students.shape import Shape
from teachers.checkpoint import Checkpoint, open_checkpoint
from teachers.layout import EMBEDDING, listed
from teachers.tokenizer import copy_companions
from teachers.transfer_set import TransferSet
from teachers.weights import is_finite

MASSIVE = 10.0
"""Times the other positions' size from which a first position counts as an attention sink."""
SURVEY, WALK = "survey", "walk"
"""What a checkpoint was saved in."""
SINK_FACTOR = 2.0
"""How far off a kept sink may be before a user is told."""


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
    """Cut the model in ``teacher`` to ``shape``; writes ``out/model`` and ``out/selection.json``
    (with ``out/selection.safetensors`` where the stream was turned: ``compress.selection``).

    ``model`` is a stock Hugging Face folder with the teacher's tokenizer, in the teacher's dtype.
    Returns the numbers that a report shows.

    Raises:
        ShearlingError: the teacher can't be read or pruned, or the saved student does not answer
            as the one in memory does.
    """
    give_back_freed_memory()
    source = open_checkpoint(teacher)
    problems = shape.problems_as_student_of(source.shape)
    if problems:
        raise ShearlingError(
            "The student's shape does not fit: " + "; ".join(problems) + ".",
            hint="Change `shape` in the recipe's prune stage.",
        )
    settings.check_depth(source.shape, shape)
    config = student_config(source.config, shape)
    check_rotary(source.config, config)
    text = TransferSet(transfer_set)
    windows = text.calibration(settings.calibration_tokens, seed)
    vocabulary = vocabulary_of([teacher], text)
    place, resume = torch.device(device), out / "resume"
    identity = identity_of_cut(source, text, settings, shape.to_dict(), seed)
    saved = load_checkpoint(resume)
    if saved and saved.state["identity"] != identity:
        raise ShearlingError(
            f"{resume} holds a checkpoint of another cut.",
            hint=f"Delete {resume} to start this stage from its beginning.",
        )
    # What was measured then, lest a busy machine change the arithmetic now.
    precision = (
        PrecisionChoice(**saved.state["precision"])
        if saved
        else fast_dtype(place, settings.precision)
    )

    def streams() -> Streams:
        limit = int(settings.stream_memory_gb * 1024**3)
        return Streams(out / "streams", DTYPES[settings.stream_dtype], limit)

    facts = {"identity": identity, "precision": precision.to_dict()}
    saving = Saving(resume, facts, settings.save_every_seconds)
    with torch.no_grad(), disk_errors(out), finite_or_told(source):
        with saving:
            begun = saved if saved and saved.state["phase"] == WALK else None
            if begun:
                survey = Survey.from_tensors(begun.whole("survey"))
            else:
                survey = take_survey(
                    source,
                    shape,
                    windows,
                    settings,
                    streams(),
                    place,
                    precision.dtype,
                    vocabulary,
                    progress,
                    saved,
                    partial(saving, SURVEY, 0),
                )
            slicer = Slicer(
                teacher=source.shape,
                student=shape,
                plan=survey.plan(shape).to(place),
                coupling=derive_coupling(source.config),
            )
            writer = StudentWriter(out / "model", config, source.torch_dtype)
            if begun:
                writer.restore(begun.state["shards"])
            ends = student_ends(
                source,
                slicer,
                survey.final_NE.to(place),
                settings.merge,
                precision.dtype,
                vocabulary,
                (writer.written(EMBEDDING), begun.whole("ends")["norm"].to(place))
                if begun
                else None,
            )
            walk = Walk(
                source,
                slicer,
                ends,
                windows,
                settings,
                streams(),
                writer,
                device=place,
                dtype=precision.dtype,
            )
            if begun:
                walk.restore(begun)
            saved = begun = None  # two streams in memory, wherever the walk's own lie

            def state() -> TrainingState:
                walked = walk.state()
                return replace(walked, tensors={**walked.tensors, "survey": survey.to_tensors()})

            walk.run(progress, lambda: saving(WALK, source.shape.num_hidden_layers, state))
        # No layer follows behind which `saving` would look: from here on Ctrl-C acts at once.
        walk.finish(progress)
        copy_companions(teacher, out / "model")
        logit_error = _gate(walk, out / "model", shape)
    write_selection(
        out / "selection.json",
        slicer.plan,
        {
            "turned": ends.turned(shape.num_hidden_layers),
            "importance": survey.to_json(),
            "reconstruction": walk.errors,
        },
    )
    shutil.rmtree(out / "streams", ignore_errors=True)
    return _summary(walk, shape, windows, precision, logit_error)


def identity_of_cut(
    source: Checkpoint, text: TransferSet, settings: PruneSettings, *wanted: Any
) -> str:
    """A hash of all that results depend on; ``wanted`` is what is cut to, and how, as JSON."""
    how = deciding(settings, PruneSettings)
    return sha256_of_json([how, *wanted, source.fingerprint(), text.facts["sha256"]])


class Saving:
    """Saves what is done so far when it is time, or when someone asks to stop: a stage that was
    killed goes on from there.

    Called between two layers, of the survey and then of the walk. While it is open, the first
    SIGINT or SIGTERM is looked at there; a second one acts at once.

    Raises:
        KeyboardInterrupt: asked to stop, and saved.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any], seconds: float) -> None:
        self.folder, self.facts, self.seconds = folder, facts, seconds
        self._saved, self._stop = time.monotonic(), StopRequest()

    def __enter__(self) -> Saving:
        self._stop.__enter__()
        return self

    def __exit__(self, *raised: object) -> None:
        self._stop.__exit__(*raised)
        if self._stop.asked and raised[0] is None:  # behind the last look
            raise KeyboardInterrupt

    def __call__(self, phase: str, steps_before: int, state: Callable[[], TrainingState]) -> None:
        """``state`` gives what is saved, its step counted behind ``steps_before`` others."""
        asked = self._stop.asked
        if not asked and time.monotonic() - self._saved < self.seconds:
            return
        found = state()
        save_checkpoint_alone(
            self.folder,
            replace(
                found,
                step=steps_before + found.step,
                state={**self.facts, "phase": phase, **found.state},
            ),
        )
        self._saved = time.monotonic()
        if asked:
            raise KeyboardInterrupt


@contextmanager
def finite_or_told(source: Checkpoint) -> Iterator[None]:
    """Where numbers stop being finite, say what to do about it."""
    try:
        yield
    except FloatingPointError as error:
        hint = (
            "Set precision to float32 in the recipe's prune stage; if it is, the teacher "
            "overflows on this text, or refit: false is needed."
        )
        if source.torch_dtype is torch.float16:
            hint = (
                "float16 ends at 65,504, and the student is stored as the teacher is: convert the "
                "teacher to bfloat16 or float32."
            )
        raise ShearlingError(
            f"Pruning met numbers that are not finite: {error}.", hint=hint
        ) from error


def _gate(walk: Walk, folder: Path, shape: Shape) -> float:
    """Open the saved student as any user would, and hold it against the one in memory.

    Returns the largest difference of a logit over the largest logit.
    """
    model, loading = LlamaForCausalLM.from_pretrained(
        folder, dtype="auto", local_files_only=True, output_loading_info=True
    )
    strange = [*loading["missing_keys"], *loading["unexpected_keys"]]
    if strange:
        raise ShearlingError(
            f"The pruned model's tensors are not those of a stock Llama: {listed(strange)}.",
            hint="This is a bug in shearling; please report it with the recipe.",
        )
    counted = sum(parameter.numel() for parameter in model.parameters())
    if Shape.from_config(model.config) != shape or counted != shape.parameters:
        raise ShearlingError(
            f"The pruned model has {counted:,} parameters, its shape asks for "
            f"{shape.parameters:,}.",
            hint="This is a bug in shearling; please report it with the recipe.",
        )
    broken = [name for name, parameter in model.named_parameters() if not is_finite(parameter)]
    if broken:
        raise ShearlingError(
            f"The pruned model saved in {folder} holds NaN or infinity: {listed(broken)}.",
            hint=f"The disk may be failing; delete {folder.parent} and run the stage again.",
        )
    logits = _last_answer(model, walk.probe_tokens, walk.device)
    error = float((logits - walk.probe_logits).abs().max() / walk.probe_logits.abs().max())
    if not error < 1e-3:
        raise ShearlingError(
            f"The pruned model saved in {folder} does not answer as the one in memory: its logits "
            f"differ by {error:.2g} of the largest.",
            hint="This is a bug in shearling or a failing disk; delete "
            f"{folder.parent} and run the stage again.",
        )
    return error


def _last_answer(model: LlamaForCausalLM, tokens_BT: Tensor, device: torch.device) -> Tensor:
    """The model's logits in float32; its layers are used up.

    The weights stay as they were opened, mapped from their files, but for the module at work: in
    float32 an 8B's would take 32 GB.
    """

    def wake(module: nn.Module, _: Any) -> None:
        module.to(device, torch.float32)

    def spend(module: nn.Module, *_: Any) -> None:
        module.to("meta")

    model.model.embed_tokens.register_forward_hook(lambda *call: call[-1].to(device).float())
    model.model.rotary_emb.to(device)
    for module in (*model.model.layers, model.model.norm, model.lm_head):
        module.register_forward_pre_hook(wake)
    for layer in model.model.layers:
        layer.register_forward_hook(spend)
    logits: Tensor = model.eval()(tokens_BT, use_cache=False).logits
    return logits


def _summary(
    walk: Walk, shape: Shape, windows_BT: Tensor, precision: PrecisionChoice, logit_error: float
) -> dict[str, Any]:
    dropped = sorted(set(range(walk.source.shape.num_hidden_layers)) - set(walk.slicer.plan.layers))
    return {
        "shape": shape.to_dict(),
        "parameters": shape.parameters,
        "teacher_parameters": walk.source.shape.parameters,
        "calibration_tokens": windows_BT.numel(),
        "dropped_layers": dropped,
        "refit": walk.settings.refit,
        "stream_error": walk.errors[-1].get("stream_after_down_proj"),
        "reload_logit_error": logit_error,
        "precision": precision.to_dict(),
        **_sink_facts(walk),
    }


def _sink_facts(walk: Walk) -> dict[str, Any]:
    """What became of the attention sink, at the layer where the teacher's is the largest."""
    largest = max(walk.errors, key=lambda error: error.get("sink", 0.0))
    size = largest.get("sink", 0.0)
    if size <= MASSIVE:
        return {}
    kept = largest["sink_kept"]
    said = (
        f"Behind layer {largest['layer']} the teacher's first position is {size:.0f} times as "
        f"large as others, an attention sink, the student's {kept:.2g} times that: text in other "
        "windows than these may come out far worse. Give it more calibration_tokens, or cut "
        "fewer layers and neurons."
    )
    lost = not 1 / SINK_FACTOR < kept < SINK_FACTOR
    return {"sink": size, "sink_kept": kept, "notes": [said] if lost else []}
