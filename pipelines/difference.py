"""`shearling diff`: is B worse than A, by how much, and is that more than noise?

Both are scorecards, stages, runs (their last model) or models; a model is measured first, on the
other's tasks where that one is a scorecard.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipelines.named import is_run, last_measured, refuse_earlier
from reports import words
from reports.compare import Comparison, compare_models, written_alike
from reports.groups import whole_results
from reports.pace import READS, WRITES, Pace, measured_pace, terms_apart
from reports.page import markdown_cell
from reports.run_folder import Data, as_number, open_scorecard
from shearling import ShearlingError, itemised

SCHEMA = 1
COLUMNS = ("task", "metric", "A", "B", "B - A", "p (Holm)", "B is")


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Two scorecards and what can be said about the second against the first."""

    first: Data
    second: Data
    comparisons: list[Comparison]

    def to_json(self) -> dict[str, Any]:
        """Plain data for other programs (docs/FORMATS.md)."""
        return {
            "schema": SCHEMA,
            "a": _facts(self.first),
            "b": _facts(self.second),
            "comparisons": [comparison.to_dict() for comparison in self.comparisons],
        }

    def rows(self) -> list[tuple[str, ...]]:
        """One row of texts for each comparison, in the order of COLUMNS."""
        return [_row(comparison) for comparison in self.comparisons]

    def footnotes(self) -> list[str]:
        """Sizes and speeds, and what the words mean."""
        pairs = [
            ("parameters", "parameters", words.count),
            ("bytes", "on disk", words.size),
            ("peak_memory_bytes", "peak memory", words.size),
        ]
        told = [
            f"{label}: {show(self.first.get(key))} and {show(self.second.get(key))}"
            for key, label, show in pairs
            if self.first.get(key) and self.second.get(key)
        ]
        for key, label in (
            (READS, "tokens read a second"),
            (WRITES, "tokens written a second"),
            ("time_to_first_token_seconds", "seconds to the first token"),
        ):
            first, second = (measured_pace(card, key) for card in (self.first, self.second))
            if first and second:
                told.append(f"{label}: {_told(first)} and {_told(second)}")
        measured = all(card.get("speed") for card in (self.first, self.second))
        if measured and (apart := terms_apart(self.first, self.second)):
            told.append(f"speeds and memory were measured on other terms: {', '.join(apart)}")
        for entry in written_alike(self.first, self.second):
            alike = words.score("rouge_l", entry.rouge_l, entry.stderr)
            told.append(f"ROUGE-L of B's texts with A's on {entry.task}: {alike}")
        return [
            *told,
            "Differences are paired over the same documents, ± standard error; within noise: "
            "p >= 0.05 after Holm's correction for all rows.",
        ]


def _told(pace: Pace) -> str:
    """A speed, and its quartiles where they are known: "410 (405 to 422)"."""
    around = f" ({pace.told()})" if pace.known else ""
    return f"{words.significant(pace.middle)}{around}"


def _facts(card: Data) -> dict[str, Any]:
    kept = ("model", "parameters", "bytes", "peak_memory_bytes", "speed")
    return {key: card.get(key) for key in kept}


def _row(entry: Comparison) -> tuple[str, ...]:
    gap = p = ""
    if entry.difference is not None:
        gap = words.difference(entry.metric, entry.difference, entry.stderr)
        p = words.probability(entry.p_adjusted)
    verdict = entry.verdict + (f": {entry.reason}" if entry.reason else "")
    values = (words.score(entry.metric, value) for value in (entry.reference, entry.value))
    return (entry.task, words.metric_label(entry.task, entry.metric), *values, gap, p, verdict)


