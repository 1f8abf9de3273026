"""Commands about models: families."""

from __future__ import annotations

from typing import Annotated

import typer

from pipelines.terminal import JsonOption, make_console, print_json


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
        make_console().print(families_summary(rows))
