"""Read what a run folder says, in whatever state; what can't be read is noted, not fatal.

Only JSON, JSONL and YAML are opened, never a model.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from reports.liveness import lock_owner
from shearling import ShearlingError, parse_json, without_secrets

Data = dict[str, Any]


@dataclass
class Stage:
    """One stage of a run: its row in the journal and the JSON in its folder."""

    name: str
    kind: str
    state: str
    reason: str | None = None
    seconds: float | None = None
    peak_memory_bytes: int | None = None
    scorecard: Data | None = None
    record: Data = field(default_factory=dict)
    """stage.json"""
    config: Data = field(default_factory=dict)
    """model/config.json"""
    selection: Data = field(default_factory=dict)
    transfer_set: Data = field(default_factory=dict)
    metrics: list[Data] = field(default_factory=list)
    resumes: list[Data] = field(default_factory=list)
    """Where the stage went on after an interruption: {"step", "at"}."""

    @property
    def summary(self) -> Data:
        """What the stage itself found worth telling."""
        return as_dict(self.record.get("summary"))

    @property
    def kept_nothing(self) -> bool:
        """Whether it trained and its model has the weights that the training began with."""
        return kept_nothing(self.summary)


@dataclass
class Run:
    """A run folder as data. `problems` says in words what was missing or could not be read."""

    folder: Path
    name: str
    state: str
    journal: Data
    recipe: Data
    recipe_text: str
    lock: Data
    stages: list[Stage]
    problems: list[str]
    plan: Data = field(default_factory=dict)
    """plan.json: what was expected before the run, if somebody asked."""

    @property
    def models(self) -> list[Stage]:
        """The stages that make a model, the teacher first."""
        return [stage for stage in self.stages if stage.kind not in ("transfer_set", "export")]

    @property
    def measured(self) -> list[Stage]:
        """The models whose scorecard is there."""
        return [stage for stage in self.models if stage.scorecard]

    def history(self, name: str) -> tuple[list[str], list[str]]:
        """Kinds of the stages that made a model out of the teacher, in order; of a teacher none.

        Then those of trainings on its way whose weights were thrown away.
        """
        made = [stage for stage in self.models if stage.kind != "teacher"]
        place = next((place for place, stage in enumerate(made, 1) if stage.name == name), 0)
        done = [stage.kind for stage in made[:place] if not stage.kept_nothing]
        return done, [stage.kind for stage in made[:place] if stage.kept_nothing]

    @property
    def teacher(self) -> Data | None:
        """The teacher's scorecard."""
        found = [stage.scorecard for stage in self.measured if stage.kind == "teacher"]
        return found[0] if found else None


def kept_nothing(summary: Data) -> bool:
    """Whether a training's summary says that it kept the weights of its start (step 0)."""
    return as_number(summary.get("kept_step")) == 0


def as_dict(value: Any) -> Data:
    """The value if it is a mapping, else an empty one."""
    return dict(value) if isinstance(value, Mapping) else {}


def as_list(value: Any) -> list[Any]:
    """The value if it is a list, else an empty one."""
    return list(value) if isinstance(value, list) else []


def as_number(value: Any) -> float | None:
    """The value if it is a finite number, else None."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if number and abs(value) < float("inf") else None


def read_run(folder: Path) -> Run:
    """Read a run folder. One that doesn't exist, or holds nothing of a run, is a ShearlingError."""
    folder = Path(folder)
    known = ("run.json", "recipe.yaml", "stages", "lock.json")
    if not any((folder / name).exists() for name in known):
        raise ShearlingError(
            f"{folder} is not a run: it has none of {', '.join(known)}.",
            hint="Name the folder that `shearling run` wrote, as in runs/quickstart.",
        )
    problems: list[str] = []
    journal = _read_json(folder / "run.json", problems)
    recipe_text = _read_text(folder / "recipe.yaml", problems)
    recipe = _parse_yaml(recipe_text, problems)
    lock = _read_json(folder / "lock.json", problems)
    keys = as_dict(lock.get("keys"))
    stages = [
        _read_stage(folder / "stages" / file_name(row.get("name")), row, keys, problems)
        for row in _rows(folder, journal, recipe)
    ]
    _add_metrics_of_the_stage_at_work(folder, stages, problems)
    stages.sort(key=lambda stage: stage.kind != "teacher")
    return Run(
        folder=folder,
        name=str(recipe.get("name") or journal.get("recipe") or folder.resolve().name),
        state=_state(folder, journal, stages),
        journal=journal,
        recipe=recipe,
        recipe_text=recipe_text,
        lock=lock,
        stages=stages,
        plan=_read_json(folder / "plan.json", problems, required=False),
        problems=problems,
    )


