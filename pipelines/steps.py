"""From a recipe to steps: what each is a function of, and whether it has to run.

A recipe names its stages; the steps are those, the teacher and the transfer set before them, and a
benchmark after each one that makes a model. All keys follow from the recipe and from the user's
own files, so what will be done and why is known before anything is done.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from compress.settings import without_effect
from pipelines.recipe import DistillStage, Recipe, TeacherStage
from pipelines.stages import benchmark, correct, distill, export, prune, teacher, transfer_set
from pipelines.stages.distill import teacher_role
from pipelines.store import Store, stage_key
from reports.hub import is_passing, worth_another_try
from reports.run_folder import as_dict, kept_nothing
from reports.tasks import mirror_file
from shearling import without_secrets
from students.settings import Settings
from teachers.readers import local_files
from teachers.settings import TeacherSettings

STAGES: dict[str, ModuleType] = {
    "teacher": teacher,
    "transfer_set": transfer_set,
    "correct": correct,
    "prune": prune,
    "distill": distill,
    "export": export,
    "benchmark": benchmark,
}
"""One module a kind: ``run(settings, context)``, ``CODE_VERSION``, ``RESUMABLE``, and ``TOGETHER``
where several processes may run it together."""

TELL_HASHING = 1e9
"""Bytes of an artefact from which on its hashing is announced."""

FILES = "files of "
"""Prefix of inputs that are hashes of the user's own files, not keys of artefacts."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One artefact to be made, and all that it is a function of."""

    name: str
    """Unique in the run: a stage's name, or NAME/benchmark."""
    stage: str
    """The stage it belongs to: its own name, or that of the stage it measures."""
    kind: str
    settings: Settings
    slice: Mapping[str, Any]
    """The part of the recipe that the key depends on, as JSON."""
    needs: Mapping[str, str]
    """Names of earlier steps by role: teacher, model, transfer_set."""
    inputs: Mapping[str, str]
    """Keys of those steps by role, and hashes of the user's own files."""

    @property
    def code_version(self) -> int:
        return int(STAGES[self.kind].CODE_VERSION)

    @property
    def resumable(self) -> bool:
        return bool(STAGES[self.kind].RESUMABLE)

    @property
    def key(self) -> str:
        return stage_key(self.kind, self.code_version, self.slice, self.inputs)

    @property
    def makes_model(self) -> bool:
        return self.kind not in ("transfer_set", "benchmark", "export")

    @property
    def recipe_path(self) -> str:
        """Where its settings stand in a recipe, as in --set."""
        return "benchmark" if self.kind == "benchmark" else self.stage


@dataclass(frozen=True)
class Decision:
    """Whether a step runs, and why."""

    runs: bool
    reason: str

    def __str__(self) -> str:
        return f"{'runs' if self.runs else 'not run again'}: {self.reason}"


@dataclass
class _Builder:
    """Collects steps; each new one sees the keys of those before it."""

    seed: int
    steps: dict[str, Step] = field(default_factory=dict)

    def add(
        self,
        kind: str,
        settings: Settings,
        *,
        stage: str,
        name: str | None = None,
        seeded: bool = True,
        leave_out: frozenset[str] = frozenset(),
        also: Mapping[str, Any] | None = None,
        needs: Mapping[str, str] | None = None,
        files: Mapping[str, str] | None = None,
    ) -> None:
        slice_ = settings.model_dump(mode="json", exclude=set(leave_out))
        if files:
            _forget_places(slice_)
        slice_ |= also or {}
        needs = needs or {}
        inputs = {role: self.steps[need].key for role, need in needs.items()}
        inputs |= {FILES + path: digest for path, digest in (files or {}).items()}
        step = Step(
            name=name or stage,
            stage=stage,
            kind=kind,
            settings=settings,
            slice={"seed": self.seed, **slice_} if seeded else slice_,
            needs=needs,
            inputs=inputs,
        )
        self.steps[step.name] = step


