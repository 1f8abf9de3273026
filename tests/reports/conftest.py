"""A small real run: three tiny Llamas (a teacher, cut, taught again), really benchmarked."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import HOSTILE, hostile_cleaning
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import reports.tasks.wikitext
from pipelines.tiny import tiny_documents
from reports.benchmark import benchmark
from reports.settings import BenchmarkSettings
from shearling import read_json, write_json

STEPS = 12
KEPT_LAYERS = [0, 1, 3]
COMMAND = "shearling run tiny --set distill.tokens=6144"


def wikitext_like() -> str:
    """Six pages in raw WikiText's form."""
    pages = []
    for number in range(6):
        body = " \n ".join(tiny_documents(12, seed=number))
        pages.append(f" = Page {number} = \n \n {body} \n \n = = Part = = \n \n {body} \n ")
    return " \n" + "\n".join(pages)


@contextlib.contextmanager
def wikitext_replaced() -> Iterator[str]:
    """Text in WikiText's place: its package is 85 MB, too much for a test to download."""
    text = wikitext_like()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reports.tasks.wikitext, "raw_test_text", lambda *_, **__: text)
        yield text


@pytest.fixture
def local_wikitext() -> Iterator[str]:
    """The text that stands in WikiText's place while a test runs."""
    with wikitext_replaced() as text:
        yield text


