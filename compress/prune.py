"""Pruning: a survey of the teacher, a selection, a walk that refits what was cut, and a gate."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from compress.memory import reuse_freed_memory
from compress.precision import PrecisionChoice, fast_dtype
from compress.selection import choose, to_json
from compress.settings import PruneSettings
from compress.survey import take_survey
from compress.walk import Walk
from shearling import Progress, ShearlingError, silent, write_json
from students.shape import Shape
from teachers.checkpoint import open_checkpoint
from teachers.tokenizer import copy_tokenizer
from teachers.transfer_set import TransferSet


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
    if shape.tie_word_embeddings and not source.shape.tie_word_embeddings:
        raise ShearlingError(
            "The teacher's input and output embeddings are two matrices, the shape asks for one. "
            "Merging them is not supported yet.",
            hint="Give the axes in `shape` instead of a name, with tie_word_embeddings: false.",
        )
    windows = TransferSet(transfer_set).calibration(settings.calibration_tokens, seed)
    place = torch.device(device)
    precision = fast_dtype(place, settings.precision)
    with torch.no_grad():
        survey = take_survey(source, windows, place, precision.dtype, progress)
        plan = choose(survey, shape, settings)
        walk = Walk(
            source,
            shape,
            plan,
            windows,
            settings,
            device=place,
            dtype=precision.dtype,
            folder=out / "model",
        )
        try:
            reconstruction = walk.run(progress)
        except FloatingPointError as error:
            raise ShearlingError(
                f"Pruning met numbers that are not finite: {error}.",
                hint="Set precision to float32 in the recipe's prune stage; if it is, the teacher "
                "overflows on this text, or refit: false is needed.",
            ) from error
        _copy_companions(teacher, out / "model")
        logit_error = _gate(walk, out / "model", shape)
    write_json(
        out / "selection.json",
        to_json(plan) | {"importance": survey.to_json(), "reconstruction": reconstruction},
    )
    return _summary(walk, windows, precision, reconstruction, logit_error)


def _copy_companions(teacher: Path, folder: Path) -> None:
    """What makes a folder of weights usable: the tokenizer, and how the teacher generates."""
    copy_tokenizer(teacher, folder)
    generation = teacher / "generation_config.json"
    if generation.is_file():
        shutil.copyfile(generation, folder / generation.name)


def _gate(walk: Walk, folder: Path, shape: Shape) -> float:
    """Open the saved student as any user would, and hold it against the one in memory.

    Returns the largest difference of a logit over the largest logit.
    """
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
