"""`shearling watch`: a run while it is at work, from its files alone."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from pipelines.display import PLAIN_SECONDS, headline
from pipelines.journal import read_status
from pipelines.status import current_line, status_lines


def watch_run(run: Path, console: Console, *, every: float) -> str:
    """Show the run until it is no longer at work; gives the state in which it ended.

    Raises:
        ShearlingError: if the folder is no run.
    """
    status = read_status(run)
    if console.is_terminal:
        status = _watch_live(run, status, console, every)
    else:
        status = _watch_lines(run, status, console, every)
    return str(status["state"])


def _watch_live(
    run: Path, status: dict[str, Any], console: Console, every: float
) -> dict[str, Any]:
    with Live(_view(status), console=console, auto_refresh=False) as live:
        while status["state"] == "running":
            time.sleep(every)
            status = read_status(run)
            live.update(_view(status), refresh=True)
    return status


def _view(status: dict[str, Any]) -> Group:
    return Group(*status_lines(status))


def _watch_lines(
    run: Path, status: dict[str, Any], console: Console, every: float
) -> dict[str, Any]:
    """One line for each stage that changes its state, and now and then for the step at work."""
    told: dict[str, str] = {}
    printed, step = time.monotonic(), ""
    while True:
        for line in _news(status, told):
            console.print(Text(line), highlight=False, soft_wrap=True)
        current = status["current"]
        due = time.monotonic() - printed >= PLAIN_SECONDS
        if current and (due or current["step"] != step):
            console.print(Text(f"  {current_line(current)}"), highlight=False, soft_wrap=True)
            printed, step = time.monotonic(), current["step"]
        if status["state"] != "running":
            break
        time.sleep(every)
        status = read_status(run)
    error = status["error"]
    ending = [f"{status['recipe']}: {status['state']}"]
    ending += [f"Error: {error['what']}", error["hint"]] if error else []
    ending += [f"Go on with: {status['command']}"] if status["state"] != "done" else []
    console.print(Text("\n".join(filter(None, ending))), highlight=False, soft_wrap=True)
    return status


def _news(status: dict[str, Any], told: dict[str, str]) -> list[str]:
    lines = []
    for row in status["stages"]:
        if told.get(row["name"]) == row["state"] or row["state"] == "waiting":
            continue
        told[row["name"]] = row["state"]
        scores = f", {headline(row['scorecard'])}" if row["scorecard"] else ""
        lines.append(f"{row['name']}: {row['state']}{scores}")
    return lines
