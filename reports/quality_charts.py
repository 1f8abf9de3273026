"""Charts of quality: against size, against speed, and task by task."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import altair as alt

from reports.chart import Chart, finish, shortened, told_apart, values
from reports.compare import headline_metrics, mismatch
from reports.groups import whole_results
from reports.pace import IN_TURNS, WRITES, Pace, measured_beside_one_teacher, measured_pace
from reports.run_folder import Data, Run, as_dict, as_number
from reports.words import count, is_right, metric_label, percent, score, significant


def metric_number(card: Data | None, task: str, metric: str) -> tuple[float | None, float | None]:
    """(value, standard error) of a scorecard's metric, each None where it is not there."""
    found = as_dict(as_dict((card or {}).get("results", {}).get(task)).get(metric))
    return as_number(found.get("value")), as_number(found.get("stderr"))


def main_perplexity(cards: Sequence[Data]) -> tuple[str, str] | None:
    """(task, metric) of the perplexity that most scorecards have, the fixed-window one first.

    Perplexities of tokens are out of the question where the models have different tokenizers.
    """
    tokenizers = {str(card["tokenizer_sha256"]) for card in cards if card.get("tokenizer_sha256")}
    wanted = [("wikitext2", "token_perplexity_512"), ("wikitext2", "word_perplexity")]
    wanted += [
        (task, metric)
        for card in cards
        for task, metrics in card["results"].items()
        for metric in metrics
        if "perplexity" in metric
    ]
    having = [
        (sum(metric_number(card, *key)[0] is not None for card in cards), key)
        for key in wanted
        if len(tokenizers) < 2 or not key[1].startswith("token_perplexity")
    ]
    best = max(having, key=lambda pair: pair[0], default=(0, ("", "")))
    return best[1] if best[0] else None


@dataclass(frozen=True, kw_only=True)
class Mean:
    """The mean share of right answers over some tasks, which are taken to be independent."""

    value: float
    stderr: float
    tasks: int


def share_tasks(card: Data | None) -> dict[str, str]:
    """Tasks of a scorecard that have right answers -> the metric that counts them.

    A group of tasks is one of them, and its members are none.
    """
    headlines = {
        task: (headline_metrics(task, as_dict(results)) or [""])[0]
        for task, results in whole_results(card or {}).items()
    }
    return {
        task: metric
        for task, metric in headlines.items()
        if is_right(metric) and metric_number(card, task, metric)[0] is not None
    }


def common_tasks(cards: Sequence[Data]) -> list[str]:
    """The tasks with right answers that all scorecards have that have any."""
    asked = [tasks for tasks in map(share_tasks, cards) if tasks]
    return [task for task in asked[0] if all(task in each for each in asked)] if asked else []


def mean_share(card: Data | None, tasks: Sequence[str] | None = None) -> Mean | None:
    """Mean over the tasks that have right answers, or over those of them that are named."""
    found = [
        metric_number(card, task, metric)
        for task, metric in share_tasks(card).items()
        if tasks is None or task in tasks
    ]
    shares = [(value, error or 0.0) for value, error in found if value is not None]
    if not shares:
        return None
    return Mean(
        value=sum(value for value, _ in shares) / len(shares),
        stderr=sum(error**2 for _, error in shares) ** 0.5 / len(shares),
        tasks=len(shares),
    )


@dataclass(frozen=True, kw_only=True)
class Measure:
    """What stands for quality in the charts of it."""

    axis: str
    told: str
    logarithmic: bool
    of: Callable[[Data | None], tuple[float | None, float | None]]
    """Scorecard -> value and standard error."""
    show: Callable[[float], str]
    tasks: tuple[str, ...]
    """On which it is measured."""

    windows: str = ""
    """The fact that says on how many windows, where it matters."""

    def alike(self, one: Data, other: Data) -> bool:
        """Whether two scorecards were asked the same."""
        facts = [
            [as_dict(card.get("tasks")).get(t, {}) for t in self.tasks] for card in (one, other)
        ]
        windows = [[each.get(self.windows) for each in card] for card in facts]
        return windows[0] == windows[1] and not any(mismatch(one, other, t) for t in self.tasks)


