"""Other faults than kills, tried on whole runs: full and read-only disks, too little memory, races.

    python tests/pipelines/faults.py --tries 20

Each fault hits a run; then it is gone, the same command is given again, and the results must be
those of an undisturbed run, byte for byte. Every process ends with an exit code and a message.
Disks of a wanted size are tmpfs mounts in a mount namespace of the child's own (Linux; root or user
namespaces).
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import resource
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
from killing import RUN, Killer, results, run_in_child

_NEW_NAMESPACES = (0x00020000, 0x00020000 | 0x10000000)  # mounts; mounts and users
_READ_ONLY, _REMOUNT = 1, 32
Outcome = tuple[int, str]
"""Exit code, and all that was printed."""


def forked(work: Callable[[Connection], None]) -> Outcome:
    """Run ``work`` in a fork of this process; what it prints comes through the pipe."""
    heard, said = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(heard)
        code = 1
        try:
            work(_Pipe(said))  # type: ignore[arg-type]
            code = 0
        except SystemExit as ended:
            code = int(ended.code or 0)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)
    os.close(said)
    with os.fdopen(heard, encoding="utf-8", errors="replace") as file:
        text = file.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text


class _Pipe:
    def __init__(self, number: int) -> None:
        self._number = number

    def fileno(self) -> int:
        return self._number


def own_mounts() -> bool:
    """Give this process mounts of its own; False where the system does not allow it."""
    libc = ctypes.CDLL(None, use_errno=True)
    ids = os.getuid(), os.getgid()
    for flags in _NEW_NAMESPACES:
        if libc.unshare(flags) == 0:
            if flags != _NEW_NAMESPACES[0]:
                with contextlib.suppress(OSError):
                    Path("/proc/self/setgroups").write_text("deny")
                    Path("/proc/self/uid_map").write_text(f"0 {ids[0]} 1")
                    Path("/proc/self/gid_map").write_text(f"0 {ids[1]} 1")
            libc.mount(b"none", b"/", None, 0x40000 | 16384, None)  # private, all below
            return True
    return False


def mount(place: Path, kilobytes: int, flags: int = 0) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    place.mkdir(parents=True, exist_ok=True)
    size = f"size={kilobytes}k".encode()
    if libc.mount(b"shearling", str(place).encode(), b"tmpfs", flags, size) != 0:
        raise OSError(ctypes.get_errno(), f"can't mount at {place}")


# --- what a child does --------------------------------------------------------------------------


def full_disk(recipe: str, folder: str, kilobytes: int, answer: Connection) -> None:
    """A run on a disk of so many kilobytes; then the disk grows and the run goes on."""
    if not own_mounts():
        answer.send(None)
        return
    place = Path(folder) / "disk"
    mount(place, kilobytes)
    run, cache = str(place / RUN), str(place / "cache")
    first = forked(lambda said: run_in_child(recipe, run, cache, said, 0))
    mount(place, 1 << 20, _REMOUNT)
    second = forked(lambda said: run_in_child(recipe, run, cache, said, 0))
    answer.send((first, second, results(place / RUN)))


def read_only(recipe: str, folder: str, _: int, answer: Connection) -> None:
    """A finished run on a disk that may only be read, asked for more; then it may be written."""
    if not own_mounts():
        answer.send(None)
        return
    place = Path(folder) / "disk"
    mount(place, 1 << 20)
    run, cache = str(place / RUN), str(place / "cache")
    forked(lambda said: run_in_child(recipe, run, cache, said, 0))
    before = results(place / RUN)
    mount(place, 1 << 20, _REMOUNT | _READ_ONLY)
    first = forked(lambda said: run_in_child(recipe, run, cache, said, 0))
    assert results(place / RUN) == before
    mount(place, 1 << 20, _REMOUNT)
    second = forked(lambda said: run_in_child(recipe, run, cache, said, 0))
    answer.send((first, second, results(place / RUN)))


def little_memory(recipe: str, folder: str, kilobytes: int, answer: Connection) -> None:
    """A run one stage of which may have so much more memory than at its start; then without.

    The kind of stage goes by the amount. Libraries that end the process when they get no memory
    (Rust's do) make it one that was killed.
    """
    from pipelines.steps import STAGES

    run, cache = str(Path(folder) / RUN), str(Path(folder) / "cache")
    module = STAGES[list(STAGES)[kilobytes % len(STAGES)]]
    work = module.run

    def limited(settings: Any, context: Any) -> Any:
        size = psutil.Process().memory_info().vms + kilobytes * 1024
        resource.setrlimit(resource.RLIMIT_AS, (size, resource.RLIM_INFINITY))
        return work(settings, context)

    def with_limit(said: Connection) -> None:
        module.run = limited  # type: ignore[attr-defined]
        run_in_child(recipe, run, cache, said, 0)

    first = forked(with_limit)
    second = forked(lambda said: run_in_child(recipe, run, cache, said, 0))
    answer.send((first, second, results(Path(run))))


def race(recipe: str, folder: str, processes: int, answer: Connection) -> None:
    """Several runs that start on one folder at the same time; then one alone."""
    run, cache = str(Path(folder) / RUN), str(Path(folder) / "cache")
    heard, said = os.pipe()
    children = []
    for _ in range(processes):
        child = os.fork()
        if child == 0:
            os.close(heard)
            code = 1
            try:
                run_in_child(recipe, run, cache, _Pipe(said), 0)  # type: ignore[arg-type]
            except SystemExit as ended:
                code = int(ended.code or 0)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    os.close(said)
    with os.fdopen(heard, encoding="utf-8", errors="replace") as file:
        text = file.read()
    codes = sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)
    first = (2 if codes == [0] + [2] * (processes - 1) else 1, f"{codes}\n{text}")
    second = forked(lambda said: run_in_child(recipe, run, cache, said, 0))
    answer.send((first, second, results(Path(run))))


FAULTS: dict[str, tuple[Callable[..., None], str, tuple[int, int]]] = {
    "full disk": (full_disk, "The disk is full", (40, 2600)),
    "read-only disk": (read_only, "Not allowed to use", (0, 0)),
    "little memory": (little_memory, "Out of memory", (100, 40_000)),
    "runs at the same time": (race, "Another run is at work", (2, 4)),
}
"""By name: what the child does, a message that tells of it, and from where to where its amount."""


def try_fault(killer: Killer, name: str, amount: int) -> tuple[str, list[str]]:
    """One try: how it ended ("no fault": the amount was enough), and what was wrong with that."""
    work, message, _ = FAULTS[name]
    folder = Path(tempfile.mkdtemp(dir=killer.folder))
    heard, said = killer.context.Pipe(duplex=False)
    process = killer.context.Process(
        target=work, args=(str(killer.recipe), str(folder), amount, said)
    )
    process.start()
    said.close()
    try:
        answer = heard.recv()
    except EOFError:
        return "crashed", [f"{name} {amount}: the process that made the fault died"]
    finally:
        process.join()
    if answer is None:
        return "not possible here", []
    (code, text), (after, later), found = answer
    wrong = []
    died = code < 0 and name == "little memory"
    if code not in (0, 2) and not died:
        wrong.append(f"{name} {amount}: exit {code}: {text[-600:]}")
    if code == 2 and message not in text:
        wrong.append(f"{name} {amount}: no word of it: {text[-600:]}")
    if "Traceback" in text:
        wrong.append(f"{name} {amount}: a traceback: {text[-900:]}")
    if after != 0:
        wrong.append(f"{name} {amount}: did not go on: exit {after}: {later[-600:]}")
    elif found != killer.undisturbed:
        wrong.append(f"{name} {amount}: other results than undisturbed")
    return ("told" if code == 2 else "ended by the system" if died else "no fault"), wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tries", type=int, default=20, help="of each fault")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=FAULTS)
    options = parser.parse_args()
    killer = Killer(Path(tempfile.mkdtemp(prefix="shearling-faults-")), options.seed)
    tally: dict[str, Any] = {}
    for name, (_, _, (least, most)) in FAULTS.items():
        if options.only not in (None, name):
            continue
        ends: dict[str, int] = {}
        for _ in range(options.tries if least != most else min(3, options.tries)):
            end, wrong = try_fault(killer, name, killer.random.randint(least, most))
            ends[end] = ends.get(end, 0) + 1
            killer.tally.wrong += wrong
            print(f"{name}: {ends}, {len(killer.tally.wrong)} wrong", flush=True)
        tally[name] = ends
    print(json.dumps({"tries": tally, "wrong": killer.tally.wrong}, indent=2))
    sys.exit(bool(killer.tally.wrong))


if __name__ == "__main__":
    main()
