"""`shearling plan`: what a recipe will need, told before anything is spent.

Everything comes from shapes: no weights are read, and a teacher that is known by name need not be
here at all. The formulas are in ``pipelines.estimate`` and its two neighbours, the machines in
``pipelines.accelerators``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.settings import DistillSettings
from pipelines import preflight
from pipelines.accelerators import MEMORY_SHARE, Machine
from pipelines.cost import LIBRARIES, Cost, Moment, Saving, Writing, share_of
from pipelines.estimate import (
    benchmark_cost,
    export_cost,
    import_cost,
    transfer_set_cost,
    written_cost,
)
from pipelines.estimate_distill import distill_cost
from pipelines.estimate_prune import prune_cost, search_cost
from pipelines.recipe import (
    CorrectStage,
    DistillStage,
    ExportStage,
    PruneStage,
    Recipe,
    TeacherStage,
)
from pipelines.stages.distill import in_order
from pipelines.stages.prune import possible_shapes
from shearling import ShearlingError, read_json
from students.shape import Shape
from teachers.families import known_family
from teachers.settings import TeacherSettings

SCHEMA = 1
PLAN_FILE = "plan.json"
TOKENISING = 100_000.0
"""Tokens a second and core (measured: tests/bench/bench_tokenising.py)."""
DISK = 0.5e9
"""Bytes a second, read or written and hashed, of all processes; a guess for a common disk."""
SAVES_APART = 20.0
"""How many times as long as a checkpoint takes a training waits for the next, at least."""
LAYER_STEP = 0.8e-3
"""Seconds that a layer takes for one step of writing, however small it is (measured on a CPU;
launching a GPU's kernels is of that order)."""
OPENING = {"teacher": 1.0, "benchmark": 4.0, "prune": 1.0, "correct": 1.0, "distill": 1.0}
"""Seconds that a step takes before it works: libraries, lm-eval's tasks, choosing a precision
(measured on two busy cores with a model of 50,000 parameters)."""
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8}


@dataclass(frozen=True, kw_only=True)
class TeacherFacts:
    """What planning needs to know of a teacher."""

    name: str
    shape: Shape
    form: str
    """folder (taken as it is), hub, gguf, meta, mllama or relative."""
    dtype_bytes: int
    """Of a stored weight, once the teacher is a Hugging Face folder."""
    context: int | None
    told_by: str


# --- the teacher --------------------------------------------------------------------------------


def teacher_facts(settings: TeacherSettings, artefact: Path | None = None) -> TeacherFacts:
    """The teacher's shape from its files, from an earlier import (``artefact``), or by its name.

    Raises:
        ShearlingError: it is not here, and its name tells no Llama that is known.
    """
    name = settings.model
    local = Path(name).expanduser()
    if artefact is not None and (artefact / "model" / "config.json").is_file():
        form = _form_of(local, name)
        return _from_config(name, artefact / "model" / "config.json", form, "an earlier import")
    if local.is_file() and local.suffix.lower() == ".gguf":
        return _from_gguf(name, local)
    if local.is_dir():
        return _from_folder(name, local)
    known = known_family(name)
    if known is None:
        raise ShearlingError(
            f"The shape of the teacher {name} is not known: it is not on this disk, and its name "
            "is none of the families'.",
            hint="Download it first, or name one of the Llamas that `shearling families` lists.",
        )
    form = _form_of(local, name)
    return TeacherFacts(
        name=name,
        shape=known.shape,
        form="mllama" if known.vision else form,
        dtype_bytes=4 if form == "gguf" else 2,
        context=known.context,
        told_by=f"its name: {known.title}",
    )


def _form_of(local: Path, name: str) -> str:
    if name.lower().endswith(".gguf"):
        return "gguf"
    if local.is_dir():
        from teachers.checkpoint import folder_format

        return folder_format(local)
    return "hub"


