"""Commands that make a run or look at one: run, resume, status, watch."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipelines.terminal import (
    JsonOption,
    RecipeArgument,
    RunArgument,
    SetOption,
    download_cache,
    log_unexpected,
    make_console,
    patience,
    print_json,
    stop_signals,
)
from shearling import ShearlingError

if TYPE_CHECKING:
    from pipelines.display import Display
    from pipelines.recipe import Recipe
    from pipelines.runner import Options


def run(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    out: Annotated[
        Path | None, typer.Option(help="The run's folder; by default runs/NAME.", metavar="DIR")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be done, and why.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Hash every finished file before it is used again.")
    ] = False,
    locked: Annotated[
        Path | None,
        typer.Option(help="Refuse unless all is as this lock.json says.", metavar="LOCK.JSON"),
    ] = None,
    processes: Annotated[
        int, typer.Option(min=1, help="Distil with so many processes; docs/CLUSTERS.md has more.")
    ] = 1,
    as_json: Annotated[
        bool, typer.Option("--json", help="With --dry-run: print the decisions as JSON.")
    ] = False,
) -> None:
    """Run a recipe, or go on with a run that was interrupted.

    A stage whose recipe, inputs and code have not changed is not run again.
    """
    if as_json and not dry_run:
        raise ShearlingError(
            "run prints JSON only of its decisions.",
            hint="Add --dry-run; of a run itself `shearling status RUN --json` tells all.",
        )
    if processes > 1 and not dry_run and "WORLD_SIZE" not in os.environ:
        from pipelines.crew import start_processes

        raise typer.Exit(start_processes(processes, sys.argv[1:]))
    from pipelines.recipe import load_recipe
    from pipelines.runner import Options, check, decisions, warnings

    try:
        loaded = load_recipe(recipe, overrides or [])
    except ShearlingError:
        if os.environ.get("RANK", "0") == "0":
            raise
        raise typer.Exit(2) from None  # one of several processes tells the user
    folder = out or Path("runs") / loaded.name
    options = Options(
        run=folder.expanduser(),
        cache=download_cache(),
        again=_run_command(recipe, overrides, out, processes, locked, verify),
        verify=verify,
        locked=locked,
        processes=int(os.environ.get("WORLD_SIZE", processes)),
    )
    if dry_run:
        with patience("looking at what is there"):
            steps = check(loaded, options)
            decided = decisions(steps, options)
            warned = warnings(loaded, steps, options)
        if as_json:
            told = [
                {"step": s.name, "kind": s.kind, "runs": d.runs, "reason": d.reason}
                for s, d in decided
            ]
            facts = {"schema": 1, "recipe": loaded.name, "steps": told, "warnings": warned}
            print_json(facts)
            return
        for step, decision in decided:
            print(f"{step.name}: {decision}")
        for warning in warned:
            print(f"Warning: {warning}")
        return
    _go(loaded, options)


def resume(
    run: RunArgument,
    verify: Annotated[
        bool, typer.Option("--verify", help="Hash every finished file before it is used again.")
    ] = False,
) -> None:
    """Go on with a run that was interrupted, as its own recipe.yaml says.

    For when the command that began it is not at hand; the recipe's file may be gone.
    """
    from pipelines.journal import check_is_run
    from pipelines.recipe import load_recipe
    from pipelines.runner import Options

    check_is_run(run)
    again = shlex.join(["shearling", "resume", str(run)])
    options = Options(run=run.expanduser(), cache=download_cache(), again=again, verify=verify)
    _go(load_recipe(str(options.run / "recipe.yaml")), options)


def _go(recipe: Recipe, options: Options) -> None:
    """Run a recipe in sight of the user."""
    from pipelines.display import Display
    from pipelines.runner import run_recipe

    console = make_console()
    with stop_signals(options.again), log_unexpected(options.run):
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            run_recipe(recipe, options, Display(console))
        elif not _run_together(recipe, options, Display(console)):
            return
    console.print(f"The report: {options.run / 'report.html'}", highlight=False, soft_wrap=True)


def _run_together(recipe: Recipe, options: Options, display: Display) -> bool:
    """The same as one of several processes; whether this is the one that leads."""
    from compress.parallel import leads, together
    from pipelines.crew import follow, leading
    from pipelines.machine import pick_device
    from pipelines.runner import run_recipe

    with together(pick_device(recipe.device)):
        if leads():
            with leading():
                run_recipe(recipe, options, display)
            return True
        follow()
        return False


def _run_command(
    recipe: str,
    overrides: list[str] | None,
    out: Path | None,
    processes: int,
    locked: Path | None,
    verify: bool,
) -> str:
    parts = ["shearling", "run", recipe]
    for override in overrides or []:
        parts += ["--set", override]
    if out:
        parts += ["--out", str(out)]
    if processes > 1:
        parts += ["--processes", str(processes)]
    if locked:
        parts += ["--locked", str(locked)]
    if verify:
        parts += ["--verify"]
    return shlex.join(parts)


def status(run: RunArgument, as_json: JsonOption = False) -> None:
    """Say how far a run is, also while it is running."""
    from pipelines.journal import read_status

    found = read_status(run)
    if as_json:
        print_json(found)
        return
    from pipelines.status import status_lines

    console = make_console()
    for line in status_lines(found):
        console.print(line, highlight=False, soft_wrap=True)


def watch(
    run: RunArgument,
    every: Annotated[float, typer.Option(help="Seconds between two looks.", min=0.1)] = 1.0,
) -> None:
    """Show a run while it is at work, until it ends.

    On a terminal the view stays in place; elsewhere a line is printed when something changes.
    Exits with 1 if the run failed or was interrupted.
    """
    from pipelines.watch import watch_run

    with stop_signals(quiet=True):
        state = watch_run(run.expanduser(), make_console(), every=every)
    if state != "done":
        raise typer.Exit(1)
