"""What ``shearling --help`` costs beside what it must load: processor time of new processes.

    python -m pytest tests/bench/bench_help.py -o python_files='bench_*.py' -s

Help in frames and colours is typer's and rich's; loading these is what any command-line program of
this kind pays. The goal is one and a half times that.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = {
    "python alone": [sys.executable, "-c", "pass"],
    "typer and rich": [sys.executable, "-c", "import typer.rich_utils"],
    "shearling --help": [sys.executable, "-m", "pipelines", "--help"],
}
REPEATS, RATIO = 15, 1.5


def processor_seconds(command: list[str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True, cwd=ROOT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def test_help_costs_little_beside_what_shows_it() -> None:
    turns = [
        {name: processor_seconds(command) for name, command in COMMANDS.items()}
        for _ in range(REPEATS)
    ]
    print()
    for name in COMMANDS:
        seconds = [turn[name] for turn in turns]
        low, middle, high = min(seconds), statistics.median(seconds), max(seconds)
        print(f"{name:>16}  {middle:.2f} s ({low:.2f} to {high:.2f})")
    ratio = statistics.median(turn["shearling --help"] / turn["typer and rich"] for turn in turns)
    print(f"{'ratio':>16}  {ratio:.2f}")
    assert ratio < RATIO
