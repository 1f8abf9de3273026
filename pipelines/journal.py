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
from reports.run_folder import as_dict, as_list, as_number, file_name, read_scorecard
from shearling import ShearlingError, read_json, without_secrets, write_text

SCHEMA = 1
RUN_FILE = "run.json"
_BETWEEN_WRITES = 2.0  # seconds


def now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


class Pace:
    """Guesses the time left from how far the work came since it began (or went on)."""

    def __init__(self) -> None:
        self._what = ""
        self._first = 0
        self._began = 0.0

    def seconds_left(
        self, what: str, done: int, total: int, *, clock: float | None = None
    ) -> float | None:
        """None while there is nothing to go by. ``clock``: the monotonic time, if it is known."""
        clock = time.monotonic() if clock is None else clock
        if what != self._what or done < self._first:
            self._what, self._first, self._began = what, done, clock
        made = done - self._first
        if made <= 0 or done >= total:
            return None
        return round((clock - self._began) * (total - done) / made, 1)


class Journal:
    """Writes run.json. Rows of stages have the form that report.json has, without scorecards."""

    def __init__(self, run: Path, *, recipe: str, stages: list[tuple[str, str]], again: str):
        """``stages``: (name, kind) in order; ``again``: the command that repeats the run."""
        self.path = run / RUN_FILE
        self._written = 0.0
        self._pace = Pace()
        self.at = ""
        self._unfinished = _unfinished_before(self.path)
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
            "unfinished": self._unfinished,
        }
        self.write()

    def row(self, stage: str) -> dict[str, Any]:
        return next(row for row in self.data["stages"] if row["name"] == stage)

    def seconds_before(self, key: str) -> float:
        """Seconds that an interrupted run already spent on the artefact of this key."""
        return float(self._unfinished.get(key, {}).get("seconds") or 0.0)

    def resumes_before(self, key: str) -> list[Any]:
        """Where the artefact of this key went on after earlier interruptions."""
        return list(self._unfinished.get(key, {}).get("resumes") or [])

    def begin(self, stage: str) -> None:
        """From now on this stage is the one at work."""
        self.at = stage

    def set_row(self, stage: str, **values: Any) -> None:
        row = self.row(stage)
        row.update(values)
        if row["state"] == "done":
            self._unfinished.pop(row["key"], None)
        self.write()

    def progress(self, step: str, what: str, done: int, total: int, **numbers: float) -> None:
        """Note how far the current step is; written at most every two seconds."""
        self.data["current"] = {
            "step": step,
            "what": what,
            "done": done,
            "total": total,
            "seconds_left": self._pace.seconds_left(f"{step} {what}", done, total),
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
        text = json.dumps(self.data, indent=2, ensure_ascii=False, allow_nan=False)
        write_text(self.path, without_secrets(text) + "\n")
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


def _unfinished_before(path: Path) -> dict[str, dict[str, Any]]:
    """Seconds and resumes of stages that were begun and not finished, by their keys: of the last
    session, and of those before it whose stages it did not come to."""
    try:
        data = as_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError):
        return {}  # a first run, or a journal that nobody can use any more
    rows = as_dict(data.get("unfinished"))
    rows |= {row["key"]: row for row in as_list(data.get("stages")) if as_dict(row).get("key")}
    known = {str(key): _known_row(as_dict(row)) for key, row in rows.items()}
    return {
        key: {name: row[name] for name in ("seconds", "resumes") if row.get(name)}
        for key, row in known.items()
        if row["state"] != "done" and row["seconds"]
    }


def _known_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row as it should be, whatever the file says: what can't be used is None."""
    texts = {name: _text(row.get(name)) for name in ("reason", "key")}
    numbers = {name: as_number(row.get(name)) for name in ("seconds", "peak_memory_bytes")}
    known = {name: str(row.get(name)) for name in ("name", "kind", "state")}
    resumes = [entry for entry in as_list(row.get("resumes")) if isinstance(entry, dict)]
    return {**known, **texts, **numbers, **({"resumes": resumes} if resumes else {})}


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _known_current(value: Any) -> dict[str, Any] | None:
    current = as_dict(value)
    numbers = as_dict(current.get("numbers"))
    if not current:
        return None
    return {
        "step": str(current.get("step")),
        "what": str(current.get("what")),
        "done": int(as_number(current.get("done")) or 0),
        "total": int(as_number(current.get("total")) or 0),
        "seconds_left": as_number(current.get("seconds_left")),
        "numbers": {str(n): v for n, v in numbers.items() if as_number(v) is not None},
    }


def check_is_run(run: Path) -> None:
    """The folder is one that `shearling run` wrote, whatever its files hold.

    Raises:
        ShearlingError: it isn't.
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


def read_status(run: Path) -> dict[str, Any]:
    """What `shearling status --json` prints: report.json's stages, true at this moment.

    A run whose process is gone without a word (killed, power lost) is told as interrupted.

    Raises:
        ShearlingError: the folder is no run, or its run.json can't be used.
    """
    check_is_run(run)
    hint = (
        f"`shearling resume {run}` writes it anew; finished stages are kept. "
        f"`shearling report {run}` shows them without it."
    )
    data = as_dict(read_json(run / RUN_FILE, hint=hint))
    if not isinstance(data.get("state"), str) or not isinstance(data.get("stages"), list):
        raise ShearlingError(
            f"{run / RUN_FILE} is damaged.",
            hint=hint,
        )
    state = data["state"]
    if state == "running" and lock_owner(run) is None:
        state = "interrupted"
    found = [_known_row(row) for row in data["stages"] if isinstance(row, dict)]
    rows = [_status_row(run, row, state) for row in found]
    error = as_dict(data.get("error"))
    return {
        "schema": SCHEMA,
        "recipe": str(data.get("recipe")),
        "state": state,
        "started": _text(data.get("started")),
        "updated": _text(data.get("updated")),
        "command": str(data.get("command")),
        "error": {n: str(error.get(n) or "") for n in ("what", "hint")} if error else None,
        "current": _known_current(data.get("current")) if state == "running" else None,
        # The transfer set makes no model, so it stands beside the stages, not among them.
        "stages": [row for row in rows if row["kind"] != "transfer_set"],
        "transfer_set": next((row for row in rows if row["kind"] == "transfer_set"), None),
    }


def _status_row(run: Path, row: dict[str, Any], run_state: str) -> dict[str, Any]:
    shown = {name: value for name, value in row.items() if name != "key"}
    if shown["state"] == "running" and run_state != "running":
        shown["state"] = run_state
    scorecard = run / "stages" / file_name(row["name"]) / "scorecard.json"
    card = read_scorecard(scorecard, []) if shown["state"] == "done" else None
    return {**shown, "scorecard": _without_samples(card) if card else None}


def _without_samples(scorecard: dict[str, Any]) -> dict[str, Any]:
    """A scorecard as report.json has it: the answers to single documents are in its own file."""
    return {name: value for name, value in scorecard.items() if name not in ("samples", "answers")}
