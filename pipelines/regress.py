"""`shearling regress`: small recipes, run for real, held against numbers kept in the repository.

A baseline file holds each number with its direction and its tolerance:

    {"schema": 1, "recipe": ..., "versions": {...},
     "numbers": {"distill/wikitext2/word_perplexity":
                 {"value": 61.2, "better": "lower", "tolerance": {"relative": 0.05},
                  "asked": "3f2a..."}}}

Tolerances are at most one standard error, so that no fall passes that a reader would see, and small
shares where that is wide; they are there for other processors, whose sums round differently. They
are edited by hand and survive ``--update``. ``asked`` is a fingerprint of the task's questions,
limit and few-shot examples: numbers of other questions are not compared, and that fails too. A
number that got better never fails, but is pointed out.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.text import Text

from pipelines.display import Display
from pipelines.locks import taken
from pipelines.machine import package_versions
from pipelines.preflight import check_run_folder
from pipelines.recipe import Recipe, load_recipe
from pipelines.runner import Options, run_recipe
from pipelines.tables import tables
from pipelines.tiny import make_tiny_llama, tiny_documents, write_documents, write_last_words
from reports.compare import asked_as
from reports.liveness import lock_owner
from shearling import ShearlingError, read_json, write_json

SCHEMA = 1
BASELINES = Path(__file__).parent / "baselines"
RECIPES = ("regress-tiny", "regress-stories", "regress-smollm2")
RELATIVE = 0.02
"""Default tolerance of perplexities, as a share of the baseline. Other kernels of the same machine
(ATEN_CPU_CAPABILITY=default) move those of regress-tiny by 0.004%."""
RELATIVE_KL = 0.05
"""The same for divergences, which are small differences: there it is 0.3%."""
TINY_STEPS = 300
"""Training of the tiny teacher before it teaches; about two seconds."""
ANSWERS = 3
"""Default tolerance of accuracies, in answers that may turn from right to wrong."""

Better = Literal["lower", "higher", "same"]


@dataclass(frozen=True)
class Number:
    """One measured number and which direction is better."""

    value: float
    better: Better
    samples: int | None = None
    """How many answers an accuracy is the mean of."""
    relative: float = RELATIVE
    stderr: float | None = None
    asked: str | None = None
    """Fingerprint of the task's questions, limit and examples, where a task gave the number."""

    def rounded(self) -> float:
        """As a baseline file keeps it: counts exactly, measurements to eight digits."""
        return number if (number := int(self.value)) == self.value else float(f"{self.value:.8g}")

    def default_tolerance(self) -> dict[str, float]:
        if self.better == "same":
            return {"absolute": 0.0}
        if self.better == "higher":
            answers = ANSWERS / self.samples if self.samples else 0.05
            return {"absolute": round(min(answers, self.stderr or answers), 4)}
        share = self.relative * abs(self.value)
        if self.stderr and self.stderr < share:
            return {"absolute": float(f"{self.stderr:.4g}")}
        return {"relative": self.relative}


@dataclass(frozen=True)
class Finding:
    """How one number stands against its baseline."""

    name: str
    verdict: Literal["ok", "better", "worse", "missing", "new", "skipped", "asked otherwise"]
    baseline: float | None
    measured: float | None
    allowed: float
    """The largest change for the worse that passes."""

    @property
    def fails(self) -> bool:
        return self.verdict in ("worse", "missing", "asked otherwise")

    def row(self) -> tuple[str, str, str, str, str, str]:
        """Name, baseline, measured, change, allowed, verdict: as text."""
        change = ""
        if self.baseline is not None and self.measured is not None:
            difference = self.measured - self.baseline
            share = f" ({difference / self.baseline:+.1%})" if self.baseline else ""
            change = f"{difference:+.4g}{share}"
        allowed = f"{self.allowed:.3g}" if self.baseline is not None else ""
        return (
            self.name,
            _text(self.baseline),
            _text(self.measured),
            change,
            allowed,
            self.verdict,
        )


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def regress(
    out: Path, *, only: str | None, update: bool, cache: Path, console: Console
) -> dict[str, list[Finding]]:
    """Run the recipes in fresh folders below ``out``; recipe -> how each of its numbers stands.

    A recipe whose data are not here, or whose baseline is written now, is not among them.
    """
    if only is not None and only not in RECIPES:
        raise ShearlingError(
            f"There is no regression recipe {only}.", hint=f"Choose --only {' or '.join(RECIPES)}."
        )
    found: dict[str, list[Finding]] = {}
    for name in [only] if only else RECIPES:
        run = out / name
        if absent := absent_data(name):
            console.print(f"{name}: skipped: {absent} is not here", highlight=False, soft_wrap=True)
            continue
        measured, skipped = run_fresh(name, run, cache=cache, console=console)
        path = BASELINES / f"{name}.json"
        if update:
            before = _read_baseline(path)
            write_json(path, baseline_of(name, measured, before=before, skipped=skipped))
            console.print(f"{name}: baselines written to {path}", highlight=False, soft_wrap=True)
            continue
        found[name] = compare(_need_baseline(path, name), measured, skipped)
        show(name, found[name], console)
    return found


