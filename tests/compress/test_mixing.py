"""Adaptive mixing: sources on which the student lags get more, and all of it can be repeated."""

from __future__ import annotations

import json
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import ValidationError
from safetensors.torch import load_file

from compress.data import StepData
from compress.distill import distill
from compress.mixing import DRAWN_BACK, Mix, reweighted
from compress.settings import DistillSettings
from pipelines.tiny import make_tiny_llama
from shearling import ShearlingError
from teachers.transfer_set import TransferSet

SETTINGS: dict[str, Any] = {
    "tokens": 32 * 8 * 12,
    "batch_tokens": 32 * 8,
    "learning_rate": 5e-3,
    "precision": "float32",
    "evaluate_every": 3,
    "save_every_seconds": 100,
    "adaptive_mix": 0.1,
}


def mix_of(sizes: list[int], step_windows: int, seed: int = 0) -> Mix:
    owner_W = np.repeat(np.arange(len(sizes)), sizes)

    def order(epoch: int) -> NDArray[np.int64]:
        return np.random.default_rng([seed, epoch]).permutation(len(owner_W))

    names = [f"source {number}" for number in range(len(sizes))]
    return Mix(names, owner_W, step_windows=step_windows, seed=seed, order=order)


# --- the shares ------------------------------------------------------------------------------


def test_the_source_that_lags_gets_more_and_none_is_forgotten() -> None:
    natural = np.array([0.5, 0.3, 0.2])
    shares = reweighted(natural, np.array([0.2, 0.2, 1.0]), natural, 1.0)
    assert shares.sum() == pytest.approx(1)
    assert shares[2] > natural[2]
    assert shares[0] / shares[1] == pytest.approx(5 / 3)  # equal lags keep their proportion
    assert np.allclose(reweighted(natural, np.full(3, 7.0), natural, 1.0), natural)
    for _ in range(200):
        shares = reweighted(shares, np.array([0.0, 0.0, 900.0]), natural, 1.0)
    assert np.all(shares >= 0.999 * DRAWN_BACK * natural)
    assert shares[2] > 0.9


@given(
    st.lists(st.integers(0, 9), min_size=2, max_size=4).filter(any),
    st.integers(1, 7),
    st.integers(1, 12),
)
def test_every_window_comes_once_an_epoch(sizes: list[int], step_windows: int, steps: int) -> None:
    mix = mix_of(sizes, step_windows)
    mix.update(2, {"source 0": 0.3, "source 1": 2.0}, 1.0)
    seen: Counter[int] = Counter()
    for step in range(steps):
        windows = mix.windows(step)
        assert len(windows) == step_windows
        seen.update(windows)
    owner_W = np.repeat(np.arange(len(sizes)), sizes)
    for source, size in enumerate(sizes):
        counts = [seen[int(window)] for window in np.flatnonzero(owner_W == source)]
        assert max(counts, default=0) - min(counts, default=0) <= 1
        assert sum(counts) == mix.taken(steps)[source]
        assert bool(size) or not counts


def test_shares_are_kept_over_many_steps() -> None:
    mix = mix_of([700, 300], step_windows=4)
    mix.update(100, {"source 0": 0.0, "source 1": 1.0}, 1.0)
    assert mix.taken(100) / 400 == pytest.approx([0.7, 0.3], abs=0.02)
    later = (mix.taken(400) - mix.taken(100)) / 1200
    assert later == pytest.approx(mix.shares(399), abs=0.02)
    assert later[1] > 0.45


def test_a_restored_history_gives_the_same_windows() -> None:
    mix, other = mix_of([30, 20], 4), mix_of([30, 20], 4)
    for step in (5, 9):
        mix.windows(step)
        mix.update(step, {"source 0": 0.1, "source 1": 0.9}, 1.0)
    other.windows(7)
    other.restore(json.loads(json.dumps(mix.history)))
    assert [other.windows(step) for step in (12, 3, 30)] == [
        mix.windows(step) for step in (12, 3, 30)
    ]
    assert mix_of([30, 20], 4, seed=1).windows(0) != mix_of([30, 20], 4).windows(0)


# --- which source a window is of -------------------------------------------------------------


