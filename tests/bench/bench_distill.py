"""Tokens a second and memory of a distillation step, side by side.

    python tests/bench/bench_distill.py --out distill.jsonl [--work FOLDER] [--threads 2]
        [--steps 4] [--repeats 3] [--variants plain,plain-bf16,live,cached,trl,trl-bf16]
    python tests/bench/bench_distill.py --out distill.jsonl --table

SmolLM2-135M teaches a like-3b student, on windows of 512 tokens, 2048 tokens a step. Each variant
runs in a process of its own, so that none inherits another's memory; all of them take turns, as
often as ``--repeats`` says, and a row that is there is not measured again:

    plain        the loop that everyone writes first: dense KL on full logits, float32
    plain-bf16   the same under bfloat16 autocast
    live         this project's step, the teacher running along
    cached       this project's step, the teacher's answers from the cache
    trl          TRL's GKDTrainer with lmbda 0 and beta 0: forward KL on the given text, a live
                 teacher, float32; without its gradient checkpointing, which costs time
    trl-bf16     the same with bf16, which is TRL's default

TRL is no dependency of this project; where it is missing its rows are skipped with a word. To have
it for the benchmark only:

    python -m pip install --target /tmp/trl --no-deps trl
    PYTHONPATH=/tmp/trl python tests/bench/bench_distill.py ...

``tokens_per_second`` is by the wall clock, ``tokens_per_cpu_second`` by processor time, which a
busy machine disturbs less. ``above_weights_gb`` is the most resident memory in any step, without
the models' weights and without what the process held before it opened them. ``product_share`` is
the floating-point operations of the step's matrix products, a processor second, over the rate that
one core reaches on matrix products alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, TrainerCallback
from workbench import Rows, markdown, prepare, quiet

from compress.answers import CachedAnswers, LiveAnswers, Taught
from compress.course import Course, open_course
from compress.data import StepData
from compress.distill import train_step
from compress.precision import product_rate
from compress.prune import prune
from compress.settings import DistillSettings, PruneSettings
from shearling import silent
from students.shape import resolve_shape
from teachers.checkpoint import open_checkpoint
from teachers.transfer_set import TransferSet

VARIANTS = ("plain", "plain-bf16", "live", "cached", "trl", "trl-bf16")
STEP_TOKENS = 2048
WARM_UP = 3
"""Steps until the optimizer's state is there and memory grows little."""
WINDOW = 512
RATE = 5e-4
CPU = torch.device("cpu")
GB = 1e9


# --- what is measured ---------------------------------------------------------------------------


def resident_bytes() -> int:
    """What of this process lies in memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


@contextmanager
def resident_peak() -> Iterator[list[int]]:
    """The most resident memory seen while the block runs, in bytes."""
    peak, done = [resident_bytes()], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            peak[0] = max(peak[0], resident_bytes())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    yield peak
    done.set()
    thread.join()


@dataclass
class Timed:
    """Times of the steps behind those that warm up, and what the first one's loss was."""

    steps: int
    first_loss: float | None = None
    cpu: float = 0.0
    wall: float = 0.0
    _done: int = 0
    _starts: tuple[float, float] = field(default=(0.0, 0.0))

    def step_done(self) -> None:
        now = time.process_time(), time.perf_counter()
        if self._done < WARM_UP:
            self._starts = now
        self.cpu, self.wall = now[0] - self._starts[0], now[1] - self._starts[1]
        self._done += 1


@dataclass(frozen=True)
class Opened:
    """A variant that is ready: the models' bytes, the dtype of its products, and its steps."""

    weights: int
    dtype: torch.dtype
    run: Callable[[Timed], None]


def bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


# --- the variants -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """Teacher, student and text of the measurement."""

    teacher: Path
    student: Path
    text: Path
    cache: Path


def settings_for(steps: int, cached: bool) -> DistillSettings:
    """The trainer's defaults, with this benchmark's steps and the objective of all variants."""
    return DistillSettings(
        tokens=STEP_TOKENS * steps,
        batch_tokens=STEP_TOKENS,
        targets="sample" if cached else "live",
        forward_kl=1.0,
        cross_entropy=0.0,
    )