def absent_data(name: str) -> str | None:
    """The first local path of a recipe that isn't here, where it needs data of this workplace."""
    if name != "regress-stories":
        return None
    recipe = load_recipe(name)
    paths = [recipe.teacher.model, *(source.path for source in recipe.transfer_set.sources)]
    paths += [recipe.benchmark.mirror] if recipe.benchmark.mirror else []
    return next((path for path in paths if not Path(path).exists()), None)


def run_fresh(
    name: str, run: Path, *, cache: Path, console: Console
) -> tuple[dict[str, Number], set[str]]:
    """Run a recipe from nothing; its numbers, and the names of tasks that were skipped.

    Nothing of an earlier run is used again: a change of code is what regress is there to catch.
    """
    check_run_folder(run)
    if owner := lock_owner(run):
        raise taken(run, owner)
    if run.exists():
        shutil.rmtree(run)
    options = Options(run=run, cache=cache, again=f"shearling regress --only {name}")
    with _threads(None if name == "regress-smollm2" else 1):
        recipe = _prepare(name, run.with_name(f"{name}-inputs"))
        run_recipe(recipe, options, Display(console))
    return numbers_of(run, [stage.name for stage in recipe.stages])


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Compute on so many threads; a tiny model waits longer for a second one than it gains."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _prepare(name: str, inputs: Path) -> Recipe:
    """The recipe; for the tiny one, with the teacher, text and task that are made here."""
    if name != "regress-tiny":
        return load_recipe(name)
    inputs = inputs.resolve()
    teacher = make_tiny_llama(inputs / "tiny-llama", steps=TINY_STEPS, initializer_range=0.1)
    text = write_documents(inputs / "tiny-text.jsonl", tiny_documents(400))
    write_last_words(inputs / "tiny-tasks" / "lambada_openai.jsonl", 80)
    return load_recipe(
        name,
        [
            f"teacher.model={json.dumps(str(teacher))}",
            f"transfer_set.sources.grammar.path={json.dumps(str(text))}",
            f"benchmark.mirror={json.dumps(str(inputs / 'tiny-tasks'))}",
        ],
    )


# --- measuring ----------------------------------------------------------------------------------


def numbers_of(run: Path, stages: Iterable[str]) -> tuple[dict[str, Number], set[str]]:
    """All quality numbers of a finished run by STAGE/TASK/METRIC, and the tasks that were skipped
    for want of their data; of one that a model can't answer the numbers are missing."""
    from reports.benchmark import MODELS_FAULT

    numbers: dict[str, Number] = {}
    skipped: set[str] = set()
    for stage in ("teacher", *stages):
        folder = run / "stages" / stage
        scorecard = read_json(folder / "scorecard.json")
        numbers |= {f"{stage}/{name}": number for name, number in _scores(scorecard).items()}
        numbers |= {f"{stage}/{name}": number for name, number in _heldout(folder).items()}
        skipped |= {
            f"{stage}/{task}"
            for task, reason in scorecard.get("skipped", {}).items()
            if reason not in MODELS_FAULT
        }
    return numbers, skipped


def _scores(scorecard: Mapping[str, Any]) -> dict[str, Number]:
    numbers = {"parameters": Number(scorecard["parameters"], "same")}
    for task, metrics in scorecard["results"].items():
        facts = scorecard.get("tasks", {}).get(task, {})
        asked = asked_as(facts) if facts else None
        directions = facts.get("higher_is_better", {})
        for metric, entry in metrics.items():
            if isinstance(entry["value"], (int, float)):
                better: Better = "higher" if directions.get(metric, True) else "lower"
                samples = facts.get("samples")
                share = RELATIVE_KL if metric in ("teacher_kl", "calibration_error") else RELATIVE
                numbers[f"{task}/{metric}"] = Number(
                    float(entry["value"]),
                    better,
                    None if metric == "teacher_first_choice" else samples,
                    relative=share,
                    stderr=entry.get("stderr"),
                    asked=asked,
                )
    return numbers


_HELDOUT: dict[str, Better] = {
    "heldout_kl": "lower",
    "heldout_perplexity": "lower",
    "heldout_top1_agreement": "higher",
}


def _heldout(folder: Path) -> dict[str, Number]:
    """What a stage that trained measured on held-out windows: before its first step (``start_``),
    which judges the cut that it started from, and after its last."""
    from pipelines.runner import read_metrics

    lines = [line for line in read_metrics(folder / "metrics.jsonl") if "heldout_kl" in line]
    return {
        prefix + name: Number(
            float(line[name]), better, relative=RELATIVE_KL if name == "heldout_kl" else RELATIVE
        )
        for prefix, chosen in (("start_", lines[:1]), ("", lines[-1:]))
        for line in chosen
        for name, better in _HELDOUT.items()
        if name in line
    }


# --- comparing ----------------------------------------------------------------------------------


