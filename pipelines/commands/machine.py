"""Commands about this machine: doctor."""

from __future__ import annotations

from pathlib import Path

import typer

from pipelines.terminal import JsonOption, make_console, patience, print_json


def doctor(as_json: JsonOption = False) -> None:
    """Check versions, memory, disk, cores, accelerator and bf16, and say what to do.

    Exits with 2 if something must be mended before a run.
    """
    from rich.table import Table
    from rich.text import Text

    from pipelines.doctor import examine
    from teachers.fetch import default_cache

    with patience("looking at this machine"):
        found = examine(Path("runs"), default_cache())
    if as_json:
        print_json(found)
    else:
        styles = {"ok": "green", "notice": "yellow", "error": "red"}
        table = Table(box=None, pad_edge=False, show_header=False)
        for finding in found["findings"]:
            told = Text(finding["found"])
            if finding["advice"]:
                told.append(f"\n{finding['advice']}", style="bold")
            state = Text(finding["state"], style=styles[finding["state"]])
            table.add_row(state, Text(finding["name"]), told)
        make_console().print(table)
    if not found["fit"]:
        raise typer.Exit(2)
