"""run.json: what a run is doing, always readable, so that `shearling status` can tell it live.

The journal is written whole at every change of state, and every two seconds while a stage works.
It holds no scorecards: those are in the stages' folders, and ``read_status`` joins the two.
"""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from reports.liveness import lock_owner, process_identity
from shearling import ShearlingError, read_json, write_json

SCHEMA = 1
RUN_FILE = "run.json"
_BETWEEN_WRITES = 2.0  # seconds


def now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


class Journal:
    """Writes run.json. Rows of stages have the form that report.json has, without scorecards."""

    def __init__(self, run: Path, *, recipe: str, stages: list[tuple[str, str]], again: str):
        """``stages``: (name, kind) in order; ``again``: the command that repeats the run."""
        self.path = run / RUN_FILE
        self._written = 0.0
        self.at = ""
        before = _rows_before(self.path)
        self.data: dict[str, Any] = {
            "schema": SCHEMA,
            "recipe": recipe,
            "state": "running",
            "command": again,
            **process_identity(),
            "started": now(),
            "updated": now(),
            "finished": None,
            "error": None,
            "current": None,
            "stages": [_row(name, kind) for name, kind in stages],
        }
        self._seconds_before = {row.get("key"): row.get("seconds") or 0.0 for row in before}
        self.write()

    def row(self, stage: str) -> dict[str, Any]:
        return next(row for row in self.data["stages"] if row["name"] == stage)

    def seconds_before(self, key: str) -> float:
        """Seconds that an interrupted run already spent on the artefact of this key."""
        return float(self._seconds_before.get(key, 0.0))

    def begin(self, stage: str) -> None:
        """From now on this stage is the one at work."""
        self.at = stage

    def set_row(self, stage: str, **values: Any) -> None:
        self.row(stage).update(values)
        self.write()

    def progress(self, step: str, what: str, done: int, total: int, **numbers: float) -> None:
        """Note how far the current step is; written at most every two seconds."""
        self.data["current"] = {
            "step": step,
            "what": what,
            "done": done,
            "total": total,
            "numbers": {name: value for name, value in numbers.items() if value == value},
        }
        if time.monotonic() - self._written > _BETWEEN_WRITES:
            self.write()

    def end(self, state: str, error: dict[str, str] | None = None) -> None:
        """Close the run as done, failed or interrupted; the stage at work ends in the same state.

        Another one that has begun and waits for its benchmark is waiting again.
        """
        for row in self.data["stages"]:
            if row["state"] == "running":
                row["state"] = state if row["name"] == self.at else "waiting"
        self.data |= {"state": state, "error": error, "current": None, "finished": now()}
        self.write()

    def write(self) -> None:
        self.data["updated"] = now()
        write_json(self.path, self.data)
        self._written = time.monotonic()


def _row(name: str, kind: str) -> dict[str, Any]:
    return {
        "name": name,
        "kind": kind,
        "state": "waiting",
        "reason": None,
        "seconds": None,
        "peak_memory_bytes": None,
        "key": None,
    }


def _rows_before(path: Path) -> list[dict[str, Any]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["stages"]
        return [row for row in rows if isinstance(row, dict)]
    except (OSError, ValueError, TypeError, KeyError):
        return []  # a first run, or a journal that nobody can use any more


def read_status(run: Path) -> dict[str, Any]:
    """What `shearling status --json` prints: report.json's stages, true at this moment.

    A run whose process is gone without a word (killed, power lost) is told as interrupted.
    """
    if not run.is_dir():
        raise ShearlingError(
            f"There is no run folder {run}.",
            hint="Runs lie in runs/NAME; `shearling run quickstart` makes one.",
        )
    if not (run / RUN_FILE).is_file():
        raise ShearlingError(
            f"{run} is not a run: it has no {RUN_FILE}.",
            hint="Name the folder that `shearling run` wrote, as in runs/quickstart.",
        )
    data = read_json(run / RUN_FILE)
    state = data["state"]
    if state == "running" and lock_owner(run) is None:
        state = "interrupted"
    rows = [_status_row(run, row, state) for row in data["stages"]]
    return {
        "schema": SCHEMA,
        "recipe": data["recipe"],
        "state": state,
        "started": data["started"],
        "updated": data["updated"],
        "command": data["command"],
        "error": data["error"],
        "current": data["current"] if state == "running" else None,
        # The transfer set makes no model, so it stands beside the stages, not among them.
        "stages": [row for row in rows if row["kind"] != "transfer_set"],
        "transfer_set": next((row for row in rows if row["kind"] == "transfer_set"), None),
    }


def _status_row(run: Path, row: dict[str, Any], run_state: str) -> dict[str, Any]:
    shown = {name: value for name, value in row.items() if name != "key"}
    if shown["state"] == "running" and run_state != "running":
        shown["state"] = run_state
    scorecard = run / "stages" / row["name"] / "scorecard.json"
    finished = shown["state"] == "done" and scorecard.is_file()
    return {**shown, "scorecard": _without_samples(read_json(scorecard)) if finished else None}


def _without_samples(scorecard: dict[str, Any]) -> dict[str, Any]:
    """A scorecard as report.json has it: the answers to single documents are in its own file."""
    return {name: value for name, value in scorecard.items() if name != "samples"}
