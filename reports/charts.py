"""Vega-Lite charts of a run, each with its text for those who can't see it.

Colours are CSS variables of the page, so a chart follows light, dark and print without being drawn
again. Every chart is as wide as its container.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt
import vl_convert

from reports.compare import headline_metrics
from reports.run_folder import Data, Run, Stage, as_dict, as_list, as_number
from reports.words import count, metric_label, score, significant

SERIES = ["var(--series-1)", "var(--series-2)", "var(--series-3)", "var(--series-4)"]
_FONT = "system-ui, sans-serif"  # Vega measures texts on a canvas, which knows no variables
_CONFIG: dict[str, Any] = {
    "background": "transparent",
    "font": _FONT,
    "view": {"stroke": "transparent"},
    "axis": {
        "labelColor": "var(--soft)",
        "titleColor": "var(--soft)",
        "titleFontWeight": "normal",
        "labelFontSize": 12,
        "titleFontSize": 12,
        "domainColor": "var(--line)",
        "tickColor": "var(--line)",
        "gridColor": "var(--line)",
        "labelLimit": 140,
    },
    "legend": {
        "labelColor": "var(--ink)",
        "titleColor": "var(--soft)",
        "titleFontWeight": "normal",
        "orient": "top",
        "labelFontSize": 12,
        "symbolStrokeWidth": 2.5,
    },
    "text": {"color": "var(--ink)", "fontSize": 12},
    "rule": {"color": "var(--soft)"},
    "line": {"strokeWidth": 2},
}


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A figure of the report."""

    name: str
    title: str
    text: str
    """What the chart shows, in words: its caption."""
    numbers: str
    """Its numbers, for a screen reader; empty where the caption says them all."""
    spec: Data