def open_plain(pair: Pair, steps: int, narrow: bool) -> Opened:
    """A step as a tutorial would have it, on the windows that the others see."""
    teacher = LlamaForCausalLM.from_pretrained(pair.teacher, dtype=torch.float32).eval()
    student = LlamaForCausalLM.from_pretrained(pair.student, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=RATE, betas=(0.9, 0.95))
    text = TransferSet(pair.text)
    settings = settings_for(steps, False)
    data = StepData(text, settings, seed=0, device=CPU)

    def step(number: int) -> float:
        windows = data.windows(number)
        batch = text.batch(windows)
        counts_BT = torch.cat([each.mask_BT for each in data.in_batches(windows)])
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            with torch.no_grad():
                teacher_logits = teacher(**batch, use_cache=False).logits
            student_logits = student(**batch, use_cache=False).logits
        divergence_BT = torch.nn.functional.kl_div(
            student_logits.float().log_softmax(-1),
            teacher_logits.float().log_softmax(-1),
            log_target=True,
            reduction="none",
        ).sum(-1)
        loss = divergence_BT[counts_BT].mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    def run(timed: Timed) -> None:
        for number in range(steps):
            loss = step(number)
            timed.first_loss = loss if number == 0 else timed.first_loss
            timed.step_done()

    weights = bytes_of([*teacher.parameters(), *student.parameters()])
    return Opened(weights, torch.bfloat16 if narrow else torch.float32, run)


def our_course(pair: Pair, steps: int, cached: bool) -> Course:
    """What `shearling run` opens for a distill stage."""
    return open_course(
        [Taught(pair.teacher)],
        pair.student,
        TransferSet(pair.text),
        settings_for(steps, cached),
        selection=None,
        seed=0,
        device=CPU,
        cache=pair.cache,
        checkpoint=None,
        progress=silent,
    )


def open_ours(pair: Pair, steps: int, cached: bool) -> Opened:
    """The step that `shearling run` takes."""
    course = our_course(pair, steps, cached)
    held = list(course.student.parameters())
    if isinstance(course.answers, LiveAnswers):
        held += list(course.answers.inside.model.parameters())
    elif isinstance(course.answers, CachedAnswers):
        held.append(course.answers.head_VE)

    def run(timed: Timed) -> None:
        for number in range(steps):
            line = train_step(course)
            timed.first_loss = line["loss"] if number == 0 else timed.first_loss
            timed.step_done()

    return Opened(bytes_of(held), course.precision.dtype, run)


class StepEnds(TrainerCallback):
    """Tells of every step of transformers' trainer."""

    def __init__(self) -> None:
        self.timed: Timed | None = None

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if self.timed:
            self.timed.step_done()

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        if self.timed and self.timed.first_loss is None:
            self.timed.first_loss = logs.get("loss")


