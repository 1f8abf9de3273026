"""What the benchmarks of pruning and distillation stand on: a teacher, texts, and rows in a file.

A benchmark that takes hours is stopped and started again: what it made lies in its work folder,
and a row that is in its results file already is not measured a second time.

Legend: W windows, T positions, D hidden, V vocabulary.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from pipelines.recipe import load_recipe
from reports.load import load_model
from reports.tasks.wikitext import raw_test_text
from shearling import write_json
from teachers.checkpoint import import_teacher, open_checkpoint
from teachers.fetch import default_cache
from teachers.transfer_set import build_transfer_set

BOOKS = Path(__file__).resolve().parents[3] / "shared/data/text/books_pd/part-002.jsonl"
TEST_LENGTH = 512


# --- rows ---------------------------------------------------------------------------------------


class Rows:
    """Rows of results as JSON lines; a row is known by the fields that ``has`` is asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in lines if line.strip()]

    def where(self, **known: Any) -> list[dict[str, Any]]:
        """The rows with these values."""
        return [row for row in self.rows if known.items() <= row.items()]

    def has(self, **known: Any) -> bool:
        return bool(self.where(**known))

    def add(self, row: Mapping[str, Any]) -> None:
        """Write a row at once, so that it survives whatever comes next; print it."""
        self.rows.append(dict(row))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


def markdown(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; floats with three significant digits, nothing for None."""

    def text(value: Any) -> str:
        if value is None:
            return ""
        if not isinstance(value, float):
            return str(value)
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"

    lines = [list(head), ["---"] * len(head), *([text(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# --- a teacher and its texts --------------------------------------------------------------------


@dataclass(frozen=True)
class Ground:
    """Folders: the teacher, the transfer set, where kept targets lie, and all of the work."""

    teacher: Path
    text: Path
    cache: Path
    work: Path


def prepare(recipe: str, work: Path, window: int | None = None) -> Ground:
    """The teacher and the transfer set of a recipe, made in ``work`` unless they are there.

    ``window`` stands in for the recipe's.
    """
    loaded = load_recipe(recipe)
    settings = loaded.transfer_set
    if window is not None:
        settings = settings.model_copy(update={"window": window})
    name = f"transfer_set-{settings.window}"
    ground = Ground(work / "teacher/model", work / name, work / "cache", work)
    if not (work / "teacher/facts.json").is_file():
        facts = import_teacher(loaded.teacher, work / "teacher", cache=default_cache())
        write_json(work / "teacher/facts.json", facts)
    if not (ground.text / "transfer_set.json").is_file():
        build_transfer_set(
            settings, ground.teacher, ground.text, seed=loaded.seed, cache=default_cache()
        )
    return ground


def tiny_ground(teacher: Path, text: Path, work: Path) -> Ground:
    """The same of a tiny teacher and a short text, for the benchmarks' own tests."""
    recipe = {
        "name": "tiny",
        "teacher": {"model": str(teacher)},
        "transfer_set": {
            "window": 32,
            "heldout_windows": 4,
            "sources": [{"name": "tiny", "path": str(text)}],
        },
        "stages": [{"name": "prune", "kind": "prune", "shape": {"num_hidden_layers": 3}}],
    }
    (work / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    return prepare(str(work / "recipe.yaml"), work)


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """``count`` of the items, or all, evenly spread."""
    count = min(count, len(items))
    return [items[number * len(items) // count] for number in range(count)]


def held_apart(teacher: Path, count: int, length: int = TEST_LENGTH) -> dict[str, Tensor]:
    """Windows of WikiText-2's test split as its file has it, and of books, where the data folder
    is: [W, T] each, evenly spread; of a book's chapter the first window.

    Neither text is in any recipe's transfer set: the split is for tests, the books are another
    part of their collection.
    """
    tokenizer = open_checkpoint(teacher).tokenizer()

    def tokens(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    wiki = tokens(raw_test_text(default_cache()))
    wiki_windows = [wiki[start : start + length] for start in range(0, len(wiki), length)]
    found = {"wikitext2": spread(wiki_windows[:-1], count)}
    if BOOKS.is_file():
        lines = BOOKS.read_text(encoding="utf-8").splitlines()
        chapters = [json.loads(line)["text"] for line in lines]
        long = [chapter for chapter in chapters if len(chapter) > 10 * length]
        found["books"] = [
            tokens(chapter[: 10 * length])[:length] for chapter in spread(long, count)
        ]
    else:
        print(f"{BOOKS} is not here: no second text", flush=True)
    return {name: torch.tensor(windows) for name, windows in found.items()}


def quiet() -> None:
    """No bars of transformers between the rows."""
    logging.disable_progress_bar()


# --- measuring ----------------------------------------------------------------------------------


@torch.inference_mode()
def perplexities(model: Path, texts: Mapping[str, Tensor]) -> dict[str, float]:
    """exp of the mean loss of a model folder on each text's windows, in float32."""
    student, _ = load_model(model)
    found = {}
    for name, tokens_WT in texts.items():
        losses = []
        for tokens_T in tokens_WT:
            logits_TV = student(tokens_T[None], use_cache=False).logits[0, :-1]
            losses.append(float(torch.nn.functional.cross_entropy(logits_TV, tokens_T[1:])))
        found[name] = math.exp(min(sum(losses) / len(losses), 700.0))
    return found
