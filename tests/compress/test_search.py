"""A search under a budget: scores are the KL that they are said to be, and none is made twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

import compress.search
from compress.prune import prune
from compress.search import search
from compress.settings import PruneSettings
from shearling import read_json
from students.search import candidate_shapes
from students.shape import Shape
from teachers.checkpoint import Checkpoint
from teachers.settings import SourceSettings, TransferSetSettings
from teachers.transfer_set import TransferSet, build_transfer_set

SETTINGS = PruneSettings(calibration_tokens=1024, precision="float32")
WINDOWS, TOKENS = 12, 400
"""The held-out windows that are looked at, and a budget of tokens that has room for just them."""


@pytest.fixture(scope="module")
def transfer_set(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, tiny_text: Path
) -> Path:
    """Windows of 32 tokens; 16 held out, so many that documents end inside them."""
    folder = tmp_path_factory.mktemp("search")
    sources = (SourceSettings(name="tiny", path=str(tiny_text)),)
    settings = TransferSetSettings(sources=sources, window=32, heldout_windows=16)
    build_transfer_set(settings, tiny_llama, folder / "set", seed=0, cache=folder / "cache")
    return folder / "set"


@pytest.fixture(scope="module")
def shapes(tiny_llama: Path) -> list[Shape]:
    return candidate_shapes({"params": 0.6, "candidates": 3}, Checkpoint(tiny_llama).shape)


def searched(teacher: Path, out: Path, shapes: list[Shape], text: Path) -> list[dict[str, Any]]:
    return search(teacher, out, shapes, text, SETTINGS, tokens=TOKENS, seed=0)


@torch.no_grad()
def dense_kl(teacher: Path, student: Path, transfer_set: Path) -> float:
    """KL(teacher || student) with stock models and whole logits, where a next token is asked."""
    windows = TransferSet(transfer_set).heldout_batch(list(range(WINDOWS)))
    said = []
    for folder in (teacher, student):
        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        said.append(model(windows["input_ids"]).logits.double().log_softmax(-1))
    counts = torch.ones_like(windows["input_ids"], dtype=torch.bool)
    counts[:, :-1] = windows["position_ids"][:, 1:] != 0
    assert not counts.all()
    return float((said[0].exp() * (said[0] - said[1])).sum(-1)[counts].mean())


def test_shapes_are_ranked_by_their_divergence(
    tiny_llama: Path, transfer_set: Path, shapes: list[Shape], tmp_path: Path
) -> None:
    found = searched(tiny_llama, tmp_path / "out", shapes, transfer_set)
    assert {Shape(**score["shape"]) for score in found} == set(shapes)
    cheap = SETTINGS.model_copy(update={"calibration_tokens": TOKENS})
    recomputed = []
    for number, score in enumerate(found):
        shape, folder = Shape(**score["shape"]), tmp_path / str(number)
        prune(tiny_llama, folder, shape, transfer_set, cheap, seed=0)
        recomputed.append(dense_kl(tiny_llama, folder / "model", transfer_set))
        assert score["kl"] == pytest.approx(recomputed[-1], rel=1e-3)
        assert score["parameters"] == shape.parameters
    assert recomputed == sorted(recomputed)
    assert recomputed[0] < 0.99 * recomputed[-1]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["search.json"]


def test_a_killed_search_goes_on_at_its_shape(
    tiny_llama: Path,
    transfer_set: Path,
    shapes: list[Shape],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = searched(tiny_llama, tmp_path / "whole", shapes, transfer_set)
    pruned: list[str] = []

    def killed_at_the_third(teacher: Path, out: Path, *rest: Any, **more: Any) -> dict[str, Any]:
        pruned.append(out.name)
        if pruned == ["1", "2", "3"]:
            raise KeyboardInterrupt
        return prune(teacher, out, *rest, **more)

    monkeypatch.setattr(compress.search, "prune", killed_at_the_third)
    out = tmp_path / "killed"
    with pytest.raises(KeyboardInterrupt):
        searched(tiny_llama, out, shapes, transfer_set)
    kept = read_json(out / "search.json")["scores"]
    assert [score["shape"] for score in kept] == [shape.to_dict() for shape in shapes[:2]]
    assert searched(tiny_llama, out, shapes, transfer_set) == whole
    assert pruned == ["1", "2", "3", "3"]
    assert searched(tiny_llama, out, shapes, transfer_set) == whole
    assert len(pruned) == 4


def test_scores_of_another_search_are_not_taken(
    tiny_llama: Path, transfer_set: Path, shapes: list[Shape], tmp_path: Path
) -> None:
    first = searched(tiny_llama, tmp_path, shapes[:1], transfer_set)
    again = searched(tiny_llama, tmp_path, shapes[1:2], transfer_set)
    assert [Shape(**score["shape"]) for score in (*first, *again)] == shapes[:2]
