"""Whether the process that a run folder names is still at work.

`shearling run` keeps run.lock: who it is, and a sign of life every few seconds (the file's time).
On the same machine the process table answers; of another machine only the sign of life is known.
"""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import psutil

LOCK_FILE = "run.lock"
BEAT_SECONDS = 5.0
"""Between two signs of life."""
SILENT_SECONDS = 60.0
"""A process on another machine that was silent for so long is taken for dead."""


def process_identity() -> dict[str, Any]:
    """What tells this process from every other one: {"pid", "process_started", "host", "boot"}."""
    return {
        "pid": os.getpid(),
        "process_started": process_started(os.getpid()),
        "host": socket.gethostname(),
        "boot": _boot(),
    }


def process_started(pid: int) -> float:
    """When a process began, in seconds since the machine's start where Linux tells it.

    Not psutil's wall time: that moves when the clock is set, and a living run would look dead.

    Raises:
        psutil.Error: if there is no such process.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return float(psutil.Process(pid).create_time())
    # The second field is the name in parentheses, which may hold anything; the 22nd is the start.
    return int(text.rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")


def _boot() -> str | None:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return None


def read_owner(run: Path) -> dict[str, Any] | None:
    """Who run.lock names, dead or alive; None if nobody or if it can't be read."""
    try:
        owner = json.loads((run / LOCK_FILE).read_text(encoding="utf-8"))
        return {
            "pid": int(owner["pid"]),
            "process_started": float(owner["process_started"]),
            "host": str(owner["host"]),
            "boot": owner.get("boot"),
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def is_foreign(owner: dict[str, Any]) -> bool:
    """Whether the process lives on another machine, where it can't be looked up."""
    return bool(owner["host"] != socket.gethostname())


def lock_owner(run: Path) -> dict[str, Any] | None:
    """The living process that runs in this folder, or None."""
    owner = read_owner(run)
    if owner is None:
        return None
    if is_foreign(owner):
        return owner if _silence(run) < SILENT_SECONDS else None
    if owner["boot"] not in (None, _boot()):
        return None
    try:
        # A process id is used again sooner or later; together with its start time it is unique.
        alive = abs(process_started(owner["pid"]) - owner["process_started"]) < 1.0
    except (psutil.Error, ValueError, OverflowError):
        return None
    return owner if alive else None


def _silence(run: Path) -> float:
    """Seconds since the last sign of life, by this machine's clock."""
    try:
        return abs(time.time() - (run / LOCK_FILE).stat().st_mtime)
    except OSError:
        return float("inf")