def _add_metrics_of_the_stage_at_work(
    folder: Path, stages: list[Stage], problems: list[str]
) -> None:
    """A stage that isn't finished has no folder yet; the run's own metrics.jsonl has its lines."""
    lines = _read_lines(folder / "metrics.jsonl", problems)
    for stage in stages:
        if not stage.metrics and stage.state not in ("waiting", "done"):
            stage.metrics = [line for line in lines if line.get("stage") == stage.name]


def _rows(folder: Path, journal: Data, recipe: Data) -> list[Data]:
    """The stages in order: as the journal has them, else as the recipe has, else as folders are."""
    rows = [row for row in map(as_dict, as_list(journal.get("stages"))) if row.get("name")]
    if rows:
        return rows
    rows = [{"name": "teacher", "kind": "teacher"}] if recipe.get("teacher") else []
    rows += [row for row in map(as_dict, as_list(recipe.get("stages"))) if row.get("name")]
    known = {row["name"] for row in rows}
    found = sorted(folder.glob("stages/*/stage.json"), key=lambda path: path.stat().st_mtime)
    extra = [path.parent.name for path in found if path.parent.name not in known]
    return [*rows, *({"name": name} for name in extra)]


def file_name(name: Any) -> str:
    """A stage's name as one part of a path: a hostile journal may not lead out of the run."""
    return Path(str(name)).name or "unnamed"


def _read_stage(folder: Path, row: Data, keys: Data, problems: list[str]) -> Stage:
    name, scorecard = folder.name, folder / "scorecard.json"
    if _is_other(folder / "benchmark.json", keys.get(f"{name}/benchmark")):
        scorecard = folder / "not measured yet"
    if _is_other(folder / "stage.json", keys.get(name)):
        # What lies there belongs to another recipe than the one that this run now is.
        problems.append(f"{name}: what was made with earlier settings is not shown.")
        folder = folder / "not made yet"
        scorecard = folder
    record = _read_json(folder / "stage.json", problems, required=False)
    state = row.get("state") or ("done" if record else "waiting")
    memory = as_number(row.get("peak_memory_bytes", record.get("peak_memory_bytes")))
    reason = row.get("reason") or record.get("reason")
    return Stage(
        name=str(row.get("name")),
        kind=str(row.get("kind") or record.get("kind") or "unknown"),
        state=str(state),
        reason=None if reason is None else str(reason),
        seconds=as_number(row.get("seconds")) or as_number(record.get("seconds")),
        peak_memory_bytes=None if memory is None else int(memory),
        scorecard=read_scorecard(scorecard, problems),
        record=record,
        config=_read_json(folder / "model" / "config.json", problems, required=False),
        selection=_read_json(folder / "selection.json", problems, required=False),
        transfer_set=_read_json(folder / "transfer_set.json", problems, required=False),
        metrics=_read_lines(folder / "metrics.jsonl", problems),
        resumes=[as_dict(e) for e in as_list(row.get("resumes") or record.get("resumes"))],
    )


def _is_other(record: Path, planned: Any) -> bool:
    """Whether a result has another key than the one that lock.json announces for it."""
    shown = _read_json(record, [], required=False).get("key")
    return planned is not None and shown is not None and planned != shown


def earlier_settings(stage: Path) -> str | None:
    """What of ``RUN/stages/NAME`` was made with other settings than its run has by now.

    ``made`` for the model, ``measured`` for its scorecard alone, None where all is the run's own.
    A run that was changed and interrupted still has such stages until it is finished.
    """
    stage = Path(os.path.abspath(stage))  # not resolved: what it links to has other names
    run, name = stage.parent.parent, stage.name
    keys = as_dict(_read_json(run / "lock.json", [], required=False).get("keys"))
    if stage.parent.name != "stages" or not keys:
        return None
    if _is_other(stage / "stage.json", keys.get(name, "left the recipe")):
        return "made"
    other = _is_other(stage / "benchmark.json", keys.get(f"{name}/benchmark"))
    return "measured" if other else None


def open_scorecard(path: Path) -> Data:
    """A scorecard file. One that is missing or no scorecard is a ShearlingError."""
    problems: list[str] = []
    card = read_scorecard(Path(path), problems)
    if card is None or not Path(path).is_file() or not card["results"]:
        raise ShearlingError(
            " ".join(problems) or f"{path} is not a scorecard, or nothing was measured in it.",
            hint="Name what `shearling eval MODEL --out FILE` wrote, or a stage's scorecard.json.",
        )
    return card


