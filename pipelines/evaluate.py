"""`shearling eval`: the benchmark on any model, outside of a run."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipelines.display import Display, format_bytes, skipped_lines
from pipelines.machine import pick_device
from pipelines.named import find_model
from pipelines.preflight import check_mirror, check_tasks, missing_mirror
from reports.run_folder import not_measured
from reports.settings import BenchmarkSettings
from reports.tasks import OWN
from shearling import ShearlingError, itemised
from teachers.settings import TeacherSettings


def evaluate_model(
    model: str,
    settings: dict[str, Any],
    *,
    teacher: str | None = None,
    cache: Path,
    console: Console,
) -> dict[str, Any]:
    """The scorecard of a model folder, a run's or a stage's, a GGUF, a packaged file or a hub id.

    ``settings`` are keys of ``BenchmarkSettings``; progress goes to ``console``. With a
    ``teacher`` (in any of the same forms) the model's answers on text are held against its.

    Raises:
        ShearlingError: a model can't be read, the teacher is asked for nothing or gives a text
            other ids, or not one task could be measured.
    """
    chosen = _settings(settings)
    check_tasks(chosen)
    if teacher and "wikitext2" not in chosen.tasks:
        raise ShearlingError(
            "A teacher is held against the model on the text of wikitext2, which is not among the "
            "tasks.",
            hint="Add wikitext2 to --tasks, or leave --teacher out.",
        )
    check_mirror(chosen)
    from reports.benchmark import benchmark
    from teachers.checkpoint import import_teacher

    with Display(console) as display, tempfile.TemporaryDirectory(prefix="shearling-") as aside:

        def progress(what: str, done: int, total: int, /, **numbers: float) -> None:
            display.progress("eval", what, done, total, **numbers)

        def opened(named: str, role: str) -> tuple[Path, int]:
            # The same way in as for a teacher, so every form of a model can be measured.
            found = find_model(named, role=role, tell=display.line)
            facts = import_teacher(
                TeacherSettings(model=found),
                Path(aside) / role,
                cache=cache,
                progress=progress,
                role=role,
                where="--teacher" if role == "teacher" else "its path",
            )
            return Path(aside) / role / "model", facts["source_bytes"]

        if missing := missing_mirror(chosen):
            display.line(missing, style="yellow")
        measured, size = opened(model, "model")
        taught_by = opened(teacher, "teacher")[0] if teacher else None
        if teacher and taught_by:
            _check_same_tokenizer(taught_by, measured, names=(teacher, model))
        scorecard = benchmark(
            measured,
            chosen,
            name=model,
            cache=cache,
            teacher=taught_by,
            size=size,
            device=pick_device("auto"),
            progress=progress,
        )
    if not scorecard["results"]:
        raise ShearlingError(
            itemised("Not one task could be measured:", skipped_lines(scorecard, set())),
            hint="Name the folder of the tasks' JSONL files with --mirror, or with --tasks some "
            f"that come with Shearling: {', '.join(OWN)}.",
        )
    return scorecard


def _check_same_tokenizer(teacher: Path, model: Path, *, names: tuple[str, str]) -> None:
    from teachers.tokenizer import check_same_tokenizer

    try:
        check_same_tokenizer(teacher, model)
    except ShearlingError as error:  # its user knows the paths that were given, not ours
        what = error.what.replace(str(teacher), names[0]).replace(str(model), names[1])
        hint = "Name a teacher with the model's own tokenizer, or leave --teacher out."
        raise ShearlingError(what, hint=hint) from error


def _settings(settings: dict[str, Any]) -> BenchmarkSettings:
    if "tasks" in settings and not settings["tasks"]:
        raise ShearlingError(
            "No task is named.", hint="Name some with --tasks, as in --tasks wikitext2,piqa."
        )
    return BenchmarkSettings(**settings)


def scorecard_table(scorecard: dict[str, Any]) -> Table:
    """A scorecard as a table: one row a metric, those left out and skipped tasks included."""
    size = f"{scorecard['parameters']:,} parameters, {format_bytes(scorecard['bytes'])}"
    table = Table(title=Text(f"{scorecard['model']}: {size}"), box=None, title_justify="left")
    for column in ("task", "metric"):
        table.add_column(column)
    for column in ("value", "standard error"):
        table.add_column(column, justify="right")
    for task, metrics in scorecard["results"].items():
        for metric, number in metrics.items():
            value, stderr = number["value"], number.get("stderr")
            shown = "not finite" if value is None else f"{value:.5g}"
            spread = f"{stderr:.4g}" if stderr is not None else ""
            table.add_row(Text(task), Text(metric), shown, spread)
    for name, reason in not_measured(scorecard).items():
        table.add_row(Text(name), Text(f"skipped: {reason}", style="dim"), "", "")
    return table
