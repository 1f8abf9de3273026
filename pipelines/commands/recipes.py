"""Commands that come before a run: init, keys, plan."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from pipelines.terminal import (
    JsonOption,
    RecipeArgument,
    SetOption,
    download_cache,
    make_console,
    patience,
    print_json,
)
from shearling import ShearlingError, write_text


def init(
    teacher: Annotated[
        str | None,
        typer.Option(
            help="The teacher: a model or a stage's folder, GGUF file or hub id.", metavar="MODEL"
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="The file to write.", metavar="FILE")] = Path(
        "recipe.yaml"
    ),
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
) -> None:
    """Write a commented recipe that fits a teacher and this machine.

    How long it distils, and whether it saves memory, come from a plan for what is found here.
    """
    from pipelines.accelerators import this_machine
    from pipelines.machine import pick_device
    from pipelines.named import find_model
    from pipelines.preflight import check_file
    from pipelines.starter import starter_recipe

    check_file(out)
    if out.exists() and not force:
        raise ShearlingError(
            f"{out} is already there.", hint="Overwrite it with --force, or name another --out."
        )
    if teacher is not None:
        told = make_console(stderr=True)
        teacher = find_model(
            teacher, role="teacher", tell=lambda line: told.print(line, markup=False)
        )
    with patience("looking at the teacher and this machine"):
        machine = this_machine(download_cache(), pick_device("auto"), out)
        text = starter_recipe(teacher, out, machine)
    write_text(out, text)
    print(f"Wrote {out}. Next: shearling run {shlex.quote(str(out))}")


def keys(
    place: Annotated[
        str | None,
        typer.Argument(help="A kind of stage or a place: prune, distill.hidden, benchmark, ..."),
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="As docs/RECIPES.md.")] = False,
    as_json: JsonOption = False,
) -> None:
    """List all keys that a recipe may have: what each takes, its default, what it does."""
    from dataclasses import asdict

    from pipelines.keys import as_markdown, sections
    from pipelines.tables import keys_lines

    found = sections(place)
    if as_json:
        print_json([asdict(section) for section in found])
    elif markdown:
        print(as_markdown(found), end="")
    else:
        console = make_console()
        for part in keys_lines(found):
            console.print(part, highlight=False)


def plan(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    accelerator: Annotated[
        str | None,
        typer.Option(help="Plan for this one (h100-sxm, a100-80gb, l4, ...), not this machine."),
    ] = None,
    processes: Annotated[int, typer.Option(help="Processes that share a distillation.", min=1)] = 1,
    as_json: JsonOption = False,
) -> None:
    """Say what a recipe will need before it runs: parameters, memory, disk, FLOPs, time.

    Works from shapes alone: a teacher that is known by name need not be downloaded.
    """
    from pipelines.accelerators import named_machine, this_machine
    from pipelines.crew import threads_of_each
    from pipelines.machine import pick_device
    from pipelines.plan import make_plan, teacher_facts
    from pipelines.recipe import load_recipe
    from pipelines.tables import plan_table

    loaded = load_recipe(recipe, overrides or [])
    facts = teacher_facts(loaded.teacher)
    if processes > 1 and not accelerator:
        import torch

        torch.set_num_threads(threads_of_each(processes))  # as `run` will start them
    with patience("measuring this machine"):
        machine = (
            named_machine(accelerator)
            if accelerator
            else this_machine(download_cache(), pick_device(loaded.device), Path("runs"))
        )
    made = make_plan(loaded, facts, machine, processes=processes)
    if as_json:
        print_json(made)
    else:
        console = make_console()
        for part in plan_table(made, width=console.width):
            console.print(part, highlight=False, soft_wrap=True)