def build_steps(recipe: Recipe, fingerprint: Callable[..., str]) -> list[Step]:
    """All steps of a recipe in the order in which they run.

    ``fingerprint`` hashes a local file, or files of a folder (`FileHashes.fingerprint`). Names of
    stages and the folder of the mirror are not part of a key: renaming and moving repeat no work.
    """
    builder = _Builder(recipe.seed)
    builder.add(
        "teacher",
        recipe.teacher,
        stage="teacher",
        seeded=False,
        files=_model_hash("teacher", recipe.teacher, fingerprint),
    )
    mirror = _mirror_files(recipe, fingerprint)
    clean = recipe.transfer_set.clean
    # What is taken out of the text then depends on the questions.
    cleared = clean is not None and clean.benchmarks
    builder.add(
        "transfer_set",
        recipe.transfer_set,
        stage="transfer_set",
        also={"benchmark_tasks": list(recipe.benchmark.tasks)} if cleared else None,
        needs={"teacher": "teacher"},
        files=_text_hashes(recipe, fingerprint) | (mirror if cleared else {}),
    )

    def measure(stage: str) -> None:
        builder.add(
            "benchmark",
            recipe.benchmark,
            stage=stage,
            name=f"{stage}/benchmark",
            seeded=False,  # questions and examples are lm-eval's own
            leave_out=frozenset({"mirror"}),
            # The students' answers are held against the teacher's.
            needs={"model": stage} | ({} if stage == "teacher" else {"teacher": "teacher"}),
            files=mirror,
        )

    measure("teacher")
    teacher = newest = "teacher"
    for stage in recipe.stages:
        if stage.kind == "export":
            scorecards = {
                "scorecard": f"{newest}/benchmark",
                "teacher_scorecard": "teacher/benchmark",
            }
            # Its card says so where the teacher wrote the text.
            text = {"transfer_set": "transfer_set"} if recipe.transfer_set.written else {}
            builder.add(
                "export",
                stage,
                stage=stage.name,
                seeded=False,
                leave_out=frozenset({"name", "kind"}),
                # The first teacher, corrected or not: its licence and name go along.
                needs={"model": newest, "teacher": "teacher", **scorecards, **text},
            )
            continue
        needs = {"teacher": teacher, "model": newest, "transfer_set": "transfer_set"}
        files = {}
        if isinstance(stage, TeacherStage):
            needs = {}
            files = _model_hash(stage.name, stage, fingerprint)
        if isinstance(stage, DistillStage):
            others = [name for name in stage.teachers if name != "teacher"]
            needs |= {teacher_role(name): name for name in others}
        builder.add(
            stage.kind,
            stage,
            stage=stage.name,
            seeded=stage.kind != "teacher",
            # training: only what it stands for
            leave_out=frozenset({"name", "kind", "training"}) | without_effect(stage),
            needs=needs,
            files=files,
        )
        measure(stage.name)
        if stage.kind == "correct":  # what is cut and who teaches from here on
            teacher = stage.name
        if stage.kind != "teacher":
            newest = stage.name
    return list(builder.steps.values())


def history(step: Step, steps: Mapping[str, Step], store: Store) -> tuple[list[str], list[str]]:
    """Kinds of the steps that made the model which ``step`` reads out of the teacher, in order.

    Then those of trainings on its way whose weights were thrown away.
    """
    done: list[str] = []
    tried: list[str] = []
    while "model" in step.needs:
        step = steps[step.needs["model"]]
        summary = (store.read(step.kind, step.key) or {}).get("summary")
        if step.kind != "teacher":
            (tried if kept_nothing(as_dict(summary)) else done).insert(0, step.kind)
    return done, tried


