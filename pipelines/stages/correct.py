"""Stage correct: let the teacher read some of the transfer set before it is cut and teaches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipelines.stages.context import Context

if TYPE_CHECKING:
    from pipelines.recipe import CorrectStage

CODE_VERSION = 3
RESUMABLE = True
TOGETHER = True


def run(settings: CorrectStage, context: Context) -> dict[str, Any]:
    """Write ``out/model``, the new teacher; the distillation loop with labels and no teacher."""
    from compress.distill import distill

    summary = distill(
        None,
        context.inputs["teacher"] / "model",
        context.out,
        context.inputs["transfer_set"],
        settings.as_distillation(),
        seed=context.seed,
        device=context.device,
        progress=context.progress,
        on_metrics=context.on_metrics,
        cache=context.cache,
    )
    return summary
