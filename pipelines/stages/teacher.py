"""Stage teacher: bring the teacher into the run as a folder that `from_pretrained` takes."""

from __future__ import annotations

from typing import Any

from pipelines.stages.context import Context
from teachers.settings import TeacherSettings

CODE_VERSION = 2
RESUMABLE = False


def run(settings: TeacherSettings, context: Context) -> dict[str, Any]:
    """Make ``out/model``; returns facts of the teacher (source, sha256, parameters, shape)."""
    from teachers.checkpoint import import_teacher

    return import_teacher(
        settings,
        context.out,
        cache=context.cache,
        progress=context.progress,
        where=f"`{context.name}.model` in the recipe",
    )