def _forget_places(slice_: dict[str, Any]) -> None:
    """Put its ending in the place of each path that is here: its hash is among the inputs.

    So moving a teacher or a text repeats no work. The ending stays, because readers go by it.
    """
    for owner in (slice_, *slice_.get("sources", ())):
        for name in ("model", "path"):
            value = owner.get(name)
            if isinstance(value, str) and Path(value).expanduser().exists():
                ending = "".join(Path(value).suffixes[-2:])
                owner[name] = f"(here) {ending}".strip()


def _model_hash(
    owner: str, settings: TeacherSettings, fingerprint: Callable[..., str]
) -> dict[str, str]:
    """The hash of a teacher that is on this disk; a hub id is pinned by its name."""
    path = Path(settings.model).expanduser()
    if not path.exists():
        return {}
    files = _model_files(path) if path.is_dir() else None
    return {f"{owner}.model": fingerprint(path, files)}


def _model_files(folder: Path) -> list[Path]:
    """What a teacher is read from: a folder's own files, and Meta's tokenizer above it."""
    files = [file for file in folder.iterdir() if file.is_file()]
    above = folder.parent / "tokenizer.model"
    if above.is_file() and not (folder / above.name).is_file():
        from teachers.meta_format import is_meta_folder

        files += [above] if is_meta_folder(folder) else []
    return files


def _text_hashes(recipe: Recipe, fingerprint: Callable[..., str]) -> dict[str, str]:
    """Hashes of those sources that are on this disk; the others are pinned by their names."""
    return {
        f"transfer_set.sources.{source.name}.path": fingerprint(
            Path(source.path).expanduser(), files
        )
        for source in recipe.transfer_set.sources
        if (files := local_files(source))
    }


def _mirror_files(recipe: Recipe, fingerprint: Callable[..., str]) -> dict[str, str]:
    """Hashes of the mirror's files for the recipe's tasks; one that appears later is measured."""
    folder = Path(recipe.benchmark.mirror or "").expanduser()
    if not recipe.benchmark.mirror or not folder.is_dir():
        return {}
    found = [mirror_file(task, folder) for task in recipe.benchmark.tasks]
    return {
        f"benchmark.mirror/{path.relative_to(folder)}": fingerprint(path)
        for file in found
        if file is not None
        for path in (file, file.with_name(f"{file.stem}_train{file.suffix}"))
        if path.is_file()
    }


# --- decisions ----------------------------------------------------------------------------------


def decide(
    step: Step, store: Store, previous: Mapping[str, Any] | None, *, verify: bool = False
) -> Decision:
    """Whether ``step`` runs. ``previous`` is the stage.json of its name's last result, if any."""
    changes = differences(step, previous) if previous else []
    if store.artefact(step.kind, step.key).exists():
        damage = store.damage(step.kind, step.key, verify=verify)
        if damage:
            return Decision(True, f"artefact damaged: {damage}")
        missed = _missed_tasks(step, store)
        if missed:
            return Decision(True, f"can be measured now: {', '.join(missed)}")
        if changes:
            return Decision(False, f"done before with these settings ({'; '.join(changes)})")
        return Decision(False, "nothing changed")
    if store.partial(step.kind, step.key).exists():
        goes_on = step.resumable and store.has_checkpoint(step.kind, step.key)
        again = "goes on where it was interrupted" if goes_on else "it was not finished"
        return Decision(True, again)
    if previous is None:
        return Decision(True, "first time")
    return Decision(True, "; ".join(changes) or "its artefact is gone from the store")