@pytest.fixture(scope="session")
def mirror(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mirror folder with a few questions in the layout of PIQA."""
    folder = tmp_path_factory.mktemp("mirror")
    lines = []
    for number, text in enumerate(tiny_documents(24, seed=5)):
        first, second = text.split(". ")[:2]
        lines.append({"goal": first, "sol1": second, "sol2": second[::-1], "label": number % 2})
    text = "".join(f"{json.dumps(line)}\n" for line in lines)
    (folder / "piqa.jsonl").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def settings(mirror: Path) -> BenchmarkSettings:
    """Three tasks of three kinds, and one that can't be had here."""
    return BenchmarkSettings(
        tasks=("wikitext2", "grammar_pairs", "piqa", "hellaswag"),
        limits={"grammar_pairs": 48},
        mirror=str(mirror),
        perplexity_windows=6,
        agreement_windows=3,
        completion_tokens=8,
        speed=False,
    )


@dataclass(frozen=True)
class Models:
    """Folders of the three models, and what happened while the third was taught."""

    teacher: Path
    pruned: Path
    taught: Path
    metrics: list[dict[str, Any]]


def _drop_layers(teacher: LlamaForCausalLM) -> LlamaForCausalLM:
    config = LlamaConfig.from_dict(teacher.config.to_dict())
    config.num_hidden_layers = len(KEPT_LAYERS)
    student = LlamaForCausalLM(config)
    student.load_state_dict(teacher.state_dict(), strict=False)
    for place, layer in enumerate(KEPT_LAYERS):
        student.model.layers[place].load_state_dict(teacher.model.layers[layer].state_dict())
    return student


def _learn(model: LlamaForCausalLM, windows: torch.Tensor) -> None:
    """Let a model see the text, so that cutting it costs something."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(40):
        batch = windows[torch.arange(step * 8, step * 8 + 8) % len(windows)]
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.fixture(scope="session")
def models(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Models:
    """A teacher, the teacher without its third layer, and that taught for a few steps."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    teacher = LlamaForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    ids = tokenizer("\n".join(tiny_documents(300)), add_special_tokens=False)["input_ids"]
    windows = torch.tensor(ids[: len(ids) // 64 * 64]).view(-1, 64)
    _learn(teacher, windows)
    student = _drop_layers(teacher)

    def save(model: LlamaForCausalLM, name: str) -> Path:
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        return folder / name

    pruned = save(student, "pruned")
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    metrics: list[dict[str, Any]] = []
    for step in range(STEPS):
        batch = windows[torch.arange(step * 8, step * 8 + 8) % len(windows)]
        with torch.no_grad():
            wanted = teacher(batch).logits.log_softmax(-1)
        given = student(batch).logits.log_softmax(-1)
        loss = (wanted.exp() * (wanted - given)).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        line = {"step": step + 1, "steps": STEPS, "tokens": (step + 1) * 512}
        measured = {"learning_rate": 3e-3, "gradient_norm": 1.5 + step, "tokens_per_second": 900.0}
        metrics.append({**line, "loss": loss.item(), "forward_kl": loss.item(), **measured})
        if step % 4 == 3:
            metrics.append({**line, "heldout_kl": loss.item()})
    return Models(save(teacher, "teacher"), pruned, save(student, "taught"), metrics)


@pytest.fixture(scope="session")
def cards(
    models: Models,
    settings: BenchmarkSettings,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, dict[str, Any]]:
    """Real scorecards of the three models."""
    cache = tmp_path_factory.mktemp("cache")
    folders = {"teacher": models.teacher, "prune": models.pruned, "distill": models.taught}
    with wikitext_replaced():
        return {
            name: benchmark(
                folder,
                settings,
                name=name,
                cache=cache,
                teacher=None if name == "teacher" else models.teacher,
            )
            for name, folder in folders.items()
        }


@pytest.fixture
def run(models: Models, cards: dict[str, dict[str, Any]], tmp_path: Path) -> Path:
    """A run folder as the pipelines leave it, with everything in it but the report."""
    folder = tmp_path / "runs" / "tiny"
    sources = {"teacher": models.teacher, "prune": models.pruned, "distill": models.taught}
    rows = []
    for kind in ("teacher", "transfer_set", "prune", "distill"):
        stage = folder / "stages" / kind
        stage.mkdir(parents=True)
        row = {"name": kind, "kind": kind, "state": "done", "reason": "runs: first time"}
        row |= {"seconds": 2.5, "peak_memory_bytes": 10**9}
        rows.append(row)
        record = {"schema": 1, **row, "summary": {}}
        if kind == "distill":
            record["summary"] = {"tokens": STEPS * 512}
            record["resumes"] = [{"step": 6, "at": "2026-11-23T12:00:00+00:00"}]
        write_json(stage / "stage.json", record)
        if kind in sources:
            (stage / "model").mkdir()
            shutil.copy(sources[kind] / "config.json", stage / "model" / "config.json")
            speed = {"prefill_tokens_per_second": 400.0, "decode_tokens_per_second": 20.0}
            write_json(stage / "scorecard.json", {**cards[kind], "speed": speed})
    write_json(
        folder / "stages" / "prune" / "selection.json",
        {
            "schema": 1,
            "layers": KEPT_LAYERS,
            "hidden": list(range(32)),
            "heads": [[0, 1, 2, 3]] * 3,
            "key_value_heads": [[0, 1]] * 3,
            "neurons": [list(range(64))] * 3,
            "importance": {
                "layers": [0.4, 0.3, 0.1, 0.2],
                "heads": [[0.1, 0.2, 0.3, 0.4]] * 4,
                "neurons": [0.9, 0.8, 0.7, 0.6],
                "hidden": [0.1 * (index + 1) for index in range(32)],
            },
            "reconstruction": [{"layer": layer, "error": 0.1 * layer} for layer in range(3)],
        },
    )
    write_json(
        folder / "stages" / "transfer_set" / "transfer_set.json",
        {
            "schema": 1,
            "windows": 90,
            "sources": [{"name": "tiny", "documents": 300, "tokens": 5760, "bytes": 20000}],
        },
    )
    lines = "".join(f"{json.dumps(line)}\n" for line in models.metrics)
    (folder / "stages" / "distill" / "metrics.jsonl").write_text(lines, encoding="utf-8")
    expected = {"name": "distill", "seconds": 5.0, "parameters": {"value": 30000}}
    write_json(folder / "plan.json", {"schema": 1, "stages": [expected]})
    (folder / "recipe.yaml").write_text("name: tiny\ndescription: A tiny run.\n", encoding="utf-8")
    write_json(folder / "lock.json", {"schema": 1, "seed": 0, "packages": {"torch": "2"}})
    write_json(
        folder / "run.json",
        {"schema": 1, "recipe": "tiny", "state": "done", "command": COMMAND, "stages": rows},
    )
    return folder


@pytest.fixture
def crowded_run(run: Path) -> Path:
    """The run with twenty models, whose names are as long as a recipe allows."""
    journal = read_json(run / "run.json")
    card = read_json(run / "stages" / "distill" / "scorecard.json")
    for number in range(17):
        name = f"{'prune-and-distill-' * 4}"[:62] + f"{number:02}"
        folder = run / "stages" / name
        folder.mkdir()
        write_json(folder / "scorecard.json", card | {"parameters": 9000 + 900 * number})
        journal["stages"].append({"name": name, "kind": "distill", "state": "done"})
    write_json(run / "run.json", journal)
    return run


def poison(data: Any) -> Any:
    """The data with every text replaced by, and every key of a task or metric made, hostile."""
    if isinstance(data, dict):
        return {key: poison(value) for key, value in data.items()}
    if isinstance(data, list):
        return [poison(value) for value in data]
    return data + HOSTILE if isinstance(data, str) else data


@pytest.fixture
def hostile_run(run: Path) -> Path:
    """The run with hostile text wherever a model, task, recipe, package or file could bring it."""
    for path in [*run.rglob("scorecard.json"), run / "lock.json"]:
        card = read_json(path)
        samples = card.pop("samples", {})
        card = poison(card)
        card["samples"] = samples
        for part in ("results", "tasks", "samples", "skipped"):
            card[part] = {HOSTILE + task: value for task, value in card.get(part, {}).items()}
        write_json(path, card)
    journal = read_json(run / "run.json")
    for row in journal["stages"]:
        row["reason"] = HOSTILE
    journal |= {"command": HOSTILE, "state": "failed", "error": {"what": HOSTILE, "hint": HOSTILE}}
    name = "</script><b>stage</b>".replace("/", "")
    (run / "stages" / "prune").rename(run / "stages" / name)
    journal["stages"][2]["name"] = name
    write_json(run / "run.json", journal)
    write_json(
        run / "stages" / "transfer_set" / "transfer_set.json",
        {
            "schema": 1,
            HOSTILE: HOSTILE,
            "sources": [{"name": HOSTILE, "documents": 1}],
            "cleaning": hostile_cleaning(),
        },
    )
    quoted = json.dumps(HOSTILE)
    recipe = f"name: {quoted}\ndescription: {quoted}\n"
    (run / "recipe.yaml").write_text(recipe, encoding="utf-8")
    return run
