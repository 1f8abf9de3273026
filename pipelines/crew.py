"""Several processes for one run: rank 0 does everything, and calls the others where they help.

Rank 0 is the only one that writes the run's folder. The others wait, and join in for the stages
whose module says ``TOGETHER``, on the same settings and folders.

Starting them is `torchrun`'s work on a cluster; `start_processes` does the same on one machine,
without its output and with rank 0's exit code.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipelines.machine import memory_errors
from pipelines.stages.context import Context
from pipelines.steps import STAGES, Step
from reports.settings import BenchmarkSettings
from shearling import ShearlingError, disk_errors, silent

_FOLDERS = ("out", "run", "cache")
_SAME = 20.0
"""Seconds in which rank 0 comes upon a mistake of all, and writes its report of it."""
_GRACE = 30.0
"""Seconds in which the other processes may end by themselves once one has ended."""


# --- starting them on one machine ---------------------------------------------------------------


def threads_of_each(count: int) -> int:
    """Threads that each of so many processes on this machine is given."""
    return max(1, (os.cpu_count() or 1) // count)


def start_processes(count: int, arguments: Sequence[str]) -> int:
    """Run ``shearling ARGUMENTS`` in ``count`` processes that know of each other.

    Returns rank 0's exit code. Signals are passed on; a second one ends them at once.
    """
    threads = str(threads_of_each(count))
    told = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "pipelines", *arguments],
            env={
                "OMP_NUM_THREADS": threads,
                **os.environ,
                **told,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
            },
            start_new_session=True,  # else a terminal's Ctrl-C would reach them twice
        )
        for rank in range(count)
    ]
    with _signals_passed_on(started):
        _wait_for_first(started)
        _end(started, _GRACE)
    return int(started[0].returncode)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextmanager
def _signals_passed_on(started: list[subprocess.Popen[bytes]]) -> Iterator[None]:
    asked = 0

    def pass_on(number: int, frame: Any) -> None:
        nonlocal asked
        asked += 1
        for process in started:
            if process.poll() is None:
                process.send_signal(number if asked == 1 else signal.SIGKILL)

    stops = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, pass_on) for number in stops}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait_for_first(started: list[subprocess.Popen[bytes]]) -> None:
    while all(process.poll() is None for process in started):
        time.sleep(0.2)


def _end(started: list[subprocess.Popen[bytes]], grace: float) -> None:
    """Wait for the rest; what does not end by itself is asked to, then made to."""
    for stop in (None, signal.SIGTERM, signal.SIGKILL):
        for process in started:
            if stop is not None and process.poll() is None:
                process.send_signal(stop)
        end = time.monotonic() + grace
        while time.monotonic() < end and any(process.poll() is None for process in started):
            time.sleep(0.1)


# --- working together ---------------------------------------------------------------------------


@contextmanager
def leading() -> Iterator[None]:
    """While open, the others wait for calls; at the end, whatever it is, they are sent home."""
    from compress.parallel import leader_says

    try:
        yield
    finally:
        leader_says(None, patiently=True)


def call_the_others(step: Step, context: Context) -> None:
    """Have the other processes run this stage too, where it is made for that."""
    from compress.parallel import leader_says, processes

    if processes() == 1 or not getattr(STAGES[step.kind], "TOGETHER", False):
        return
    leader_says(
        {
            "kind": step.kind,
            "settings": step.settings.model_dump(mode="json"),
            "inputs": {role: str(path) for role, path in context.inputs.items()},
            "folders": {name: str(getattr(context, name)) for name in _FOLDERS},
            "name": context.name,
            "seed": context.seed,
            "device": context.device,
        },
        patiently=True,
    )


def follow() -> None:
    """What every process but rank 0 does: wait for calls, and work along until sent home.

    Signals are left to the stage at work; between stages rank 0 says when it is over.
    """
    from compress.parallel import leader_says
    from pipelines.recipe import KINDS

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    left_alone = threading.Timer(0, lambda: None)
    while (told := leader_says(None, patiently=True)) is not None:
        left_alone.cancel()
        context = Context(
            name=told["name"],
            inputs={role: Path(path) for role, path in told["inputs"].items()},
            history=(),  # only an export looks at these, which rank 0 makes alone
            tried=(),
            seed=told["seed"],
            benchmark=BenchmarkSettings(),  # only the transfer set looks at it, on rank 0 alone
            device=told["device"],
            progress=silent,
            on_metrics=lambda line: None,
            **{name: Path(path) for name, path in told["folders"].items()},
        )
        settings = KINDS[told["kind"]].model_validate(told["settings"])
        try:
            with memory_errors(context.name, told["kind"]), disk_errors(context.out):
                STAGES[told["kind"]].run(settings, context)
        except KeyboardInterrupt:
            continue  # rank 0 was interrupted too
        except ShearlingError as error:
            # Mostly the same happened to rank 0, which tells the user and sends all home.
            left_alone = threading.Timer(_SAME, _leave, [error])
            left_alone.daemon = True
            left_alone.start()
    left_alone.cancel()


def _leave(error: ShearlingError) -> None:
    """Say what went wrong here alone, and end: the others wait for this process in the stage."""
    number = os.environ["RANK"]
    print(f"Process {number}: {error.what}\n{error.hint or ''}", file=sys.stderr, flush=True)
    os._exit(1)
