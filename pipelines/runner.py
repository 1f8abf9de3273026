"""Run a recipe: decide for each step whether it has to run, run it, publish it, show it.

    RUN/recipe.yaml  lock.json  run.json  metrics.jsonl  report.html  report.json  error.log
    RUN/store/                  finished artefacts by key (see ``pipelines.store``)
    RUN/stages/NAME/            the current artefact of each stage, for people and programs

A step that was killed leaves at most its ``.partial`` folder behind; ``stages/NAME`` is replaced
only by a finished artefact. So whatever happens, what was done before is still there.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines import machine, preflight
from pipelines.accelerators import this_machine
from pipelines.crew import call_the_others
from pipelines.display import Display, format_bytes, format_seconds, headline, skipped_lines
from pipelines.export import export_line
from pipelines.journal import Journal, now
from pipelines.locks import run_lock
from pipelines.plan import PLAN_FILE, make_plan, teacher_facts
from pipelines.provenance import check_locked, lock_data, write_provenance
from pipelines.recipe import Recipe
from pipelines.stages.context import Context
from pipelines.steps import STAGES, Decision, Step, build_steps, decide_all, history
from pipelines.store import STAGE_FILE, FileHashes, Store
from shearling import (
    ShearlingError,
    disk_errors,
    folder_aside,
    read_json,
    sweep,
    without_secrets,
    write_json,
    write_text,
)
from students.shape import Shape

SCHEMA = 1
ERROR_LOG = "error.log"
TELL_LEFTOVERS = 50_000_000  # bytes
LINKED = (
    "model",
    "export",
    "selection.json",
    "selection.safetensors",
    "metrics.jsonl",
    "transfer_set.json",
)
"""What of an artefact ``stages/NAME`` links to; scorecard.json and stage.json are copied."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to run, apart from what the recipe says."""

    run: Path
    """The run folder."""
    cache: Path
    """Where downloads are kept."""
    again: str
    """The command that repeats this run; shown when it is interrupted."""
    verify: bool = False
    """Compare the hash of every finished file before it is used again."""
    locked: Path | None = None
    """A lock.json that this run must agree with."""
    processes: int = field(default_factory=lambda: int(os.environ.get("WORLD_SIZE", "1")))
    """How many share a training."""


def check(recipe: Recipe, options: Options) -> list[Step]:
    """All steps of the recipe, after everything was checked that can be before any work.

    Writes nothing, so that a mistake leaves an earlier run as it was.
    """
    preflight.check_run_folder(options.run)
    preflight.check_paths(recipe)
    preflight.check_processes(recipe, options.processes)
    machine.pick_device(recipe.device)
    store = Store(options.run / "store")
    steps = build_steps(recipe, FileHashes(options.cache).fingerprint)
    preflight.check_with_teacher(recipe, store.artefact("teacher", steps[0].key))
    preflight.check_tokenizers(recipe)
    preflight.check_tasks(recipe.benchmark)
    return steps


def warnings(recipe: Recipe, steps: list[Step], options: Options) -> list[str]:
    """What is likely not meant, as far as it can be told by now."""
    artefact = Store(options.run / "store").artefact("teacher", steps[0].key)
    config = preflight.known_teacher_config(recipe, artefact)
    return preflight.warnings(recipe, Shape.from_config(config) if config else None)


def decisions(
    steps: list[Step],
    options: Options,
    *,
    verify_inputs: bool = False,
    tell: Callable[[str], None] = lambda _: None,
) -> list[tuple[Step, Decision]]:
    """Every step with what would be done about it now, and why."""
    return decide_all(
        steps,
        Store(options.run / "store"),
        lambda step: _previous(options.run, step),
        verify=options.verify,
        verify_inputs=verify_inputs,
        tell=tell,
    )


def run_recipe(recipe: Recipe, options: Options, display: Display) -> None:
    """Run all steps of a recipe in ``options.run``.

    Raises:
        ShearlingError: for what the user can mend; the journal then says failed.
        KeyboardInterrupt: if interrupted; the journal then says interrupted.
    """
    steps = check(recipe, options)
    if options.locked:
        here = lock_data(recipe, steps, device=machine.pick_device(recipe.device), command="")
        check_locked(options.locked, here, steps)
    with disk_errors(options.run):
        (options.run / "store").mkdir(parents=True, exist_ok=True)
    with run_lock(options.run):
        _Run(recipe, options, display, steps).go()


