"""What a report says: a run's numbers turned into sentences and tables of plain strings.

Nothing here knows HTML. The same view makes report.html and report.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from reports import words
from reports.charts import Chart, main_perplexity, make_charts, pruned
from reports.compare import Comparison, Recovery, compare_models, headline_metrics, recovered
from reports.run_folder import Data, Run, Stage, as_dict, as_list, as_number

VERDICT_MARKS = {
    "better": "better",
    "worse": "worse",
    "within noise": "within noise",
    "the same": "the same",
    "not comparable": "not compared",
}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One cell of a table. ``sort`` is what a sorted column goes by."""

    text: str
    note: str = ""
    mark: str = ""
    """A word of VERDICT_MARKS, or empty."""
    title: str = ""
    sort: float | str = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table whose first column heads the rows."""

    name: str
    caption: str
    columns: list[str]
    rows: list[list[Cell]]
    numeric: bool = True


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
    tasks: Table | None = None
    skipped: list[tuple[str, str]] = field(default_factory=list)
    all_metrics: Table | None = None
    charts: list[Chart] = field(default_factory=list)
    kept: list[tuple[str, str]] = field(default_factory=list)
    completions: Table | None = None
    transfer_set: Table | None = None
    transfer_facts: list[tuple[str, str]] = field(default_factory=list)
    recipe: str = ""
    versions: list[tuple[str, str]] = field(default_factory=list)
    hashes: list[tuple[str, str]] = field(default_factory=list)
    hardware: list[tuple[str, str]] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """All comparisons of a run: each measured model against the teacher, and what was won back."""

    comparisons: dict[str, list[Comparison]]
    recoveries: list[Recovery]


def judge(run: Run) -> Judgement:
    """Compare every model with the teacher, and the last one with the first cut."""
    teacher = run.teacher
    students = [stage for stage in run.measured if stage.kind != "teacher" and stage.scorecard]
    if teacher is None:
        return Judgement(comparisons={}, recoveries=[])
    compared = {
        stage.name: compare_models(teacher, stage.scorecard)
        for stage in students
        if stage.scorecard
    }
    cut = next((stage.scorecard for stage in students if stage.kind == "prune"), None)
    last = students[-1].scorecard if students else None
    found = []
    if cut is not None and last is not None and last is not cut:
        for task, results in teacher["results"].items():
            for metric in headline_metrics(task, results):
                found.append(recovered(teacher, cut, last, task, metric))
    return Judgement(
        comparisons=compared, recoveries=[entry for entry in found if entry is not None]
    )


def make_view(run: Run, judgement: Judgement) -> View:
    """The whole report as plain data."""
    return View(
        name=run.name,
        description=str(run.recipe.get("description") or ""),
        state=run.state,
        verdict=verdict(run, judgement),
        details=verdict_details(run, judgement),
        facts=headline_facts(run, judgement),
        cost=cost(run),
        stages=stage_table(run),
        tasks=task_table(run, judgement),
        skipped=skipped(run),
        all_metrics=metric_table(run),
        charts=make_charts(run),
        kept=kept(run),
        completions=completion_table(run),
        transfer_set=source_table(run),
        transfer_facts=transfer_facts(run),
        recipe=run.recipe_text,
        versions=versions(run),
        hashes=hashes(run),
        hardware=[(key, _plain(value)) for key, value in as_dict(run.lock.get("hardware")).items()],
        commands=commands(run),
        problems=problems(run),
    )


def _last_student(run: Run) -> Stage | None:
    students = [stage for stage in run.measured if stage.kind != "teacher"]
    return students[-1] if students else None


def _main_recovery(run: Run, judgement: Judgement) -> Recovery | None:
    key = main_perplexity([stage.scorecard for stage in run.measured if stage.scorecard])
    found = [entry for entry in judgement.recoveries if (entry.task, entry.metric) == key]
    return found[0] if found else None


def verdict(run: Run, judgement: Judgement) -> str:
    """The run in a few sentences: size, speed, quality with its uncertainty, what came back."""
    student, teacher = _last_student(run), run.teacher
    if student is None or student.scorecard is None:
        if teacher is None:
            return "No model has been measured yet, so there is nothing to judge."
        size = words.count(teacher.get("parameters"))
        return f"Only the teacher has been measured yet ({size} parameters)."
    card = student.scorecard
    if teacher is None:
        return (
            f"{student.name} has {words.count(card.get('parameters'))} parameters. The teacher has "
            "not been measured, so there is nothing to compare it with."
        )
    parts = _size_and_speed(card, teacher) + _perplexity(judgement, student, teacher)
    sentence = f"After {student.name}, {', '.join(parts[:-1])}, and {parts[-1]}"
    if len(parts) == 1:
        sentence = f"After {student.name}, {parts[0]}"
    back = _main_recovery(run, judgement)
    if back is not None:
        sentence += (
            f"; of what the cut had lost, {words.percent(back.share)} came back "
            f"({words.percent(back.low)} to {words.percent(back.high)})"
        )
    return f"{sentence}."


def _size_and_speed(card: Data, teacher: Data) -> list[str]:
    share = words.ratio(card.get("parameters"), teacher.get("parameters"))
    numbers = f"{words.count(card.get('parameters'))} of {words.count(teacher.get('parameters'))}"
    parts = [f"{words.percent(share)} of the teacher's parameters are left ({numbers})"]
    faster = _faster(card, teacher, "decode_tokens_per_second")
    if faster is not None:
        parts.append(f"the model writes {words.times(faster)} as fast")
    return parts


def _faster(card: Data, teacher: Data, speed: str) -> float | None:
    return words.ratio(card["speed"].get(speed), teacher["speed"].get(speed))


def _perplexity(judgement: Judgement, student: Stage, teacher: Data) -> list[str]:
    key = main_perplexity([teacher, student.scorecard or {"results": {}}])
    for entry in judgement.comparisons.get(student.name, []):
        if (entry.task, entry.metric) == key and entry.difference is not None:
            gap = words.difference(entry.metric, entry.difference, entry.stderr)
            return [
                f"its perplexity on {entry.task} is {words.score(entry.metric, entry.value)} "
                f"instead of {words.score(entry.metric, entry.reference)} "
                f"({gap}, {entry.verdict})"
            ]
    return []


def verdict_details(run: Run, judgement: Judgement) -> list[str]:
    """How the tasks with right answers came out, and where the scorecards can't be compared."""
    student = _last_student(run)
    compared = judgement.comparisons.get(student.name, []) if student else []
    shares = [entry for entry in compared if words.is_share(entry.metric)]
    judged = [entry for entry in shares if entry.p is not None]
    found = []
    if judged:
        verdicts = ["within noise" if e.verdict == "the same" else e.verdict for e in judged]
        told = [
            f"{verdicts.count(word)} {word}"
            for word in ("better", "within noise", "worse")
            if word in verdicts
        ]
        tasks = "one task" if len(judged) == 1 else f"{len(judged)} tasks"
        found.append(f"Against the teacher on {tasks} with right answers: {', '.join(told)}.")
    refused = [entry for entry in compared if entry.p is None and entry.reason]
    found += [f"{entry.task} is not compared: {entry.reason}." for entry in refused]
    return list(dict.fromkeys(found))


