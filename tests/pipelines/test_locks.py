"""One run at a time: who holds a folder, who is alive, and what happens to a dead owner's lock."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from pipelines.locks import run_lock
from reports import liveness
from reports.liveness import lock_owner, process_identity, process_started
from shearling import ShearlingError

HOLDS = """
import sys, time
from pathlib import Path
from pipelines.locks import run_lock
with run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_two_runs_on_one_folder(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path)], stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        owner = lock_owner(tmp_path)
        assert owner is not None
        assert owner["pid"] == other.pid
        with pytest.raises(ShearlingError, match=str(other.pid)) as caught, run_lock(tmp_path):
            pass
        assert "--out" in caught.value.hint
        other.kill()
    # Killed without a word: the lock is stale and is taken over.
    assert lock_owner(tmp_path) is None
    with run_lock(tmp_path):
        assert lock_owner(tmp_path) == lock_owner(tmp_path) is not None
    assert lock_owner(tmp_path) is None


def test_a_process_id_that_was_given_away_again_owns_nothing(tmp_path: Path) -> None:
    me = process_identity()
    (tmp_path / "run.lock").write_text(json.dumps(me))
    assert lock_owner(tmp_path) == me
    for other in (
        {**me, "process_started": me["process_started"] - 100},
        {**me, "boot": "another start of this machine"},
        {**me, "pid": 2**22 + 1},
        {**me, "pid": 10**30},
        {**me, "pid": -1},
        {"pid": me["pid"]},
        [me],
        None,
    ):
        (tmp_path / "run.lock").write_text(json.dumps(other))
        assert lock_owner(tmp_path) is None
    (tmp_path / "run.lock").write_text("not json")
    assert lock_owner(tmp_path) is None


def test_the_lock_is_free_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="boom"), run_lock(tmp_path):
        raise ValueError("boom")
    with run_lock(tmp_path):
        pass


def test_a_clock_that_jumps_kills_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The start of a process is told in time since the machine's start, which nobody can set."""
    if not Path("/proc/self/stat").is_file():
        pytest.skip("only Linux tells it")
    with run_lock(tmp_path):
        monkeypatch.setattr(psutil.Process, "create_time", lambda _: 0.0)
        monkeypatch.setattr(time, "time", lambda: 4e9)
        assert lock_owner(tmp_path) is not None
    with pytest.raises(psutil.NoSuchProcess):
        process_started(2**22 + 1)


def foreign(run: Path) -> Path:
    lock = run / "run.lock"
    lock.write_text(json.dumps({**process_identity(), "host": "elsewhere"}))
    return lock


def test_a_run_on_another_machine_shows_that_it_lives(tmp_path: Path) -> None:
    lock = foreign(tmp_path)
    assert lock_owner(tmp_path) is not None
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(0.05):
            os.utime(lock)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with (
            pytest.raises(ShearlingError, match="on elsewhere"),
            run_lock(tmp_path, watched=10),
        ):
            pass
    finally:
        stop.set()
        thread.join()
    assert json.loads(lock.read_text())["host"] == "elsewhere"


def test_the_lock_of_a_dead_run_on_another_machine_is_taken_over(tmp_path: Path) -> None:
    lock = foreign(tmp_path)
    with run_lock(tmp_path, watched=0.2):
        assert json.loads(lock.read_text())["host"] == socket.gethostname()
    foreign(tmp_path)
    os.utime(lock, (time.time() - 3600, time.time() - 3600))
    assert lock_owner(tmp_path) is None


def test_a_run_gives_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipelines import locks

    beating = locks._beating
    monkeypatch.setattr(locks, "_beating", lambda path: beating(path, 0.02))
    with run_lock(tmp_path):
        os.utime(tmp_path / "run.lock", (1, 1))
        end = time.monotonic() + 10
        while (tmp_path / "run.lock").stat().st_mtime == 1 and time.monotonic() < end:
            time.sleep(0.02)
        assert liveness.lock_owner(tmp_path) is not None
        assert (tmp_path / "run.lock").stat().st_mtime > 1


def test_a_disk_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lustre mounted without flock: whom the file names, and whether that one lives, has to do."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.flock", refuse)
    with run_lock(tmp_path):
        with pytest.raises(ShearlingError, match="Another run is at work"), run_lock(tmp_path):
            pass
        assert lock_owner(tmp_path) == process_identity()
    with run_lock(tmp_path):
        pass
