"""One run held against others: the end of each, with paired tests where they may be compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from reports import words
from reports.compare import Comparison, compare_models, headline_metrics
from reports.groups import whole_results
from reports.pace import WRITES
from reports.quality_charts import metric_number, run_labels
from reports.run_folder import Data, Run, Stage, as_number
from reports.tables import Cell, Table, cell, pace_cell
from reports.verdict import last_student


def rival_data(run: Run, rivals: Sequence[Run]) -> list[dict[str, Any]]:
    """For report.json: each rival's last student against this run's."""
    ours = last_student(run)
    found = []
    for label, rival in run_labels([run, *rivals])[1:]:
        theirs = last_student(rival)
        compared = _compared(ours, theirs)
        found.append(
            {
                "run": label,
                "folder": str(rival.folder),
                "model": theirs.name if theirs else None,
                "comparisons": [comparison.to_dict() for comparison in compared],
            }
        )
    return found


def _compared(ours: Stage | None, theirs: Stage | None) -> list[Comparison]:
    if not (ours and theirs and ours.scorecard and theirs.scorecard):
        return []
    return compare_models(ours.scorecard, theirs.scorecard)


def rival_table(run: Run, rivals: Sequence[Run]) -> Table | None:
    """One row a run: its last student, and how it does against this run's."""
    if not rivals:
        return None
    ours = last_student(run)
    labelled = run_labels([run, *rivals])
    ends = [(label, each, last_student(each)) for label, each in labelled]
    cards = [end.scorecard for _, _, end in ends if end and end.scorecard]
    keys = {
        (task, metric): None
        for card in cards
        for task, results in whole_results(card).items()
        for metric in headline_metrics(task, results)
    }
    rows = []
    for label, each, end in ends:
        card = (end.scorecard if end else None) or {"results": {}, "speed": {}, "skipped": {}}
        compared = [] if each is run else _compared(ours, end)
        seconds = [stage.seconds for stage in each.stages if stage.seconds is not None]
        rows.append(
            [
                Cell(text=label, note=end.name if end else "no student was measured", sort=label),
                cell(as_number(card.get("parameters")), words.count),
                *(_score(card, task, metric, compared) for task, metric in keys),
                pace_cell(card, WRITES),
                cell(sum(seconds) if seconds else None, words.duration),
            ]
        )
    return Table(
        name="rivals",
        caption=f"The last student of each run. Under each score: its difference to that of "
        f"{labelled[0][0]}, from the same documents, ± standard error; p after Holm's correction.",
        columns=[
            "run",
            "parameters",
            *(f"{task}, {words.metric_label(task, metric)}" for task, metric in keys),
            "writes",
            "took",
        ],
        rows=rows,
    )


def _score(card: Data, task: str, metric: str, compared: Sequence[Comparison]) -> Cell:
    value, error = metric_number(card, task, metric)
    order = float("-inf") if value is None else value
    text = words.score(metric, value, error)
    for entry in compared:
        if (entry.task, entry.metric) == (task, metric):
            if entry.difference is None:
                return Cell(text=text, mark=entry.verdict, title=entry.reason or "", sort=order)
            note = words.difference(metric, entry.difference, entry.stderr)
            return Cell(text=text, note=note, mark=entry.verdict, sort=order)
    return Cell(text=text, sort=order)