def measure_of(cards: Sequence[Data]) -> Measure | None:
    """Perplexity where the models have one, else the share of right answers on common tasks."""
    key = main_perplexity(cards)
    if key is not None:
        return Measure(
            axis="perplexity (log)",
            told=f"{metric_label(*key).capitalize()} ({key[0]}; lower is better)",
            logarithmic=True,
            of=lambda card: metric_number(card, *key),
            show=significant,
            tasks=key[:1],
            windows="perplexity_windows" if key[1].startswith("token_") else "",
        )
    common = common_tasks(cards)
    if not common:
        return None

    def of(card: Data | None) -> tuple[float | None, float | None]:
        mean = mean_share(card, common)
        return (mean.value, mean.stderr) if mean else (None, None)

    tasks = common[0] if len(common) == 1 else f"mean of {len(common)} tasks"
    return Measure(
        axis="right answers",
        told=f"Share of right answers ({tasks}; higher is better)",
        logarithmic=False,
        of=of,
        show=lambda value: percent(value, 1),
        tasks=tuple(common),
    )


def quality_by_size(run: Run, rivals: Sequence[Run] = ()) -> Chart | None:
    """Quality against parameters: where each model of the run, and of its rivals, lies."""
    return _quality(
        run,
        rivals,
        name="quality-by-size",
        title="Quality against size",
        of=_millions,
        axis="parameters (millions)",
        against="parameters",
        told=lambda value: f"{count(value * 1e6)} parameters",
    )


def quality_by_speed(run: Run, rivals: Sequence[Run] = ()) -> Chart | None:
    """Quality against the speed of writing: that beside the teacher, where all others have it."""
    draw = partial(_quality, run, rivals, name="quality-by-speed", title="Quality against speed")
    if measured_beside_one_teacher([run, *rivals]):
        return draw(
            of=lambda card: measured_pace(card, IN_TURNS) or Pace(middle=1.0, low=1.0, high=1.0),
            axis="times as fast as the teacher at writing",
            against="speed beside the teacher's (with its 95% confidence interval), one sequence "
            "at a time, in turns",
            told=lambda value: f"{value:.2f} times as fast as the teacher",
        )
    return draw(
        of=lambda card: measured_pace(card, WRITES),
        axis="tokens written a second",
        against="tokens written a second (with quartiles), one sequence at a time on the machine "
        "that measured",
        told=lambda value: f"{significant(value)} tokens a second",
    )


def _millions(card: Data) -> Pace | None:
    """Parameters, which have no spread."""
    size = (as_number(card.get("parameters")) or 0.0) / 1e6
    return Pace(middle=size, low=size, high=size) if size else None