@functools.cache
def javascript() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script that needs nothing else (about 900 kB)."""
    names = ("vegaEmbed", "vega", "vegaLite")
    bundle: str = vl_convert.javascript_bundle(";".join(f"window.{n}={n}" for n in names))
    return bundle.replace("\r\n", "\n").replace("\r", "\n")


def make_charts(run: Run) -> list[Chart]:
    """All charts that the run has data for."""
    makers = (quality_by_size, tasks_by_model, losses, heldout, layers, reconstruction)
    charts = (maker(run) for maker in makers)
    return [chart for chart in charts if chart is not None]


def _finish(
    name: str, title: str, text: str, chart: Any, *, height: int = 260, numbers: str = ""
) -> Chart:
    spec = chart.properties(width="container", height=height).configure(**_CONFIG).to_dict()
    spec["autosize"] = {"type": "fit-x", "contains": "padding"}
    return Chart(name=name, title=title, text=text, numbers=numbers, spec=spec)


def _values(rows: Sequence[Data]) -> Any:
    return alt.Data(values=list(rows))


def _number(card: Data | None, task: str, metric: str) -> tuple[float | None, float | None]:
    found = as_dict(as_dict((card or {}).get("results", {}).get(task)).get(metric))
    return as_number(found.get("value")), as_number(found.get("stderr"))


def main_perplexity(cards: Sequence[Data]) -> tuple[str, str] | None:
    """(task, metric) of the perplexity that most scorecards have, the fixed-window one first."""
    wanted = [("wikitext2", "token_perplexity_512"), ("wikitext2", "word_perplexity")]
    wanted += [
        (task, metric)
        for card in cards
        for task, metrics in card["results"].items()
        for metric in metrics
        if "perplexity" in metric
    ]
    having = [(sum(_number(card, *key)[0] is not None for card in cards), key) for key in wanted]
    best = max(having, key=lambda pair: pair[0], default=(0, ("", "")))
    return best[1] if best[0] else None


def quality_by_size(run: Run) -> Chart | None:
    """Perplexity against parameters: where each model of the run lies."""
    cards = [stage.scorecard for stage in run.measured if stage.scorecard]
    key = main_perplexity(cards)
    if key is None or len(cards) < 2:
        return None
    rows: list[Data] = []
    for stage in run.measured:
        value, error = _number(stage.scorecard, *key)
        parameters = as_number((stage.scorecard or {}).get("parameters"))
        if value is None or parameters is None:
            continue
        spread = error or 0.0
        rows.append(
            {
                "model": stage.name,
                "order": len(rows),
                "millions": parameters / 1e6,
                "perplexity": value,
                "low": max(value - spread, value / 10),
                "high": value + spread,
                "label": f"{stage.name} · {significant(value)}",
            }
        )
    if len(rows) < 2:
        return None
    x = alt.X(
        "millions:Q",
        title="parameters (millions)",
        scale=alt.Scale(zero=False, nice=False, padding=60),
        axis=alt.Axis(tickCount=6),
    )
    y = alt.Y(
        "perplexity:Q",
        title="perplexity (log)",
        scale=alt.Scale(type="log", nice=False, padding=30),
        axis=alt.Axis(tickCount=5),
    )
    base = alt.Chart(_values(rows))
    path = base.mark_line(strokeDash=[4, 4], color="var(--soft)", strokeWidth=1.2).encode(
        x, y, order="order:Q"
    )
    bars = base.mark_rule(strokeWidth=1.5).encode(x, alt.Y("low:Q", title=""), alt.Y2("high:Q"))
    points = base.mark_point(filled=True, size=110, opacity=1, color=SERIES[0]).encode(
        x, y, tooltip=["model:N", "millions:Q", "perplexity:Q"]
    )
    names = base.mark_text(align="center", dy=-16).encode(x, y, text="label:N")
    said = "; ".join(f"{count(r['millions'] * 1e6)} parameters: {r['label']}" for r in rows)
    return _finish(
        "quality-by-size",
        "Quality against size",
        f"{metric_label(*key).capitalize()} ({key[0]}; lower is better) against parameters, with "
        "standard errors.",
        path + bars + points + names,
        numbers=said,
    )


def tasks_by_model(run: Run) -> Chart | None:
    """Accuracies of all models on all tasks of choices, with standard errors and chance."""
    rows: list[Data] = []
    guesses: list[Data] = []
    for stage in run.measured:
        card = stage.scorecard or {}
        for task, metrics in card["results"].items():
            metric = headline_metrics(task, metrics)[0] if metrics else ""
            value, error = _number(card, task, metric)
            if value is None or metric not in ("acc", "exact_match", "exact"):
                continue
            spread = error or 0.0
            rows.append(
                {
                    "task": task,
                    "model": stage.name,
                    "value": value,
                    "low": max(value - spread, 0),
                    "high": min(value + spread, 1),
                }
            )
            chance = as_number(card["tasks"].get(task, {}).get("chance"))
            if chance is not None:
                guesses.append({"task": task, "chance": chance})
    if not rows:
        return None
    names = [stage.name for stage in run.measured]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    scale = alt.Scale(domain=names, range=[SERIES[i % len(SERIES)] for i in range(len(names))])
    y = alt.Y("task:N", title=None, sort=tasks)
    offset = alt.YOffset("model:N", sort=names)
    base = alt.Chart(_values(rows))
    colour = alt.Color("model:N", scale=scale, title=None)
    x = alt.X(
        "value:Q", title="share of right answers", axis=alt.Axis(format="%", tickCount=5),
        scale=alt.Scale(domain=[0, 1]),
    )  # fmt: skip
    bars = base.mark_rule(strokeWidth=2).encode(
        alt.X("low:Q"), alt.X2("high:Q"), y, yOffset=offset, color=colour
    )
    points = base.mark_point(filled=True, size=70, opacity=1).encode(
        x, y, yOffset=offset, color=colour, tooltip=["model:N", "task:N", "value:Q"]
    )
    chance_marks = (
        alt.Chart(_values(list({row["task"]: row for row in guesses}.values())))
        .mark_tick(color="var(--soft)", thickness=2, size=30)
        .encode(alt.X("chance:Q"), y, tooltip=["task:N", "chance:Q"])
    )
    layers_ = chance_marks + bars + points if guesses else bars + points
    said = "; ".join(f"{r['task']}, {r['model']}: {score('acc', r['value'])}" for r in rows)
    return _finish(
        "tasks",
        "Tasks",
        "Share of right answers of each model on each task, with standard errors; the grey tick "
        "is what guessing gives.",
        layers_,
        numbers=said,
        height=max(140, 24 * len(tasks) * max(len(names), 2) // 2 + 40),
    )


_TERMS = {
    "loss": "loss",
    "forward_kl": "KL to the teacher",
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


def losses(run: Run) -> Chart | None:
    """Loss by term over the tokens seen, one colour a term; later stages follow on."""
    rows: list[Data] = []
    offset = 0.0
    for stage in _taught(run):
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
        offset += max(map(_tokens, stage.metrics), default=0.0)
    if not rows:
        return None
    shown = [name for name in _TERMS.values() if any(row["term"] == name for row in rows)]
    scale = alt.Scale(domain=shown, range=SERIES[: len(shown)])
    chart = (
        alt.Chart(_values(rows))
        .mark_line(interpolate="monotone")
        .encode(
            alt.X(
                "tokens:Q",
                title="tokens seen (thousands)",
                axis=alt.Axis(tickCount=6),
                scale=alt.Scale(nice=False),
            ),
            alt.Y("value:Q", title="nats per token", scale=alt.Scale(zero=False)),
            alt.Color("term:N", scale=scale, title=None),
            tooltip=["term:N", "tokens:Q", "value:Q"],
        )
    )
    total = [row["value"] for row in rows if row["term"] == "loss"]
    return _finish(
        "loss",
        "Loss while distilling",
        f"Loss by term over the tokens seen. The whole loss went from {significant(total[0])} to "
        f"{significant(total[-1])}." if total else "Loss by term over the tokens seen.",
        chart,
    )  # fmt: skip


def heldout(run: Run) -> Chart | None:
    """KL to the teacher on text that the student was not taught on."""
    rows: list[Data] = []
    offset = 0.0
    for stage in _taught(run):
        for line in stage.metrics:
            value = as_number(line.get("heldout_kl"))
            if value is not None:
                rows.append({"tokens": (offset + _tokens(line)) / 1000, "value": value})
        offset += max(map(_tokens, stage.metrics), default=0.0)
    if len(rows) < 2:
        return None
    chart = (
        alt.Chart(_values(rows))
        .mark_line(point=alt.OverlayMarkDef(size=50, filled=True, color=SERIES[1]), color=SERIES[1])
        .encode(
            alt.X(
                "tokens:Q",
                title="tokens seen (thousands)",
                axis=alt.Axis(tickCount=6),
                scale=alt.Scale(nice=False),
            ),
            alt.Y("value:Q", title="nats per token", scale=alt.Scale(zero=False)),
            tooltip=["tokens:Q", "value:Q"],
        )
    )
    first, last = rows[0]["value"], rows[-1]["value"]
    return _finish(
        "heldout",
        "Distance from the teacher on held-out text",
        f"KL divergence from the teacher on text that was kept out of training: "
        f"{significant(first)} at the first evaluation, {significant(last)} at the last.",
        chart,
    )


def pruned(run: Run) -> Stage | None:
    """The first stage that cut something."""
    return next((stage for stage in run.stages if as_list(stage.selection.get("layers"))), None)


def layer_scores(stage: Stage) -> list[float]:
    """How important each of the cut model's layers was, where the stage recorded it."""
    importance = as_dict(stage.selection.get("importance"))
    for name in ("layers", "layer", "depth"):
        scores = [as_number(value) for value in as_list(importance.get(name))]
        if scores and None not in scores:
            return [value for value in scores if value is not None]
    return []