def compare(
    baseline: Mapping[str, Any], measured: Mapping[str, Number], skipped: set[str]
) -> list[Finding]:
    """One finding for each number of the baseline, then for each that the baseline lacks."""
    findings = []
    for name, known in baseline["numbers"].items():
        value = float(known["value"])
        allowed = _allowed(value, known["tolerance"])
        number = measured.get(name)
        if number is None:
            task = "/".join(name.split("/")[:2])
            verdict: Any = "skipped" if task in skipped else "missing"
            findings.append(Finding(name, verdict, value, None, allowed))
        else:
            verdict = _verdict(number.value, value, known["better"], allowed)
            if known.get("asked", number.asked) != number.asked:
                verdict = "asked otherwise"
            findings.append(Finding(name, verdict, value, number.value, allowed))
    new = [name for name in measured if name not in baseline["numbers"]]
    return findings + [Finding(name, "new", None, measured[name].value, 0.0) for name in new]


def _allowed(value: float, tolerance: Mapping[str, float]) -> float:
    return tolerance.get("absolute", 0.0) + tolerance.get("relative", 0.0) * abs(value)


def _verdict(now: float, before: float, better: Better, allowed: float) -> str:
    if better == "same":
        return "ok" if abs(now - before) <= allowed else "worse"
    worse_by = now - before if better == "lower" else before - now
    if not abs(worse_by) <= allowed:  # also true for NaN
        return "better" if worse_by < 0 else "worse"
    return "ok"


def baseline_of(
    name: str,
    measured: Mapping[str, Number],
    *,
    before: Mapping[str, Any] | None,
    skipped: Iterable[str] = (),
) -> dict[str, Any]:
    """A baseline file's content; tolerances that were set before stay, and so do the numbers of
    tasks that were skipped here."""
    known = (before or {}).get("numbers", {})
    tasks = tuple(f"{task}/" for task in skipped)
    numbers = {key: number for key, number in known.items() if key.startswith(tasks)}
    numbers |= {
        key: {
            "value": number.rounded(),
            "better": number.better,
            "tolerance": known.get(key, {}).get("tolerance") or number.default_tolerance(),
            **({"asked": number.asked} if number.asked else {}),
        }
        for key, number in measured.items()
    }
    return {
        "schema": SCHEMA,
        "recipe": name,
        "versions": package_versions(),
        "numbers": dict(sorted(numbers.items())),
    }


def _read_baseline(path: Path) -> dict[str, Any] | None:
    return dict(read_json(path)) if path.is_file() else None


def _need_baseline(path: Path, name: str) -> dict[str, Any]:
    baseline = _read_baseline(path)
    if baseline is None:
        raise ShearlingError(
            f"{name} has no baseline yet.",
            hint=f"Write it: shearling regress --only {name} --update",
        )
    return baseline


# --- showing ------------------------------------------------------------------------------------

_COLUMNS = ("number", "baseline", "now", "change", "allowed", "")
_STYLES = {
    **dict.fromkeys(("worse", "missing", "asked otherwise"), "bold red"),
    "better": "green",
    "skipped": "dim",
}


def show(name: str, findings: list[Finding], console: Console) -> None:
    """Print the table, the verdict, and for a CI its summary."""
    columns = {c: "right" if 0 < index < 5 else "left" for index, c in enumerate(_COLUMNS)}
    styles = [_STYLES.get(finding.verdict, "") for finding in findings]
    rows = [finding.row() for finding in findings]
    console.print(Text(name, style="bold"))
    console.print(*tables(columns, rows, width=console.width, styles=styles), sep="\n")
    failed = [finding for finding in findings if finding.fails]
    verdict = f"{name}: {len(failed)} of {len(findings)} numbers got worse than allowed"
    if failed:
        worst = "".join(
            f"\n  {f.name}: {_text(f.baseline)} -> {_text(f.measured) or 'missing'}" for f in failed
        )
        console.print(Text(verdict + worst, style="bold red"), soft_wrap=True)
    else:
        left_out = sum(finding.verdict == "skipped" for finding in findings)
        rest = f"; {left_out} were not measured" if left_out else ""
        console.print(f"{name}: {len(findings) - left_out} numbers hold{rest}", highlight=False)
    if any(finding.verdict == "asked otherwise" for finding in findings):
        console.print(
            "Some tasks ask other questions than the baseline's did, so nothing can be said of "
            "them: look why, then write them with `shearling regress --update`.",
            highlight=False,
            soft_wrap=True,
        )
    if any(finding.verdict == "better" for finding in findings):
        console.print(
            "Some got better than the baseline: keep that with `shearling regress --update`.",
            highlight=False,
            soft_wrap=True,
        )
    _write_step_summary(name, findings)


def _write_step_summary(name: str, findings: list[Finding]) -> None:
    """Add the table to the summary page of a CI that offers one."""
    path = os.environ.get("GITHUB_STEP_SUMMARY")
    if not path:
        return
    lines = [f"### {name}", "", f"| {' | '.join(_COLUMNS)} |", "| --- " * len(_COLUMNS) + "|"]
    lines += [f"| {' | '.join(finding.row())} |" for finding in findings]
    with Path(path).open("a", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n\n")