def test_windows_belong_to_the_source_that_has_most_of_them(two_sources: Path) -> None:
    text = TransferSet(two_sources)
    source_N = np.zeros(text.tokens.size, np.int64)
    for start, source in zip(text.starts, text.document_sources, strict=True):
        source_N[start:] = source
    tokens_WS = [np.bincount(row, minlength=2) for row in source_N.reshape(-1, text.window)]
    assert text.window_owners().tolist() == [int(counts.argmax()) for counts in tokens_WS]
    assert set(text.window_owners()) == {0, 1}
    owners_BT = text.heldout_owners([1, 0])
    assert owners_BT.shape == (2, text.window)
    assert owners_BT[1, 0] == text.heldout_document_sources[0]
    assert text.source_names == ["grammar", "digits"]


# --- in training -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def knowing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher that knows the grammar and nothing of digits."""
    folder = tmp_path_factory.mktemp("knowing") / "llama"
    return make_tiny_llama(folder, steps=150, initializer_range=0.1)


def run(
    out: Path, teacher: Path, student: Path, text: Path, **more: Any
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    summary = distill(teacher, student, out, text, DistillSettings(**SETTINGS), **more)
    return lines(out), summary


def lines(out: Path) -> list[dict[str, Any]]:
    clocks = {"seconds", "tokens_per_second"}
    found = (json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key not in clocks} for line in found]


def stop_after_four(line: dict[str, Any]) -> None:
    if line["step"] == 4 and "loss" in line:
        signal.raise_signal(signal.SIGTERM)


def test_what_the_student_lags_in_is_read_more_and_goes_on_to_the_same_bits(
    knowing: Path, tiny_student: Path, two_sources: Path, tmp_path: Path
) -> None:
    found, summary = run(tmp_path / "whole", knowing, tiny_student, two_sources)
    evaluations = [line for line in found if "mix" in line]
    assert [line["step"] for line in evaluations] == [0, 3, 6, 9, 12]
    for line in evaluations:
        assert sum(line["mix"].values()) == pytest.approx(1, abs=1e-5)
        assert line["lag"]["grammar"] > line["lag"]["digits"]
    assert evaluations[0]["mix"] == summary["mix"]["start"]
    grown = [line["mix"]["grammar"] for line in evaluations]
    assert grown == sorted(grown)
    assert grown[-1] > grown[0] + 0.1
    read = summary["mix"]["tokens"]
    assert sum(read.values()) == SETTINGS["tokens"]
    assert read["grammar"] / SETTINGS["tokens"] > summary["mix"]["start"]["grammar"]

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "again", knowing, tiny_student, two_sources, on_metrics=stop_after_four)
    again, after = run(tmp_path / "again", knowing, tiny_student, two_sources)
    assert again == found
    assert after["mix"] == summary["mix"]
    weights = [
        load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "again")
    ]
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())


def test_the_whole_evaluation_is_that_of_all_sources_together(
    knowing: Path, tiny_student: Path, two_sources: Path, tmp_path: Path
) -> None:
    adapted, _ = run(tmp_path / "adapted", knowing, tiny_student, two_sources)
    settings = DistillSettings(**{**SETTINGS, "adaptive_mix": 0.0})
    distill(knowing, tiny_student, tmp_path / "plain", two_sources, settings)
    plain = lines(tmp_path / "plain")
    assert "mix" not in plain[0]
    for name in ("heldout_kl", "heldout_perplexity", "heldout_top1_agreement"):
        assert adapted[0][name] == pytest.approx(plain[0][name], rel=1e-5)


def test_one_source_has_nothing_to_be_mixed_with(tiny_transfer_set: Path) -> None:
    settings = DistillSettings(**SETTINGS)
    with pytest.raises(ShearlingError, match="several sources"):
        StepData(TransferSet(tiny_transfer_set), settings, seed=0, device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("more", "said"),
    [({"evaluate_every": 0}, "evaluate_every"), ({"targets": "sample"}, "set targets to live")],
)
def test_settings_that_leave_nothing_to_adapt_by_are_refused(
    more: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValidationError, match=said):
        DistillSettings(**{**SETTINGS, **more})
