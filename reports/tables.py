"""The report's tables as plain strings: stages, tasks, metrics, completions, sources of text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from reports import words
from reports.compare import headline_metrics
from reports.cuts import Cut
from reports.groups import whole_results
from reports.pace import IN_TURNS, READS, WRITES, measured_pace
from reports.quality_charts import common_tasks, main_perplexity, mean_share, metric_number
from reports.run_folder import Data, Run, Stage, as_dict, as_list, as_number
from reports.verdict import Judgement


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One cell of a table. ``sort`` is what a sorted column goes by; without one it's the text."""

    text: str
    note: str = ""
    mark: str = ""
    """A verdict of `reports.compare`, or empty."""
    title: str = ""
    sort: float | str = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table whose first column heads the rows."""

    name: str
    caption: str
    columns: list[str]
    rows: list[list[Cell]]
    kind: Literal["numbers", "words", "texts"] = "numbers"
    """What its cells hold: numbers, short answers, or what models wrote."""


def stage_table(run: Run) -> Table | None:
    """The waterfall: one row a stage, what it made, how good and fast that is, what it took."""
    if not run.stages:
        return None
    cards = [stage.scorecard for stage in run.measured if stage.scorecard]
    key = main_perplexity(cards)
    tasks = common_tasks(cards)
    return Table(
        name="stages",
        caption="What each stage made, and what it took. Tasks: mean share of right answers on "
        "those that all have. Reads and writes: tokens per second, for one sequence on this "
        "machine, and the quartiles of the repeats; × the teacher's, both in turns (the verdict "
        "takes models of one shape for one). Memory: what a process with this model alone needs.",
        columns=["stage", "parameters", "perplexity", "tasks", "reads", "writes", "memory", "took"],
        rows=[_stage_row(stage, run.teacher or {}, key, tasks) for stage in run.stages],
    )


def _stage_row(
    stage: Stage, teacher: Data, key: tuple[str, str] | None, tasks: Sequence[str]
) -> list[Cell]:
    card = stage.scorecard or {}
    speed = as_dict(card.get("speed"))
    share = words.percent(words.ratio(card.get("parameters"), teacher.get("parameters")))
    on_disk = as_number(card.get("bytes"))
    first = as_number(speed.get("time_to_first_token_seconds"))
    after = f"first after {words.duration(first)}" if first is not None else ""
    ratio = measured_pace(card, IN_TURNS)
    times = f"{ratio.middle:.2f}× ({ratio.range})" if ratio else ""
    used = as_number(card.get("peak_memory_bytes"))
    before = as_number(as_dict(card.get("memory")).get("before_loading_bytes"))
    grown = f"model {words.size(used - before)}" if used and before else ""
    notes = [stage.kind if stage.kind != stage.name else "", stage.reason or ""]
    if stage.state != "done":
        notes.insert(0, stage.state)
    return [
        Cell(text=stage.name, note=" · ".join(filter(None, notes)), sort=stage.name),
        cell(
            as_number(card.get("parameters")),
            words.count,
            f"{share}, {words.size(on_disk)}" if on_disk else share,
        ),
        _perplexity_cell(card, key),
        _mean_cell(card, tasks),
        pace_cell(card, READS, after),
        pace_cell(card, WRITES, times),
        cell(used, words.size, grown),
        cell(stage.seconds, words.duration, f"in {words.size(stage.peak_memory_bytes)}"),
    ]


def pace_cell(card: Data, key: str, note: str = "") -> Cell:
    """Tokens a second with their quartiles, each note on a line of its own."""
    measured = measured_pace(card, key)
    if measured is None:
        return cell(None, words.significant)
    notes = ",\n".join(filter(None, (measured.told(), note)))
    return cell(measured.middle, words.significant, notes)


def _perplexity_cell(card: Data, key: tuple[str, str] | None) -> Cell:
    value, error = metric_number(card, *key) if key and card else (None, None)
    note = f"± {words.significant(error, 2)}" if error else ""
    return cell(value, words.significant, note)


def _mean_cell(card: Data, tasks: Sequence[str]) -> Cell:
    """Mean share of right answers over some tasks that have them, with its standard error."""
    mean = mean_share(card, tasks)
    if mean is None:
        return cell(None, words.percent)
    tasks = "1 task" if mean.tasks == 1 else f"{mean.tasks} tasks"
    return cell(mean.value, lambda v: words.percent(v, 1), f"± {100 * mean.stderr:.1f}, {tasks}")


def cell(value: float | None, show: Any, note: str = "") -> Cell:
    """A number as ``show`` writes it; a dash, sorted first, where there is none."""
    if value is None:
        return Cell(text=words.MISSING, sort=float("-inf"))
    return Cell(text=show(value), note=note, sort=float(value))


def task_table(run: Run, judgement: Judgement) -> Table | None:
    """Every task by every model: score, standard error, difference to the teacher, verdict."""
    cards = [stage.scorecard for stage in run.measured if stage.scorecard]
    if not cards:
        return None
    keys: dict[tuple[str, str], None] = {}
    for card in cards:
        for task, results in whole_results(card).items():
            keys |= dict.fromkeys((task, metric) for metric in headline_metrics(task, results))
    rows = [
        [
            Cell(text=task, note=words.metric_label(task, metric), sort=task),
            *(_taskcell(stage, task, metric, judgement) for stage in run.measured),
            *_floor_cells(cards, task, metric),
        ]
        for task, metric in keys
    ]
    return Table(
        name="tasks",
        caption="Tasks. Under each score: its difference to the teacher, from the same documents, "
        "± standard error. “Within noise”: p ≥ 0.05 after Holm's correction for all rows.",
        columns=["task", *(stage.name for stage in run.measured), "guessing", "documents"],
        rows=rows,
    )


def _taskcell(stage: Stage, task: str, metric: str, judgement: Judgement) -> Cell:
    card = stage.scorecard or {}
    if task in card["skipped"]:
        return Cell(text="skipped", title=str(card["skipped"][task]), sort=float("-inf"))
    found = card["results"].get(task, {}).get(metric, {})
    value, error = as_number(found.get("value")), as_number(found.get("stderr"))
    text = words.score(metric, value, error)
    entry = next(
        (
            comparison
            for comparison in judgement.comparisons.get(stage.name, [])
            if (comparison.task, comparison.metric) == (task, metric)
        ),
        None,
    )
    order = float("-inf") if value is None else value
    if entry is None:
        return Cell(text=text, sort=order)
    if entry.difference is None:
        return Cell(text=text, mark=entry.verdict, title=entry.reason or "", sort=order)
    return Cell(
        text=text,
        note=words.difference(metric, entry.difference, entry.stderr),
        mark=entry.verdict,
        title=f"{entry.test}, {entry.documents} documents, p {words.probability(entry.p)}, "
        f"after Holm's correction {words.probability(entry.p_adjusted)}",
        sort=order,
    )


def _floor_cells(cards: list[Data], task: str, metric: str) -> tuple[Cell, Cell]:
    """What guessing scores, and how many documents (or windows) of how many were asked."""
    facts: Data = next((card["tasks"][task] for card in cards if task in card["tasks"]), {})
    chance = as_number(facts.get("chance")) if metric.startswith("acc") else None
    constant = as_number(facts.get("constant")) if metric.startswith("acc") else None
    guess = cell(chance, lambda value: words.percent(value, 1))
    written = as_number(as_dict(facts.get("floor")).get(metric))
    if written is not None:
        guess = Cell(text=words.score(metric, written), note="a constant answer", sort=written)
    if constant is not None:
        constant_answer = f"always the same: {words.percent(constant, 1)}"
        guess = Cell(text=guess.text, note=constant_answer, sort=guess.sort)
    if metric.startswith("token_perplexity"):
        windows = as_number(facts.get("perplexity_windows"))
        return guess, cell(windows, lambda value: f"{value:,.0f} windows")
    asked, there = as_number(facts.get("samples")), as_number(facts.get("documents"))
    of = f"of {there:,.0f}" if there is not None else ""
    return guess, cell(asked, lambda value: f"{value:,.0f}", of)


def metric_table(run: Run) -> Table | None:
    """Every metric that lm-eval gave, those of the members of groups too."""
    keys = {
        (task, metric): None
        for stage in run.measured
        for task, results in (stage.scorecard or {})["results"].items()
        for metric in results
    }
    if not keys:
        return None
    rows = []
    for task, metric in keys:
        row = [Cell(text=task, note=metric, sort=f"{task} {metric}")]
        for stage in run.measured:
            found = (stage.scorecard or {})["results"].get(task, {}).get(metric, {})
            value, error = as_number(found.get("value")), as_number(found.get("stderr"))
            row.append(cell(value, lambda v, m=metric, e=error: words.score(m, v, e)))
        rows.append(row)
    return Table(
        name="metrics",
        caption="All metrics, each with its standard error.",
        columns=["task", *(stage.name for stage in run.measured)],
        rows=rows,
    )


def completion_table(run: Run) -> Table | None:
    """What each model writes after the same beginnings."""
    prompts = {
        str(entry.get("prompt")): None
        for stage in run.measured
        for entry in (stage.scorecard or {})["completions"]
    }
    if not prompts:
        return None
    rows = []
    for prompt in prompts:
        row = [Cell(text=prompt)]
        for stage in run.measured:
            texts = [
                str(entry.get("text"))
                for entry in (stage.scorecard or {})["completions"]
                if str(entry.get("prompt")) == prompt
            ]
            row.append(Cell(text=texts[0] if texts else words.MISSING))
        rows.append(row)
    return Table(
        name="completions",
        caption="Completions: what each model writes after the same beginning, greedily.",
        columns=["beginning", *(stage.name for stage in run.measured)],
        rows=rows,
        kind="texts",
    )


def source_table(run: Run) -> Table | None:
    """Where the transfer set's text came from."""
    sources = [as_dict(source) for source in as_list(transfer(run).get("sources"))]
    if not sources:
        return None

    def count(value: float) -> str:
        return f"{value:,.0f}"

    numbers: dict[str, tuple[str, Callable[[float], str]]] = {
        "documents": ("documents", count),
        "tokens": ("tokens", count),
        "learnt_tokens": ("learnt", count),
        "heldout_learnt_tokens": ("held out and learnt", count),
        "bytes": ("bytes", words.size),
        "reserved": ("kept for benchmarks", count),
    }
    if not any("learnt_tokens" in source for source in sources):
        del numbers["learnt_tokens"], numbers["heldout_learnt_tokens"]
    rows = [
        [
            Cell(
                text=str(source.get("name") or source.get("path") or "source"),
                note=plain(source.get("notes")),
            ),
            *(cell(as_number(source.get(key)), show) for key, (_, show) in numbers.items()),
        ]
        for source in sources
    ]
    return Table(
        name="sources",
        caption="Sources of the transfer set.",
        columns=["source", *(column for column, _ in numbers.values())],
        rows=rows,
    )


