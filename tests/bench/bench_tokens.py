"""Quality per token: what a student has learnt after so many, from where, and with which loss.

    python tests/bench/bench_tokens.py --out tokens.jsonl [--work FOLDER] [--shape like-3b]
        [--tokens 204800] [--starts sliced,refitted] [--variants live,cached,hidden,labels]
    python tests/bench/bench_tokens.py --out tokens.jsonl --iterative [--tokens 204800]
    python tests/bench/bench_tokens.py --out tokens.jsonl --table

Starts: the project's selection, plainly sliced or refitted. Variants, each with one thing changed:

    live      forward KL, the teacher running along
    cached    forward KL, the teacher's answers from the cache; all that follow are cached too
    hidden    the hidden states of mapped layers beside it (kept in 8 bits: of SmolLM2-135M and
              200,000 tokens 3 GB in the work folder)
    labels    three parts of ten cross-entropy on the text's own tokens: the default

KL to the teacher and perplexity are those on the transfer set's held-out windows, at 0, 1/8, 1/4,
1/2 and all of the tokens of one run, whose learning rate falls to its end only there. Perplexity on
WikiText-2's test split and on books, in windows of 512, is that of the end.

``--iterative`` goes to ``like-1b`` in one cut and one training, and in two of each by way of the
shape halfway, with as many tokens in all; the teacher teaches throughout.

Each row is written when it is done; started again, rows that are there are not made again, and a
training that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from workbench import Ground, Rows, held_apart, markdown, perplexities, prepare, quiet, tiny_ground

from compress.distill import distill
from compress.prune import prune
from compress.settings import DistillSettings, PruneSettings
from students.shape import Shape, resolve_shape
from teachers.checkpoint import open_checkpoint
from teachers.transfer_set import TransferSet

STARTS: dict[str, dict[str, Any]] = {"sliced": {"refit": False}, "refitted": {}}
TAUGHT_ALONE = {"forward_kl": 1.0, "cross_entropy": 0.0}
VARIANTS: dict[str, dict[str, Any]] = {
    "live": {"targets": "live", **TAUGHT_ALONE},
    "cached": {"targets": "sample", **TAUGHT_ALONE},
    "hidden": {
        "targets": "sample",
        **TAUGHT_ALONE,
        "hidden": {"kind": "normalised_mse", "weight": 0.5},
    },
    "labels": {"targets": "sample"},
}
WAYS = ("one-shot", "iterative")
MARKS = (0, 1, 2, 4, 8)
"""Eighths of the tokens after which a row tells how far the student is."""
SEED = 0


def cut(model: Path, ground: Ground, shape: Shape, out: Path, **settings: Any) -> Path:
    """Prune a model into ``out``, unless that was done; the stage's folder."""
    if not (out / "selection.json").is_file():
        prune(model, out, shape, ground.text, PruneSettings(**settings), seed=SEED)
    return out


