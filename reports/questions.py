"""The benchmarks' questions as plain texts, so that a transfer set can be cleared of them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from reports import tasks
from reports.benchmark import load_task
from reports.load import quiet_libraries
from reports.settings import BenchmarkSettings
from shearling import Progress, silent


def questions_of(
    settings: BenchmarkSettings, cache: Path, progress: Progress = silent
) -> tuple[dict[str, list[list[str]]], dict[str, str]]:
    """Task -> its documents -> each one's texts; and why tasks could not be read.

    All documents of the split that is measured, whatever the limit. A document's texts are its
    own fields and what lm-eval asks: the question with each answer behind it.
    """
    tasks.check_tasks(settings)
    questions: dict[str, list[list[str]]] = {}
    unread: dict[str, str] = {}
    for number, name in enumerate(settings.tasks):
        progress("benchmarks' questions", number, len(settings.tasks))
        with tempfile.TemporaryDirectory(prefix="shearling-tasks-") as folder, quiet_libraries():
            task = tasks.prepare(name, settings, Path(folder), cache, progress)
            loaded = load_task(task, settings, unread)
            if loaded is not None:
                questions[name] = [
                    list(dict.fromkeys(_texts(one, document)))
                    for one in loaded["tasks"].values()
                    for document in one.eval_docs
                ]
    return questions, unread


def _texts(task: Any, document: Any) -> Iterator[str]:
    yield from _strings(document)
    question = task.doc_to_text(document)
    if not isinstance(question, str):
        return
    target = task.doc_to_target(document)
    answers = task.doc_to_choice(document) if task.config.doc_to_choice is not None else [target]
    for answer in answers:
        if isinstance(answer, str):
            yield f"{question} {answer}"


def _strings(value: Any) -> Iterator[str]:
    """Every text inside a document."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for below in value.values():
            yield from _strings(below)
    elif isinstance(value, list | tuple):
        for below in value:
            yield from _strings(below)