def read_scorecard(path: Path, problems: list[str]) -> Data | None:
    """A scorecard whose parts have the right types, so that nobody after this has to ask."""
    card = _read_json(path, problems, required=False)
    if not card:
        return None
    for part in ("results", "tasks", "skipped", "speed", "versions", "samples", "memory"):
        card[part] = as_dict(card.get(part))
    for part in ("parameters", "bytes", "peak_memory_bytes"):
        card[part] = as_number(card.get(part))
    card["model"] = str(card.get("model"))
    results = {task: _metrics(metrics) for task, metrics in card["results"].items()}
    card["results"] = {task: metrics for task, metrics in results.items() if metrics}
    card["tasks"] = {task: _task_facts(facts) for task, facts in card["tasks"].items()}
    card["samples"] = {task: _samples(values) for task, values in card["samples"].items()}
    card["answers"] = {
        task: [str(text) for text in as_list(texts)]
        for task, texts in as_dict(card.get("answers")).items()
    }
    card["by_position"] = _by_position(card.get("by_position"))
    card["completions"] = [as_dict(entry) for entry in as_list(card.get("completions"))]
    return card


def not_measured(card: Mapping[str, Any]) -> dict[str, str]:
    """Why tasks were skipped, and single metrics of others ("task, metric") left out."""
    reasons = {str(task): str(reason) for task, reason in card.get("skipped", {}).items()}
    for task, facts in card.get("tasks", {}).items():
        for metric, reason in as_dict(facts.get("left_out")).items():
            reasons[f"{task}, {metric}"] = str(reason)
    return reasons


def _by_position(measured: Any) -> Data:
    """Only stretches of positions that were measured and are numbers."""
    known = as_dict(measured)
    rows = [
        {key: as_number(as_dict(row).get(key)) for key in ("first", "last", "loss", "stderr")}
        for row in as_list(known.get("positions"))
    ]
    needed = ("first", "last", "loss")
    return {
        "window": as_number(known.get("window")),
        "windows": as_number(known.get("windows")),
        "positions": [row for row in rows if None not in (row[key] for key in needed)],
    }


def _metrics(metrics: Any) -> Data:
    return {
        metric: {"value": as_number(as_dict(number).get("value")),
                 "stderr": as_number(as_dict(number).get("stderr"))}
        for metric, number in as_dict(metrics).items()
    }  # fmt: skip


def _task_facts(facts: Any) -> Data:
    known = as_dict(facts)
    return {**known, "higher_is_better": as_dict(known.get("higher_is_better"))}


def _samples(values: Any) -> Data:
    """Only what statistics can use: zeros and ones as text, numbers, or pairs of numbers."""

    def usable(samples: Any) -> bool:
        if isinstance(samples, str):
            return set(samples) <= {"0", "1"}
        entries = as_list(samples)
        if all(isinstance(entry, list) for entry in entries):
            return all(len(e) == 2 and None not in map(as_number, e) for e in entries)
        return None not in map(as_number, entries)

    return {metric: found for metric, found in as_dict(values).items() if usable(found)}


def _read_text(path: Path, problems: list[str], *, required: bool = True) -> str:
    try:
        # Cleaned here, where all that a report shows comes in.
        return without_secrets(path.read_text(encoding="utf-8", errors="replace"))
    except FileNotFoundError:
        if required:
            problems.append(f"{path.name} is not there.")
    except OSError as error:
        problems.append(f"{path.name} can't be read: {error.strerror}.")
    return ""


def _read_json(path: Path, problems: list[str], *, required: bool = True) -> Data:
    text = _read_text(path, problems, required=required)
    if not text:
        return {}
    try:
        data = parse_json(text)
    except (ValueError, RecursionError):
        data = None
    if not isinstance(data, dict):
        problems.append(f"{path.parent.name}/{path.name} is damaged.")
        return {}
    return data


def _parse_yaml(text: str, problems: list[str]) -> Data:
    try:
        data = yaml.safe_load(text) if text else {}
    except (yaml.YAMLError, RecursionError):
        data = None
    if not isinstance(data, dict):
        problems.append("recipe.yaml is damaged.")
        return {}
    return data


def _read_lines(path: Path, problems: list[str]) -> list[Data]:
    """The lines of a JSONL file; the last one may be half written."""
    lines: list[Data] = []
    for text in _read_text(path, problems, required=False).splitlines():
        try:
            line = parse_json(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines


def _state(folder: Path, journal: Data, stages: list[Stage]) -> str:
    """The run's state; a run that says it is running while its process is gone is interrupted."""
    state = str(journal.get("state") or "unknown")
    if state != "running" or lock_owner(folder):
        return state
    for stage in stages:
        stage.state = "interrupted" if stage.state == "running" else stage.state
    return "interrupted"
