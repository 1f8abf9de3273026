"""Stage transfer_set: text to packed token windows, with the teacher's tokenizer."""

from __future__ import annotations

from typing import Any

from pipelines.stages.context import Context
from shearling import ShearlingError, read_json
from teachers.settings import TransferSetSettings

CODE_VERSION = 1
RESUMABLE = False


def run(settings: TransferSetSettings, context: Context) -> dict[str, Any]:
    """Write the windows and ``transfer_set.json``; returns counts of documents and tokens."""
    from teachers.transfer_set import build_transfer_set

    config = read_json(context.inputs["teacher"] / "model" / "config.json")
    longest = config.get("max_position_embeddings")
    if isinstance(longest, int) and settings.window > longest:
        raise ShearlingError(
            f"transfer_set.window is {settings.window}, and the teacher was made for {longest} "
            "tokens at most.",
            hint=f"Set transfer_set.window to {longest} or less.",
        )
    return build_transfer_set(
        settings,
        context.inputs["teacher"] / "model",
        context.out,
        seed=context.seed,
        cache=context.cache,
        progress=context.progress,
    )