def search_table(cut: Cut) -> Table | None:
    """The shapes that a budget left open, as they were tried, the best first."""
    tried = as_list(cut.stage.summary.get("search"))
    if not tried:
        return None
    rows = []
    for place, entry in enumerate(map(as_dict, tried), 1):
        shape = as_dict(entry.get("shape"))
        rows.append(
            [
                Cell(text=str(place), sort=place),
                cell(as_number(entry.get("kl")), words.significant),
                *(cell(as_number(shape.get(axis)), lambda v: f"{v:,.0f}") for axis in _AXES),
                cell(as_number(entry.get("parameters")), lambda v: f"{v:,.0f}"),
            ]
        )
    return Table(
        name=f"search{cut.mark}",
        caption="Shapes under the budget, each pruned on a little text. Divergence: KL from the "
        "model that was cut, nats a token, on held-out text before any training. The first was "
        "taken.",
        columns=["rank", "divergence", *_AXES.values(), "parameters"],
        rows=rows,
    )


_AXES = {
    "num_hidden_layers": "layers",
    "hidden_size": "hidden",
    "num_attention_heads": "query heads",
    "num_key_value_heads": "key/value heads",
    "intermediate_size": "neurons",
}


def transfer(run: Run) -> Data:
    """The run's transfer_set.json, empty if there is none."""
    return next((stage.transfer_set for stage in run.stages if stage.transfer_set), {})


TRANSFER_HASHES = {"sha256": "transfer set", "tokenizer_sha256": "tokenizer"}
"""Hashes in transfer_set.json, and of what they are."""


def transfer_facts(run: Run) -> list[tuple[str, str]]:
    """All plain numbers and texts of transfer_set.json."""
    return [
        (key.replace("_", " "), plain(value))
        for key, value in transfer(run).items()
        if key not in ("schema", "sources", *TRANSFER_HASHES)
        and isinstance(value, str | int | float)
    ]


def plain(value: Any) -> str:
    """Any JSON value as a person would write it."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {plain(entry)}" for key, entry in value.items())
    if isinstance(value, list):
        return ", ".join(plain(entry) for entry in value)
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "" if value is None else str(value)