def headline_facts(run: Run, judgement: Judgement) -> list[tuple[str, str, str]]:
    """The four numbers that stand large at the top."""
    student, teacher = _last_student(run), run.teacher
    if student is None or student.scorecard is None or teacher is None:
        return []
    card = student.scorecard
    share = words.ratio(card.get("parameters"), teacher.get("parameters"))
    facts = [(words.percent(share), "of the parameters", words.count(card.get("parameters")))]
    faster = _faster(card, teacher, "decode_tokens_per_second")
    if faster is not None:
        written = as_number(card["speed"]["decode_tokens_per_second"]) or 0.0
        facts.append((f"{faster:.2f}×", "as fast at writing", f"{written:.1f} tokens/s"))
    key = main_perplexity([teacher, card])
    for entry in judgement.comparisons.get(student.name, []):
        if (entry.task, entry.metric) == key and entry.difference is not None:
            gap = words.difference(entry.metric, entry.difference, entry.stderr)
            facts.append((words.score(entry.metric, entry.value), f"perplexity on {key[0]}", gap))
    back = _main_recovery(run, judgement)
    if back is not None:
        between = f"{words.percent(back.low)} to {words.percent(back.high)}"
        facts.append((words.percent(back.share), "of the loss won back", between))
    return facts


def cost(run: Run) -> list[tuple[str, str]]:
    """What the run took."""
    seconds = [stage.seconds for stage in run.stages if stage.seconds is not None]
    memory = [s.peak_memory_bytes for s in run.stages if s.peak_memory_bytes is not None]
    tokens = [as_number(stage.summary.get("tokens")) for stage in run.models]
    entries = [
        ("stages, together", words.duration(sum(seconds)) if seconds else ""),
        ("most memory in a stage", words.size(max(memory)) if memory else ""),
        ("tokens taught on", words.count(sum(t for t in tokens if t)) if any(tokens) else ""),
        ("started", words.moment(run.journal.get("started") or "")),
        ("finished", words.moment(run.journal.get("finished") or "")),
    ]
    return [(name, value) for name, value in entries if value]


