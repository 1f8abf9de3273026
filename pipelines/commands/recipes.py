"""Commands that come before a run: init."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from shearling import ShearlingError, write_text


def init(
    teacher: Annotated[
        str | None,
        typer.Option(help="The teacher: a model folder, GGUF file or hub id.", metavar="MODEL"),
    ] = None,
    out: Annotated[Path, typer.Option(help="The file to write.", metavar="FILE")] = Path(
        "recipe.yaml"
    ),
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
) -> None:
    """Write a commented recipe that fits a teacher."""
    from pipelines.starter import starter_recipe

    if out.exists() and not force:
        raise ShearlingError(
            f"{out} is already there.", hint="Overwrite it with --force, or name another --out."
        )
    write_text(out, starter_recipe(teacher, out))
    print(f"Wrote {out}. Next: shearling run {shlex.quote(str(out))}")
