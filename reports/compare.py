"""Is one model worse than another, by how much, and is that more than noise? Pure functions.

Two models that answered the same documents are compared document by document: much of the chance
in a score is in the choice of documents, and it cancels. Scorecards whose tasks differ in anything
that changes the numbers (text, prompts, limit, few-shot examples) are never compared: the answer
is then a reason instead of a difference.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

from reports.groups import counted_as, whole_results
from shearling import sha256_of_json

Floats = npt.NDArray[np.float64]

MUST_AGREE = ("version", "hash", "data_sha256", "limit", "num_fewshot", "chat_template", "samples")
"""Facts of a task that must be the same in two scorecards before their results are compared."""
IF_KNOWN = ("precision", "max_length")
"""Facts that must be the same where both scorecards have them; earlier ones don't."""
COUNTED_IN = {
    "tokenizer_sha256": (
        ("token_perplexity_", "calibration_error", "teacher_"),
        "counted in tokens of different tokenizers",
    ),
    "teacher_sha256": (("teacher_",), "held against different teachers"),
}
"""What must be the same for both models -> metrics of which kind, and why they else say nothing."""
SIGNIFICANT = 0.05
BOOTSTRAPS = 4000
_HEADLINES = {"wikitext2": ("word_perplexity", "token_perplexity_512")}
_USUAL = (
    "acc", "followed", "exact_match", "exact", "f1", "rougeL", "rouge_l", "word_perplexity",
    "perplexity",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One metric of one task, of a model against a reference (here: the teacher)."""

    task: str
    metric: str
    reference: float | None
    value: float | None
    difference: float | None = None
    """value - reference."""
    stderr: float | None = None
    """Standard error of the difference, from the paired documents."""
    p: float | None = None
    """Probability of so large a difference between equally good models (two-sided)."""
    p_adjusted: float | None = None
    """After Holm's correction for all comparisons of the model."""
    test: str | None = None
    documents: int | None = None
    verdict: str = "not comparable"
    """"better", "worse", "within noise", "the same" or "not comparable"."""
    reason: str | None = None
    """Why there is no comparison."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def headline_metrics(task: str, results: Mapping[str, Any]) -> list[str]:
    """The metrics of a task that a summary shows; all others say the same in another way."""
    known = [metric for metric in _HEADLINES.get(task, ()) if metric in results]
    usual = [metric for metric in _USUAL if metric in results]
    return known or usual[:1] or list(results)[:1]


def higher_is_better(card: Mapping[str, Any], task: str, metric: str) -> bool:
    """Whether a larger number is a better one: as the task says, else by the metric's name."""
    said = card.get("tasks", {}).get(task, {}).get("higher_is_better", {}).get(metric)
    if isinstance(said, bool):
        return said
    return not any(part in metric for part in ("perplexity", "bits_per", "loss", "brier"))


def mismatch(first: Mapping[str, Any], second: Mapping[str, Any], task: str) -> str | None:
    """Why the two scorecards' results on the task can't be compared; None if they can."""
    for card in (first, second):
        if task in card.get("skipped", {}):
            return f"skipped for {card.get('model')}: {card['skipped'][task]}"
        if task not in card.get("results", {}):
            return f"not measured for {card.get('model')}"
    one, two = (card.get("tasks", {}).get(task, {}) for card in (first, second))
    known = [fact for fact in IF_KNOWN if one.get(fact) and two.get(fact)]
    different = [
        f"{fact.replace('_', ' ')} {_short(one.get(fact))} and {_short(two.get(fact))}"
        for fact in (*MUST_AGREE, *known)
        if (one.get(fact) or None) != (two.get(fact) or None)  # false, 0 and absent are one
    ]
    return "measured differently: " + ", ".join(different) if different else None


def other_units(first: Mapping[str, Any], second: Mapping[str, Any], metric: str) -> str | None:
    """Why the metric counts different things in two scorecards; None if it doesn't as far as known.

    A token of a larger vocabulary is more text: its perplexity is higher for an equally good model.
    """
    for fact, (kinds, reason) in COUNTED_IN.items():
        one, two = first.get(fact), second.get(fact)
        if metric.startswith(kinds) and one and two and one != two:
            return reason
    return None


def asked_as(facts: Mapping[str, Any]) -> str:
    """A short fingerprint of what a task asked; other fingerprints, other questions."""
    named = (*MUST_AGREE, "perplexity_windows", "agreement_windows")
    return sha256_of_json({fact: facts.get(fact) or None for fact in named})[:12]


def _short(value: Any) -> str:
    text = str(value)
    return text[:8] + "…" if len(text) > 12 else text


def unpack(values: Any) -> list[Any]:
    """The samples of one metric as a list; "0110" stands for [0, 1, 1, 0].

    What is no list of samples, in a scorecard that something else has written, holds none.
    """
    if isinstance(values, str):
        return [int(digit) for digit in values]
    return list(values) if isinstance(values, (list, tuple)) else []


def pack(values: Sequence[Any]) -> str | list[Any]:
    """The samples of one metric as a scorecard keeps them: zeros and ones as one string."""
    if values and all(isinstance(value, int) and value in (0, 1) for value in values):
        return "".join(map(str, values))
    return list(values)


def compare_models(
    reference: Mapping[str, Any], model: Mapping[str, Any], *, headlines_only: bool = True
) -> list[Comparison]:
    """Compare a scorecard with the reference's on every task of either, Holm-corrected.

    A group of tasks is one task: its members are compared only where every metric is asked for.
    """
    cards = (reference, model)
    results = [whole_results(c) if headlines_only else c.get("results", {}) for c in cards]
    found = []
    for task in dict.fromkeys(task for each in results for task in each):
        known = model.get("results", {}).get(task) or reference.get("results", {}).get(task, {})
        metrics = headline_metrics(task, known) if headlines_only else list(known)
        found += [compare_metric(reference, model, task, metric) for metric in metrics]
    return with_holm(found, reference)


def compare_metric(
    reference: Mapping[str, Any], model: Mapping[str, Any], task: str, metric: str
) -> Comparison:
    """One metric's difference with its standard error and p, before any correction."""
    values = [
        ((card.get("results", {}).get(task) or {}).get(metric) or {}).get("value")
        for card in (reference, model)
    ]
    plain = Comparison(task=task, metric=metric, reference=values[0], value=values[1])
    reason = mismatch(reference, model, task) or other_units(reference, model, metric)
    if reason is None and (values[0] is None or values[1] is None):
        reason = "not measured for both"
    samples = [
        unpack((card.get("samples", {}).get(task) or {}).get(metric) or ())
        for card in (reference, model)
    ]
    if reason is None and (len(samples[0]) < 2 or len(samples[0]) != len(samples[1])):
        reason = "fewer than two documents in common"
    if reason is None and has_pairs(samples[0]) and not is_perplexity(metric, samples[0]):
        reason = "no paired test for this metric"
    if reason is not None:
        return _replace(plain, reason=reason)
    difference, stderr, p, test = _paired(metric, samples[0], samples[1])
    return _replace(
        plain, difference=difference, stderr=stderr, p=p, test=test, documents=len(samples[0])
    )


def _replace(comparison: Comparison, **changes: Any) -> Comparison:
    return Comparison(**{**asdict(comparison), **changes})


def _paired(
    metric: str, first: Sequence[Any], second: Sequence[Any]
) -> tuple[float, float, float, str]:
    """(difference, its standard error, p, the test's name) of paired documents."""
    if is_perplexity(metric, first):
        return paired_perplexities(metric, as_weighted(metric, first), as_weighted(metric, second))
    one, two = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    delta = two - one
    stderr = float(np.std(delta, ddof=1)) / math.sqrt(len(delta))
    if set(one) | set(two) <= {0.0, 1.0}:
        return float(delta.mean()), stderr, mcnemar(one, two), "McNemar, exact"
    p = paired_t(float(delta.mean()), stderr, len(delta))
    return float(delta.mean()), stderr, p, "paired t"


def mcnemar(first: Floats, second: Floats) -> float:
    """Exact two-sided p of McNemar's test on paired answers (1 right, 0 wrong).

    McNemar 1947: among the documents that only one of the two got right, each is a fair coin.
    """
    only_first = int(np.sum((first == 1) & (second == 0)))
    only_second = int(np.sum((first == 0) & (second == 1)))
    if only_first + only_second == 0:
        return 1.0
    return float(stats.binomtest(only_first, only_first + only_second, 0.5).pvalue)


def paired_t(difference: float, stderr: float, documents: int) -> float:
    """Two-sided p of Student's t for a mean difference of so many documents."""
    if stderr == 0:
        return 1.0 if difference == 0 else 0.0
    return float(2 * stats.t.sf(abs(difference / stderr), documents - 1))


def is_perplexity(metric: str, samples: Sequence[Any]) -> bool:
    """Whether the metric is a function of summed log-likelihoods.

    Bits per byte are one where a document's sample is [log-likelihood, bytes], else a mean.
    """
    return "perplexity" in metric or (metric == "bits_per_byte" and has_pairs(samples))


def has_pairs(samples: Sequence[Any]) -> bool:
    """Whether a document's sample is two numbers: lm-eval keeps [right, given] for F1, say."""
    return bool(samples) and isinstance(samples[0], list | tuple)


def as_weighted(metric: str, samples: Sequence[Any]) -> Floats:
    """[documents, 2]: log-likelihood (nats) and weight (words, bytes, or 1) of each document."""
    if has_pairs(samples):
        return np.asarray(samples, dtype=float)
    sign = -1.0 if metric.startswith("token_perplexity") else 1.0  # windows keep losses
    values = sign * np.asarray(samples, dtype=float)
    return np.stack([values, np.ones_like(values)], axis=1)


def paired_perplexities(
    metric: str, first: Floats, second: Floats
) -> tuple[float, float, float, str]:
    """(difference, standard error, p, test) of two (word, byte, token) perplexities.

    p comes from a paired t on the documents' log-likelihoods; the standard error of the difference
    is linearised around both perplexities (delta method for a ratio of sums).
    """
    weights = first[:, 1]
    total, count = float(weights.sum()), len(weights)
    loss = [-float(pairs[:, 0].sum()) / total for pairs in (first, second)]
    residuals = [
        (-pairs[:, 0] - mean * weights) / total
        for pairs, mean in zip((first, second), loss, strict=True)
    ]
    if metric == "bits_per_byte":
        values, slopes = [mean / math.log(2) for mean in loss], [1 / math.log(2)] * 2
    else:
        values = slopes = [math.exp(min(mean, 700.0)) for mean in loss]
    spread = math.sqrt(count / (count - 1))
    moved = slopes[1] * residuals[1] - slopes[0] * residuals[0]
    stderr = spread * float(np.sqrt(np.sum(moved**2)))
    log_error = spread * float(np.sqrt(np.sum((residuals[1] - residuals[0]) ** 2)))
    p = paired_t(loss[1] - loss[0], log_error, count)
    return values[1] - values[0], stderr, p, "paired t on log-likelihoods"


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment (Holm 1979): controls the chance of any false alarm."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def with_holm(comparisons: Sequence[Comparison], card: Mapping[str, Any]) -> list[Comparison]:
    """Adjust all p together and put each verdict into words."""
    tested = [comparison for comparison in comparisons if comparison.p is not None]
    adjusted = iter(holm([comparison.p for comparison in tested if comparison.p is not None]))
    judged = []
    for comparison in comparisons:
        if comparison.p is None:
            judged.append(comparison)
            continue
        p = next(adjusted)
        upward = higher_is_better(card, comparison.task, comparison.metric)
        judged.append(_replace(comparison, p_adjusted=p, verdict=_verdict(comparison, p, upward)))
    return judged


def _verdict(comparison: Comparison, p: float, upward: bool) -> str:
    difference = comparison.difference
    if difference == 0 and not comparison.stderr:  # no document differs: more than a mean of 0
        return "the same"
    if p >= SIGNIFICANT:
        return "within noise"
    assert difference is not None
    return "better" if (difference > 0) == upward else "worse"


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """How much of the quality that one stage lost a later one won back."""

    task: str
    metric: str
    share: float
    """0: nothing, 1: all, more than 1: better than the teacher."""
    low: float
    high: float
    """Ends of the 95% interval, from a paired bootstrap over the documents."""


def recovered(
    teacher: Mapping[str, Any], before: Mapping[str, Any], after: Mapping[str, Any], task: str,
    metric: str, *, seed: int = 0,
) -> Recovery | None:  # fmt: skip
    """Share of the loss between teacher and ``before`` that ``after`` won back.

    Perplexities are taken as losses (nats), everything else as it is. None where the three can't
    be compared, or where ``before`` did not lose more than noise: a share of nothing is nothing,
    and what it won can't be won back.
    """
    if mismatch(teacher, before, task) or mismatch(teacher, after, task):
        return None
    cards = (teacher, before, after)
    samples = [unpack((c.get("samples", {}).get(task) or {}).get(metric) or ()) for c in cards]
    if len(samples[0]) < 2 or len({len(values) for values in samples}) != 1:
        return None
    difference, _, p, _ = _paired(metric, samples[0], samples[1])
    if p >= SIGNIFICANT or (difference > 0) == higher_is_better(teacher, task, metric):
        return None
    if is_perplexity(metric, samples[0]):
        weighted = np.stack([as_weighted(metric, values) for values in samples])
    else:
        scores = np.asarray(samples, dtype=float)
        weighted = np.stack([scores, np.ones_like(scores)], axis=2)
    quality = _resampled(weighted, np.random.default_rng(seed))
    shares = _share(quality[..., 0] / quality[..., 1])
    whole = weighted.sum(axis=1)
    share = float(_share((whole[:, 0] / whole[:, 1])[:, None])[0])
    low, high = np.nanquantile(shares, [0.025, 0.975])
    return Recovery(task=task, metric=metric, share=share, low=float(low), high=float(high))


def _resampled(weighted_3N2: Floats, rng: np.random.Generator) -> Floats:
    """Sums over documents that are drawn with replacement, the same ones for all: [3, B, 2].

    Counts of how often each document was drawn do, and a hundred draws at once, for of ten thousand
    documents the values of all draws would be 2 GB.
    """
    documents, at_once = weighted_3N2.shape[1], 100
    sums = []
    for _ in range(BOOTSTRAPS // at_once):
        picks = rng.integers(documents, size=(at_once, documents))
        counts = np.stack([np.bincount(row, minlength=documents) for row in picks])
        sums.append(counts @ weighted_3N2)
    return np.concatenate(sums, axis=1)


def _share(quality_3B: Floats) -> Floats:
    teacher, before, after = quality_3B
    with np.errstate(divide="ignore", invalid="ignore"):
        shares: Floats = (after - before) / (teacher - before)
    return shares


@dataclass(frozen=True, kw_only=True)
class Likeness:
    """How alike two models' written answers are."""

    task: str
    rouge_l: float
    stderr: float | None
    documents: int


def written_alike(reference: Mapping[str, Any], model: Mapping[str, Any]) -> list[Likeness]:
    """ROUGE-L (F1) of the model's texts against the reference's, for each task of writing.

    The two wrote on the same documents, or the task is left out. Two empty texts are alike.
    """
    from reports.tasks.rewriting import rouge_l

    found = []
    written = _whole_answers(model)
    for task, theirs in _whole_answers(reference).items():
        mine = written.get(task, [])
        if not theirs or len(mine) != len(theirs) or mismatch(reference, model, task):
            continue
        scores = [1.0 if a == b else rouge_l(a, b) for a, b in zip(theirs, mine, strict=True)]
        error = float(np.std(scores, ddof=1)) / math.sqrt(len(scores)) if len(scores) > 1 else None
        found.append(
            Likeness(task=task, rouge_l=float(np.mean(scores)), stderr=error, documents=len(scores))
        )
    return found


def _whole_answers(card: Mapping[str, Any]) -> dict[str, list[str]]:
    """What a model wrote on each task, and on a group of tasks in the order of its members."""
    found: dict[str, list[str]] = {}
    for task, texts in card.get("answers", {}).items():
        found.setdefault(counted_as(card, task), []).extend(texts)
    return found