def stage_table(run: Run) -> Table | None:
    """One row a stage: what it made, how fast that is, what it took."""
    if not run.stages:
        return None
    teacher = run.teacher or {}
    rows = []
    for stage in run.stages:
        card = stage.scorecard or {}
        speed = as_dict(card.get("speed"))
        share = words.ratio(card.get("parameters"), teacher.get("parameters"))
        first = as_number(speed.get("time_to_first_token_seconds"))
        after = f"first token after {words.duration(first)}" if first is not None else ""
        used = as_number(card.get("peak_memory_bytes"))
        before = as_number(as_dict(card.get("memory")).get("before_loading_bytes"))
        grown = f"{words.size(used - before)} of it the model" if used and before else ""
        rows.append(
            [
                Cell(text=stage.name, note=stage.kind, sort=stage.name),
                Cell(text=stage.state, note=stage.reason or "", sort=stage.state),
                _cell(as_number(card.get("parameters")), words.count, words.percent(share)),
                _cell(as_number(card.get("bytes")), words.size),
                _cell(as_number(speed.get("prefill_tokens_per_second")), words.significant, after),
                _cell(as_number(speed.get("decode_tokens_per_second")), words.significant),
                _cell(used, words.size, grown),
                _cell(stage.seconds, words.duration, f"in {words.size(stage.peak_memory_bytes)}"),
            ]
        )
    return Table(
        name="stages",
        caption="What each stage made, and what it took. Speeds are in tokens per second, for one "
        "sequence on this machine; memory is what a process with this model alone needs.",
        columns=[
            "stage",
            "state",
            "parameters",
            "on disk",
            "reads",
            "writes",
            "memory",
            "took",
        ],
        rows=rows,
    )