def _quality(
    run: Run,
    rivals: Sequence[Run],
    *,
    name: str,
    title: str,
    of: Any,
    axis: str,
    against: str,
    told: Any,
) -> Chart | None:
    """Quality against something of a scorecard; each run is a colour and a dashed path.

    ``of``: scorecard -> where the model stands on the x axis, and between what.
    """
    cards = [s.scorecard for each in (run, *rivals) for s in each.measured if s.scorecard]
    measure = measure_of(cards) if cards else None
    if measure is None:
        return None
    rows: list[Data] = []
    asked_otherwise = []
    for label, each in run_labels([run, *rivals]):
        if not all(measure.alike(cards[0], card) for card in _having(each, measure)):
            asked_otherwise.append(label)
            continue
        rows += [
            {**row, "run": label, "order": order}
            for order, row in enumerate(_points(each, measure, of))
        ]
    if len(rows) < 2:
        return None
    _label(rows, measure)
    x = alt.X(
        "x:Q",
        title=axis,
        scale=alt.Scale(zero=False, nice=False, padding=20),
        axis=alt.Axis(tickCount=6),
    )
    y = alt.Y(
        "quality:Q",
        title=measure.axis,
        scale=alt.Scale(nice=False, padding=30, **_scale(measure.logarithmic)),
        axis=alt.Axis(tickCount=5, format="~g" if measure.logarithmic else "%"),
    )
    runs = list(dict.fromkeys(row["run"] for row in rows))
    looks = told_apart("run", runs, by="shape", legend=len(runs) > 1)
    base = alt.Chart(values(rows))
    path = base.mark_line(strokeDash=[4, 4], strokeWidth=1.2).encode(
        x, y, order="order:Q", color=looks["color"]
    )
    bars = base.mark_rule(strokeWidth=1.5).encode(x, alt.Y("low:Q", title=""), alt.Y2("high:Q"))
    across = base.mark_rule(strokeWidth=1.5).encode(alt.X("slow:Q", title=""), alt.X2("fast:Q"), y)
    points = base.mark_point(filled=True, size=110, opacity=1).encode(
        x, y, tooltip=["run:N", "model:N", "x:Q", "quality:Q"], **looks
    )
    # The same text twice: first a halo in the paper's colour, or the bars would cross it out.
    halo, ink = (
        base.mark_text(align={"expr": "datum.align"}, dy=-16, **look).encode(x, y, text="label:N")
        for look in ({"stroke": "var(--sheet)", "strokeWidth": 5, "strokeJoin": "round"}, {})
    )
    said = "; ".join(
        f"{told(row['x'])}: {row['model']} · {measure.show(row['quality'])}" for row in rows
    )
    return finish(
        name,
        title,
        f"{measure.told} against {against}, with standard errors.{_left_out(asked_otherwise)}",
        path + bars + across + points + halo + ink,
        numbers=said,
    )


def _having(run: Run, measure: Measure) -> list[Data]:
    """The scorecards of a run that have the measure."""
    return [
        stage.scorecard
        for stage in run.measured
        if stage.scorecard and measure.of(stage.scorecard)[0] is not None
    ]


def _left_out(runs: Sequence[str]) -> str:
    return f" Not drawn, for they were asked otherwise: {', '.join(runs)}." if runs else ""


def _scale(logarithmic: bool) -> Data:
    return {"type": "log"} if logarithmic else {"zero": False}


def run_labels(runs: Sequence[Run]) -> list[tuple[str, Run]]:
    """Each run with a name that no other one has: its recipe's, or else its folder's."""
    names = [run.name for run in runs]
    return [
        (run.name if names.count(run.name) == 1 else f"{run.name} ({run.folder.name})", run)
        for run in runs
    ]


def _points(run: Run, measure: Measure, of: Any) -> list[Data]:
    rows = []
    for stage in run.measured:
        value, error = measure.of(stage.scorecard)
        place = of(stage.scorecard)
        if value is None or value <= 0 or place is None:
            continue
        spread = error or 0.0
        rows.append(
            {
                "model": stage.name,
                "x": place.middle,
                "slow": place.low,
                "fast": place.high,
                "quality": value,
                "low": max(value - spread, value / 10),
                "high": value + spread,
            }
        )
    return rows


def _label(rows: Sequence[Data], measure: Measure) -> None:
    """Give the rows the names that stand beside their points, and a side where there is room.

    Of many points only the first, the last and the best that a run has made have one.
    """
    named = list(range(len(rows)))
    if len(rows) > _MOST_LABELS:
        made = [place for place in named if rows[place]["order"]] or named
        best = min if measure.logarithmic else max
        named = [0, len(rows) - 1, best(made, key=lambda place: rows[place]["quality"])]
    least, most = (limit(row["x"] for row in rows) for limit in (min, max))
    for place, row in enumerate(rows):
        across = (row["x"] - least) / (most - least) if most > least else 0.5
        row["align"] = "left" if across < 1 / 3 else "right" if across > 2 / 3 else "center"
        text = f"{shortened(row['model'])} · {measure.show(row['quality'])}"
        row["label"] = text if place in named else ""


_MOST_LABELS = 8
_MOST_NATS = 700.0  # exp of more is no number