def _from_config(name: str, path: Path, form: str, told_by: str) -> TeacherFacts:
    config = read_json(path)
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    context = config.get("max_position_embeddings")
    return TeacherFacts(
        name=name,
        shape=Shape.from_config(config),
        form=form,
        dtype_bytes=_BYTES.get(dtype, 4),
        context=context if isinstance(context, int) else None,
        told_by=told_by,
    )


def _from_folder(name: str, folder: Path) -> TeacherFacts:
    """A Hugging Face folder, Meta's own release, or a vision model's folder."""
    form = _form_of(folder, name)
    if form == "meta":
        from teachers.meta_format import MetaRelease, meta_config

        config = meta_config(MetaRelease(folder))
    elif form == "mllama":
        from teachers.mllama import text_config

        config, _ = text_config(folder)
    elif form == "relative":
        from teachers.relatives import llama_config as relative_config

        config = relative_config(folder)
    else:
        from teachers.checkpoint import Checkpoint

        Checkpoint(folder)  # refuses by name what is no Llama
        return _from_config(name, folder / "config.json", form, "its config.json")
    return TeacherFacts(
        name=name,
        shape=Shape.from_config(config),
        form=form,
        dtype_bytes=_BYTES.get(str(config.dtype).removeprefix("torch."), 2),
        context=config.max_position_embeddings,
        told_by="its files",
    )


def _from_gguf(name: str, path: Path) -> TeacherFacts:
    from teachers.gguf_file import llama_config
    from teachers.gguf_header import read_gguf

    config = llama_config(read_gguf(path))
    return TeacherFacts(
        name=name,
        shape=Shape.from_config(config),
        form="gguf",
        dtype_bytes=4,
        context=config.max_position_embeddings,
        told_by="its header",
    )


# --- the plan -----------------------------------------------------------------------------------


def make_plan(
    recipe: Recipe,
    teacher: TeacherFacts,
    machine: Machine,
    *,
    processes: int = 1,
    imported: Mapping[str, Path] = {},
) -> dict[str, Any]:
    """The plan as JSON: teacher, machine, a row for each step, totals, assumptions, warnings.

    ``imported`` says where further teachers are that a run has brought in, by their stage.

    Raises:
        ShearlingError: a stage's shape does not fit the model before it, a teacher has another
            tokenizer than the recipe's, or so many processes can't share a stage.
    """
    preflight.check_tokenizers(recipe)
    preflight.check_processes(recipe, processes)
    steps = list(stage_costs(recipe, teacher, machine, imported))
    rows = [_row(*step, machine, processes) for step in steps]
    costs = {name: cost for name, _, _, cost in steps}
    return {
        "schema": SCHEMA,
        "recipe": recipe.name,
        "teacher": {
            "model": teacher.name,
            "parameters": teacher.shape.parameters,
            "shape": teacher.shape.to_dict(),
            "context": teacher.context,
            "told_by": teacher.told_by,
        },
        "machine": machine.to_dict(),
        "processes": processes,
        "stages": rows,
        "total": _total(rows),
        "assumptions": [
            *_assumptions(machine),
            *_searches(recipe),
            *_written(recipe, teacher, machine),
        ],
        "warnings": list(_warnings(recipe, teacher, machine, rows, costs, processes)),
    }


