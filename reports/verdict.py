"""The verdict: a run judged against its teacher, in a few sentences with their numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from reports import words
from reports.compare import Comparison, Recovery, compare_models, recovered
from reports.pace import faster
from reports.quality_charts import main_perplexity
from reports.run_folder import Data, Run, Stage, as_number


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """All comparisons of a run: each measured model against the teacher, and what was won back."""

    comparisons: dict[str, list[Comparison]]
    recoveries: list[Recovery]


def judge(run: Run) -> Judgement:
    """Compare every model with the teacher, and the last one with the last cut."""
    teacher = run.teacher
    students = [stage for stage in run.measured if stage.kind != "teacher" and stage.scorecard]
    if teacher is None:
        return Judgement(comparisons={}, recoveries=[])
    compared = {
        stage.name: compare_models(teacher, stage.scorecard)
        for stage in students
        if stage.scorecard
    }
    # The last one: what came before it is already in what that model had lost.
    cut = next((stage for stage in reversed(students) if stage.kind == "prune"), None)
    last = students[-1] if students else None
    found = []
    if cut and last and last is not cut and cut.scorecard and last.scorecard:
        for entry in compared[cut.name]:
            if entry.p is not None:  # what can't be compared can't be won back
                task, metric = entry.task, entry.metric
                found.append(recovered(teacher, cut.scorecard, last.scorecard, task, metric))
    return Judgement(
        comparisons=compared, recoveries=[entry for entry in found if entry is not None]
    )


def last_student(run: Run) -> Stage | None:
    students = [stage for stage in run.measured if stage.kind != "teacher"]
    return students[-1] if students else None


def _main_recovery(run: Run, judgement: Judgement) -> Recovery | None:
    key = main_perplexity([stage.scorecard for stage in run.measured if stage.scorecard])
    found = [entry for entry in judgement.recoveries if (entry.task, entry.metric) == key]
    return found[0] if found else None


def verdict(run: Run, judgement: Judgement) -> str:
    """The run in a few sentences: size, speed, quality with its uncertainty, what came back."""
    student, teacher = last_student(run), run.teacher
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
    parts = [*_size(card, teacher), *_speed(run, student)]
    parts += _perplexity(judgement, student, teacher) or _right_answers(judgement, student)
    sentence = f"After {student.name}, {', '.join(parts[:-1])}, and {parts[-1]}"
    if len(parts) == 1:
        sentence = f"After {student.name}, {parts[0]}"
    back = _main_recovery(run, judgement)
    if back is not None:
        cuts = [stage.name for stage in run.measured if stage.kind == "prune"]
        lost = "the cut had lost" if len(cuts) == 1 else f"was lost after {cuts[-1]}"
        sentence += (
            f"; of what {lost}, {words.percent(back.share)} came back "
            f"({words.percent(back.low)} to {words.percent(back.high)})"
        )
    return f"{sentence}."


def _size(card: Data, teacher: Data) -> list[str]:
    share = words.ratio(card.get("parameters"), teacher.get("parameters"))
    numbers = f"{words.count(card.get('parameters'))} of {words.count(teacher.get('parameters'))}"
    return [f"{words.percent(share)} of the teacher's parameters are left ({numbers})"]


def _speed(run: Run, student: Stage) -> list[str]:
    """A ratio only where it is more than noise."""
    ratio = faster(run, student)
    if ratio is None:
        return []
    if ratio.is_noise:
        return ["the model writes about as fast as the teacher, within the noise of this machine"]
    return [f"the model writes {words.times(ratio.middle)} as fast ({ratio.range})"]


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


def mean_difference(compared: Sequence[Comparison]) -> Comparison | None:
    """All tasks with right answers as one comparison: means, and the error of their difference.

    The tasks are taken to be independent; within one of them the documents are paired. None where
    there is no such task.
    """
    tasks = [
        (entry, entry.reference, entry.value, entry.difference, entry.stderr or 0.0)
        for entry in compared
        if words.is_right(entry.metric) and entry.difference is not None
    ]
    shares = [(r, v, d, s) for _, r, v, d, s in tasks if None not in (r, v, d)]
    if not shares:
        return None
    if len(shares) == 1:
        return next(entry for entry, *_ in tasks)
    mean = [sum(column) / len(shares) for column in zip(*shares, strict=True)]
    stderr = sum(error**2 for *_, error in shares) ** 0.5 / len(shares)
    noise = stderr == 0 or abs(mean[2]) < 1.96 * stderr
    verdict = "within noise" if noise else "better" if mean[2] > 0 else "worse"
    return Comparison(
        task=f"{len(shares)} tasks", metric="acc", reference=mean[0], value=mean[1],
        difference=mean[2], stderr=stderr, verdict=verdict,
    )  # fmt: skip


def _right_answers(judgement: Judgement, student: Stage) -> list[str]:
    """The same of tasks with right answers, for runs without a perplexity."""
    mean = mean_difference(judgement.comparisons.get(student.name, []))
    if mean is None or mean.difference is None:
        return []
    gap = words.difference(mean.metric, mean.difference, mean.stderr)
    return [
        f"the student answers {words.score('acc', mean.value)} of {mean.task} right instead of "
        f"{words.score('acc', mean.reference)} ({gap}, {mean.verdict})"
    ]


def verdict_details(run: Run, judgement: Judgement) -> list[str]:
    """How the tasks with right answers came out, and where the scorecards can't be compared."""
    student = last_student(run)
    compared = judgement.comparisons.get(student.name, []) if student else []
    shares = [entry for entry in compared if words.is_right(entry.metric)]
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
        mean = mean_difference(judged)
        if len(judged) > 1 and mean is not None and mean.difference is not None:
            gap = words.difference("acc", mean.difference, mean.stderr)
            told[-1] += (
                f"; on average {words.score('acc', mean.value)} are right instead of "
                f"{words.score('acc', mean.reference)} ({gap}, {mean.verdict})"
            )
        found.append(f"Against the teacher on {tasks} with right answers: {', '.join(told)}.")
    refused = [entry for entry in compared if entry.p is None and entry.reason]
    found += [f"{entry.task} is not compared: {entry.reason}." for entry in refused]
    return list(dict.fromkeys(found))


def headline_facts(run: Run, judgement: Judgement) -> list[tuple[str, str, str]]:
    """The few numbers that stand large at the top."""
    student, teacher = last_student(run), run.teacher
    if student is None or student.scorecard is None or teacher is None:
        return []
    card = student.scorecard
    share = words.ratio(card.get("parameters"), teacher.get("parameters"))
    facts = [(words.percent(share), "of the parameters", words.count(card.get("parameters")))]
    ratio = faster(run, student)
    if ratio is not None:
        noise = ", within noise" if ratio.is_noise else ""
        facts.append((f"{ratio.middle:.2f}×", "as fast at writing", ratio.range + noise))
    key = main_perplexity([teacher, card])
    for entry in judgement.comparisons.get(student.name, []):
        if (entry.task, entry.metric) == key and entry.difference is not None:
            gap = words.difference(entry.metric, entry.difference, entry.stderr)
            facts.append((words.score(entry.metric, entry.value), f"perplexity on {key[0]}", gap))
    mean = mean_difference(judgement.comparisons.get(student.name, []))
    if mean is not None and mean.difference is not None:
        gap = words.difference("acc", mean.difference, mean.stderr)
        right = f"right answers, {mean.task}"
        facts.append((words.score("acc", mean.value), right, gap))
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
