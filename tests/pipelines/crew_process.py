"""One of two processes, of which only the second comes upon a mistake in a stage.

RANK=0 WORLD_SIZE=2 ... crew_process.py
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from compress.parallel import leads, together
from pipelines import crew
from shearling import ShearlingError


def stage(*_: Any) -> None:
    if not leads():
        raise ShearlingError("The shard is damaged.", hint="Delete it.")
    dist.all_reduce(torch.ones(1))  # of which the other never hears


def main() -> None:
    crew._SAME = 1.0
    crew.STAGES["distill"] = SimpleNamespace(run=stage, TOGETHER=True)  # type: ignore[assignment]
    with together("cpu"):
        if not leads():
            crew.follow()
            return
        told = {"kind": "distill", "settings": {"name": "d", "kind": "distill", "tokens": 1}}
        folders = dict.fromkeys(crew._FOLDERS, ".")
        from compress.parallel import leader_says

        call = {**told, "inputs": {}, "folders": folders, "name": "d", "seed": 0, "device": "cpu"}
        leader_says(call, patiently=True)
        stage()


if __name__ == "__main__":
    main()