def stage_costs(
    recipe: Recipe,
    teacher: TeacherFacts,
    machine: Machine,
    imported: Mapping[str, Path] = {},
) -> Iterator[tuple[str, str, Shape | None, Cost]]:
    """(name, kind, the shape of the model that it makes, cost) of every step, in order."""
    window, width = recipe.transfer_set.window, teacher.dtype_bytes
    tokens, known = preflight.transfer_set_tokens(recipe)

    def measured(name: str, shape: Shape) -> tuple[str, str, Shape, Cost]:
        cost = benchmark_cost(shape, recipe.benchmark, dtype_bytes=width, on_cpu=machine.on_cpu)
        return f"{name}/benchmark", "benchmark", shape, cost

    yield "teacher", "teacher", teacher.shape, import_cost(teacher.shape, teacher.form, width)
    yield "transfer_set", "transfer_set", None, _text_cost(recipe, teacher, machine, tokens)
    yield measured("teacher", teacher.shape)
    newest = teacher.shape
    shapes = {"teacher": teacher.shape}

    def taught(settings: DistillSettings, teachers: list[Shape]) -> Cost:
        return distill_cost(
            teachers,
            newest,
            settings,
            window=window,
            heldout_windows=recipe.transfer_set.heldout_windows,
            distinct_tokens=tokens if known else 0,
            product=machine.precision(settings.precision),
            dtype_bytes=width,
            on_cpu=machine.on_cpu,
        )

    for stage in recipe.stages:
        if isinstance(stage, TeacherStage):
            other = teacher_facts(stage, imported.get(stage.name))
            shapes[stage.name] = other.shape
            cost = import_cost(other.shape, other.form, other.dtype_bytes)
            yield stage.name, "teacher", other.shape, cost
            yield measured(stage.name, other.shape)
            continue
        if isinstance(stage, PruneStage):
            before, tried = newest, _cuts(stage, teacher.shape, newest)
            newest = tried[0]
            told: dict[str, Any] = {
                "window": window,
                "product": machine.precision(stage.precision),
                "dtype_bytes": width,
            }
            if stage.budget:
                cost = search_cost(
                    before,
                    tried,
                    stage,
                    tokens=stage.budget.tokens,
                    heldout_windows=recipe.transfer_set.heldout_windows,
                    **told,
                )
            else:
                cost = prune_cost(before, newest, stage, **told)
            yield stage.name, "prune", newest, cost
        elif isinstance(stage, DistillStage):
            teachers = [shapes[name] for name in in_order(stage.teachers or ("teacher",))]
            yield stage.name, "distill", newest, taught(stage, teachers)
        elif isinstance(stage, CorrectStage):
            yield stage.name, "correct", newest, taught(stage.as_distillation(), [])
        elif isinstance(stage, ExportStage):
            yield stage.name, "export", newest, export_cost(newest, stage, width)
            continue
        yield measured(stage.name, newest)


def _text_cost(recipe: Recipe, teacher: TeacherFacts, machine: Machine, tokens: int) -> Cost:
    """Of the transfer set, with what the teacher writes of it."""
    packing, settings = transfer_set_cost(tokens, teacher.shape.vocab_size), recipe.transfer_set
    if settings.written is None:
        return packing
    return written_cost(
        packing,
        teacher.shape,
        settings.written,
        length=settings.written.longest(settings.window, teacher.context),
        width=_BYTES[machine.writing_precision],
    )


def _cuts(stage: PruneStage, teacher: Shape, newest: Shape) -> list[Shape]:
    try:
        return possible_shapes(stage.shape_spec(), teacher=teacher, newest=newest)
    except ShearlingError as error:
        raise ShearlingError(f"Stage {stage.name}: {error.what}", hint=error.hint) from error


def _row(
    name: str, kind: str, shape: Shape | None, cost: Cost, machine: Machine, processes: int
) -> dict[str, Any]:
    divided = min(processes, cost.most_processes)
    worst = cost.worst(on_cpu=machine.on_cpu, processes=divided)
    memory = _parts(worst, machine, divided)
    host = max(moment.host_bytes(divided) for moment in cost.moments_of(divided))
    least, most = processes_that_fit(cost, machine)
    return {
        "name": name,
        "kind": kind,
        "parameters": shape.parameters if shape else None,
        "memory_bytes": round(sum(memory.values())),
        "host_bytes": None if machine.on_cpu else round(host),
        "moment": worst.what,
        "memory": {part: round(size) for part, size in memory.items()},
        "disk_bytes": round(cost.disk),
        "cache_bytes": round(cost.cached),
        "scratch_bytes": round(cost.scratch),
        "tokens": cost.tokens,
        "flops": float(f"{_all_flops(cost):.6g}"),
        "seconds": round(seconds(kind, cost, machine, divided), 1),
        "least_processes": least,
        "most_processes": most,
    }