def _cell(value: float | None, show: Any, note: str = "") -> Cell:
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
        for task, results in card["results"].items():
            keys |= dict.fromkeys((task, metric) for metric in headline_metrics(task, results))
    rows = [
        [
            Cell(text=task, note=words.metric_label(task, metric), sort=task),
            *(_task_cell(stage, task, metric, judgement) for stage in run.measured),
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


def _task_cell(stage: Stage, task: str, metric: str, judgement: Judgement) -> Cell:
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
        title=f"{entry.test}, {entry.documents} documents, p {_p(entry.p)}, "
        f"after Holm's correction {_p(entry.p_adjusted)}",
        sort=order,
    )


def _p(value: float | None) -> str:
    if value is None:
        return words.MISSING
    return "< 0.0001" if value < 0.0001 else f"= {words.significant(value, 2)}"


def _floor_cells(cards: list[Data], task: str, metric: str) -> tuple[Cell, Cell]:
    """What guessing scores, and how many documents (or windows) of how many were asked."""
    facts: Data = next((card["tasks"][task] for card in cards if task in card["tasks"]), {})
    chance = as_number(facts.get("chance")) if metric.startswith("acc") else None
    constant = as_number(facts.get("constant")) if metric.startswith("acc") else None
    guess = _cell(chance, lambda value: words.percent(value, 1))
    if constant is not None:
        constant_answer = f"always the same: {words.percent(constant, 1)}"
        guess = Cell(text=guess.text, note=constant_answer, sort=guess.sort)
    if metric.startswith("token_perplexity"):
        windows = as_number(facts.get("perplexity_windows"))
        return guess, _cell(windows, lambda value: f"{value:,.0f} windows")
    asked, there = as_number(facts.get("samples")), as_number(facts.get("documents"))
    of = f"of {there:,.0f}" if there is not None else ""
    return guess, _cell(asked, lambda value: f"{value:,.0f}", of)


def skipped(run: Run) -> list[tuple[str, str]]:
    """Tasks that were asked for and not measured, each with its reason."""
    found: dict[str, str] = {}
    for stage in run.measured:
        found |= {str(k): str(v) for k, v in (stage.scorecard or {})["skipped"].items()}
    return list(found.items())


def metric_table(run: Run) -> Table | None:
    """Every metric that lm-eval gave, for those who want them all."""
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
            row.append(_cell(value, lambda v, m=metric, e=error: words.score(m, v, e)))
        rows.append(row)
    return Table(
        name="metrics",
        caption="All metrics, each with its standard error.",
        columns=["task", *(stage.name for stage in run.measured)],
        rows=rows,
    )


def kept(run: Run) -> list[tuple[str, str]]:
    """What stayed of the teacher, axis by axis."""
    stage = pruned(run)
    if stage is None:
        return []
    teacher = next((s.config for s in run.stages if s.kind == "teacher"), {})
    axes = (
        ("layers", "num_hidden_layers"),
        ("hidden dimensions", "hidden_size"),
        ("query heads in a layer", "num_attention_heads"),
        ("key/value heads in a layer", "num_key_value_heads"),
        ("neurons in a layer", "intermediate_size"),
    )
    found = []
    for label, key in axes:
        before, after = as_number(teacher.get(key)), as_number(stage.config.get(key))
        if before is not None and after is not None:
            found.append(
                (label, f"{after:,.0f} of {before:,.0f} ({words.percent(after / before)})")
            )
    layers = [value for value in as_list(stage.selection.get("layers")) if isinstance(value, int)]
    if layers:
        found.append(("layers that stayed", _ranges(layers)))
    heads = as_list(stage.selection.get("heads"))
    per_layer = {
        _ranges(entry) for entry in heads if all(isinstance(h, int) for h in as_list(entry))
    }
    if len(per_layer) == 1:
        found.append(("query heads that stayed, in every layer", per_layer.pop()))
    elif per_layer:
        found.append(("query heads that stayed", f"{len(per_layer)} different sets, by layer"))
    return found


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "0–2, 5"."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in spans)


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
        numeric=False,
    )


def _transfer(run: Run) -> Data:
    return next((stage.transfer_set for stage in run.stages if stage.transfer_set), {})


def source_table(run: Run) -> Table | None:
    """Where the transfer set's text came from."""
    sources = [as_dict(source) for source in as_list(_transfer(run).get("sources"))]
    if not sources:
        return None
    rows = [
        [
            Cell(
                text=str(source.get("name") or source.get("path") or "source"),
                note=_plain(source.get("notes")),
            ),
            *(
                _cell(as_number(source.get(key)), show)
                for key, show in (
                    ("documents", lambda v: f"{v:,.0f}"),
                    ("tokens", lambda v: f"{v:,.0f}"),
                    ("bytes", words.size),
                    ("reserved", lambda v: f"{v:,.0f}"),
                )
            ),
        ]
        for source in sources
    ]
    return Table(
        name="sources",
        caption="Sources of the transfer set.",
        columns=["source", "documents", "tokens", "bytes", "kept for benchmarks"],
        rows=rows,
    )


def transfer_facts(run: Run) -> list[tuple[str, str]]:
    """All plain numbers and texts of transfer_set.json."""
    return [
        (key.replace("_", " "), _plain(value))
        for key, value in _transfer(run).items()
        if key not in ("schema", "sources") and isinstance(value, str | int | float)
    ]


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(entry)}" for key, entry in value.items())
    if isinstance(value, list):
        return ", ".join(_plain(entry) for entry in value)
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "" if value is None else str(value)


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
    found = [(key, _plain(run.lock.get(key))) for key in ("recipe_sha256", "seed", "git", "device")]
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
    folder = str(run.folder)
    return [
        *([str(again)] if again else []),
        f"shearling report {folder}",
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
