"""How fast a checkpoint answers and how much memory that takes, measured in a process of its own.

    python -m reports.speed MODEL_FOLDER --device cpu --threads 2 [--beside TEACHER_FOLDER]

A fresh process has nothing in memory but Python, torch and this one model, so its peak is the
model's, and nothing that ran before slows it down. A teacher comes after that: both write in turns,
for a machine that others use is half as fast a minute later, and a ratio should not know of it.
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
TURN_TOKENS = 4
"""Tokens that each of two models writes before it is the other's turn: a machine's speed hardly
changes in so short a time, and a hiccup in one of them does not move their median."""


def measure_speed(
    folder: Path, *, device: str = "cpu", beside: Path | None = None
) -> dict[str, Any]:
    """Run this module on the folder and return what it measured (see `measure`).

    With a teacher ``beside`` it, "speed" holds what `in_turns` measured too, or why it did not:
    the model's own speed has been told before, whatever becomes of the two.
    """
    import torch

    # -P and the path: a folder `reports` where the command runs must not be taken for this one.
    command = [sys.executable, "-P", "-m", "reports.speed", str(Path(folder).resolve())]
    command += ["--device", device, "--threads", str(torch.get_num_threads())]
    command += ["--beside", str(Path(beside).resolve())] if beside else []
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in finished.stdout.split("\n")[:-1] if line.startswith("{")]
    last = finished.stderr.strip().splitlines()[-1:] or ["no message"]
    ended = f"ended with code {finished.returncode}: {last[0]}"
    if not lines:
        raise ShearlingError(
            f"Measuring the speed of {folder} {ended}",
            hint="Set benchmark.speed to false to leave speed and memory out.",
        )
    measured: dict[str, Any] = json.loads(lines[-1])
    if finished.returncode != 0:
        measured["speed"]["decode_times_teacher_left_out"] = f"it {ended}"
    return measured


def peak_memory(device: str) -> int:
    """Most bytes that this process has had resident (CPU) or allocated (accelerator)."""
    import torch

    if device.startswith("cuda"):
        return int(torch.cuda.max_memory_allocated(device))
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
        torch.cuda.synchronize(device)


class Writer:
    """A model that reads a prompt and then writes on, one token at a time, greedily, batch 1.

    The key/value cache grows by a token each time. ``prompt`` is [1, T] int64, on the device.
    """

    def __init__(self, model: Any, prompt: Any, device: str) -> None:
        self._model, self._prompt, self._device = model, prompt, device
        model(prompt[:, :32], use_cache=False, logits_to_keep=1)

    def read(self) -> float:
        """Seconds from the prompt to the first new token."""
        return self._timed(self._prompt, None)

    def write(self, tokens: int) -> list[float]:
        """Seconds of each of so many further tokens."""
        return [self._timed(self._token, self._cache) for _ in range(tokens)]

    def _timed(self, ids: Any, cache: Any) -> float:
        _wait_for(self._device)
        start = time.perf_counter()
        output = self._model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        self._token = output.logits[:, -1].argmax(dim=-1, keepdim=True)
        _wait_for(self._device)
        self._cache = output.past_key_values
        return time.perf_counter() - start


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
    prompt = _prompt(device, model)
    prefills: list[float] = []
    steps: list[float] = []
    with torch.inference_mode():
        writer = Writer(model, prompt, device)
        while not steps or sum(prefills) + sum(steps) < LEAST_SECONDS:
            prefills += [writer.read() for _ in range(PREFILLS)]
            steps += writer.write(NEW_TOKENS)
    peak = peak_memory(device)
    return {
        "speed": {
            **speeds("prefill", prompt.shape[1], prefills),
            **speeds("decode", 1, steps),
            "time_to_first_token_seconds": statistics.median(prefills),
            "prompt_tokens": prompt.shape[1],
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


def _prompt(device: str, *models: Any) -> Any:
    """Random tokens that all of these models know: 512, or what leaves room to write."""
    import torch

    room = min(model.config.max_position_embeddings for model in models)
    rows = min(model.config.vocab_size for model in models)
    tokens = max(min(PROMPT_TOKENS, room - NEW_TOKENS), 1)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(rows, (1, tokens), generator=generator).to(device)


def has_room(device: str, *folders: Path) -> bool:
    """Whether free memory holds these models: on a CPU in 32 bits, where files may have 16."""
    import psutil
    import torch

    files = sum(file.stat().st_size for each in folders for file in each.glob("*.safetensors"))
    if device.startswith("cuda"):
        return 1.25 * files < int(torch.cuda.mem_get_info(device)[0])
    return 1.25 * 2 * files < int(psutil.virtual_memory().available)


def in_turns(folder: Path, teacher: Path, device: str) -> dict[str, Any]:
    """How many times as fast as the teacher the model writes, and its 95% confidence interval.

    Both read one prompt. In a turn each writes `TURN_TOKENS` tokens, and the turn's ratio is that
    of their median times; who begins changes from turn to turn. Told is the median turn. All is
    repeated while less than `LEAST_SECONDS` have passed.
    """
    import torch

    from reports.load import load_model

    models = [load_model(each, device)[0] for each in (folder, teacher)]
    prompt = _prompt(device, *models)
    ratios: list[float] = []
    with torch.inference_mode():
        ours, theirs = (Writer(each, prompt, device) for each in models)
        end = time.perf_counter() + LEAST_SECONDS
        while not ratios or time.perf_counter() < end:
            ours.read()
            theirs.read()
            for turn in range(NEW_TOKENS // TURN_TOKENS):
                order = (ours, theirs) if turn % 2 else (theirs, ours)
                took = {writer: statistics.median(writer.write(TURN_TOKENS)) for writer in order}
                ratios.append(took[theirs] / took[ours])
    return {
        "decode_times_teacher": statistics.median(ratios),
        "decode_times_teacher_interval": median_interval(ratios),
    }


def median_interval(values: Sequence[float]) -> list[float]:
    """The two values, of six or more, between which the median lies at 95%: an exact sign test's.

    Of independent draws from any distribution, those below its median are as many as heads of a
    fair coin (Conover, Practical Nonparametric Statistics, 3.2).
    """
    from scipy import stats

    ordered = sorted(values)
    k = int(stats.binom.ppf(0.025, len(ordered), 0.5))
    return [ordered[k - 1], ordered[-k]]


def speeds(what: str, tokens: int, seconds: Sequence[float]) -> dict[str, Any]:
    """Tokens a second, each time of ``seconds`` being that of ``tokens``: median and quartiles."""
    slow, middle, fast = (
        tokens / time for time in reversed(statistics.quantiles(seconds, method="inclusive"))
    )
    name = f"{what}_tokens_per_second"
    return {name: middle, f"{name}_quartiles": [slow, fast]}


def main() -> None:
    """The child process: measure, and print a line of JSON; one with more after the turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--beside", type=Path, help="a teacher that writes in turns with it")
    asked = parser.parse_args()
    measured = measure(asked.folder, asked.device, asked.threads)
    print(json.dumps(measured), flush=True)
    if asked.beside:
        if has_room(asked.device, asked.folder, asked.beside):
            measured["speed"] |= in_turns(asked.folder, asked.beside, asked.device)
        else:
            left_out = "free memory has no room for both models"
            measured["speed"]["decode_times_teacher_left_out"] = left_out
        print(json.dumps(measured))


if __name__ == "__main__":
    main()