def _all_flops(cost: Cost) -> float:
    return sum(cost.flops.values()) + (cost.writing.flops if cost.writing else 0.0)


def _parts(moment: Moment, machine: Machine, processes: int) -> dict[str, float]:
    parts = share_of(moment.device, processes)
    if machine.on_cpu:
        for name, size in {**share_of(moment.host, processes), "libraries": LIBRARIES}.items():
            parts[name] = parts.get(name, 0.0) + size
    return {name: size for name, size in parts.items() if size}


def seconds(kind: str, cost: Cost, machine: Machine, processes: int) -> float:
    """Time of a step: what its processes share, the disk, that is one, and the libraries."""
    working = _working_seconds(kind, cost, machine) / processes
    saving = saving_seconds(cost.saving, working) if cost.saving else 0.0
    return OPENING.get(kind, 0.0) + cost.moved / DISK + working + saving


def saving_seconds(saving: Saving, working: float) -> float:
    """Time in which a training that works for so long waits for its checkpoints to be written."""
    each = saving.bytes / DISK
    # 0 asks for one after every step, whatever it takes.
    rarely = max(saving.every, SAVES_APART * each) if saving.every else 0.0
    between = max(rarely, working / saving.steps)
    return working // between * each + saving.best / DISK


def _working_seconds(kind: str, cost: Cost, machine: Machine) -> float:
    """Time of one process: each arithmetic at its share of the machine's rate."""
    if kind == "transfer_set":
        written = cost.writing.tokens if cost.writing else 0
        return (cost.tokens - written) / TOKENISING + writing_seconds(cost.writing, machine)
    spent = 0.0
    product = machine.rates[cost.product or machine.precision("auto")]
    for arithmetic, flops in cost.flops.items():
        if arithmetic == "product":
            spent += flops / (product * machine.share["distill" if kind == "correct" else kind])
        elif kind == "benchmark":
            spent += flops / (machine.rates[arithmetic] * machine.share[kind])
        else:
            spent += flops / (machine.rates[arithmetic] * machine.share[arithmetic])
    return spent + writing_seconds(cost.writing, machine)


def writing_seconds(writing: Writing | None, machine: Machine) -> float:
    """Time in which a model writes: its memory, its arithmetic and the calls of each layer, added.

    They overlap in part, so this is rather too long than too short.
    """
    if writing is None:
        return 0.0
    rate = machine.rates[machine.writing_precision] * machine.share["benchmark"]
    calls = writing.layer_steps * LAYER_STEP
    return calls + writing.bytes / machine.memory_rate + writing.flops / rate


def _room(machine: Machine) -> float:
    return MEMORY_SHARE * machine.memory_bytes


def _needed(cost: Cost, machine: Machine, processes: int) -> float:
    """Bytes on a device, or on a CPU of all processes together, at the worst moment."""
    divided = min(processes, cost.most_processes)
    return max(
        moment.together_bytes(divided) if machine.on_cpu else moment.device_bytes(divided)
        for moment in cost.moments_of(divided)
    )


def processes_that_fit(cost: Cost, machine: Machine) -> tuple[int | None, int | None]:
    """The least number of processes with which a stage fits, and the most that can share it.

    On a CPU all processes share one memory, so more never help it to fit; elsewhere each brings
    its own device. Both are None where no number fits.
    """
    most = cost.most_processes
    counts = [*(2**n for n in range((most - 1).bit_length())), most]
    fitting = [count for count in counts if _needed(cost, machine, count) <= _room(machine)]
    if not fitting:
        return None, None
    return fitting[0], fitting[-1] if machine.on_cpu else most