def compare_targets(
    first: str,
    second: str,
    settings: dict[str, Any],
    *,
    every_metric: bool,
    cache: Path,
    console: Console,
) -> Difference:
    """Read or measure both and compare them.

    Raises:
        ShearlingError: where one can't be read, or not one task can be compared.
    """

    def tell(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    cards = [find_scorecard(target, tell=tell) for target in (first, second)]
    known = next((card for card in cards if card is not None), None)
    for place, target in enumerate((first, second)):
        if cards[place] is None:
            asked = settings_like(known, settings) if known else settings
            cards[place] = _measure(target, asked, cache, console)
            known = known or cards[place]
    one, two = cards
    assert one is not None
    assert two is not None
    found = compare_models(one, two, headlines_only=not every_metric)
    if found and all(entry.p is None for entry in found):
        reasons = dict.fromkeys(f"{entry.task}: {entry.reason}" for entry in found)
        raise ShearlingError(
            itemised(f"{first} and {second} can't be compared:", reasons),
            hint="Measure both alike: shearling eval MODEL --tasks ... --limit ... --out FILE",
        )
    return Difference(first=one, second=two, comparisons=found)


def find_scorecard(target: str, *, tell: Callable[[str], None]) -> Data | None:
    """The scorecard that a path stands for; None where it is a model still to be measured.

    A run stands for its last measured model; ``tell`` hears which.

    Raises:
        ShearlingError: it can't be read, or was made or measured with earlier settings of its run.
    """
    path = Path(target).expanduser()
    if path.suffix == ".json":
        return open_scorecard(path)
    if (path / "scorecard.json").is_file():
        refuse_earlier(path, kept="scorecard.json", measured=True)
        return open_scorecard(path / "scorecard.json")
    return last_measured(path, tell=tell).scorecard if is_run(path) else None


def settings_like(card: Data, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings that measure a model as the scorecard's was, but for what ``settings`` says."""
    asked = {key: value for key, value in settings.items() if value is not None}
    tasks = {task: facts for task, facts in card["tasks"].items() if task in card["results"]}
    chosen = asked.get("tasks") or [task for task in whole_results(card) if task in tasks]
    like: dict[str, Any] = {
        "tasks": chosen,
        "limits": {
            t: facts["limit"] for t, facts in tasks.items() if facts.get("limit") and t in chosen
        },
        "speed": bool(card["speed"]),
    }
    limit, limits = asked.get("limit"), like["limits"]
    if limit is not None and any(limits.get(task) != limit for task in chosen):
        found = sorted({str(limits.get(task) or "all") for task in chosen})
        raise ShearlingError(
            f"{card['model']} was measured on {', '.join(found)} examples a task, so {limit} could "
            "not be compared with it.",
            hint="Leave --limit out: the other model is then measured on as many.",
        )
    known = [facts for task, facts in tasks.items() if task in chosen]
    if not known:
        raise ShearlingError(
            f"{card['model']} was not measured on {', '.join(chosen)}, so there is nothing to hold "
            "another model against.",
            hint=f"Leave --tasks out, or name some of {', '.join(tasks) or 'its tasks'}.",
        )
    # Scorecards of earlier versions don't say what was asked; tasks of no examples have fewer.
    most = max(as_number(facts.get("num_fewshot")) or 0 for facts in known)
    if (shots := card.get("num_fewshot", most)) is not None:
        like["num_fewshot"] = shots
    # Not any: some tasks go through the template by themselves.
    if all(facts.get("chat_template") for facts in known):
        like["chat_template"] = True
    for windows in ("perplexity_windows", "agreement_windows"):
        if found := tasks.get("wikitext2", {}).get(windows):
            like[windows] = found
    names = (metric.rpartition("_") for metric in card["results"].get("wikitext2", {}))
    if lengths := [int(n) for name, _, n in names if name == "token_perplexity" and n.isdecimal()]:
        like["perplexity_lengths"] = lengths
    return like | asked


def _measure(target: str, settings: dict[str, Any], cache: Path, console: Console) -> Data:
    from pipelines.evaluate import evaluate_model

    asked = {key: value for key, value in settings.items() if value is not None}
    return evaluate_model(target, asked, cache=cache, console=console)


def as_table(difference: Difference) -> Table:
    """For a terminal."""
    title = f"A: {difference.first['model']}\nB: {difference.second['model']}"
    table = Table(title=Text(title), title_justify="left", box=None, pad_edge=False)
    for place, column in enumerate(COLUMNS):
        table.add_column(column, justify="right" if 2 <= place <= 5 else "left")
    styles = {"better": "green", "worse": "bold red", "not comparable": "dim"}
    for entry, row in zip(difference.comparisons, difference.rows(), strict=True):
        table.add_row(*map(Text, row), style=styles.get(entry.verdict, ""))
    return table


def as_markdown(difference: Difference) -> str:
    """For a pull request or a README."""
    names = [markdown_cell(str(card["model"])) for card in (difference.first, difference.second)]
    lines = [
        f"A: {names[0]}, B: {names[1]}",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "| --- | --- | ---: | ---: | ---: | ---: | --- |",
    ]
    lines += [f"| {' | '.join(map(markdown_cell, row))} |" for row in difference.rows()]
    return "\n".join([*lines, "", *(f"- {note}" for note in difference.footnotes())])
