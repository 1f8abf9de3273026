"""Kill a whole run again and again, at random moments of every step, and look what is left.

    python tests/pipelines/killing.py --kills 300

A run that was killed (SIGKILL: nothing can be tidied up) is started again with the same command
until it is done. Then its results must be those of an undisturbed run, byte for byte: transfer
set, selection, the weights after each stage, metrics, and scores.

Half of the kills come at a random time of a random step, the other half right before a random
change of a file (seen by an audit hook), where half-done work would show. Each run is a process of
its own, forked from one that has already imported torch, for importing takes longer than the run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

WRITES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.symlink", "os.truncate"}
STEPS = (
    "teacher", "transfer_set", "teacher/benchmark", "correct", "correct/benchmark", "prune",
    "prune/benchmark", "distill", "distill/benchmark", "small",
)  # fmt: skip
RUN = "killed"
"""The name of every run's folder, for exports bear it."""
WRITES_TOLD = "changes of files: "


def recipe_data(folder: Path) -> dict[str, Any]:
    """A recipe in which every step leaves and finds something; made in ``folder``."""
    from pipelines.tiny import make_tiny_llama, tiny_documents, write_documents

    make_tiny_llama(folder / "llama")
    write_documents(folder / "text.jsonl", tiny_documents(150))
    question = {
        "premise": "The lamb sees the hill.",
        "choice1": "It follows the shepherd.",
        "choice2": "The gate counts the rain.",
        "question": "effect",
        "idx": 0,
        "label": 0,
    }
    (folder / "mirror").mkdir()
    lines = "".join(json.dumps({**question, "idx": n}) + "\n" for n in range(3))
    (folder / "mirror" / "copa.jsonl").write_text(lines, encoding="utf-8")
    return {
        "name": "killed",
        "device": "cpu",
        "teacher": {"model": str(folder / "llama")},
        "transfer_set": {
            "window": 32,
            "heldout_windows": 4,
            "sources": [{"name": "grammar", "path": str(folder / "text.jsonl")}],
        },
        "benchmark": {
            "tasks": ["copa"],
            "mirror": str(folder / "mirror"),
            "prompts": ["The shepherd"],
            "completion_tokens": 2,
            "speed": False,
        },
        "stages": [
            {
                "name": "correct",
                "kind": "correct",
                "tokens": 512,
                "batch_tokens": 128,
                "precision": "float32",
                "evaluate_every": 2,
                "save_every_seconds": 0,
            },
            {
                "name": "prune",
                "kind": "prune",
                "shape": {"hidden_size": 24, "num_hidden_layers": 3, "intermediate_size": 48},
                "calibration_tokens": 256,
                "precision": "float32",
                "save_every_seconds": 0,
            },
            {
                "name": "distill",
                "kind": "distill",
                "tokens": 1280,
                "batch_tokens": 128,
                "precision": "float32",
                "targets": "sample",
                "ema": 0.5,
                "evaluate_every": 4,
                "save_every_seconds": 0,
            },
            {"name": "small", "kind": "export", "to": "gguf", "dtype": "float16"},
        ],
    }


# --- one process --------------------------------------------------------------------------------


def run_in_child(recipe: str, run: str, cache: str, said: Connection, die_at: int) -> None:
    """`shearling run` in this process; with ``die_at`` it kills itself before that many writes.

    At its end it says how many there were.
    """
    import torch

    from pipelines.cli import main

    torch.set_num_threads(1)
    os.environ["SHEARLING_CACHE"] = cache
    os.dup2(said.fileno(), 1)
    os.dup2(said.fileno(), 2)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    writes = watch_writes(Path(run), Path(cache), die_at)
    sys.argv = ["shearling", "run", recipe, "--out", run]
    try:
        main()
    finally:
        print(f"{WRITES_TOLD}{writes()}")


def watch_writes(run: Path, cache: Path, die_at: int) -> Callable[[], int]:
    """Count changes of files below ``run`` and ``cache``; die right before number ``die_at``."""
    count = 0
    ours = (str(run), str(cache))

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event == "open":
            changes = isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        else:
            changes = event in WRITES
        if not changes or not str(arguments[0]).startswith(ours):
            return
        count += 1
        if count == die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return lambda: count


@dataclass
class Tally:
    """What was tried, and what came of it."""

    kills: Counter[str] = field(default_factory=Counter)
    """By the step in which they fell."""
    ways: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    wrong: list[str] = field(default_factory=list)


