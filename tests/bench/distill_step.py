"""Tokens a second and memory of a distillation step, side by side in one run.

    python tests/bench/distill_step.py TEACHER STUDENT TRANSFER_SET [--threads 2] [--steps 4]

TEACHER and STUDENT are Hugging Face folders, TRANSFER_SET what the transfer set stage wrote.
Each variant runs in a process of its own, so that none inherits another's memory:

    plain        the loop that everyone writes first: dense KL on full logits, float32
    plain-bf16   the same under bfloat16 autocast
    live         this project's step, the teacher running along
    cached       this project's step, the teacher's answers from the cache

``tokens_per_second`` is by the wall clock, ``tokens_per_cpu_second`` by processor time, which a
busy machine disturbs less. ``product_share`` is the floating-point operations of the step's matrix
products, per processor second, over the rate that one core reaches on matrix products alone.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from compress.course import open_course
from compress.distill import train_step
from compress.precision import product_rate
from compress.settings import DistillSettings
from shearling import silent
from students.shape import Shape
from teachers.transfer_set import TransferSet

VARIANTS = ("plain", "plain-bf16", "live", "cached")
STEP_TOKENS = 2048


def plain_step(
    teacher: Path, student: Path, text: TransferSet, narrow: bool
) -> Callable[[int], None]:
    """A step as a tutorial would have it."""
    taught = LlamaForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
    learnt = LlamaForCausalLM.from_pretrained(student, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(learnt.parameters(), lr=5e-4, betas=(0.9, 0.95))
    windows = STEP_TOKENS // text.window

    def step(number: int) -> None:
        batch = text.batch(list(range(number * windows, (number + 1) * windows)))
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            with torch.no_grad():
                teacher_logits = taught(**batch, use_cache=False).logits
            student_logits = learnt(**batch, use_cache=False).logits
        loss = torch.nn.functional.kl_div(
            student_logits.float().log_softmax(-1).flatten(0, 1),
            teacher_logits.float().log_softmax(-1).flatten(0, 1),
            log_target=True,
            reduction="batchmean",
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learnt.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def our_step(
    teacher: Path, student: Path, text: TransferSet, cached: bool, steps: int
) -> Callable[[int], None]:
    """The step that `shearling run` takes."""
    settings = DistillSettings(
        tokens=STEP_TOKENS * steps,
        batch_tokens=STEP_TOKENS,
        targets="sample" if cached else "live",
    )
    course = open_course(
        teacher,
        student,
        text,
        settings,
        selection=None,
        seed=0,
        device=torch.device("cpu"),
        cache=Path(tempfile.gettempdir()) / "shearling-bench",
        checkpoint=None,
        progress=silent,
    )
    return lambda number: train_step(course) and None


def step_flops(teacher: Path, student: Path, cached: bool) -> float:
    """Floating-point operations of matrix products a token: 6 a student weight, 2 a teacher's."""

    def weights(folder: Path) -> int:
        shape = Shape.from_config(LlamaForCausalLM.config_class.from_pretrained(folder))
        return shape.non_embedding_parameters + shape.vocab_size * shape.hidden_size

    return 6.0 * weights(student) + (0.0 if cached else 2.0 * weights(teacher))


def measure(variant: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run one variant in this process."""
    torch.set_num_threads(arguments.threads)
    text = TransferSet(arguments.transfer_set)
    cached = variant == "cached"
    if cached:  # fill the cache elsewhere: its memory is not the step's
        command = [sys.executable, *sys.argv[:-2], "--variant", "fill"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    if variant.startswith("plain"):
        step = plain_step(arguments.teacher, arguments.student, text, "bf16" in variant)
    else:
        count = arguments.steps + 1
        step = our_step(arguments.teacher, arguments.student, text, cached, count)
    step(0)
    process_start, start = time.process_time(), time.perf_counter()
    for number in range(1, arguments.steps + 1):
        step(number)
    tokens = STEP_TOKENS * arguments.steps
    cpu, wall = time.process_time() - process_start, time.perf_counter() - start
    kind = torch.float32 if variant == "plain" else torch.bfloat16
    core_rate = product_rate(kind, torch.device("cpu"), seconds=0.5) / arguments.threads
    flops = step_flops(arguments.teacher, arguments.student, cached)
    return {
        "variant": variant,
        "tokens_per_second": round(tokens / wall, 1),
        "tokens_per_cpu_second": round(tokens / cpu, 1),
        "peak_memory_gb": round(_peak_bytes() / 1e9, 2),
        "product_share": round(flops * tokens / cpu / core_rate, 3),
    }


def _peak_bytes() -> int:
    """The most memory this process ever held; Linux counts in kilobytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("teacher", type=Path)
    parser.add_argument("student", type=Path)
    parser.add_argument("transfer_set", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--variant", choices=[*VARIANTS, "fill"])
    arguments = parser.parse_args()
    if arguments.variant == "fill":
        text = TransferSet(arguments.transfer_set)
        our_step(arguments.teacher, arguments.student, text, True, arguments.steps + 1)
    elif arguments.variant:
        print(json.dumps(measure(arguments.variant, arguments)))
    else:
        for variant in VARIANTS:
            command = [sys.executable, *sys.argv, "--variant", variant]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