def open_trl(pair: Pair, steps: int, narrow: bool) -> Opened:
    """TRL's GKDTrainer. Its beta 0 is KL(teacher || student); with lmbda 0 nobody writes text.

    Source: Agarwal et al. 2023, https://arxiv.org/abs/2306.13649; TRL's generalized_jsd_loss.
    """
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    text = TransferSet(pair.text)
    teacher = LlamaForCausalLM.from_pretrained(pair.teacher, dtype=torch.float32).eval()
    student = LlamaForCausalLM.from_pretrained(pair.student, dtype=torch.float32)
    windows = StepData(text, settings_for(steps, False), seed=0, device=CPU).all_windows()
    rows = text.batch(sorted(windows))["input_ids"].tolist()
    config = GKDConfig(
        output_dir=tempfile.mkdtemp(),
        lmbda=0.0,
        beta=0.0,
        max_steps=steps,
        per_device_train_batch_size=STEP_TOKENS // text.window,
        learning_rate=RATE,
        max_grad_norm=1.0,
        bf16=narrow,
        gradient_checkpointing=False,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    ends = StepEnds()
    trainer = GKDTrainer(
        model=student,
        teacher_model=teacher,
        args=config,
        data_collator=_whole_windows,
        train_dataset=Dataset.from_dict({"input_ids": rows}),
        processing_class=open_checkpoint(pair.teacher).tokenizer(),
        callbacks=[ends],
    )

    def run(timed: Timed) -> None:
        ends.timed = timed
        trainer.train()

    weights = bytes_of([*teacher.parameters(), *student.parameters()])
    return Opened(weights, torch.bfloat16 if narrow else torch.float32, run)


def _whole_windows(rows: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
    input_BT = torch.tensor([row["input_ids"] for row in rows])
    return {
        "input_ids": input_BT,
        "attention_mask": torch.ones_like(input_BT),
        "labels": input_BT.clone(),
    }


def open_variant(variant: str, pair: Pair, steps: int) -> Opened:
    narrow = variant.endswith("-bf16")
    if variant.startswith("plain"):
        return open_plain(pair, steps, narrow)
    if variant.startswith("trl"):
        return open_trl(pair, steps, narrow)
    return open_ours(pair, steps, variant == "cached")


# --- one row ------------------------------------------------------------------------------------


def measure(variant: str, pair: Pair, steps: int) -> dict[str, Any]:
    """Run one variant in this process: some steps to warm up, then ``steps``."""
    before = resident_bytes()
    opened = open_variant(variant, pair, WARM_UP + steps)
    timed = Timed(steps)
    with resident_peak() as peak:
        opened.run(timed)
    tokens = STEP_TOKENS * steps
    rate = product_rate(opened.dtype, CPU, seconds=0.5, clock=time.process_time)
    flops = step_flops(pair, variant == "cached")
    return {
        "tokens_per_second": round(tokens / timed.wall, 1),
        "tokens_per_cpu_second": round(tokens / timed.cpu, 1),
        "peak_gb": round(peak[0] / GB, 3),
        "above_weights_gb": round((peak[0] - before - opened.weights) / GB, 3),
        "product_share": round(flops * tokens / timed.cpu / rate, 3),
        "dtype": str(opened.dtype).removeprefix("torch."),
        "first_loss": timed.first_loss,
    }


def step_flops(pair: Pair, cached: bool) -> float:
    """Floating-point operations of matrix products a token: 6 a student weight, 2 a teacher's."""

    def weights(folder: Path) -> int:
        shape = open_checkpoint(folder).shape
        return shape.non_embedding_parameters + shape.vocab_size * shape.hidden_size

    return 6.0 * weights(pair.student) + (0.0 if cached else 2.0 * weights(pair.teacher))


def in_a_process(what: str, pair: Pair, steps: int, threads: int) -> dict[str, Any]:
    """``measure`` where no other variant has left anything in memory."""
    asked = [what, *map(str, (pair.teacher, pair.student, pair.text, pair.cache, steps, threads))]
    command = [sys.executable, __file__, "--variant", *asked]
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    row: dict[str, Any] = json.loads(said.splitlines()[-1])
    return row


def serve(asked: Sequence[str]) -> None:
    """The other side of ``in_a_process``; ``fill`` only asks the teacher for the cache."""
    variant, *folders, steps, threads = asked
    torch.set_num_threads(int(threads))
    pair = Pair(*map(Path, folders))
    if variant == "fill":
        our_course(pair, WARM_UP + int(steps), True)
        print("{}")
    else:
        print(json.dumps(measure(variant, pair, int(steps))))


def compare(
    pair: Pair, variants: Sequence[str], steps: int, repeats: int, threads: int, rows: Rows
) -> None:
    """All variants in turns, as often as asked."""
    have_trl = importlib.util.find_spec("trl") is not None
    for repeat in range(repeats):
        for variant in variants:
            known = {"variant": variant, "repeat": repeat, "steps": steps, "threads": threads}
            if rows.has(**known):
                continue
            if variant.startswith("trl") and not have_trl:
                print(f"{variant} skipped: trl is not installed", flush=True)
                continue
            if variant == "cached":  # asked elsewhere: the teacher's memory is not the step's
                in_a_process("fill", pair, steps, threads)
            rows.add(known | in_a_process(variant, pair, steps, threads))


def table(rows: Rows) -> str:
    """Markdown: medians, the spread of the speed, and the ratio to the plain loop's."""

    def median(some: Sequence[dict[str, Any]], name: str) -> float:
        return statistics.median(row[name] for row in some)

    plain = rows.where(variant="plain")
    out = []
    for variant in VARIANTS:
        mine = rows.where(variant=variant)
        if not mine:
            continue
        speeds = [row["tokens_per_cpu_second"] for row in mine]
        faster = more = None
        if plain:
            faster = median(mine, "tokens_per_cpu_second") / median(plain, "tokens_per_cpu_second")
            more = median(mine, "above_weights_gb") / median(plain, "above_weights_gb")
        wall, middle = median(mine, "tokens_per_second"), statistics.median(speeds)
        spread = f"{middle:.0f} ({min(speeds):.0f} to {max(speeds):.0f})"
        memory, share = median(mine, "above_weights_gb"), median(mine, "product_share")
        out.append([variant, mine[0]["dtype"], wall, spread, faster, memory, more, share])
    head = ["variant", "products in", "tokens/s", "tokens per processor second (spread)"]
    head += ["to plain", "GB above weights", "to plain", "share of the product rate"]
    return markdown(head, out)


# --- beginning ----------------------------------------------------------------------------------


def make_pair(recipe: str, work: Path, shape: str) -> Pair:
    """A recipe's teacher, its text in windows of 512, and a sliced student: speed asks no more."""
    ground = prepare(recipe, work, WINDOW)
    out = work / f"{shape}-sliced-for-speed"
    if not (out / "model/config.json").is_file():
        settings = PruneSettings(calibration_tokens=2048, refit=False)
        student = resolve_shape(shape, open_checkpoint(ground.teacher).shape)
        prune(ground.teacher, out, student, ground.text, settings, seed=0)
    return Pair(ground.teacher, out / "model", ground.text, ground.cache)


def test_all_steps_follow_one_objective(tiny_llama: Path, tiny_text: Path, tmp_path: Path) -> None:
    recipe = {
        "name": "tiny",
        "teacher": {"model": str(tiny_llama)},
        "transfer_set": {
            "heldout_windows": 1,
            "sources": [{"name": "tiny", "path": str(tiny_text)}],
        },
        "stages": [{"name": "prune", "kind": "prune", "shape": {"num_hidden_layers": 3}}],
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    pair = make_pair(str(tmp_path / "recipe.yaml"), tmp_path, "like-3b")
    rows = Rows(tmp_path / "rows.jsonl")
    variants = [name for name in VARIANTS if not name.startswith("trl")]
    compare(pair, variants, steps=2, repeats=1, threads=1, rows=rows)
    print("\n" + table(rows))
    (plain,) = rows.where(variant="plain")
    for row in rows.rows:
        near = 0.02 if row["variant"] != "cached" else 0.2  # a sample of the teacher's answer
        assert abs(row["first_loss"] / plain["first_loss"] - 1) < near
        assert row["peak_gb"] > row["above_weights_gb"]
    compare(pair, variants, steps=2, repeats=1, threads=1, rows=rows)
    assert len(rows.rows) == len(variants), "no row is measured twice"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, help="rows, as JSON lines")
    parser.add_argument("--work", type=Path, default=Path("runs/bench"))
    parser.add_argument("--recipe", default="quickstart", help="teacher and text")
    parser.add_argument("--shape", default="like-3b")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--table", action="store_true", help="print the rows as Markdown, no more")
    parser.add_argument("--variant", nargs=7, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    quiet()
    if arguments.variant:
        serve(arguments.variant)
        return
    if arguments.out is None:
        parser.error("--out is needed")
    rows = Rows(arguments.out)
    if not arguments.table:
        pair = make_pair(arguments.recipe, arguments.work, arguments.shape)
        variants = arguments.variants.split(",")
        compare(pair, variants, arguments.steps, arguments.repeats, arguments.threads, rows)
    print(table(rows))


if __name__ == "__main__":
    main()
