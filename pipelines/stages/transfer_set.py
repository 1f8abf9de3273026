"""Stage transfer_set: text to packed token windows, with the teacher's tokenizer.

What the teacher writes itself is kept in the cache folder round by round, so a stage that was
interrupted goes on there.
"""

from __future__ import annotations

from typing import Any

from pipelines.stages.context import Context
from shearling import read_json, write_json
from teachers.settings import TransferSetSettings

CODE_VERSION = 4
RESUMABLE = False


def run(settings: TransferSetSettings, context: Context) -> dict[str, Any]:
    """Write the windows and ``transfer_set.json``; returns counts of documents and tokens."""
    from teachers.transfer_set import build_transfer_set

    config = read_json(context.inputs["teacher"] / "model" / "config.json")
    longest = config.get("max_position_embeddings")
    if isinstance(longest, int):
        settings.check_context(longest)
    questions, unread = _questions(settings, context)
    facts = build_transfer_set(
        settings,
        context.inputs["teacher"] / "model",
        context.out,
        seed=context.seed,
        cache=context.cache,
        questions=questions,
        device=context.device,
        progress=context.progress,
    )
    if unread:
        facts["cleaning"]["benchmarks_not_read"] = unread
        write_json(context.out / "transfer_set.json", facts)
    return facts


def _questions(
    settings: TransferSetSettings, context: Context
) -> tuple[dict[str, list[list[str]]], dict[str, str]]:
    """The benchmarks' questions, and why those of a task could not be read."""
    if settings.clean is None or not settings.clean.benchmarks:
        return {}, {}
    from reports.questions import questions_of

    return questions_of(context.benchmark, context.cache, context.progress)
