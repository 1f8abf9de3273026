"""What a run shows: a live line on a terminal, a plain line now and then anywhere else."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from pipelines.journal import Pace
from reports import words
from reports.groups import whole_results
from reports.run_folder import not_measured
from shearling import without_secrets

_SHRINKS = Column(no_wrap=True, overflow="ellipsis")
"""On a narrow terminal the numbers are cut off, not the time left."""

PLAIN_SECONDS = 15.0
"""Between two plain lines, so that a log is never silent for much longer."""


class Display:
    """Prints decisions, progress and results of a run."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._live: Progress | None = None
        self._task: TaskID | None = None
        self._what = ""
        self._pace = Pace()
        self._printed = time.monotonic()

    def __enter__(self) -> Display:
        if self.console.is_terminal:
            self._live = Progress(
                TextColumn("{task.description}", table_column=Column(no_wrap=True)),
                BarColumn(bar_width=16, table_column=Column(min_width=8)),
                TextColumn(
                    "{task.completed:,.0f}/{task.total:,.0f}", table_column=Column(no_wrap=True)
                ),
                TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True, min_width=5)),
                TextColumn("[dim]{task.fields[numbers]}", table_column=_SHRINKS),
                console=self.console,
                transient=True,
            )
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.step_ended()
        if self._live:
            self._live.stop()
            self._live = None

    def line(self, text: str, style: str = "") -> None:
        """Print one line; nothing in ``text`` is read as markup."""
        shown = Text(without_secrets(text), style=style)
        self.console.print(shown, highlight=False, soft_wrap=True)
        self._printed = time.monotonic()

    def decision(self, name: str, decision: str) -> None:
        line = Text.assemble((f"{name}: ", "bold"), decision)
        self.console.print(line, highlight=False, soft_wrap=True)
        self._printed = time.monotonic()

    def progress(self, name: str, what: str, done: int, total: int, **numbers: float) -> None:
        """Show how far a step is. ``what`` names the part of the step that is counted."""
        clock = time.monotonic()
        if what != self._what:
            self.step_ended()
            self._what = what
            if total <= 1 and done < total and not self._live:
                # Work that can't be counted (a download) is announced, for it may take long.
                self.line(f"  {name}: {what}")
        left = self._pace.seconds_left(f"{name} {what}", done, total, clock=clock)
        if self._live:
            self._show_live(name, what, done, total, numbers)
        elif clock - self._printed >= PLAIN_SECONDS:
            part = "" if what == name else f"{what} "
            parts = [f"  {name}: {part}{done:,}/{total:,}", format_numbers(numbers)]
            parts += [f"{format_seconds(left)} left"] if left is not None else []
            self.line(" · ".join(part for part in parts if part))

    def _show_live(
        self, name: str, what: str, done: int, total: int, numbers: Mapping[str, float]
    ) -> None:
        assert self._live is not None
        shown = format_numbers(numbers)
        if self._task is None:
            part = "" if what == name else f" {_plain(what)}"
            self._task = self._live.add_task(
                f"[bold]{_plain(name)}[/bold]{part}", total=total, numbers=""
            )
        self._live.update(self._task, completed=done, total=total, numbers=_plain(shown))

    def step_ended(self) -> None:
        """Take the live line away; the next progress begins a new one."""
        if self._live and self._task is not None:
            self._live.remove_task(self._task)
        self._task, self._what = None, ""


def _plain(text: str) -> str:
    return text.replace("[", r"\[")


_HIDDEN = {"step", "steps", "seconds", "tokens", "learning_rate", "gradient_norm"}
"""Numbers that metrics.jsonl and the report have, and that no one watches live."""


def format_numbers(numbers: Mapping[str, Any]) -> str:
    """``loss 3.21 · forward_kl 3.02 · 210 tokens/s``."""
    parts = []
    for name, value in numbers.items():
        if name in _HIDDEN or not isinstance(value, (int, float)):
            continue
        if name == "tokens_per_second":
            parts.append(f"{value:,.0f} tokens/s")
        else:
            parts.append(f"{name.replace('_', ' ')} {value:.4g}")
    return " · ".join(parts)


def format_seconds(seconds: float) -> str:
    """``3.2 s``, ``4 min 05 s``, ``2 h 03 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def format_bytes(size: float) -> str:
    """``1.9 GB``, in powers of ten as disks and memory are sold."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"


def headline(scorecard: Mapping[str, Any]) -> str:
    """One line of a scorecard: its size and the first metric of each task or group of tasks."""
    parts = [f"{words.count(scorecard.get('parameters'))} parameters"]
    for task, metrics in whole_results(scorecard).items():
        for metric, number in list(metrics.items())[:1]:
            value, stderr = number.get("value"), number.get("stderr")
            if isinstance(value, (int, float)):
                spread = f" ± {stderr:.2g}" if isinstance(stderr, (int, float)) else ""
                parts.append(f"{task} {metric} {value:.4g}{spread}")
    return ", ".join(parts)


def skipped_lines(scorecard: Mapping[str, Any], told: set[tuple[str, str]]) -> Iterator[str]:
    """A line for each reason for which tasks or metrics were not measured, but for ``told`` ones.

    All models of a run skip the same tasks for the same reason, which is told once.
    """
    skipped: dict[str, list[str]] = {}
    for name, reason in not_measured(scorecard).items():
        if (name, reason) not in told:
            told.add((name, reason))
            skipped.setdefault(reason, []).append(name)
    for reason, names in skipped.items():
        yield f"skipped {'; '.join(names)}: {reason}"
