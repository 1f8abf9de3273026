"""Charts of training: loss, distance from the teacher, learning rate, gradients, speed.

The x axis is tokens seen; stages of training follow one another on it. Where a run went on after
an interruption stands a dashed line.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import altair as alt

from reports.chart import SERIES, Chart, finish, told_apart, values
from reports.run_folder import Data, Run, Stage, as_list, as_number
from reports.words import significant

_TERMS = {
    "loss": "loss",
    "forward_kl": "KL to the teacher",
    "reverse_kl": "reverse KL",
    "jensen_shannon": "Jensen-Shannon",
    "skewed_kl": "skewed KL",
    "skewed_reverse_kl": "skewed reverse KL",
    "cross_entropy": "cross-entropy",
    "hidden": "hidden states",
}


def _taught(run: Run) -> list[Stage]:
    return [stage for stage in run.stages if any("step" in line for line in stage.metrics)]


def _tokens(line: Data) -> float:
    return as_number(line.get("tokens")) or as_number(line.get("step")) or 0.0


def _thinned(lines: list[Data], most: int = 400) -> list[Data]:
    """At most so many of the lines, the first and the last among them."""
    if len(lines) <= most:
        return lines
    step = (len(lines) - 1) / (most - 1)
    return [lines[round(i * step)] for i in range(most)]


def _differs(term: Any, loss: float) -> bool:
    """Whether a term is there and isn't all of the loss (which one curve shows as well as two)."""
    value = as_number(term)
    return value is not None and not math.isclose(value, loss, rel_tol=1e-3)


def _with_offsets(run: Run) -> Iterator[tuple[Stage, float]]:
    """Each stage of training, and how many tokens were seen before it."""
    offset = 0.0
    for stage in _taught(run):
        yield stage, offset
        offset += max(map(_tokens, stage.metrics), default=0.0)


def _rows(run: Run, name: str) -> list[Data]:
    """One number of the metrics over the tokens seen (in thousands)."""
    rows: list[Data] = []
    for stage, offset in _with_offsets(run):
        lines = [line for line in stage.metrics if as_number(line.get(name)) is not None]
        rows += [
            {"tokens": (offset + _tokens(line)) / 1000, "value": line[name]}
            for line in _thinned(lines)
        ]
    return rows


def resumes(run: Run) -> list[Data]:
    """Where training went on after an interruption, on the same axis."""
    found = []
    for stage, offset in _with_offsets(run):
        steps = {as_number(line.get("step")): _tokens(line) for line in stage.metrics}
        for resume in stage.resumes:
            step = as_number(resume.get("step"))
            if step in steps:
                found.append({"tokens": (offset + steps[step]) / 1000, "at": str(resume.get("at"))})
    return found


def _marked(chart: Any, run: Run) -> tuple[Any, str]:
    """The chart with a dashed line at each resume, and the words for it."""
    marks = resumes(run)
    if not marks:
        return chart, ""
    lines = (
        alt.Chart(values(marks))
        .mark_rule(strokeDash=[3, 3], strokeWidth=1)
        .encode(alt.X("tokens:Q"), tooltip=["at:N"])
    )
    times = "once" if len(marks) == 1 else f"{len(marks)} times"
    return lines + chart, f" The run was interrupted {times} and went on at the dashed lines."


def _tokens_axis() -> Any:
    return alt.X(
        "tokens:Q",
        title="tokens seen (thousands)",
        axis=alt.Axis(tickCount=6),
        scale=alt.Scale(nice=False),
    )


def losses(run: Run) -> Chart | None:
    """Loss by term over the tokens seen, one colour a term."""
    rows: list[Data] = []
    for stage, offset in _with_offsets(run):
        lines = [line for line in stage.metrics if as_number(line.get("loss")) is not None]
        terms = [
            term
            for term in _TERMS
            if term == "loss" or any(_differs(line.get(term), line["loss"]) for line in lines)
        ]
        for line in _thinned(lines):
            for term in terms:
                value = as_number(line.get(term))
                if value is not None:
                    tokens = (offset + _tokens(line)) / 1000
                    rows.append({"tokens": tokens, "term": _TERMS[term], "value": value})
    if not rows:
        return None
    shown = [name for name in _TERMS.values() if any(row["term"] == name for row in rows)]
    lines = alt.Chart(values(rows)).mark_line(strokeWidth=1.5)
    chart, interrupted = _marked(_by_name(lines, "term", shown, "nats per token", zero=False), run)
    total = [row["value"] for row in rows if row["term"] == "loss"]
    text = "Loss by term over the tokens seen."
    if total:
        went = f"{significant(total[0])} to {significant(total[-1])}"
        text = f"{text} The whole loss went from {went}."
    return finish("loss", "Loss while distilling", text + interrupted, chart)


