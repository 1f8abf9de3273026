"""One of several processes of the tests: joins the others, distils as told, and leaves.

    RANK=0 WORLD_SIZE=2 ... gloo_process.py JOBS

JOBS is a JSON file, a list of runs one after the other (starting Python costs more than they do):
the arguments of `distill` by name, and ``stop_after``, the step after which rank 0 is asked to
stop; ``wide`` has Muon multiply in float32.
"""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from compress import course
from compress.distill import distill
from compress.parallel import processes, rank, together
from compress.settings import DistillSettings


def run(job: dict[str, Any]) -> None:
    wide = job.pop("wide", False)
    course.wide_products = lambda *_: wide
    stop_after, settings = job.pop("stop_after", None), job.pop("settings")

    def on_metrics(line: dict[str, Any]) -> None:
        # Only rank 0 is told of metrics, so it is asked alone; the others must hear of it.
        if "loss" in line and line["step"] == stop_after:
            signal.raise_signal(signal.SIGTERM)

    folders = {name: Path(path) for name, path in job.items()}
    try:
        summary = distill(settings=DistillSettings(**settings), on_metrics=on_metrics, **folders)
    except KeyboardInterrupt:
        if stop_after is None:
            raise
        return
    if rank() == 0:
        (folders["out"] / "summary.json").write_text(json.dumps(summary))


def main() -> None:
    torch.set_num_threads(1)
    with together("cpu"):
        assert processes() > 1, "this script is for several processes"
        for job in json.loads(Path(sys.argv[1]).read_text()):
            run(job)


if __name__ == "__main__":
    main()
