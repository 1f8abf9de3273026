"""How fast a checkpoint answers and how much memory that takes, measured in a process of its own.

    python -m reports.speed MODEL_FOLDER --device cpu --threads 2

A fresh process has nothing in memory but Python, torch and this one model, so its peak is the
model's, and nothing that ran before slows it down.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shearling import ShearlingError

PROMPT_TOKENS = 512
NEW_TOKENS = 64
PREFILLS = 3
LEAST_SECONDS = 2.0
"""Small models are asked again until so much time has passed: 64 of their tokens take less than a
hiccup of the machine, whose quartiles would then be narrow and wrong."""


def measure_speed(folder: Path, *, device: str = "cpu") -> dict[str, Any]:
    """Run this module on the folder and return what it measured (see `measure`)."""
    import torch

    # -P and the path: a folder `reports` where the command runs must not be taken for this one.
    command = [sys.executable, "-P", "-m", "reports.speed", str(Path(folder).resolve())]
    command += ["--device", device, "--threads", str(torch.get_num_threads())]
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        last = finished.stderr.strip().splitlines()[-1:] or ["no message"]
        raise ShearlingError(
            f"Measuring the speed of {folder} ended with code {finished.returncode}: {last[0]}",
            hint="Set benchmark.speed to false to leave speed and memory out.",
        )
    measured: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return measured


def peak_memory(device: str) -> int:
    """Most bytes that this process has had resident (CPU) or allocated (accelerator)."""
    import torch

    if device.startswith("cuda"):
        return int(torch.cuda.max_memory_allocated())
    # Not ru_maxrss on Linux: a child inherits the maximum of the process that started it.
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes if sys.platform == "darwin" else kilobytes * 1024


def _wait_for(device: str) -> None:
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize()


def measure(folder: Path, device: str, threads: int) -> dict[str, Any]:
    """Prefill of 512 tokens, then 64 tokens one at a time with the key/value cache, batch 1.

    Prefill is the median of three runs and ends with the first new token (time to first token);
    decoding is the median over the 64 steps, so a hiccup of the machine does not count. Beside the
    medians stand the quartiles. All is repeated while less than `LEAST_SECONDS` have passed.
    """
    import torch

    from reports.load import load_model

    torch.set_num_threads(threads)
    before = peak_memory(device)
    model, _ = load_model(folder, device)
    room = model.config.max_position_embeddings
    prompt_tokens = max(min(PROMPT_TOKENS, room - NEW_TOKENS), 1)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(model.config.vocab_size, (1, prompt_tokens), generator=generator)
    prompt = prompt.to(device)
    prefills: list[float] = []
    steps: list[float] = []
    with torch.inference_mode():
        model(prompt[:, :32], use_cache=False, logits_to_keep=1)
        while not steps or sum(prefills) + sum(steps) < LEAST_SECONDS:
            for _ in range(PREFILLS):
                _wait_for(device)
                start = time.perf_counter()
                output = model(prompt, use_cache=True, logits_to_keep=1)
                token = output.logits[:, -1].argmax(dim=-1, keepdim=True)
                _wait_for(device)
                prefills.append(time.perf_counter() - start)
            for _ in range(NEW_TOKENS):
                start = time.perf_counter()
                output = model(token, past_key_values=output.past_key_values, use_cache=True)
                token = output.logits[:, -1].argmax(dim=-1, keepdim=True)
                _wait_for(device)
                steps.append(time.perf_counter() - start)
    peak = peak_memory(device)
    return {
        "speed": {
            **speeds("prefill", prompt_tokens, prefills),
            **speeds("decode", 1, steps),
            "time_to_first_token_seconds": statistics.median(prefills),
            "prompt_tokens": prompt_tokens,
            "new_tokens": NEW_TOKENS,
            "batch": 1,
            "precision": str(model.dtype).removeprefix("torch."),
            "device": device,
            "threads": threads,
        },
        "peak_memory_bytes": peak,
        "memory": {
            "measured": "peak allocated on the device"
            if device.startswith("cuda")
            else "peak resident set of a process that loads the model and does only this",
            "before_loading_bytes": before,
        },
    }


def speeds(what: str, tokens: int, seconds: Sequence[float]) -> dict[str, Any]:
    """Tokens a second, each time of ``seconds`` being that of ``tokens``: median and quartiles."""
    slow, middle, fast = (
        tokens / time for time in reversed(statistics.quantiles(seconds, method="inclusive"))
    )
    name = f"{what}_tokens_per_second"
    return {name: middle, f"{name}_quartiles": [slow, fast]}


def main() -> None:
    """The child process: measure, and print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.folder, arguments.device, arguments.threads)))


if __name__ == "__main__":
    main()
