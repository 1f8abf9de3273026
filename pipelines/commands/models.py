"""Commands about models: families, export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipelines.terminal import (
    JsonOption,
    download_cache,
    make_console,
    print_json,
    stop_signals,
)
from shearling import ShearlingError


def families(
    name: Annotated[
        str | None, typer.Argument(help="Show all facts of this one, with their sources.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List the Llamas that are known by name: shapes, context, RoPE, tokenizer, training."""
    from pipelines.tables import families_lines, families_summary
    from teachers.families import families_table, family, training_table

    rows = families_table()
    if name is not None:
        rows = [row for row in rows if row["name"] == family(name).name]
    if as_json:
        print_json({"schema": 1, "families": rows, "training_recipes": training_table()})
    elif name is not None:
        make_console().print(families_lines(rows[0], training_table()), soft_wrap=True)
    else:
        console = make_console()
        console.print(*families_summary(rows, width=console.width), sep="\n")


def export(
    model: Annotated[
        str,
        typer.Argument(help="A run, a stage's folder, a model folder, a GGUF file or a hub id."),
    ],
    to: Annotated[str, typer.Option(help="hf (a folder) or gguf (one file for llama.cpp).")],
    out: Annotated[Path, typer.Option(help="The folder to write.", metavar="DIR")],
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    quantise: Annotated[
        str | None,
        typer.Option(
            help="GGUF only: q8_0, q5_1, q5_0, q4_1 or q4_0. Matrices whose rows are no "
            "multiple of 32 stay in 16 bits; what share that is, is said."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write a model for others: its weights, its tokenizer, and what was measured on it."""
    from pydantic import ValidationError

    from pipelines.display import Display
    from pipelines.export import export_line, export_model
    from students.settings import ExportSettings, in_our_words

    try:
        settings = ExportSettings.model_validate({"to": to, "dtype": dtype, "quantise": quantise})
    except ValidationError as error:
        told = [
            f"{''.join(f'--{part}: ' for part in problem['loc'])}{in_our_words(problem)}"
            for problem in error.errors()
        ]
        raise ShearlingError(
            "The model can't be exported like that: " + "; ".join(told) + ".",
            hint="For example --to gguf --quantise q8_0, or --to hf --dtype bfloat16.",
        ) from error
    with stop_signals(), Display(make_console(stderr=True)) as display:

        def progress(what: str, done: int, total: int, /, **numbers: float) -> None:
            display.progress("export", what, done, total, **numbers)

        facts = export_model(
            model, out, settings, cache=download_cache(), progress=progress, tell=display.line
        )
    if as_json:
        print_json(facts)
    else:
        print(f"{out}: {export_line(facts)}")
