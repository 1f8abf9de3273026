"""Stage benchmark: measure one model. Follows every stage that makes a model."""

from __future__ import annotations

from typing import Any

from pipelines.stages.context import Context
from reports.settings import BenchmarkSettings
from shearling import write_json

CODE_VERSION = 7
RESUMABLE = False


def run(settings: BenchmarkSettings, context: Context) -> dict[str, Any]:
    """Write ``out/scorecard.json``; returns which tasks were measured and which skipped."""
    from reports.benchmark import benchmark

    teacher = context.inputs.get("teacher")
    scorecard = benchmark(
        context.inputs["model"] / "model",
        settings,
        name=context.name,
        cache=context.cache,
        teacher=teacher / "model" if teacher else None,
        device=context.device,
        progress=context.progress,
    )
    write_json(context.out / "scorecard.json", scorecard)
    return {"tasks": sorted(scorecard["results"]), "skipped": scorecard.get("skipped", {})}
