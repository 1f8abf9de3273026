"""What can be found wrong before any work is done, so that a mistake costs seconds, not hours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any

from compress.settings import DistillSettings, PruneSettings
from pipelines.estimate_distill import steps_of
from pipelines.recipe import CorrectStage, DistillStage, PruneStage, Recipe, TeacherStage
from pipelines.stages.prune import student_shape
from reports import tasks
from reports.settings import BenchmarkSettings
from shearling import ShearlingError, itemised, read_json
from students.shape import Shape
from teachers.families import known_family
from teachers.readers import is_data_set, local_files, saved_splits
from teachers.settings import SourceSettings, TeacherSettings

MOST_REPEATS = 4
"""Of one text, up to which reading it again is nearly as good as new text (Muennighoff et al. 2023,
https://arxiv.org/abs/2305.16264)."""
FEWEST_STEPS = 8
"""Of an optimizer; with fewer, one or two of them at the full rate, a model hardly moves."""
_FILE_ENDINGS = (".txt", ".jsonl", ".json", ".parquet", ".raw", ".gz", ".zst", ".gguf", ".md")


def check_run_folder(run: Path) -> None:
    """The run folder is new, empty, or that of an earlier run: nothing else is ever written into.

    Raises:
        ShearlingError: if it is a file or a folder of something else.
    """
    if run.is_dir():
        names = {path.name for path in run.iterdir()}
        if not names or names & {"run.json", "run.lock", "store"}:
            return
        what = f"{run} holds other files and is not a run."
    elif run.exists() or run.is_symlink():
        what = f"{run} is not a folder."
    else:
        check_parents(run)
        return
    raise ShearlingError(what, hint="Name a new folder with --out DIR.")


def check_parents(path: Path) -> None:
    """What stands above a path that is to be written is folders.

    Raises:
        ShearlingError: if it is a file.
    """
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if not above.is_dir():
        raise ShearlingError(
            f"{path} can't be written: {above} is a file, not a folder.",
            hint="Name another place with --out.",
        )


def check_file(path: Path) -> None:
    """A path is one where a file can be written, or written over.

    Raises:
        ShearlingError: it is a folder, or what stands above it is none.
    """
    check_parents(path)
    if path.is_dir():
        raise ShearlingError(
            f"{path} can't be written: it is a folder.", hint="Name a file with --out."
        )


def check_tasks(settings: BenchmarkSettings) -> None:
    """Every task of the benchmark exists."""
    tasks.check_tasks(settings)


def check_mirror(settings: BenchmarkSettings) -> None:
    """The mirror is no file; one that isn't there is only worth a word (``missing_mirror``).

    Raises:
        ShearlingError: if it is a file.
    """
    for problem in _mirror_problems(settings):
        raise ShearlingError(
            f"{problem}.", hint="Name the folder in which it lies, with --mirror or in the recipe."
        )


def _mirror_problems(settings: BenchmarkSettings) -> list[str]:
    if settings.mirror and Path(settings.mirror).expanduser().is_file():
        return [f"benchmark.mirror: {settings.mirror} is a file, not a folder of JSONL files"]
    return []


def missing_mirror(settings: BenchmarkSettings) -> str | None:
    """What to say of a mirror that isn't there; None where no task misses it.

    No error: a shipped recipe names one that not everybody has.
    """
    if not settings.mirror or Path(settings.mirror).expanduser().exists():
        return None
    asked = [task for task in settings.tasks if task not in tasks.OWN]
    if not asked:
        return None
    return (
        f"benchmark.mirror: {settings.mirror} does not exist, so the hub is asked for the data of "
        f"{', '.join(asked)}."
    )


def check_paths(recipe: Recipe) -> None:
    """All of the recipe's local paths exist and are not empty; no revision of one is asked for.

    Raises:
        ShearlingError: with every path that is wrong.
    """
    problems = []
    models: dict[str, TeacherSettings] = {"teacher": recipe.teacher}
    models |= {s.name: s for s in recipe.stages if isinstance(s, TeacherStage)}
    for name, settings in models.items():
        model = settings.model
        if settings.revision is not None and _is_here(model):
            problems.append(
                f"{name}.revision: {settings.revision} is of a hub id, and {model} is none; "
                "remove it, or name the hub's model"
            )
        local = _looks_local(model) or "/" not in model  # a hub id is OWNER/NAME
        if local and not Path(model).expanduser().exists():
            problems.append(f"{name}.model: {model} does not exist")
        elif Path(model).expanduser().is_file() and not model.lower().endswith(".gguf"):
            problems.append(f"{name}.model: {model} is a single file, but no .gguf file")
    for source in recipe.transfer_set.sources:
        path = Path(source.path).expanduser()
        where = f"transfer_set.sources.{source.name}.path: {source.path}"
        if path.is_file() and path.stat().st_size == 0:
            problems.append(f"{where} is empty")
        elif path.is_dir() and not any(path.iterdir()):
            problems.append(f"{where} is an empty folder")
        elif source.format != "dataset" and _looks_local(source.path) and not path.exists():
            problems.append(f"{where} does not exist")
        if source.sha256 is not None and (path.is_dir() or is_data_set(source)):
            problems.append(
                f"transfer_set.sources.{source.name}.sha256 is of one file, and {source.path} is "
                "none; remove it"
            )
    problems += _mirror_problems(recipe.benchmark)
    if problems:
        raise ShearlingError(
            itemised("The recipe names files that can't be used like that:", problems),
            hint="Relative paths count from the recipe's folder, then from the folder the command "
            "runs in. Override one with --set, as in --set teacher.model=PATH.",
        )


def check_processes(recipe: Recipe, processes: int) -> None:
    """So many processes can train as every stage wants to, and there are sources to mix.

    The training loop refuses the rest, but only when what comes before it has been done.

    Raises:
        ShearlingError: with all that it would refuse.
    """
    problems = [
        f"{stage.name}: {problem}"
        for stage in _trainings(recipe)
        for problem in _refused_trainings(recipe, stage, processes)
    ]
    if problems:
        raise ShearlingError(
            itemised("The recipe can't be trained like that:", problems),
            hint="Change the recipe, override a key with --set, or start another number of "
            "processes.",
        )


def _refused_trainings(
    recipe: Recipe, stage: DistillStage | CorrectStage, processes: int
) -> Iterator[str]:
    settings, window = _as_distillation(stage), recipe.transfer_set.window
    windows = steps_of(settings, window)[1] // window
    if windows < processes:
        yield (
            f"a step of {settings.batch_tokens} tokens has {windows} "
            f"{'window' if windows == 1 else 'windows'} of {window}, fewer than the {processes} "
            f"processes; set batch_tokens to {processes * window} or more"
        )
    if settings.on_policy and processes > 1:
        yield (
            f"on_policy can't be used with {processes} processes: a split student can't write; "
            "set it to 0"
        )
    if settings.adaptive_mix and len(recipe.transfer_set.all_sources) < 2:
        yield (
            "adaptive_mix needs several sources, and the transfer set has one; add to "
            "transfer_set.sources, or set it to 0"
        )


def warnings(recipe: Recipe, teacher: Shape | None) -> list[str]:
    """What is no mistake for certain, but likely not meant; to be told when the run begins.

    ``teacher``: its shape, where it is known by now.
    """
    missing = missing_mirror(recipe.benchmark)
    told = [missing] if missing else []
    told += [w for source in recipe.transfer_set.sources for w in _without_effect(source)]
    told += [w for stage in recipe.stages if isinstance(stage, DistillStage) for w in _idle(stage)]
    told += _idle_in_cuts(recipe, teacher)
    return [*told, *_little_calibration(recipe, teacher), *_few_steps(recipe), *_repeats(recipe)]


def _little_calibration(recipe: Recipe, teacher: Shape | None) -> Iterator[str]:
    """Cuts that look at fewer positions than the stream has directions to choose among."""
    for stage, before, _ in _cuts(recipe, teacher) if teacher else ():
        if stage.calibration_tokens < before.hidden_size:
            yield (
                f"{stage.name} looks at {stage.calibration_tokens:,} tokens of a model with "
                f"{before.hidden_size:,} hidden dims: too few to choose and refit by; raise "
                f"{stage.name}.calibration_tokens."
            )


def _few_steps(recipe: Recipe) -> Iterator[str]:
    for stage in _trainings(recipe):
        steps, tokens = steps_of(_as_distillation(stage), recipe.transfer_set.window)
        if steps < FEWEST_STEPS:
            yield (
                f"{stage.name} trains for {steps} {'step' if steps == 1 else 'steps'} of "
                f"{tokens:,} tokens, which changes little; raise {stage.name}.tokens or lower "
                f"{stage.name}.batch_tokens."
            )


def _repeats(recipe: Recipe) -> Iterator[str]:
    """Stages that read the same text too often."""
    tokens, known = transfer_set_tokens(recipe)
    text = recipe.transfer_set
    what, remedy = f"about {tokens:,} tokens of the transfer set", "name more text"
    if text.written and not text.sources:
        what = f"{text.written.tokens:,} tokens that the teacher writes"
        remedy = "raise transfer_set.written.tokens"
    for stage in _trainings(recipe) if known and tokens else ():
        times = stage.tokens / tokens
        if times > MOST_REPEATS:
            yield (
                f"{stage.name} reads the {what} {times:.0f} times, and more than {MOST_REPEATS} "
                f"teach little; {remedy} or lower {stage.name}.tokens."
            )


def _trainings(recipe: Recipe) -> list[DistillStage | CorrectStage]:
    return [stage for stage in recipe.stages if isinstance(stage, (DistillStage, CorrectStage))]


def _as_distillation(stage: DistillStage | CorrectStage) -> DistillSettings:
    return stage.as_distillation() if isinstance(stage, CorrectStage) else stage


def transfer_set_tokens(recipe: Recipe) -> tuple[int, bool]:
    """Tokens of the transfer set, and whether the recipe or its files tell them.

    A local text has about one token for four bytes. Where nothing tells, it is taken to be as
    long as the longest distillation.
    """
    settings = recipe.transfer_set
    if settings.tokens is not None:
        return settings.tokens, True
    counts = [source.tokens or _tokens_in(source) for source in settings.sources]
    counts += [settings.written.tokens] if settings.written else []
    if all(counts):
        return sum(counts), True
    wanted = [stage.tokens for stage in recipe.stages if isinstance(stage, DistillStage)]
    return max([sum(counts), *wanted]), False


def _tokens_in(source: SourceSettings) -> int:
    """About how many tokens a local file or folder of text has; 0 where it isn't here."""
    return sum(_plain_bytes(file) for file in local_files(source)) // 4


def _plain_bytes(file: Path) -> int:
    """Of a text that may be compressed, which makes English about a third as long."""
    return file.stat().st_size * (3 if file.suffix.lower() in (".gz", ".zst") else 1)


def _without_effect(source: SourceSettings) -> list[str]:
    """What only ``datasets.load_dataset`` obeys, given to a source that it doesn't open.

    No error: a recipe's data set may be replaced by a file of one's own with a single --set.
    """
    saved = saved_splits(Path(source.path).expanduser())
    if not saved and (source.format == "dataset" or not _is_here(source.path)):
        return []
    split = None if source.split == "train" or saved == "several" else source.split
    given = {"split": split, "config": source.config}
    return [
        f"transfer_set.sources.{source.name}.{key}: {value} has no effect, for {source.path} is "
        "read as it is."
        for key, value in given.items()
        if value is not None
    ]


def _idle(stage: DistillStage) -> Iterator[str]:
    skewed = stage.skewed_kl or stage.skewed_reverse_kl
    reasons = {
        "target_slots": "" if stage.targets != "live" else "targets is live",
        "jensen_shannon_beta": "" if stage.jensen_shannon else "jensen_shannon is 0",
        "skew": "" if skewed else "skewed_kl and skewed_reverse_kl are 0",
        "hidden.kind": "" if stage.hidden.weight else "hidden.weight is 0",
        "attention.kind": "" if stage.attention.weight else "attention.weight is 0",
        "on_policy_temperature": "" if stage.on_policy else "on_policy is 0",
    }
    return _without_use(stage, DistillSettings(tokens=stage.tokens), reasons)


def _idle_in_cuts(recipe: Recipe, teacher: Shape | None) -> Iterator[str]:
    usual = PruneSettings()
    for stage in recipe.stages:
        if isinstance(stage, PruneStage) and not stage.refit:
            yield from _without_use(stage, usual, {"ridge": "refit is false"})
    for stage, before, student in _cuts(recipe, teacher) if teacher else ():
        if stage.budget:
            continue  # each candidate is cut along other axes
        whole = before.num_hidden_layers == student.num_hidden_layers
        wide = before.hidden_size == student.hidden_size
        merges = student.merges_ends_of(before)
        reasons = {
            "depth": "no layer is cut" if whole else "",
            "basis": "the hidden size stays" if wide else "",
            "merge": "" if merges else "embedding and output head are not made one",
        }
        yield from _without_use(stage, usual, reasons)


def _without_use(
    stage: DistillStage | PruneStage,
    usual: DistillSettings | PruneSettings,
    reasons: Mapping[str, str],
) -> Iterator[str]:
    """Settings that differ from their defaults beside what they belong to, which is off.

    No error: what they belong to may be switched on with a single --set.
    """
    for key, reason in reasons.items():
        value, default = (attrgetter(key)(settings) for settings in (stage, usual))
        if reason and value != default:
            yield f"{stage.name}.{key}: {value} has no effect, for {reason}."


def _is_here(path: str) -> bool:
    """Whether a name means files, on this disk or in a package, and not something on the hub."""
    local = path.startswith("pypi:") or _looks_local(path)
    return local or Path(path).expanduser().exists()


def _looks_local(path: str) -> bool:
    """Whether a name can only mean a file here, and not a package, a hub id or a dataset."""
    if path.startswith("pypi:"):
        return False
    return path.startswith((".", "/", "~")) or path.lower().endswith(_FILE_ENDINGS)


def check_teacher(folder: Path) -> None:
    """Open a local Hugging Face folder; missing, cut-off and foreign files end here."""
    from teachers.checkpoint import open_checkpoint

    open_checkpoint(folder).tokenizer()


def check_shapes(recipe: Recipe, teacher: Shape) -> None:
    """Every prune stage's shape fits the model before it.

    Raises:
        ShearlingError: with the problems of the first stage that does not fit.
    """
    for _ in _cuts(recipe, teacher):
        pass


def _cuts(recipe: Recipe, teacher: Shape) -> Iterator[tuple[PruneStage, Shape, Shape]]:
    """Each prune stage with the shape before and behind it; an error where it does not fit."""
    newest = teacher
    for stage in recipe.stages:
        if isinstance(stage, PruneStage):
            try:
                before = newest
                newest = student_shape(stage.shape_spec(), teacher=teacher, newest=before)
                stage.check_depth(before, newest)
            except ShearlingError as error:
                raise ShearlingError(
                    f"Stage {stage.name}: {error.what}", hint=error.hint
                ) from error
            yield stage, before, newest


def check_tokenizers(recipe: Recipe) -> None:
    """All teachers give the same ids, as far as their folders or their names tell by now.

    Raises:
        ShearlingError: one of them can't teach this recipe's students; says what would work.
    """
    others = [stage for stage in recipe.stages if isinstance(stage, TeacherStage)]
    for other in others:
        try:
            _check_tokenizer(other.model, recipe.teacher.model)
        except ShearlingError as error:
            raise ShearlingError(f"Stage {other.name}: {error.what}", hint=error.hint) from error


def _check_tokenizer(other: str, teacher: str) -> None:
    from teachers.checkpoint import folder_format
    from teachers.tokenizer import check_same_tokenizer, other_tokenizer

    folders = [Path(model).expanduser() for model in (other, teacher)]
    if all(folder.is_dir() and folder_format(folder) == "folder" for folder in folders):
        check_same_tokenizer(*folders)
        return
    known = [known_family(model) for model in (other, teacher)]
    if None in known:
        return  # told when both are here
    told = [f"{f.tokenizer}, {f.shape.vocab_size:,} tokens" for f in known if f is not None]
    if told[0] != told[1]:
        raise other_tokenizer(f"{other} has {told[0]}; {teacher} has {told[1]}")


def check_with_teacher(recipe: Recipe, artefact: Path) -> None:
    """What needs the teacher's config, where it is known: shapes, rotations, lengths of text.

    Raises:
        ShearlingError: the teacher is broken, or something does not fit it.
    """
    from teachers.checkpoint import folder_format

    local = Path(recipe.teacher.model).expanduser()
    if local.is_dir() and folder_format(local) == "folder":
        check_teacher(local)
    config = known_teacher_config(recipe, artefact)
    if config is None:
        return
    check_shapes(recipe, Shape.from_config(config))
    _check_exports(recipe, artefact, config)
    if config.get("model_type") == "llama":  # of others it is made at their import
        _check_rotations(recipe, config)
    context = config.get("max_position_embeddings")
    if isinstance(context, int):
        recipe.transfer_set.check_context(context)


def _check_exports(recipe: Recipe, artefact: Path, config: dict[str, Any]) -> None:
    """The teacher's tokenizer, which the student will have, fits into a GGUF if one is wanted."""
    from students.gguf_vocabulary import vocabulary_metadata
    from teachers.tokenizer import load_tokenizer

    exports = [stage for stage in recipe.stages if stage.kind == "export" and stage.to == "gguf"]
    folder = artefact / "model"
    if not exports or not folder.is_dir():
        return
    try:
        vocabulary_metadata(load_tokenizer(folder), config["vocab_size"])
    except ShearlingError as error:
        raise ShearlingError(f"Stage {exports[0].name}: {error.what}", hint=error.hint) from error


def _check_rotations(recipe: Recipe, config: dict[str, Any]) -> None:
    """Narrower heads turn as the teacher's do, which its rotary embedding may not allow."""
    from transformers import LlamaConfig

    from compress.selection import check_rotary
    from students.build import student_config

    before = LlamaConfig.from_dict(config)
    for stage, _, shape in _cuts(recipe, Shape.from_config(config)):
        student = student_config(before, shape)
        try:
            check_rotary(before, student)
        except ShearlingError as error:
            raise ShearlingError(f"Stage {stage.name}: {error.what}", hint=error.hint) from error
        before = student


def known_teacher_config(recipe: Recipe, artefact: Path) -> dict[str, Any] | None:
    """The teacher's config.json if it can be told without importing it, else None."""
    from teachers.checkpoint import folder_format

    local = Path(recipe.teacher.model).expanduser()
    config = artefact / "model" / "config.json"
    if local.is_dir() and folder_format(local) == "folder":
        config = local / "config.json"
    elif local.is_file():  # a GGUF
        from teachers.gguf_file import llama_config
        from teachers.gguf_header import read_gguf

        return dict(llama_config(read_gguf(local)).to_dict())
    return dict(read_json(config)) if config.is_file() else None