def layers(run: Run) -> Chart | None:
    """Importance of each of the teacher's layers, and which ones stayed."""
    stage = pruned(run)
    scores = layer_scores(stage) if stage else []
    if stage is None or not scores:
        return None
    kept = {value for value in as_list(stage.selection["layers"]) if isinstance(value, int)}
    rows = [
        {"layer": layer, "importance": value, "state": "kept" if layer in kept else "cut"}
        for layer, value in enumerate(scores)
    ]
    scale = alt.Scale(domain=["kept", "cut"], range=[SERIES[0], "var(--faint)"])
    chart = (
        alt.Chart(_values(rows))
        .mark_bar(cornerRadiusEnd=2)
        .encode(
            alt.X("layer:O", title="the teacher's layer", axis=alt.Axis(labelAngle=0)),
            alt.Y("importance:Q", title="importance (root)", scale=alt.Scale(type="sqrt")),
            alt.Color("state:N", scale=scale, title=None),
            tooltip=["layer:O", "importance:Q", "state:N"],
        )
    )
    gone = [str(layer) for layer in range(len(scores)) if layer not in kept]
    return _finish(
        "layers",
        "Layers: importance, and what was kept",
        f"How much each layer changes the residual stream. {len(kept)} of {len(scores)} layers "
        f"were kept; cut: {', '.join(gone) or 'none'}.",
        chart,
        height=180,
    )


_PARTS = ("down proj sliced", "down proj", "o proj sliced", "o proj")
"""Where cutting costs most: errors of plain slicing beside those after the refit."""


def reconstruction(run: Run) -> Chart | None:
    """Error of each kept layer's output after the refit, where it was recorded."""
    stage = pruned(run)
    rows: list[Data] = []
    for place, entry in enumerate(as_list(stage.selection.get("reconstruction")) if stage else []):
        numbers = as_dict(entry) or {"error": entry}
        layer = as_number(numbers.pop("layer", place))
        for name, value in numbers.items():
            error = as_number(value)
            if error is not None and name not in ("teacher_layer", "index"):
                rows.append({"layer": layer, "part": name.replace("_", " "), "error": error})
    if not rows:
        return None
    found = list(dict.fromkeys(row["part"] for row in rows))
    told = [part for part in _PARTS if part in found]
    parts = (told or found)[: len(SERIES)]
    rows = [row for row in rows if row["part"] in parts]
    scale = alt.Scale(domain=parts, range=SERIES[: len(parts)])
    chart = (
        alt.Chart(_values(rows))
        .mark_line(point=alt.OverlayMarkDef(size=30, filled=True))
        .encode(
            alt.X("layer:Q", title="layer", axis=alt.Axis(tickMinStep=1)),
            alt.Y("error:Q", title="error", scale=alt.Scale(zero=False)),
            alt.Color("part:N", scale=scale, title=None),
            tooltip=["layer:Q", "part:N", "error:Q"],
        )
    )
    worst = max(rows, key=lambda row: row["error"])
    return _finish(
        "reconstruction",
        "Error of the refit, layer by layer",
        f"How far each layer of the cut model is from the teacher's. The largest is "
        f"{significant(worst['error'])} ({worst['part']}, layer {worst['layer']:g}).",
        chart,
        height=200,
    )