def decide_all(
    steps: Sequence[Step],
    store: Store,
    previous: Callable[[Step], Mapping[str, Any] | None],
    *,
    verify: bool = False,
    verify_inputs: bool = False,
    tell: Callable[[str], None] = lambda _: None,
) -> list[tuple[Step, Decision]]:
    """A decision for each step, in order. ``tell`` hears of hashing that takes a while.

    ``verify`` hashes every finished artefact; ``verify_inputs`` those that a step that runs will
    read, so that hours are not spent on weights in which a bit has flipped.
    """
    by_name = {step.name: step for step in steps}
    decided: dict[str, Decision] = {}
    read: set[str] = set()
    for step in reversed(steps):
        hashed = verify or (verify_inputs and step.name in read)
        size = store.size(step.kind, step.key) if hashed else 0
        if size > TELL_HASHING:
            tell(f"{step.name}: reading its {size / 1e9:.1f} GB, to see that no bit has changed")
        decision = decide(step, store, previous(step), verify=hashed)
        if not decision.runs and (news := _measured_since(step, by_name, store)):
            decision = Decision(True, f"measured anew: {', '.join(news)}")
        decided[step.name] = decision
        if decided[step.name].runs:
            read |= set(step.needs.values())
    return [(step, decided[step.name]) for step in steps]


def _measured_since(step: Step, steps: Mapping[str, Step], store: Store) -> list[str]:
    """Benchmarks that an export's card tells of, measured again behind it or about to be: tasks
    that were skipped once are no change of settings."""
    if step.kind != "export":
        return []
    written = str((store.read(step.kind, step.key) or {}).get("started"))
    told = [steps[name] for name in step.needs.values() if steps[name].kind == "benchmark"]
    return [
        benchmark.name
        for benchmark in told
        if _missed_tasks(benchmark, store)
        or str((store.read(benchmark.kind, benchmark.key) or {}).get("started")) > written
    ]


def _missed_tasks(step: Step, store: Store) -> list[str]:
    """Tasks that a finished benchmark skipped for a fault of the hub, if the hub is there now."""
    if step.kind != "benchmark":
        return []
    summary = (store.read(step.kind, step.key) or {}).get("summary")
    skipped = summary.get("skipped") if isinstance(summary, Mapping) else None
    if not isinstance(skipped, Mapping) or not worth_another_try(skipped.values()):
        return []
    return [str(task) for task, reason in skipped.items() if is_passing(reason)]


def differences(step: Step, previous: Mapping[str, Any]) -> list[str]:
    """What makes ``step`` another than the one that ``previous`` records, one phrase each."""
    old_version = previous.get("code_version")
    found = []
    if previous.get("kind") != step.kind:
        return [f"kind {previous.get('kind')} -> {step.kind}"]
    old, new = dict(_leaves(previous.get("settings") or {})), dict(_leaves(step.slice))
    for path in dict.fromkeys([*new, *old]):
        if old.get(path) != new.get(path):
            where = path if path == "seed" else f"{step.recipe_path}.{path}"
            found.append(f"recipe.{where} {_shown(old, path)} -> {_shown(new, path)}")
    old_inputs = previous.get("inputs")
    old_inputs = old_inputs if isinstance(old_inputs, Mapping) else {}
    for role in dict.fromkeys([*step.inputs, *old_inputs]):
        if old_inputs.get(role) != step.inputs.get(role):
            found.append(_input_phrase(step, role))
    if old_version != step.code_version:
        found.append(f"code version {old_version} -> {step.code_version}")
    return list(dict.fromkeys(found))


def _input_phrase(step: Step, role: str) -> str:
    if role.startswith(FILES):
        return f"the {role} changed"
    return f"its input {step.needs.get(role, role)} changed"


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of everything below ``value``; a list of plain values is one leaf."""
    items: Iterator[tuple[Any, Any]] | None = None
    if isinstance(value, Mapping) and value:
        items = iter(value.items())
    elif isinstance(value, list) and any(isinstance(item, (Mapping, list)) for item in value):
        items = iter(enumerate(value))
    if items is None:
        yield path, value
        return
    for key, below in items:
        yield from _leaves(below, f"{path}.{key}" if path else str(key))


def _shown(leaves: Mapping[str, Any], path: str) -> str:
    if path not in leaves:
        return "(not set)"
    value = leaves[path]
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = without_secrets(text)
    return text if len(text) <= 60 else text[:57] + "..."
