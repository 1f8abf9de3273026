"""Stage distill: teach the newest model on the transfer set."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from pipelines.stages.context import Context
from pipelines.stages.prune import TEACHER_SELECTION

if TYPE_CHECKING:
    from pipelines.recipe import DistillStage

CODE_VERSION = 5
RESUMABLE = True
TOGETHER = True


def teacher_role(name: str) -> str:
    """The role that a teacher of this name has among the stage's inputs."""
    return "teacher" if name == "teacher" else f"teacher {name}"


def in_order(teachers: Iterable[str]) -> list[str]:
    """Names of teachers: first the one whose layers are compared and which corrects and writes,
    the others however a recipe lists them."""
    return sorted(teachers, key=lambda name: (name != "teacher", name))


def run(settings: DistillStage, context: Context) -> dict[str, Any]:
    """Write ``out/model`` and ``out/metrics.jsonl``; goes on from ``out/resume`` if it is there.

    With several processes each runs this; only rank 0 writes what is not a part of a checkpoint.
    """
    from compress.answers import Taught
    from compress.distill import distill
    from compress.parallel import leads
    from compress.selection import read_map, write_map
    from teachers.tokenizer import check_same_tokenizer

    student = context.inputs["model"]
    selection = student / TEACHER_SELECTION
    for name in settings.teachers or ("teacher",):
        check_same_tokenizer(context.inputs[teacher_role(name)] / "model", student / "model")
    # Teaching moves no dimension, so what the student kept of the teacher stays true.
    if leads():
        shutil.copyfile(selection, context.out / TEACHER_SELECTION)
        write_map(context.out / TEACHER_SELECTION, read_map(selection))
    names = in_order(settings.teachers)
    summary = distill(
        context.inputs["teacher"] / "model",
        student / "model",
        context.out,
        context.inputs["transfer_set"],
        settings,
        teachers=[
            Taught(context.inputs[teacher_role(name)] / "model", settings.teachers[name])
            for name in names
        ],
        selection=selection,
        seed=context.seed,
        device=context.device,
        progress=context.progress,
        on_metrics=context.on_metrics,
        cache=context.cache,
    )
    return summary