def quality_by_position(run: Run) -> Chart | None:
    """Perplexity against how much a model had read: does it still use a long context?"""
    rows: list[Data] = []
    for stage in run.measured:
        measured = (stage.scorecard or {})["by_position"]
        for row in measured["positions"]:
            loss, spread = row["loss"], row["stderr"] or 0.0
            if row["first"] < 1 or row["last"] < row["first"] or loss + spread > _MOST_NATS:
                continue
            rows.append(
                {
                    "model": stage.name,
                    "read": math.sqrt(row["first"] * row["last"]),
                    "positions": f"{row['first']:,.0f}–{row['last']:,.0f}",
                    "perplexity": math.exp(loss),
                    "low": math.exp(loss - spread),
                    "high": math.exp(loss + spread),
                }
            )
    if len({row["positions"] for row in rows}) < 2:
        return None
    names = list(dict.fromkeys(row["model"] for row in rows))
    x = alt.X(
        "read:Q",
        title="tokens read before (log)",
        scale=alt.Scale(type="log", nice=False, padding=10),
        axis=alt.Axis(tickCount=6, format="~s"),
    )
    y = alt.Y(
        "perplexity:Q",
        title="perplexity (log)",
        scale=alt.Scale(type="log", nice=False, padding=20),
        axis=alt.Axis(tickCount=5),
    )
    looks = told_apart("model", names, by="shape")
    base = alt.Chart(values(rows))
    bars = base.mark_rule(strokeWidth=1.2).encode(
        x, alt.Y("low:Q", title=""), alt.Y2("high:Q"), color=looks["color"]
    )
    line = base.mark_line().encode(x, y, color=looks["color"])
    points = base.mark_point(filled=True, size=50, opacity=1).encode(
        x, y, tooltip=["model:N", "positions:N", "perplexity:Q"], **looks
    )
    longest = max((s.scorecard or {})["by_position"]["window"] or 0.0 for s in run.measured)
    said = "; ".join(
        f"{row['model']}, {row['positions']}: {significant(row['perplexity'])}" for row in rows
    )
    return finish(
        "quality-by-position",
        "Perplexity by position",
        f"Perplexity (wikitext2; lower is better) of tokens by how many stood before them, in "
        f"windows of {longest:,.0f}, with standard errors. A model that uses all of its context "
        "goes down to the right.",
        bars + line + points,
        numbers=said,
    )


def tasks_by_model(run: Run) -> Chart | None:
    """Accuracies of all models on all tasks of choices, with standard errors and chance."""
    rows: list[Data] = []
    guesses: list[Data] = []
    for stage in run.measured:
        card = stage.scorecard or {}
        for task, metrics in whole_results(card).items():
            metric = headline_metrics(task, metrics)[0] if metrics else ""
            value, error = metric_number(card, task, metric)
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
    y = alt.Y("task:N", title=None, sort=tasks)
    offset = alt.YOffset("model:N", sort=names)
    base = alt.Chart(values(rows))
    looks = told_apart("model", names, by="shape")
    x = alt.X(
        "value:Q", title="share of right answers", axis=alt.Axis(format="%", tickCount=5),
        scale=alt.Scale(domain=[0, 1]),
    )  # fmt: skip
    bars = base.mark_rule(strokeWidth=2).encode(
        alt.X("low:Q"), alt.X2("high:Q"), y, yOffset=offset, color=looks["color"]
    )
    points = base.mark_point(filled=True, size=70, opacity=1).encode(
        x, y, yOffset=offset, tooltip=["model:N", "task:N", "value:Q"], **looks
    )
    chance_marks = (
        alt.Chart(values(list({row["task"]: row for row in guesses}.values())))
        .mark_tick(color="var(--soft)", thickness=2, size=30)
        .encode(alt.X("chance:Q"), y, tooltip=["task:N", "chance:Q"])
    )
    layers_ = chance_marks + bars + points if guesses else bars + points
    said = "; ".join(f"{r['task']}, {r['model']}: {score('acc', r['value'])}" for r in rows)
    return finish(
        "tasks",
        "Tasks",
        "Share of right answers of each model on each task, with standard errors; the grey tick "
        "is what guessing gives.",
        layers_,
        numbers=said,
        height=max(140, 24 * len(tasks) * max(len(names), 2) // 2 + 40),
    )
