"""What a report says: a run's numbers turned into sentences and tables of plain strings.

Nothing here knows HTML. The same view makes report.html and report.md.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field

from reports.answers import answer_table, closeness
from reports.chart import Chart
from reports.charts import make_charts
from reports.cleaning import cleaning_tables
from reports.cuts import find_cuts, kept, remarks
from reports.pace import why_no_ratio, why_not_in_turns
from reports.reality import reality_table
from reports.rivals import rival_table
from reports.run_folder import Data, Run, Stage, as_dict, not_measured
from reports.tables import (
    TRANSFER_HASHES,
    Table,
    completion_table,
    metric_table,
    plain,
    search_table,
    source_table,
    stage_table,
    task_table,
    transfer,
    transfer_facts,
)
from reports.verdict import (
    Judgement,
    cost,
    headline_facts,
    last_student,
    verdict,
    verdict_details,
)


@dataclass(frozen=True, kw_only=True)
class CutPart:
    """What the report says of one cut."""

    title: str
    mark: str
    """What the names of its charts end with."""
    kept: list[tuple[str, str]]
    remarks: list[str]
    search: Table | None


@dataclass(kw_only=True)
class View:
    """Everything that the templates show, in order."""

    name: str
    description: str
    state: str
    verdict: str
    details: list[str] = field(default_factory=list)
    """Sentences that belong to the verdict but aren't its core."""
    facts: list[tuple[str, str, str]] = field(default_factory=list)
    """(value, what it is, of what)"""
    cost: list[tuple[str, str]] = field(default_factory=list)
    stages: Table | None = None
    rivals: Table | None = None
    answers: Table | None = None
    tasks: Table | None = None
    skipped: list[tuple[str, str]] = field(default_factory=list)
    all_metrics: Table | None = None
    charts: list[Chart] = field(default_factory=list)
    cuts: list[CutPart] = field(default_factory=list)
    completions: Table | None = None
    transfer_set: Table | None = None
    transfer_facts: list[tuple[str, str]] = field(default_factory=list)
    cleaning: list[Table] = field(default_factory=list)
    reality: Table | None = None
    recipe: str = ""
    versions: list[tuple[str, str]] = field(default_factory=list)
    hashes: list[tuple[str, str]] = field(default_factory=list)
    hardware: list[tuple[str, str]] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def make_view(run: Run, judgement: Judgement, rivals: Sequence[Run] = ()) -> View:
    """The whole report as plain data."""
    student = last_student(run)
    return View(
        name=run.name,
        description=str(run.recipe.get("description") or ""),
        state=run.state,
        verdict=verdict(run, judgement),
        details=[
            *verdict_details(run, judgement),
            *_kept_nothing(student),
            *why_not_in_turns(student),
            *why_no_ratio(run, student),
            *closeness(student, run.teacher),
        ],
        facts=headline_facts(run, judgement),
        cost=cost(run),
        stages=stage_table(run),
        rivals=rival_table(run, rivals),
        answers=answer_table(run, judgement),
        tasks=task_table(run, judgement),
        skipped=skipped(run),
        all_metrics=metric_table(run),
        charts=make_charts(run, rivals),
        cuts=cut_parts(run),
        completions=completion_table(run),
        transfer_set=source_table(run),
        transfer_facts=transfer_facts(run),
        cleaning=cleaning_tables(transfer(run)),
        reality=reality_table(run),
        recipe=run.recipe_text,
        versions=versions(run),
        hashes=hashes(run),
        hardware=[(key, plain(value)) for key, value in as_dict(run.lock.get("hardware")).items()],
        commands=commands(run),
        problems=problems(run),
    )


def _kept_nothing(student: Stage | None) -> list[str]:
    """That the student's last training is in none of its numbers."""
    if student is None or not student.kept_nothing:
        return []
    return [
        f"Nothing of {student.name} was kept: no evaluation found a better model than the one that "
        "it began with, which is the one judged here."
    ]


def skipped(run: Run) -> list[tuple[str, str]]:
    """Tasks and metrics that were asked for and not measured, each with its reason."""
    found: dict[str, str] = {}
    for stage in run.measured:
        found |= not_measured(stage.scorecard or {})
    return list(found.items())


def cut_parts(run: Run) -> list[CutPart]:
    """Every cut of the run, in order."""
    return [
        CutPart(
            title=f"{cut.stage.name}, made from {cut.of}",
            mark=cut.mark,
            kept=kept(cut),
            remarks=remarks(cut),
            search=search_table(cut),
        )
        for cut in find_cuts(run)
    ]


def versions(run: Run) -> list[tuple[str, str]]:
    """Packages of the run, with those that measured."""
    found: dict[str, str] = {}
    for source in (
        as_dict(run.lock.get("packages")),
        *(stage.scorecard["versions"] for stage in run.measured if stage.scorecard),
    ):
        found |= {str(name).replace("_", "-"): str(value) for name, value in source.items()}
    if run.lock.get("python"):
        found["python"] = str(run.lock["python"])
    return sorted(found.items())


def hashes(run: Run) -> list[tuple[str, str]]:
    """What the numbers are a function of: hashes of recipe, code, stages and tasks."""
    found = [(key, plain(run.lock.get(key))) for key in ("recipe_sha256", "seed", "git", "device")]
    found += [
        (f"{what} sha256", plain(transfer(run).get(key))) for key, what in TRANSFER_HASHES.items()
    ]
    found += [(f"input {key}", str(v)) for key, v in as_dict(run.lock.get("inputs")).items()]
    found += [(f"stage {key}", str(v)) for key, v in as_dict(run.lock.get("keys")).items()]
    tasks: dict[str, Data] = {}
    for stage in run.measured:
        tasks |= (stage.scorecard or {})["tasks"]
    for task, facts in tasks.items():
        told = f"version {facts.get('version')}, {facts.get('num_fewshot')} examples in the prompt"
        found.append((f"task {task}", f"{told}, {facts.get('hash')}"))
    return [(key, value) for key, value in found if value]


def commands(run: Run) -> list[str]:
    """How to do it again."""
    again = run.journal.get("command") or run.lock.get("command")
    return [
        *([str(again)] if again else []),
        f"shearling report {shlex.quote(str(run.folder))}",
    ]


def problems(run: Run) -> list[str]:
    """What is missing, in words."""
    found = list(run.problems)
    error = as_dict(run.journal.get("error"))
    if error.get("what"):
        found.append(
            f"The run ended with an error: {error['what']} {error.get('hint') or ''}".strip()
        )
    if run.state == "running":
        found.append("The run is still at work; this report shows what was done so far.")
    if run.state == "interrupted":
        found.append("The run was interrupted; the same command goes on where it stopped.")
    waiting = [stage.name for stage in run.stages if stage.state in ("waiting", "running")]
    if waiting:
        found.append(f"Not finished: {', '.join(waiting)}.")
    unmeasured = [s.name for s in run.models if s.state == "done" and s.scorecard is None]
    if unmeasured:
        found.append(f"Made but not measured yet: {', '.join(unmeasured)}.")
    return found