def _total(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    rows = list(rows)
    host = [row["host_bytes"] for row in rows if row["host_bytes"] is not None]
    return {
        "seconds": round(sum(row["seconds"] for row in rows), 1),
        "flops": float(f"{sum(row['flops'] for row in rows):.6g}"),
        "memory_bytes": max(row["memory_bytes"] for row in rows),
        "host_bytes": max(host, default=None),
        "disk_bytes": sum(row["disk_bytes"] for row in rows)
        + max(row["scratch_bytes"] for row in rows),
    }


def _assumptions(machine: Machine) -> list[str]:
    rates = ", ".join(f"{rate / 1e12:.3g} in {name}" for name, rate in machine.rates.items())
    shares = ", ".join(f"{share:.0%} {kind}" for kind, share in machine.share.items())
    return [
        f"{machine.name}: TFLOP/s {rates} ({machine.source})",
        f"of these rates the stages reach: {shares}",
        f"a disk moves {DISK / 1e9:g} GB/s, of all processes; downloads are not counted",
        "benchmarks: a rough number of tokens for each task",
    ]


def _searches(recipe: Recipe) -> Iterator[str]:
    for stage in recipe.stages:
        if isinstance(stage, PruneStage) and stage.budget:
            yield (
                f"{stage.name} tries at most {stage.budget.candidates} shapes under its budget; "
                "what follows is planned for the first of them"
            )


def _written(recipe: Recipe, teacher: TeacherFacts, machine: Machine) -> Iterator[str]:
    settings = recipe.transfer_set
    if settings.written is None:
        return
    why = "" if settings.sources else "the recipe names no text, so "
    length = settings.written.longest(settings.window, teacher.context)
    yield (
        f"{why}the teacher writes {settings.written.tokens:,} tokens of the transfer set itself, "
        f"in documents of {length:,} tokens, {settings.written.batch:,} at a time; its memory "
        f"moves {machine.memory_rate / 1e9:.3g} GB/s"
    )


def _warnings(
    recipe: Recipe,
    teacher: TeacherFacts,
    machine: Machine,
    rows: list[dict[str, Any]],
    costs: Mapping[str, Cost],
    processes: int,
) -> Iterator[str]:
    context = teacher.context
    for key, length in recipe.transfer_set.lengths.items():
        if context is not None and length > context:
            yield f"{key} {length:,} is more than the teacher's context of {context:,} tokens"
    yield from (told.removesuffix(".") for told in preflight.warnings(recipe, teacher.shape))
    for row in rows:
        if row["least_processes"] is None:
            yield (
                f"{row['name']} needs {row['memory_bytes'] / 1e9:.3g} GB ({row['moment']}); "
                f"{machine.name} has {machine.memory_bytes / 1e9:.3g} GB"
            )
        elif row["least_processes"] > processes:
            yield (
                f"{row['name']} needs {row['memory_bytes'] / 1e9:.3g} GB on each of {processes} "
                f"processes; with {row['least_processes']} it fits into "
                f"{machine.memory_bytes / 1e9:.3g} GB"
            )
        elif (together := _needed(costs[row["name"]], machine, processes)) > _room(machine):
            yield (
                f"{row['name']} needs {together / 1e9:.3g} GB with {processes} processes; with "
                f"{row['most_processes']} it fits into {machine.memory_bytes / 1e9:.3g} GB"
            )
        if machine.host_bytes and not machine.on_cpu:
            yield from _little_on_the_host(
                row["name"], costs[row["name"]], processes, machine.host_bytes
            )
    need, free = _total(rows)["disk_bytes"], machine.disk_free_bytes
    if free is not None and need > free:
        yield f"the run writes {need / 1e9:.3g} GB; the disk has {free / 1e9:.3g} GB left"


def _little_on_the_host(name: str, cost: Cost, processes: int, present: int) -> Iterator[str]:
    """Of a host with accelerators, on which all of a stage's processes are."""
    divided = min(processes, cost.most_processes)
    worst = max(cost.moments_of(divided), key=lambda m: m.host_together_bytes(divided))
    host = worst.host_together_bytes(divided)
    if host > MEMORY_SHARE * present:
        alone = "" if divided == 1 else f" for {divided} processes"
        yield (
            f"{name} needs {host / 1e9:.3g} GB of the host's memory{alone} ({worst.what}); "
            f"the host has {present / 1e9:.3g} GB"
        )