def train(
    ground: Ground, start: Path, out: Path, tokens: int, **settings: Any
) -> tuple[Path, list[dict[str, float]]]:
    """Distil ``start`` (a prune stage's folder); the student's folder, and how it got there."""
    shared = {"tokens": tokens, "keep": "last", **settings}
    steps = tokens // DistillSettings(**shared).batch_tokens
    distill(
        ground.teacher,
        start / "model",
        out,
        ground.text,
        DistillSettings(**shared, evaluate_every=max(1, steps // MARKS[-1])),
        selection=start / "selection.json" if "hidden" in settings else None,
        seed=SEED,
        cache=ground.cache,
    )
    shutil.rmtree(out / "resume", ignore_errors=True)
    return out / "model", curve(out / "metrics.jsonl", tokens)


def curve(metrics: Path, tokens: int) -> list[dict[str, float]]:
    """What the evaluations nearest to the marks found."""
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    found = [line for line in lines if "heldout_kl" in line]
    wanted = [tokens * mark / MARKS[-1] for mark in MARKS]
    nearest = [min(found, key=lambda line: abs(line["tokens"] - place)) for place in wanted]
    names = ("tokens", "heldout_kl", "heldout_perplexity")
    return [{name: line[name] for name in names} for line in nearest]


def measure(
    start: str,
    variant: str,
    ground: Ground,
    shape: str,
    tokens: int,
    texts: Mapping[str, Tensor],
    rows: Rows,
    **settings: Any,
) -> None:
    """The row of one start and one variant."""
    known = {"shape": shape, "start": start, "variant": variant, "asked": tokens}
    if rows.has(**known):
        return
    student = resolve_shape(shape, open_checkpoint(ground.teacher).shape)
    begun = cut(ground.teacher, ground, student, ground.work / f"{shape}-{start}", **STARTS[start])
    out = ground.work / f"{shape}-{start}-{variant}-{tokens}"
    model, way = train(ground, begun, out, tokens, **VARIANTS[variant], **settings)
    rows.add(known | {"curve": way} | perplexities(model, texts))


def halfway(teacher: Shape, end: Shape) -> Shape:
    """The shape between two, with the teacher's heads, of which any end can still be cut."""

    def between(axis: str) -> int:
        return (int(getattr(teacher, axis)) + int(getattr(end, axis))) // 2

    heads = teacher.num_attention_heads
    return replace(
        teacher,
        hidden_size=between("hidden_size") // heads * heads,
        num_hidden_layers=between("num_hidden_layers"),
        intermediate_size=between("intermediate_size"),
        tie_word_embeddings=end.tie_word_embeddings,
    )


def measure_way(
    way: str,
    ground: Ground,
    shape: str,
    tokens: int,
    texts: Mapping[str, Tensor],
    rows: Rows,
    **settings: Any,
) -> None:
    """The row of going to ``shape`` at once, or by way of the shape halfway."""
    known = {"shape": shape, "way": way, "asked": tokens}
    if rows.has(**known):
        return
    teacher = open_checkpoint(ground.teacher).shape
    end = resolve_shape(shape, teacher)
    model, left, curves = ground.teacher, tokens, []
    shared = VARIANTS["cached"] | settings
    if way == "iterative":
        middle = cut(
            ground.teacher, ground, halfway(teacher, end), ground.work / f"{shape}-halfway"
        )
        left = tokens // 2
        out = ground.work / f"{shape}-halfway-{left}"
        model, way_there = train(ground, middle, out, left, **shared)
        curves.append(way_there)
    begun = cut(model, ground, end, ground.work / f"{shape}-{way}-{tokens}-cut")
    out = ground.work / f"{shape}-{way}-{tokens}"
    model, way_there = train(ground, begun, out, left, **shared)
    rows.add(known | {"curves": [*curves, way_there]} | perplexities(model, texts))


def table(rows: Rows) -> str:
    """Markdown: held-out KL and perplexity against tokens seen, and the test texts at the end."""
    tests = [name for name in ("wikitext2", "books") if any(name in row for row in rows.rows)]
    tables = []
    for asked in sorted({row["asked"] for row in rows.rows}):
        marks = [asked * mark // MARKS[-1] for mark in MARKS]
        head = ["shape", "start", "variant", *(f"{mark:,} tokens" for mark in marks), *tests]
        some = [row for row in rows.where(asked=asked) if "variant" in row]
        body = [
            [row["shape"], row["start"], row["variant"], *map(_point, row["curve"])]
            + [row.get(name) for name in tests]
            for row in some
        ]
        if body:
            tables.append(markdown(head, body))
        head = ["shape", "way", "held out, before and after each training", *tests]
        body = [
            [row["shape"], row["way"], _ends(row["curves"])] + [row.get(name) for name in tests]
            for row in rows.where(asked=asked)
            if "way" in row
        ]
        if body:
            tables.append(f"{asked:,} tokens in all:\n\n{markdown(head, body)}")
    return "\n\n".join(tables)


def _point(point: Mapping[str, float]) -> str:
    return f"KL {point['heldout_kl']:.3f}, {point['heldout_perplexity']:.1f}"


def _ends(curves: list[list[dict[str, float]]]) -> str:
    return "; then ".join(f"{_point(curve[0])} to {_point(curve[-1])}" for curve in curves)


def test_students_learn_from_every_start(tiny_llama: Path, tiny_text: Path, tmp_path: Path) -> None:
    ground = tiny_ground(tiny_llama, tiny_text, tmp_path)
    texts = {"wikitext2": TransferSet(ground.text).calibration(256, 1)}
    rows = Rows(tmp_path / "rows.jsonl")
    more = {"learning_rate": 5e-3, "batch_tokens": 128}
    for start in STARTS:
        for variant in VARIANTS:
            measure(start, variant, ground, "like-3b", 2048, texts, rows, **more)
    for way in WAYS:
        measure_way(way, ground, "like-1b", 2048, texts, rows, **more)
    print("\n" + table(rows))
    begun = {row["start"]: row["curve"][0]["heldout_kl"] for row in rows.rows if "start" in row}
    assert begun["refitted"] < begun["sliced"]
    for row in rows.rows:
        for points in row.get("curves") or [row["curve"]]:
            assert points[-1]["heldout_kl"] < points[0]["heldout_kl"]
    taught = {
        row["way"]: sum(c[-1]["tokens"] for c in row["curves"])
        for row in rows.where(shape="like-1b")
    }
    assert taught == dict.fromkeys(WAYS, 2048)
    again = Rows(rows.path)
    measure("sliced", "live", ground, "like-3b", 2048, texts, again, **more)
    assert again.rows == rows.rows, "a row that is there is not made again"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True, help="rows, as JSON lines")
    parser.add_argument("--work", type=Path, default=Path("runs/bench"))
    parser.add_argument("--recipe", default="quickstart", help="teacher and text")
    parser.add_argument("--shape", help="like-3b, or like-1b with --iterative")
    parser.add_argument("--tokens", type=int, default=204800)
    parser.add_argument("--starts", default=",".join(STARTS))
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--windows", type=int, default=24, help="of each test text")
    parser.add_argument("--iterative", action="store_true")
    parser.add_argument("--table", action="store_true", help="print the rows as Markdown, no more")
    arguments = parser.parse_args()
    quiet()
    rows = Rows(arguments.out)
    if not arguments.table:
        ground = prepare(arguments.recipe, arguments.work)
        texts = held_apart(ground.teacher, arguments.windows)
        if arguments.iterative:
            for way in WAYS:
                shape = arguments.shape or "like-1b"
                measure_way(way, ground, shape, arguments.tokens, texts, rows)
        else:
            for start in arguments.starts.split(","):
                for variant in arguments.variants.split(","):
                    shape = arguments.shape or "like-3b"
                    measure(start, variant, ground, shape, arguments.tokens, texts, rows)
    print(table(rows))


if __name__ == "__main__":
    main()
