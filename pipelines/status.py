"""How far a run is, for people."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.table import Table
from rich.text import Text

from pipelines.display import format_bytes, format_numbers, format_seconds, headline

_STYLES = {"done": "green", "running": "cyan", "failed": "red", "interrupted": "yellow"}


def status_lines(status: dict[str, Any]) -> Iterator[Text | Table]:
    """What `shearling status RUN` prints, from ``pipelines.journal.read_status``."""
    state = status["state"]
    yield Text.assemble((status["recipe"], "bold"), ": ", (state, _STYLES.get(state, "")))
    yield _table(status)
    for row in status["stages"]:
        if row["scorecard"]:
            yield Text(f"{row['name']}: {headline(row['scorecard'])}")
    if status["current"]:
        yield Text(current_line(status["current"]))
    if status["error"]:
        yield Text(f"Error: {status['error']['what']}\n{status['error']['hint']}", style="red")
    if state in ("interrupted", "failed"):
        yield Text(f"Go on with: {status['command']}")


def _table(status: dict[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("stage", "kind", "state", "time", "peak memory", "reason"):
        table.add_column(column)
    rows = [*status["stages"][:1], status["transfer_set"], *status["stages"][1:]]
    for row in filter(None, rows):
        seconds, memory = row["seconds"], row["peak_memory_bytes"]
        table.add_row(
            Text(row["name"]),
            row["kind"],
            Text(row["state"], style=_STYLES.get(row["state"], "dim")),
            format_seconds(seconds) if seconds is not None else "",
            format_bytes(memory) if memory is not None else "",
            Text(row["reason"] or ""),
        )
    return table


def current_line(current: dict[str, Any]) -> str:
    """Where the step at work is: ``distill: distill 40/100 · loss 2.5 · 3 min 20 s left``."""
    text = f"{current['step']}: {current['what']} {current['done']:,}/{current['total']:,}"
    left = current.get("seconds_left")
    parts = [text, format_numbers(current["numbers"])]
    parts += [f"{format_seconds(left)} left"] if left is not None else []
    return " · ".join(part for part in parts if part)