class _Run:
    """One run while it is at work."""

    def __init__(
        self, recipe: Recipe, options: Options, display: Display, steps: list[Step]
    ) -> None:
        self.recipe = recipe
        self.options = options
        self.run = options.run
        self.display = display
        self.store = Store(options.run / "store")
        self.planned = decisions(steps, options, verify_inputs=True, tell=display.line)
        self.steps = {step.name: step for step in steps}
        self.device = machine.pick_device(recipe.device)
        self.told_warnings: set[str] = set()
        self.told_skipped: set[tuple[str, str]] = set()

    def go(self) -> None:
        """Write down what is to be done, then do it step by step."""
        for folder in (self.run, self.run / "stages", *self.run.glob("stages/*/")):
            sweep(folder)
        self.store.sweep()
        steps = [step for step, _ in self.planned]
        lock = lock_data(self.recipe, steps, device=self.device, command=self.options.again)
        write_provenance(self.run, self.recipe, lock)
        (self.run / PLAN_FILE).unlink(missing_ok=True)
        self._write_plan()
        rows = [(s.stage, s.kind) for s, _ in self.planned if s.kind != "benchmark"]
        self.journal = Journal(
            self.run, recipe=self.recipe.name, stages=rows, again=self.options.again
        )
        try:
            with self.display:
                self._tell_leftovers()
                self._warn()
                for step, decision in self.planned:
                    self._do(step, decision)
            _remove_old_stages(self.run / "stages", {step.stage for step in steps})
            self.journal.end("done")
            self._report()
        except KeyboardInterrupt:
            self.journal.end("interrupted")
            self._report_if_possible()
            raise
        except ShearlingError as error:
            self.journal.end("failed", {"what": error.what, "hint": error.hint})
            self._report_if_possible()
            raise
        except BaseException as error:
            what = f"Unexpected error: {type(error).__name__}: {error}"
            self.journal.end("failed", {"what": what, "hint": f"See {self.run / ERROR_LOG}."})
            raise

    def _warn(self) -> None:
        """Tell each warning once; some only the teacher's config allows."""
        for warning in warnings(self.recipe, list(self.steps.values()), self.options):
            if warning not in self.told_warnings:
                self.display.line(warning, style="yellow")
            self.told_warnings.add(warning)

    def _tell_leftovers(self) -> None:
        """Interrupted work under other settings is kept, for its settings may come back."""
        for path, size in self.store.leftovers({step.key for step in self.steps.values()}):
            if size > TELL_LEFTOVERS:
                self.display.line(
                    f"{path} holds {format_bytes(size)} of interrupted work under other settings; "
                    "delete it if they won't come back.",
                    style="yellow",
                )

    # --- one step ---

    def _do(self, step: Step, decision: Decision) -> None:
        self.display.decision(step.name, str(decision))
        self.journal.begin(step.stage)
        if step.kind != "benchmark":
            self.journal.set_row(step.stage, reason=str(decision), state="running", key=step.key)
        if decision.runs:
            self._make(step, decision)
        self._show(step)
        if step.name == "teacher" and decision.runs:
            # Its config is known now; what doesn't fit it ends the run early.
            preflight.check_with_teacher(self.recipe, self._artefact("teacher"))
            self._warn()
        if step.kind == "teacher" and decision.runs:
            self._write_plan()
        if step.kind in ("benchmark", "transfer_set", "export"):
            self.journal.set_row(step.stage, state="done")
            self._report_if_possible()

    def _make(self, step: Step, decision: Decision) -> None:
        """Run a step and publish what it made."""
        stage = STAGES[step.kind]
        goes_on = step.resumable and self.store.has_checkpoint(step.kind, step.key)
        spent = self.journal.seconds_before(step.key) if goes_on else 0.0
        resumes = self.journal.resumes_before(step.key) if goes_on else []
        if resumes:
            self.journal.set_row(step.stage, resumes=resumes)
        out = self.store.open_work(step.kind, step.key, resumable=step.resumable)
        context = self._context(step, out, spent, resumes if goes_on else None)
        started, clock = now(), time.monotonic()
        with (
            machine.memory_errors(step.stage, step.kind),
            machine.PeakMemory(self.device) as memory,
            disk_errors(out),
        ):
            call_the_others(step, context)
            summary = stage.run(step.settings, context)
        seconds = spent + time.monotonic() - clock
        record = {
            "schema": SCHEMA,
            "name": step.name,
            "kind": step.kind,
            "key": step.key,
            "state": "done",
            "reason": str(decision),
            "started": started,
            "seconds": round(seconds, 3),
            "peak_memory_bytes": memory.bytes,
            **({} if memory.device_bytes is None else {"device_peak_bytes": memory.device_bytes}),
            "device": self.device,
            "inputs": dict(step.inputs),
            "settings": dict(step.slice),
            "code_version": step.code_version,
            **({"resumes": resumes} if resumes else {}),
            "summary": summary,
        }
        self.display.step_ended()
        self.store.publish(step.kind, step.key, record)
        took = f"{format_seconds(seconds)}, peak memory {format_bytes(memory.bytes)}"
        self.display.line(f"  {step.name}: done in {took}", style="green")

    def _context(self, step: Step, out: Path, spent: float, resumes: list[Any] | None) -> Context:
        """``resumes`` takes where the step goes on; None if it begins."""
        begun = time.monotonic()

        def progress(what: str, done: int, total: int, /, **numbers: float) -> None:
            self.display.progress(step.name, what, done, total, **numbers)
            if step.kind != "benchmark":
                seconds = round(spent + time.monotonic() - begun, 3)
                self.journal.row(step.stage)["seconds"] = seconds
            self.journal.progress(step.name, what, done, total, **numbers)

        done, tried = history(step, self.steps, self.store)
        return Context(
            name=step.stage,
            inputs={role: self._artefact(name) for role, name in step.needs.items()},
            history=done,
            tried=tried,
            out=out,
            run=self.run,
            seed=self.recipe.seed,
            benchmark=self.recipe.benchmark,
            device=self.device,
            cache=self.options.cache,
            progress=progress,
            on_metrics=self._metrics_writer(step, resumes),
        )

    def _artefact(self, name: str) -> Path:
        step = self.steps[name]
        return self.store.artefact(step.kind, step.key)

    def _metrics_writer(
        self, step: Step, resumes: list[Any] | None
    ) -> Callable[[dict[str, Any]], None]:
        """Append each line of metrics to the run's own file, so that it can be watched live."""
        self._collect_metrics(working=step)
        first = resumes is not None

        def write(line: dict[str, Any]) -> None:
            nonlocal first
            if first and resumes is not None:
                resumes.append({"step": max(0, int(line.get("step", 1)) - 1), "at": now()})
                self.journal.set_row(step.stage, resumes=resumes)
                # By now the stage has cut its own file back to its checkpoint; this line is there.
                self._collect_metrics(working=step)
                first = False
                return
            with (self.run / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"stage": step.stage, **line}, allow_nan=False) + "\n")

        return write

    # --- what people and programs see ---

    def _show(self, step: Step) -> None:
        """Bring ``stages/NAME``, the run's metrics and the journal up to date with an artefact."""
        artefact = self.store.artefact(step.kind, step.key)
        folder = self.run / "stages" / step.stage
        record = read_json(artefact / STAGE_FILE)
        if step.kind == "benchmark":
            scorecard = {**read_json(artefact / "scorecard.json"), "model": step.stage}
            write_json(folder / "scorecard.json", scorecard)
            write_json(folder / "benchmark.json", record)
            self.display.line(f"  {step.stage}: {headline(scorecard)}")
            for skipped in skipped_lines(scorecard, self.told_skipped):
                self.display.line(f"  {skipped}", style="yellow")
            return
        if step.kind == "export":
            self.display.line(f"  {step.name}: {export_line(record['summary'])}")
        refresh_stage(folder, artefact, record)
        for note in (record.get("summary") or {}).get("notes") or ():
            self.display.line(f"  {note}", style="yellow")
        self._collect_metrics()
        self.journal.set_row(
            step.stage,
            seconds=record["seconds"],
            peak_memory_bytes=record["peak_memory_bytes"],
        )

    def _collect_metrics(self, working: Step | None = None) -> None:
        """Write the run's metrics.jsonl anew from the stages' own, in order.

        A stage that goes on after a kill repeats no line this way.
        """
        lines: list[str] = []
        for step, _ in self.planned:
            source = self.store.artefact(step.kind, step.key)
            if working is not None and step.name == working.name:
                source = self.store.partial(step.kind, step.key)
            for line in read_metrics(source / "metrics.jsonl"):
                lines.append(json.dumps({"stage": step.stage, **line}))
        write_text(self.run / "metrics.jsonl", "".join(f"{line}\n" for line in lines))

    def _write_plan(self) -> None:
        """plan.json, once and as soon as all teachers' shapes are known: the report compares."""
        path = self.run / PLAN_FILE
        if path.exists():
            return
        imported = {
            step.name: self._artefact(step.name)
            for step in self.steps.values()
            if step.kind == "teacher"
        }
        try:
            facts = teacher_facts(self.recipe.teacher, imported["teacher"])
            here = this_machine(self.options.cache, self.device, self.run)
            plan = make_plan(
                self.recipe, facts, here, processes=self.options.processes, imported=imported
            )
        except ShearlingError:
            return  # a teacher is not known before it has been brought in
        write_json(path, plan)

    def _report(self) -> None:
        from reports.page import write_report

        write_report(self.run)

    def _report_if_possible(self) -> None:
        """Refresh the report between stages; its failure must not cost the stages to come.

        The traceback goes to error.log, and at the end of the run the same failure is an error.
        """
        try:
            self._report()
        except ShearlingError as error:
            self.display.line(f"  report: not written yet: {error.what}", style="yellow")
        except Exception as error:
            log = log_traceback(self.run)
            self.display.line(f"  report: not written yet ({error}); see {log}", style="yellow")