def _by_name(lines: Any, field: str, names: Sequence[str], title: str, *, zero: bool) -> Any:
    """Values over the tokens seen, one coloured line for each name that ``field`` has."""
    return lines.encode(
        _tokens_axis(),
        alt.Y("value:Q", title=title, scale=alt.Scale(zero=zero)),
        tooltip=[f"{field}:N", "tokens:Q", "value:Q"],
        **told_apart(field, names, by="strokeDash"),
    )


def heldout(run: Run) -> Chart | None:
    """KL to the teacher on text that the student was not taught on."""
    rows = _rows(run, "heldout_kl")
    if len(rows) < 2:
        return None
    first, last = rows[0]["value"], rows[-1]["value"]
    told = [note for stage in _taught(run) for note in as_list(stage.summary.get("notes"))]
    notes = "".join(f" {note}" for note in told)
    return _one_line(
        run,
        rows,
        name="heldout",
        title="Distance from the teacher on held-out text",
        unit="nats per token",
        points=True,
        text="KL divergence from the teacher on text that was kept out of training: "
        f"{significant(first)} at the first evaluation, {significant(last)} at the last." + notes,
    )


def mixes(run: Run) -> Chart | None:
    """Share of each source in the steps, where the mix adapts to what the student lags in."""
    rows: list[Data] = []
    for stage, offset in _with_offsets(run):
        lines = [line for line in stage.metrics if isinstance(line.get("mix"), dict)]
        rows += [
            {"tokens": (offset + _tokens(line)) / 1000, "source": source, "value": 100 * share}
            for line in _thinned(lines)
            for source, share in line["mix"].items()
            if as_number(share) is not None
        ]
    names = list(dict.fromkeys(row["source"] for row in rows))
    if not names:
        return None
    lines = alt.Chart(values(rows)).mark_line(interpolate="step-after", point=True)
    title = "share of the steps (%)"
    chart, interrupted = _marked(_by_name(lines, "source", names, title, zero=True), run)
    ends = [[row["value"] for row in rows if row["source"] == name] for name in names]
    went = ", ".join(
        f"{name} {shares[0]:.0f}% to {shares[-1]:.0f}%"
        for name, shares in zip(names, ends, strict=True)
    )
    text = f"Sources on which the student lags behind the teacher get more: {went}."
    return finish("mix", "Share of each source", text + interrupted, chart)


def learning_rates(run: Run) -> Chart | None:
    """The schedule as it was."""
    rows = _rows(run, "learning_rate")
    if len(rows) < 2:
        return None
    highest = max(row["value"] for row in rows)
    return _one_line(
        run,
        rows,
        name="learning-rate",
        title="Learning rate",
        unit="learning rate",
        text=f"The learning rate of each step; the highest was {significant(highest)}.",
        height=150,
    )


def gradient_norms(run: Run) -> Chart | None:
    """The gradient's norm before clipping: where training was rough."""
    rows = [row for row in _rows(run, "gradient_norm") if row["value"] > 0]
    if len(rows) < 2:
        return None
    highest, lowest = (limit(row["value"] for row in rows) for limit in (max, min))
    wide = highest > 10 * lowest
    return _one_line(
        run,
        rows,
        name="gradient-norm",
        title="Gradient norm",
        unit="norm (log)" if wide else "norm",
        text="Norm of the whole gradient in each step, before it was clipped (but behind the "
        "clipping of single positions, position_clip); the largest was "
        f"{significant(highest)}.",
        height=150,
        logarithmic=wide,
    )


def speeds(run: Run) -> Chart | None:
    """Tokens a second, step by step."""
    rows = _rows(run, "tokens_per_second")
    if len(rows) < 2:
        return None
    middle = sorted(row["value"] for row in rows)[len(rows) // 2]
    return _one_line(
        run,
        rows,
        name="training-speed",
        title="Speed of training",
        unit="tokens a second",
        text=f"Tokens a second in each step; half of the steps were faster than "
        f"{significant(middle)}.",
        height=150,
    )


def _one_line(
    run: Run,
    rows: list[Data],
    *,
    name: str,
    title: str,
    unit: str,
    text: str,
    points: bool = False,
    height: int = 260,
    logarithmic: bool = False,
) -> Chart:
    colour = SERIES[1]
    scale = alt.Scale(type="log", nice=False) if logarithmic else alt.Scale(zero=False)
    overlay = alt.OverlayMarkDef(size=50, filled=True, color=colour) if points else False
    chart, interrupted = _marked(
        alt.Chart(values(rows))
        .mark_line(point=overlay, color=colour)
        .encode(
            _tokens_axis(),
            alt.Y("value:Q", title=unit, scale=scale, axis=alt.Axis(tickCount=4)),
            tooltip=["tokens:Q", "value:Q"],
        ),
        run,
    )
    return finish(name, title, text + interrupted, chart, height=height)
