"""Other ways to prune beside this project's, to the same shapes: before and after distillation.

    python tests/bench/bench_rivals.py --out rivals.jsonl [--work FOLDER] [--budgets like-3b,...]
        [--methods ours,minitron,magnitude,flap,osscar] [--rates 5e-4,1e-3,2e-3] [--tokens 61440]
        [--seeds 0]
    python tests/bench/bench_rivals.py --out rivals.jsonl --table

Teacher and text are those of a recipe (``--recipe``), by default the quickstart's: the same
calibration windows for all, then the same windows and the same trainer with its defaults for all
(its answers from the cache), at each of the rates, once for each seed of the windows that are
trained on. The rate whose students have the lowest median KL to the teacher on held-out windows of
the transfer set counts, and of it the medians; the test texts have no part in that.
Perplexities are means over windows of 512 tokens evenly spread over WikiText-2's test split and
over books. ``tests/bench/rivals.py`` holds the others; slicing alone is this project's selection
without its refits.

Each row is written when it is done; started again, rows that are there are not made again, and a
training that was stopped goes on.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rivals import (
    RIVALS,
    Inputs,
    fluctuation,
    group_magnitude,
    layer_ends,
    least_squares,
    lost_on_average,
    suits,
)
from torch import Tensor
from transformers import LlamaForCausalLM
from workbench import Ground, Rows, held_apart, markdown, perplexities, prepare, quiet, tiny_ground

from compress.coupling import NEURONS, derive_coupling
from compress.distill import distill
from compress.prune import prune
from compress.settings import DistillSettings, PruneSettings
from students.shape import Shape, resolve_shape
from teachers.checkpoint import open_checkpoint
from teachers.transfer_set import TransferSet

BUDGETS: dict[str, str | dict[str, int]] = {
    "like-3b": "like-3b",
    # Of SmolLM2-135M 67.0M (50%) and 107.3M (80%) parameters; both keep the hidden size.
    "half": {"num_hidden_layers": 25, "num_attention_heads": 6, "intermediate_size": 512},
    "80%": {"num_hidden_layers": 28, "intermediate_size": 1120},
}
METHODS = ("ours", *RIVALS)
RATES = (5e-4, 1e-3, 2e-3)
SEED = 0
"""Of the calibration windows."""


@dataclass(frozen=True)
class Budget:
    """A shape by its name, and the texts and sizes that all methods share."""

    name: str
    shape: Shape
    calibration_tokens: int
    tokens: int


def cut(method: str, ground: Ground, budget: Budget, out: Path) -> Path:
    """Prune the teacher into ``out/model``, unless that was done."""
    model = out / "model"
    written_last = model / "config.json" if method in RIVALS else out / "selection.json"
    if written_last.is_file():
        return model
    if method in RIVALS:
        text = TransferSet(ground.text)
        windows_BT = text.calibration(budget.calibration_tokens, SEED)
        return RIVALS[method](ground.teacher, budget.shape, windows_BT, model)
    settings = PruneSettings(calibration_tokens=budget.calibration_tokens)
    prune(ground.teacher, out, budget.shape, ground.text, settings, seed=SEED)
    return model


def train(
    ground: Ground, start: Path, out: Path, tokens: int, seed: int = SEED, **more: Any
) -> tuple[Path, dict[str, Any]]:
    """Distil a start with the trainer's defaults; the student's folder and the stage's summary."""
    settings = DistillSettings(
        tokens=tokens, targets="sample", evaluate_every=0, keep="last", **more
    )
    summary = distill(
        ground.teacher, start, out, ground.text, settings, seed=seed, cache=ground.cache
    )
    return out / "model", summary


def measure(
    method: str,
    ground: Ground,
    budget: Budget,
    rates: Sequence[float],
    texts: Mapping[str, Tensor],
    rows: Rows,
    seeds: Sequence[int] = (SEED,),
) -> None:
    """One method at one budget: the row of its start, and one for each rate and seed."""
    known = {"budget": budget.name, "method": method}
    folder = ground.work / f"{budget.name}-{method}"
    if not rows.has(**known, rate=None):
        begun = time.process_time()
        model = cut(method, ground, budget, folder)
        seconds = time.process_time() - begun
        rows.add(
            known
            | {"rate": None, "parameters": parameters(model), "cpu_seconds": round(seconds, 1)}
            | perplexities(model, texts)
        )
    for rate, seed in product(rates, seeds):
        wanted = known | {"rate": rate, "seed": seed, "tokens": budget.tokens}
        if rows.has(**wanted):
            continue
        start = cut(method, ground, budget, folder)
        trained = folder / f"rate-{rate:g}-{seed}"
        model, summary = train(ground, start, trained, budget.tokens, seed, learning_rate=rate)
        heldout = {"heldout_kl": summary["heldout_end"]["heldout_kl"]}
        rows.add(wanted | heldout | perplexities(model, texts))
        shutil.rmtree(trained)


def parameters(model: Path) -> int:
    """Parameters of a model folder as transformers counts them, which opens it on the way."""
    opened = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32, local_files_only=True)
    return sum(parameter.numel() for parameter in opened.parameters())


def table(rows: Rows) -> str:
    """Markdown: before training, and after it at each method's best rate on held-out text;
    medians of the seeds there, and how many they are."""
    out = []
    texts = [name for name in ("wikitext2", "books") if any(name in row for row in rows.rows)]
    for start in rows.where(rate=None):
        of = {"budget": start["budget"], "method": start["method"]}
        rates = {row["rate"] for row in rows.where(**of) if row["rate"] is not None}
        trained = [middle(rows.where(**of, rate=rate)) for rate in rates]
        best = min(trained, key=lambda row: row["heldout_kl"]) if trained else {}
        numbers = [row.get(text) for text in texts for row in (start, best)]
        title = [start["budget"], start["method"], f"{start['parameters']:,}"]
        rate = f"{best['rate']:g}" if best else None
        out.append([*title, *numbers, best.get("heldout_kl"), rate, best.get("seeds")])
    head = ["budget", "method", "parameters"]
    head += [f"{text}, {when}" for text in texts for when in ("before", "after")]
    return markdown([*head, "held-out KL, after", "best rate", "seeds"], out)


