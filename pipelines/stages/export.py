"""Stage export: the newest model in the form that others take. It makes no new model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipelines.stages.context import Context
from shearling import read_json

if TYPE_CHECKING:
    from pipelines.recipe import ExportStage

CODE_VERSION = 3
RESUMABLE = False


def run(settings: ExportStage, context: Context) -> dict[str, Any]:
    """Write ``out/export``: weights, tokenizer, model card; returns what was written."""
    from pipelines.export import export_checkpoint, write_card
    from teachers.origin import copy_licences, origin_of

    out = context.out / "export"
    name = f"{context.run.absolute().name}-{context.name}"
    teacher = context.inputs["teacher"]
    facts = export_checkpoint(
        context.inputs["model"] / "model",
        out,
        settings,
        name=name,
        origin=origin_of(teacher),
        progress=context.progress,
    )
    copy_licences(teacher / "model", out)  # students of earlier versions came without
    written = context.inputs.get("transfer_set")  # given where the card has to tell of it
    write_card(
        out,
        read_json(context.inputs["scorecard"] / "scorecard.json"),
        read_json(context.inputs["teacher_scorecard"] / "scorecard.json"),
        name=name,
        history=context.history,
        tried=context.tried,
        export=facts,
        text=read_json(written / "transfer_set.json") if written else None,
    )
    return facts
