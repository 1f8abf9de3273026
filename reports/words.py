"""Numbers as people read them. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

MISSING = "–"
SHARES = (
    "acc",
    "acc_norm",
    "exact",
    "exact_match",
    "em",
    "followed",
    "grounded",
    "teacher_first_choice",
)
"""Metrics that are shares of documents, or of tokens."""
RIGHT = ("acc", "acc_norm", "exact", "exact_match", "em")
"""Of these, shares of right answers: a rule that is kept makes no text right."""


def significant(value: float, digits: int = 3) -> str:
    """1234.5 -> "1,234", 0.01234 -> "0.0123": so many significant digits, no exponent near 1."""
    if value == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(value)))
    if magnitude >= 7 or magnitude < -5:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{max(digits - 1 - magnitude, 0)}f}"


def count(value: float | None) -> str:
    """134515008 -> "134.5M"."""
    if value is None:
        return MISSING
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.1f}{letter}"
    return f"{value:g}"


def size(value: float | None) -> str:
    """Bytes in decimal units: 538090408 -> "538 MB"."""
    if value is None:
        return MISSING
    for unit, letter in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(value) >= unit:
            return f"{significant(value / unit)} {letter}"
    return f"{value:g} B"


def duration(seconds: float | None) -> str:
    """200.3 -> "3 min 20 s"."""
    if seconds is None:
        return MISSING
    if seconds < 1:
        return f"{significant(1000 * seconds, 2)} ms"
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def percent(share: float | None, digits: int = 0) -> str:
    """0.7134 -> "71%"."""
    return MISSING if share is None else f"{100 * share:.{digits}f}%"


def some_percent(share: float) -> str:
    """A share that is not nothing, also where it would round to that."""
    return percent(share) if share >= 0.01 else "less than 1%"


def unquantised(export: Mapping[str, Any]) -> str:
    """What a quantised GGUF holds in 16 bits all the same; nothing where there is nothing.

    ``export`` are the facts of an export. Every quantisation that is offered has blocks of 32.
    """
    share = export.get("shares", {}).get("f16", 0)
    if not share or not str(export.get("kind")).startswith("q"):
        return ""
    why = "have rows that are no multiple of 32 and stay in f16"
    return f"{some_percent(share)} of the weights {why}"


def is_share(metric: str) -> bool:
    """Whether the metric is shown in percent."""
    return metric.split(",")[0] in SHARES


def is_right(metric: str) -> bool:
    """Whether the metric is a share of right answers."""
    return metric.split(",")[0] in RIGHT


def score(metric: str, value: float | None, stderr: float | None = None) -> str:
    """A score with its standard error: "41.2 ± 3.4%" for shares, "24.1 ± 0.9" for the rest."""
    if value is None:
        return MISSING
    if is_share(metric):
        error = f" ± {100 * stderr:.1f}" if stderr is not None else ""
        return f"{100 * value:.1f}{error}%"
    error = f" ± {significant(stderr, 2)}" if stderr is not None else ""
    return f"{significant(value)}{error}"


def difference(metric: str, value: float, stderr: float | None) -> str:
    """A signed difference with its standard error; shares in percentage points."""
    sign = "+" if value > 0 else "−" if value < 0 else "±"
    if is_share(metric):
        error = f" ± {100 * stderr:.1f}" if stderr is not None else ""
        return f"{sign}{100 * abs(value):.1f}{error} pp"
    error = f" ± {significant(stderr, 2)}" if stderr is not None else ""
    return f"{sign}{significant(abs(value))}{error}"


def probability(value: float | None) -> str:
    """A p with its sign of relation: "= 0.031", "< 0.0001"."""
    if value is None:
        return MISSING
    return "< 0.0001" if value < 0.0001 else f"= {significant(value, 2)}"


def times(ratio: float) -> str:
    """1.347 -> "1.35 times"."""
    return f"{ratio:.2f} times"


def ratio(value: Any, reference: Any) -> float | None:
    """value / reference where both are positive numbers."""
    numbers = [x for x in (value, reference) if isinstance(x, int | float) and x > 0]
    return numbers[0] / numbers[1] if len(numbers) == 2 else None


def metric_label(task: str, metric: str) -> str:
    """How a metric is called in a table."""
    names = {
        "acc": "accuracy",
        "acc_norm": "accuracy, by length",
        "exact": "exact word",
        "exact_match": "exact match",
        "word_perplexity": "perplexity per word",
        "byte_perplexity": "perplexity per byte",
        "bits_per_byte": "bits per byte",
        "followed": "rule kept",
        "grounded": "words of the text",
        "rouge_l": "ROUGE-L",
        "calibration_error": "calibration error",
        "teacher_kl": "divergence from the teacher, nats a token",
        "teacher_first_choice": "same first choice as the teacher",
        "perplexity": "perplexity of the word",
    }
    if metric.startswith("token_perplexity_"):
        return f"perplexity per token, windows of {metric.rpartition('_')[2]}"
    return names.get(metric, metric.replace("_", " "))


def moment(text: Any) -> str:
    """ISO 8601 as "2026-11-23 12:00 UTC"; what is no time stays as it is."""
    try:
        return datetime.fromisoformat(str(text)).astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")
    except ValueError:
        return str(text)