# --- helpers ------------------------------------------------------------------------------------


def refresh_stage(folder: Path, artefact: Path, record: dict[str, Any]) -> None:
    """Make ``stages/NAME`` show an artefact: links to what is large, a copy of stage.json.

    The scorecard of an earlier artefact goes away: it was measured on another model. One of the
    same artefact stays until the benchmark's own step writes it again.
    """
    kept = ["benchmark.json"]  # the next benchmark tells by it what has changed
    if _key_shown(folder / STAGE_FILE) == record["key"]:
        kept.append("scorecard.json")
    with folder_aside(folder) as aside:
        for name in LINKED:
            if (artefact / name).exists():
                target = os.path.relpath(artefact / name, folder)
                (aside / name).symlink_to(target)
        for name in kept:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, aside / name)
        write_json(aside / STAGE_FILE, record)


def _key_shown(record_file: Path) -> str | None:
    try:
        record = json.loads(record_file.read_text(encoding="utf-8"))
        return str(record["key"])
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _previous(run: Path, step: Step) -> dict[str, Any] | None:
    """The stage.json of the last result that the step's name had in this run."""
    name = "benchmark.json" if step.kind == "benchmark" else STAGE_FILE
    try:
        record = json.loads((run / "stages" / step.stage / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def _remove_old_stages(folder: Path, names: set[str]) -> None:
    """Take away the shown folders of stages that the recipe no longer has; the store keeps them."""
    if folder.is_dir():
        for path in folder.iterdir():
            if path.name not in names and (path / STAGE_FILE).is_file():
                shutil.rmtree(path)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, which may not exist; a last line that was cut off is left."""
    if not path.is_file():
        return []
    lines: list[dict[str, Any]] = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(dict(json.loads(text)))
        except (ValueError, TypeError):
            break
    return lines


def log_traceback(run: Path) -> str:
    """Append the current traceback to the run's error.log; returns the path as text."""
    path = run / ERROR_LOG
    with path.open("a", encoding="utf-8") as file:
        text = f"--- {now()} {' '.join(sys.argv[1:])}\n{traceback.format_exc()}\n"
        file.write(without_secrets(text))
    return str(path)