def middle(seeds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The medians of rows that differ in their seed alone."""
    numbers = {
        name: median(row[name] for row in seeds)
        for name in ("rate", "heldout_kl", "wikitext2", "books")
        if name in seeds[0]
    }
    return {**numbers, "seeds": len(seeds)}


def test_rivals_make_the_shape_and_learn(tiny_llama: Path, tiny_text: Path, tmp_path: Path) -> None:
    ground = tiny_ground(tiny_llama, tiny_text, tmp_path)
    teacher = open_checkpoint(ground.teacher).shape
    texts = {"wikitext2": TransferSet(ground.text).calibration(256, 1)}
    narrow = {"num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 40}
    rows = Rows(tmp_path / "rows.jsonl")
    for name, axes in (("narrow", narrow), ("narrower", {**narrow, "hidden_size": 24})):
        budget = Budget(name, resolve_shape(axes, teacher), 1024, 2048)
        for method in METHODS:
            if suits(method, teacher, budget.shape):
                measure(method, ground, budget, (5e-3,), texts, rows)
                (start,) = rows.where(budget=name, method=method, rate=None)
                (end,) = rows.where(budget=name, method=method, rate=5e-3)
                exact = start["parameters"] == budget.shape.parameters
                assert exact == (method != "flap"), "FLAP alone has biases beside the shape"
                assert end["wikitext2"] < start["wikitext2"]
        trained = {row["method"]: row["heldout_kl"] for row in rows.where(budget=name, rate=5e-3)}
        assert min(trained, key=trained.__getitem__) == "ours"
    print("\n" + table(rows))
    assert len(rows.rows) == 2 * (len(METHODS) + len(METHODS) - 1)


def test_what_is_removed_is_made_up_for() -> None:
    torch.manual_seed(0)
    input_NI = torch.randn(64, 6) @ torch.randn(6, 6)
    weight_OI, kept = torch.randn(5, 6), torch.tensor([0, 2, 5])
    wanted_NO, sliced_OI = input_NI @ weight_OI.T, torch.zeros_like(weight_OI)
    sliced_OI[:, kept] = weight_OI[:, kept]
    refitted_OI = least_squares(input_NI.T @ input_NI, weight_OI, kept)
    assert not refitted_OI[:, [1, 3, 4]].any()
    errors = [(input_NI @ each.T - wanted_NO).norm() for each in (refitted_OI, sliced_OI)]
    assert errors[0] < errors[1]
    # A constant input may go without a trace: its mean says all of it.
    seen = Inputs(6, 1)
    input_NI[:, [1, 3, 4]] = torch.tensor([1.0, -2.0, 3.0])
    seen.add(input_NI[None])
    bias_O = lost_on_average(weight_OI, seen, kept)
    assert torch.allclose(input_NI @ sliced_OI.T + bias_O, input_NI @ weight_OI.T, atol=1e-4)
    assert fluctuation(seen, weight_OI)[[1, 3, 4]].abs().max() < 1e-9


def test_magnitude_is_the_norm_of_all_that_is_coupled(tiny_llama: Path) -> None:
    source = open_checkpoint(tiny_llama)
    model, axes = source.model(torch.float32), derive_coupling(source.config).axes
    found_F = group_magnitude(layer_ends(model, axes, NEURONS, 1))
    mlp = model.model.layers[1].mlp
    rows_F = mlp.gate_proj.weight.square().sum(1) + mlp.up_proj.weight.square().sum(1)
    wanted_F = rows_F + mlp.down_proj.weight.square().sum(0)
    assert torch.allclose(found_F, wanted_F / wanted_F.mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True, help="rows, as JSON lines")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/bench"), help="what is made on the way"
    )
    parser.add_argument("--recipe", default="quickstart", help="teacher and transfer set")
    parser.add_argument("--budgets", default=",".join(BUDGETS))
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--rates", default=",".join(f"{rate:g}" for rate in RATES))
    parser.add_argument("--tokens", type=int, default=61440, help="of distillation")
    parser.add_argument("--seeds", default=str(SEED), help="of the windows that are trained on")
    parser.add_argument("--calibration-tokens", type=int, default=32768)
    parser.add_argument("--windows", type=int, default=24, help="of each test text")
    parser.add_argument("--table", action="store_true", help="print the rows as Markdown, no more")
    arguments = parser.parse_args()
    quiet()
    rows = Rows(arguments.out)
    if arguments.table:
        print(table(rows))
        return
    ground = prepare(arguments.recipe, arguments.work)
    teacher = open_checkpoint(ground.teacher).shape
    texts = held_apart(ground.teacher, arguments.windows)
    if not rows.has(budget="teacher"):
        start = {"budget": "teacher", "method": "", "rate": None}
        found = perplexities(ground.teacher, texts)
        rows.add(start | {"parameters": teacher.parameters} | found)
    rates = [float(rate) for rate in arguments.rates.split(",") if rate]
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    for name in arguments.budgets.split(","):
        shape = resolve_shape(BUDGETS[name], teacher)
        budget = Budget(name, shape, arguments.calibration_tokens, arguments.tokens)
        for method in arguments.methods.split(","):
            if suits(method, teacher, shape):
                measure(method, ground, budget, rates, texts, rows, seeds)


if __name__ == "__main__":
    main()
