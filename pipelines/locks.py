"""One run at a time in a run folder.

The operating system's lock (flock) decides between processes of one machine and ends with its
process, however that dies. Not every network disk passes it on to other machines, so a lock that
another machine left is watched for its sign of life before it is taken over.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from reports.liveness import (
    BEAT_SECONDS,
    LOCK_FILE,
    is_foreign,
    lock_owner,
    process_identity,
    read_owner,
)
from shearling import ShearlingError, disk_errors

_WATCHED_SECONDS = 2.5 * BEAT_SECONDS
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}
"""What a disk without such locks says (Lustre mounted without flock): who is named has to do."""


@contextlib.contextmanager
def run_lock(run: Path, *, watched: float = _WATCHED_SECONDS) -> Iterator[None]:
    """Hold the run folder for this process. The lock of a process that has ended is taken over.

    ``watched``: seconds to look for signs of life of a process on another machine.

    Raises:
        ShearlingError: if another process runs here.
    """
    path = run / LOCK_FILE
    with disk_errors(path):
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise taken(run, lock_owner(run) or {}) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            if owner := lock_owner(run):
                raise taken(run, owner) from error
        owner = read_owner(run)
        if owner and is_foreign(owner) and _shows_life(path, watched):
            raise taken(run, owner)
        with disk_errors(path):
            os.ftruncate(handle, 0)
            os.pwrite(handle, json.dumps(process_identity()).encode(), 0)
        with _beating(path):
            yield
        # Emptied, not deleted: deleting would let a waiting process lock a file that is gone.
        os.ftruncate(handle, 0)
    finally:
        os.close(handle)


def taken(run: Path, owner: dict[str, Any]) -> ShearlingError:
    """The error where ``owner``, as `lock_owner` gives it, runs in the folder already."""
    where = f" on {owner['host']}" if owner and is_foreign(owner) else ""
    return ShearlingError(
        f"Another run is at work in {run} (process {owner.get('pid', 'unknown')}{where}).",
        hint=f"Watch it with `shearling watch {run}`, or give this run its own folder "
        "with --out DIR.",
    )


def _shows_life(path: Path, seconds: float) -> bool:
    """Whether the file's time moves while we look: no two clocks are compared."""
    first, end = path.stat().st_mtime_ns, time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(min(0.5, seconds / 4))
        with path.open("rb"):  # opening makes a network disk ask its server again
            if path.stat().st_mtime_ns != first:
                return True
    return False


@contextlib.contextmanager
def _beating(path: Path, seconds: float = BEAT_SECONDS) -> Iterator[None]:
    """Touch the lock every few seconds from a thread of its own, as the sign of life."""
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(seconds):
            with contextlib.suppress(OSError):
                os.utime(path)

    thread = threading.Thread(target=beat, name="run-lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
