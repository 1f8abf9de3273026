"""Statistics: known answers, and the sense to refuse."""

from __future__ import annotations

import copy
import math
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from reports.compare import (
    Comparison,
    compare_metric,
    compare_models,
    higher_is_better,
    holm,
    mcnemar,
    mismatch,
    pack,
    paired_perplexities,
    recovered,
    unpack,
)


def card(name: str, **samples: Any) -> dict[str, Any]:
    """A scorecard with one task of right answers and one perplexity."""
    found: dict[str, Any] = {
        "model": name,
        "results": {},
        "tasks": {},
        "samples": {},
        "skipped": {},
    }
    facts = {"version": 1, "hash": "h", "limit": None, "num_fewshot": 0, "samples": 100}
    for task, values in samples.items():
        metric = "acc" if task.startswith("choice") else "token_perplexity_512"
        mean = float(np.mean(unpack(values)))
        value = mean if metric == "acc" else math.exp(mean)
        found["results"][task] = {metric: {"value": value, "stderr": 0.1}}
        found["samples"][task] = {metric: values}
        found["tasks"][task] = {**facts, "higher_is_better": {metric: metric == "acc"}}
    return found


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_never_lowers_a_p_and_keeps_their_order(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    assert all(p <= q <= 1 for p, q in zip(p_values, adjusted, strict=True))
    order = np.argsort(p_values, kind="stable")
    assert np.all(np.diff(np.asarray(adjusted)[order]) >= 0)


def test_holm_of_a_known_example() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_mcnemar_counts_only_where_they_differ() -> None:
    first, second = (
        np.array([1.0] * 50 + [1.0] * 9 + [0.0]),
        np.array([1.0] * 50 + [0.0] * 9 + [1.0]),
    )
    assert mcnemar(first, second) == pytest.approx(stats.binomtest(9, 10).pvalue)
    assert mcnemar(first, first) == 1.0


def test_the_error_of_a_perplexity_difference_is_that_of_a_bootstrap() -> None:
    rng = np.random.default_rng(1)
    weights = rng.integers(50, 400, 80).astype(float)
    base = -2.9 * weights + rng.normal(0, 20, 80)
    first = np.stack([base, weights], axis=1)
    second = np.stack([base - 0.2 * weights + rng.normal(0, 5, 80), weights], axis=1)
    difference, error, p, _ = paired_perplexities("word_perplexity", first, second)
    draws = []
    for _ in range(2000):
        pick = rng.integers(80, size=80)
        total = weights[pick].sum()
        draws.append(
            math.exp(-second[pick, 0].sum() / total) - math.exp(-first[pick, 0].sum() / total)
        )
    assert difference == pytest.approx(np.mean(draws), rel=0.02)
    assert error == pytest.approx(np.std(draws), rel=0.15)
    assert p < 1e-6


def test_clear_differences_are_called_so_and_small_ones_noise() -> None:
    rng = np.random.default_rng(0)
    losses = rng.normal(3, 0.3, 40)
    teacher = card("teacher", choice="1" * 60 + "0" * 40, text=losses.tolist())
    student = card("student", choice="1" * 58 + "0" * 42, text=(losses + 0.3).tolist())
    found = {entry.task: entry for entry in compare_models(teacher, student)}
    assert found["choice"].verdict == "within noise"
    assert found["choice"].difference == pytest.approx(-0.02)
    assert found["text"].verdict == "worse"
    assert found["text"].difference == pytest.approx(math.exp(losses.mean()) * (math.exp(0.3) - 1))
    better = {entry.task: entry for entry in compare_models(student, teacher)}
    assert better["text"].verdict == "better"
    same = compare_models(teacher, teacher)
    assert {entry.verdict for entry in same} == {"the same"}
    # As many right answers to other questions is a difference of 0, and no proof of sameness.
    other = card("other", choice="0" * 40 + "1" * 60, text=losses.tolist())
    found = {entry.task: entry for entry in compare_models(teacher, other)}
    assert found["choice"].difference == 0
    assert found["choice"].verdict == "within noise"
    assert found["text"].verdict == "the same"


@pytest.mark.parametrize("fact", ["version", "hash", "limit", "num_fewshot", "data_sha256"])
def test_what_was_measured_differently_is_not_compared(fact: str) -> None:
    teacher = card("teacher", choice="1100" * 10)
    student = copy.deepcopy(teacher)
    student["tasks"]["choice"][fact] = "other"
    entry = compare_models(teacher, student)[0]
    assert entry.verdict == "not comparable"
    assert entry.difference is None
    assert fact.split("_")[0] in (entry.reason or "")


@pytest.mark.parametrize("fact", ["precision", "max_length"])
def test_what_earlier_scorecards_do_not_say_is_held_against_nobody(fact: str) -> None:
    teacher, student = (card(name, choice="1100" * 10) for name in ("teacher", "student"))
    student["tasks"]["choice"][fact] = "float32"
    assert mismatch(teacher, student, "choice") is None
    teacher["tasks"]["choice"][fact] = "bfloat16"
    assert fact.split("_")[0] in (mismatch(teacher, student, "choice") or "")


@pytest.mark.parametrize(
    ("metric", "fact"),
    [
        ("token_perplexity_512", "tokenizer_sha256"),
        ("calibration_error", "tokenizer_sha256"),
        ("teacher_kl", "tokenizer_sha256"),
        ("teacher_kl", "teacher_sha256"),
    ],
)
def test_what_counts_other_tokens_or_another_teacher_is_not_compared(
    metric: str, fact: str
) -> None:
    one = card("one", text=[3.0, 3.1, 3.2])
    for part in ("results", "samples"):
        measured = one[part]["text"]["token_perplexity_512"]
        one[part]["text"] = {"word_perplexity": measured, metric: measured}
    one[fact] = "this"
    other = {**copy.deepcopy(one), fact: "that"}
    entry = compare_metric(one, other, "text", metric)
    assert entry.p is None
    assert "different t" in (entry.reason or "")
    assert compare_metric(one, other, "text", "word_perplexity").p == 1.0
    for alike in (one, {**other, fact: None}):  # earlier scorecards don't tell
        assert compare_metric(one, alike, "text", metric).p == 1.0


@pytest.mark.parametrize("metric", ["mcc", "f1"])
def test_right_and_given_answers_are_no_likelihoods(metric: str) -> None:
    """lm-eval keeps pairs of these too; the right answers of two models are always the same."""
    teacher, student = card("teacher", text=[3.0]), card("student", text=[3.0])
    for made, given_answers in ((teacher, (0, 1, 1, 0)), (student, (1, 0, 0, 1))):
        right = float(given_answers == (0, 1, 1, 0))
        made["results"]["text"] = {metric: {"value": right, "stderr": 0.1}}
        pairs = [[answer, given] for answer, given in zip((0, 1, 1, 0), given_answers, strict=True)]
        made["samples"]["text"] = {metric: pairs * 20}
    (entry,) = compare_models(teacher, student)
    assert entry.verdict == "not comparable"
    assert entry.reason == "no paired test for this metric"
    assert (entry.reference, entry.value) == (1.0, 0.0)


def test_skipped_missing_and_empty_tasks_have_a_reason() -> None:
    teacher, student = card("teacher", choice="11"), card("student")
    assert "not measured for student" in (mismatch(teacher, student, "choice") or "")
    student["skipped"]["choice"] = "no file"
    assert "no file" in (mismatch(teacher, student, "choice") or "")
    short = card("student", choice="1")
    assert "documents" in (compare_metric(teacher, short, "choice", "acc").reason or "")


def test_what_came_back_is_a_share_with_an_interval() -> None:
    rng = np.random.default_rng(0)
    losses = rng.normal(3, 0.3, 60)
    cut = losses + rng.normal(0.8, 0.1, 60)
    teacher, before = card("t", text=losses.tolist()), card("p", text=cut.tolist())
    after = card("d", text=(losses + 0.25 * (cut - losses)).tolist())
    found = recovered(teacher, before, after, "text", "token_perplexity_512")
    assert found is not None
    assert found.share == pytest.approx(0.75, abs=1e-6)
    assert found.low <= found.share <= found.high
    # What was not lost can't be won back.
    assert recovered(teacher, teacher, after, "text", "token_perplexity_512") is None
    # Neither can what the cut had won.
    assert recovered(before, teacher, after, "text", "token_perplexity_512") is None
    lucky = [card(n, choice=v) for n, v in (("t", "10" * 20), ("p", "1" * 40), ("d", "1110" * 10))]
    assert recovered(*lucky, "choice", "acc") is None
    choices = [
        card(n, choice=v) for n, v in (("t", "1" * 40), ("p", "10" * 20), ("d", "1110" * 10))
    ]
    share = recovered(*choices, "choice", "acc")
    assert share is not None
    assert share.share == pytest.approx(0.5)


def test_the_interval_of_many_documents_is_that_of_a_plain_bootstrap_in_little_memory() -> None:
    rng = np.random.default_rng(3)
    right = [rng.random(2000) < share for share in (0.7, 0.5, 0.6)]
    cards = [card("x", choice="".join(map(str, values.astype(int)))) for values in right]
    tracemalloc.start()
    found = recovered(*cards, "choice", "acc")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found is not None
    assert peak < 30e6  # every draw with its values would be 384 MB
    draws = rng.integers(2000, size=(4000, 2000))
    teacher, before, after = (r[draws].mean(axis=1) for r in right)
    low, high = np.quantile((after - before) / (teacher - before), [0.025, 0.975])
    assert found.low == pytest.approx(low, abs=0.01)
    assert found.high == pytest.approx(high, abs=0.01)


def test_samples_are_packed_and_unpacked() -> None:
    assert pack([0, 1, 1]) == "011"
    assert unpack("011") == [0, 1, 1]
    assert unpack(pack([0.5, 1])) == [0.5, 1]
    assert pack([]) == []


def test_the_direction_of_a_metric() -> None:
    assert higher_is_better({}, "x", "acc")
    assert not higher_is_better({}, "x", "word_perplexity")
    assert higher_is_better({"tasks": {"x": {"higher_is_better": {"loss": True}}}}, "x", "loss")


def test_real_scorecards_compare(cards: dict[str, dict[str, Any]]) -> None:
    found = {(e.task, e.metric): e for e in compare_models(cards["teacher"], cards["prune"])}
    entry = found["wikitext2", "token_perplexity_512"]
    assert entry.difference == pytest.approx((entry.value or 0) - (entry.reference or 0))
    assert isinstance(found["grammar_pairs", "acc"], Comparison)
    assert found["piqa", "acc"].test == "McNemar, exact"