class Killer:
    """Starts runs of one recipe and kills them."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        import yaml

        os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        # The fork server of Python 3.11 knows no other path, and passes over what it can't import.
        here = Path(__file__).resolve().parent
        given = os.environ.get("PYTHONPATH", "")
        os.environ["PYTHONPATH"] = os.pathsep.join([str(here), str(here.parents[1]), given])
        self.folder = folder
        self.random = random.Random(seed)
        self.recipe = folder / "recipe.yaml"
        self.recipe.write_text(yaml.safe_dump(recipe_data(folder)), encoding="utf-8")
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["imported"])
        self.seconds: dict[str, float] = {}
        self.writes = 0
        self.tally = Tally()
        self.undisturbed = self._reference()

    def _reference(self) -> dict[str, bytes]:
        run = self.folder / "undisturbed" / RUN
        marks = [(time.monotonic(), "")]
        steps: list[str] = []
        for line in self.start(run, self.folder / "cache-0", wait_for=None):
            if line.startswith(WRITES_TOLD):
                self.writes = int(line.removeprefix(WRITES_TOLD))
            step = line.split(": ")[0]
            if step in STEPS and step not in steps:
                steps.append(step)
                marks.append((time.monotonic(), step))
        marks.append((time.monotonic(), ""))
        self.seconds = {
            name: later - start for (start, name), (later, _) in itertools.pairwise(marks)
        }
        found = results(run)
        assert self.code == 0, "the undisturbed run failed"
        weights = [name for name in found if name.endswith((".safetensors", ".gguf"))]
        for folder in ("correct/model", "prune/model", "distill/model", "small/export"):
            compared = [name for name in weights if name.startswith(f"stages/{folder}/")]
            assert compared, f"the weights of {folder} are not compared"
        assert self.writes, "the changes of files were not counted"
        return found

    def start(
        self, run: Path, cache: Path, *, wait_for: tuple[str, float] | None, die_at: int = 0
    ) -> Iterator[str]:
        """Run until it ends or dies; gives the lines that it prints.

        ``wait_for``: (step, seconds): kill it so long after it began with that step.
        """
        heard, said = self.context.Pipe(duplex=False)
        process = self.context.Process(
            target=run_in_child, args=(str(self.recipe), str(run), str(cache), said, die_at)
        )
        process.start()
        said.close()
        timer: threading.Timer | None = None
        with os.fdopen(os.dup(heard.fileno()), encoding="utf-8", errors="replace") as lines:
            heard.close()
            for line in lines:
                if wait_for and timer is None and line.startswith(f"{wait_for[0]}: "):
                    timer = threading.Timer(wait_for[1], process.kill)
                    timer.start()
                yield line.rstrip()
        process.join()
        if timer:
            timer.cancel()
        self.code = process.exitcode

    def one_run(self, number: int, most_kills: int) -> int:
        """Kill one run up to ``most_kills`` times, let it end, compare; gives the kills."""
        run, cache = self.folder / f"run-{number}" / RUN, self.folder / f"cache-{number}"
        killed = 0
        while True:
            wait_for, die_at = self._moment() if killed < most_kills else (None, 0)
            lines, step = [], "before the first step"
            for line in self.start(run, cache, wait_for=wait_for, die_at=die_at):
                lines.append(line)
                name = line.split(": ")[0]
                step = name if name in STEPS else step
            if self.code != -signal.SIGKILL:
                break
            killed += 1
            self.tally.kills[step] += 1
            self.tally.ways["a random time" if wait_for else "right before a file changes"] += 1
        self.tally.runs += 1
        found = results(run) if self.code == 0 else {}
        names = sorted({*found, *self.undisturbed})
        differing = [name for name in names if found.get(name) != self.undisturbed.get(name)]
        if self.code != 0 or differing:
            told = f"run {number}: exit {self.code}, differing {differing}: " + " | ".join(lines)
            self.tally.wrong.append(told)
        else:
            shutil.rmtree(run.parent)
            shutil.rmtree(cache)
        return killed

    def _moment(self) -> tuple[tuple[str, float] | None, int]:
        if self.random.random() < 0.5:
            return None, 1 + int(self.random.random() ** 2 * self.writes)
        step = self.random.choice(STEPS)
        return (step, self.random.uniform(0, 1.1 * self.seconds.get(step, 0.5))), 0

    def run(self, kills: int, *, seconds: float = float("inf"), tell: bool = False) -> Tally:
        """Runs until so many kills were made or the time is over."""
        begun, made, number = time.monotonic(), 0, 0
        while made < kills and time.monotonic() - begun < seconds:
            number += 1
            made += self.one_run(number, min(self.random.randint(1, 8), kills - made))
            if tell:
                spent = time.monotonic() - begun
                wrong = len(self.tally.wrong)
                print(f"{made} kills in {number} runs, {wrong} wrong, {spent:.0f} s", flush=True)
        return self.tally


def results(run: Path) -> dict[str, bytes]:
    """All that a run made, by its place below stages/ and store/; times and paths left out.

    ``stages/NAME`` is mostly links into the store, and links are followed.
    """
    found = {}
    for top in ("stages", "store"):
        for folder, _, names in os.walk(run / top, followlinks=True):
            for path in (Path(folder) / name for name in sorted(names)):
                if path.name not in ("stage.json", "benchmark.json", "README.md"):
                    found[str(path.relative_to(run))] = _lasting(path)
    return found


def _lasting(path: Path) -> bytes:
    """The content of a file without what is another in each run: times, speeds, memory."""
    if path.name == "metrics.jsonl":
        lines = [json.loads(line) for line in path.read_bytes().splitlines()]
        for line in lines:
            line.pop("tokens_per_second", None)
            line.pop("seconds", None)
        return json.dumps(lines).encode()
    if path.name == "scorecard.json":
        card = json.loads(path.read_bytes())
        return json.dumps([card["results"], card["samples"], card["completions"]]).encode()
    return path.read_bytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after this time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the tally to this file")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="shearling-soak-"))
    tally = Killer(folder, options.seed).run(options.kills, seconds=options.seconds, tell=True)
    facts = {
        "kills": tally.kills.total(),
        "runs": tally.runs,
        "wrong": tally.wrong,
        "by_step": dict(tally.kills),
        "by_way": dict(tally.ways),
    }
    print(json.dumps(facts, indent=2))
    if options.json:
        options.json.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    if tally.wrong:
        sys.exit(f"something was lost; the folders are kept in {folder}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
