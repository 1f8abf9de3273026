"""For each task: is the student worse than the teacher, by how much, is that more than noise?

And how near the student's own words are to the teacher's.
"""

from __future__ import annotations

from reports import words
from reports.compare import Comparison, written_alike
from reports.run_folder import Data, Run, Stage, as_dict, as_number
from reports.tables import Cell, Table
from reports.verdict import Judgement, last_student


def answer_table(run: Run, judgement: Judgement) -> Table | None:
    """For each task: is the last student worse than the teacher, by how much, is that noise?"""
    student = last_student(run)
    if student is None or student.scorecard is None or run.teacher is None:
        return None
    compared = judgement.comparisons.get(student.name, [])
    if not compared:
        return None
    rows = [
        [
            Cell(text=entry.task, note=words.metric_label(entry.task, entry.metric)),
            *_answer(entry),
            _above_guessing(student.scorecard, entry.task, entry.metric),
        ]
        for entry in compared
    ]
    return Table(
        name="answers",
        caption=f"Is {student.name} worse than the teacher, by how much, and is that more than "
        "noise? The difference is paired over the same documents; more than noise means p < 0.05 "
        "after Holm's correction for all rows.",
        columns=["task", "worse?", "by how much", "more than noise?", "above guessing?"],
        rows=rows,
        kind="words",
    )


def _answer(entry: Comparison) -> tuple[Cell, Cell, Cell]:
    if entry.difference is None or entry.p_adjusted is None:
        return (
            Cell(text=words.MISSING, mark=entry.verdict, title=entry.reason or ""),
            Cell(text=entry.reason or words.MISSING),
            Cell(text=words.MISSING),
        )
    worse = {"worse": "yes", "better": "no, better", "the same": "no"}.get(entry.verdict)
    return (
        Cell(text=worse or "can't be told", mark=entry.verdict),
        Cell(
            text=words.difference(entry.metric, entry.difference, entry.stderr),
            sort=entry.difference,
        ),
        Cell(
            text="yes" if entry.verdict in ("worse", "better") else "no",
            note=f"p {words.probability(entry.p_adjusted)}",
        ),
    )


def _above_guessing(card: Data, task: str, metric: str) -> Cell:
    """Whether a score is more than two standard errors above what no knowledge scores."""
    facts, found = card["tasks"].get(task, {}), card["results"].get(task, {}).get(metric, {})
    floors = [as_number(facts.get(floor)) for floor in ("chance", "constant")]
    if not metric.startswith("acc"):
        floors = [as_number(as_dict(facts.get("floor")).get(metric))]
    known = [floor for floor in floors if floor is not None]
    value, error = as_number(found.get("value")), as_number(found.get("stderr"))
    if not known or value is None or error is None:
        return Cell(text=words.MISSING)
    above = value - 2 * error > max(known)
    return Cell(text="yes" if above else "not surely", note=words.percent(max(known), 1))


def closeness(student: Stage | None, teacher: Data | None) -> list[str]:
    """How near the student's own words are to the teacher's."""
    if student is None or student.scorecard is None or teacher is None:
        return []
    told = []
    metrics = student.scorecard["results"].get("wikitext2", {})
    same, apart = metrics.get("teacher_first_choice"), metrics.get("teacher_kl")
    if same and apart and same["value"] is not None and apart["value"] is not None:
        share = words.score("teacher_first_choice", same["value"], same["stderr"])
        nats = words.score("teacher_kl", apart["value"], apart["stderr"])
        told.append(
            f"On running text its likeliest next token is the teacher's in {share} of places; the "
            f"divergence from the teacher is {nats} nats a token."
        )
    for entry in written_alike(teacher, student.scorecard):
        alike = words.score("rouge_l", entry.rouge_l, entry.stderr)
        told.append(
            f"What it writes on {entry.task} has a ROUGE-L of {alike} with what the teacher writes "
            f"({entry.documents} documents)."
        )
    return told
