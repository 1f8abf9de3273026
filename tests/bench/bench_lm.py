"""The prefix-tree runner against stock HFLM: seconds, token positions, largest difference.

    python tests/bench/bench_lm.py --model MODEL_FOLDER --data ../shared/data/eval
        [--tasks piqa,arc_easy,lambada_openai] [--limit 20] [--fewshot 0] [--repeats 3]

Stock runs at its own best batch size, which a first round finds among ``--batches``; then both take
turns. What stock takes at its default, one request at a time, is given beside it. ``positions``
counts what each puts through the layers, its padding included, and through the vocabulary's matrix.
``bound`` is the ratio of both runners' multiplications: what is left of the work, so what no exact
runner at the same precision can exceed by much.

Seconds are processor time of this one process, which a busy machine disturbs less than the clock.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from pipelines.recipe import load_recipe
from reports.benchmark import load_task
from reports.lm import PrefixLM
from reports.load import load_model, quiet_libraries
from reports.prefix_tree import Request, pack
from reports.settings import BenchmarkSettings
from reports.tasks import prepare
from shearling import silent
from teachers.checkpoint import import_teacher
from teachers.fetch import default_cache

TASKS = ("piqa", "arc_easy", "lambada_openai")
BATCHES = (1, 4, 8, 16)


@dataclass(frozen=True)
class Work:
    """Positions that one runner computes."""

    layers: int
    projected: int

    def products(self, model: Any) -> float:
        """Multiplications of the matrix products, without attention's own."""
        body = sum(p.numel() for p in model.model.layers.parameters())
        return float(self.layers * body + self.projected * model.lm_head.weight.numel())


def stock_work(requests: Sequence[Request], batch: int) -> Work:
    """What HFLM computes: unique inputs by falling length, padded to the longest of a batch."""
    inputs = sorted({tuple((c + x)[:-1]) for _, c, x in requests}, key=len, reverse=True)
    batches = [inputs[start : start + batch] for start in range(0, len(inputs), batch)]
    padded = sum(len(part) * len(part[0]) for part in batches)
    return Work(padded, padded)


def our_work(requests: Sequence[Request], lm: PrefixLM) -> Work:
    """What the trees compute."""
    rows = pack(requests, lm.max_length, lm.node_budget)
    projected = (len({n for _, path, _ in row.wanted for n in path}) for row in rows)
    return Work(sum(len(row.tree) for row in rows), sum(projected))


def instances(name: str, data: Path, limit: int, fewshot: int) -> list[Any]:
    """The task's requests, as lm-eval builds them."""
    settings = BenchmarkSettings(mirror=str(data))
    with tempfile.TemporaryDirectory() as folder, quiet_libraries():
        prepared = prepare(name, settings, Path(folder), default_cache(), silent)
        loaded = load_task(prepared, settings, {})
        assert loaded is not None
        (task,) = loaded["tasks"].values()
        task.set_config(key="num_fewshot", value=fewshot)
        task.set_fewshot_seed(seed=0)
        task.build_all_requests(limit=limit)
    return list(task.instances)


def tokens_of(lm: PrefixLM, asked: list[Any]) -> list[Request]:
    """The requests as the runner's inner method gets them."""
    return [
        (None, *lm._encode_pair(*instance.args))
        if instance.args[0]
        else (None, [lm.prefix_token_id], lm.tok_encode(instance.args[1], add_special_tokens=False))
        for instance in asked
    ]


def timed(lm: HFLM, asked: list[Any]) -> tuple[float, list[tuple[float, bool]]]:
    """(processor seconds, log-likelihoods)."""
    start = time.process_time()
    with quiet_libraries():
        scores = lm.loglikelihood(asked, disable_tqdm=True)
    return time.process_time() - start, scores


def compare(
    model: Any, tokenizer: Any, name: str, asked: list[Any], repeats: int, batches: Sequence[int]
) -> dict[str, Any]:
    """One task's row."""
    with quiet_libraries():
        mine = PrefixLM(model, tokenizer, batch_size=8)
        stock = {n: HFLM(pretrained=model, tokenizer=tokenizer, batch_size=n) for n in batches}
    requests = tokens_of(mine, asked)
    first = {n: timed(lm, asked)[0] for n, lm in stock.items()} if len(stock) > 1 else {}
    batch = min(first, key=first.__getitem__) if first else batches[0]
    turns = [(timed(stock[batch], asked), timed(mine, asked)) for _ in range(repeats)]
    ratios = [theirs[0] / ours[0] for theirs, ours in turns]
    differences = [abs(a[0] - b[0]) for a, b in zip(turns[0][0][1], turns[0][1][1], strict=True)]
    theirs, ours = stock_work(requests, batch), our_work(requests, mine)
    return {
        "task": name,
        "requests": len(asked),
        "batch": batch,
        "one_by_one": first.get(1),
        "stock": statistics.median(turn[0][0] for turn in turns),
        "ours": statistics.median(turn[1][0] for turn in turns),
        "ratio": statistics.median(ratios),
        "spread": (min(ratios), max(ratios)),
        "bound": theirs.products(model) / ours.products(model),
        "positions": (theirs, ours),
        "difference": max(differences),
        "greedy": all(a[1] == b[1] for a, b in zip(turns[0][0][1], turns[0][1][1], strict=True)),
    }


def show(row: dict[str, Any]) -> str:
    """A row as a line of text."""
    theirs, ours = row["positions"]
    low, high = row["spread"]
    default = ""
    if row["one_by_one"]:
        default = f", {row['one_by_one'] / row['ours']:.2f} times stock's default (batch 1)"
    return (
        f"{row['task']:16} {row['requests']:4} requests | stock (batch {row['batch']}) "
        f"{row['stock']:.2f} s, ours {row['ours']:.2f} s: {row['ratio']:.2f} times "
        f"({low:.2f} to {high:.2f}), bound {row['bound']:.2f}{default} | positions "
        f"{theirs.layers:,} -> {ours.layers:,}, projected {theirs.projected:,} -> "
        f"{ours.projected:,} | largest "
        f"difference {row['difference']:.1e}{'' if row['greedy'] else ', greedy differs'}"
    )


def test_prefix_trees_are_faster_and_the_same(shared_data: Path, tmp_path: Path) -> None:
    import_teacher(load_recipe("quickstart").teacher, tmp_path, cache=default_cache())
    model, tokenizer = load_model(tmp_path / "model")
    for name in TASKS:
        asked = instances(name, shared_data / "eval", 20, 0)
        row = compare(model, tokenizer, name, asked, 3, BATCHES)
        print("\n" + show(row), end="")
        assert row["difference"] < 1e-4
        assert row["greedy"]
        assert row["ratio"] > 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--limit", type=int, default=20)
    parser.add_argument("--fewshot", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batches", default=",".join(map(str, BATCHES)))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load_model(arguments.model)
    batches = [int(size) for size in arguments.batches.split(",")]
    for name in arguments.tasks.split(","):
        asked = instances(name, arguments.data, arguments.limit, arguments.fewshot)
        row = compare(model, tokenizer, name, asked, arguments.repeats, batches)
        print(show(row), flush=True)


if __name__ == "__main__":
    main()
