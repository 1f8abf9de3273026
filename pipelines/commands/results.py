"""Commands that measure and show: report, serve, eval, diff, regress."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines.terminal import (
    JsonOption,
    RunArgument,
    download_cache,
    make_console,
    patience,
    print_json,
    stop_signals,
)
from shearling import ShearlingError, write_json


def report(
    run: RunArgument,
    rivals: Annotated[
        list[Path] | None,
        typer.Argument(help="Folders of other runs, to hold this one against.", metavar="[RIVAL]"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Write here instead of into the run's folder.", metavar="DIR"),
    ] = None,
) -> None:
    """Write report.html, report.md and report.json anew from the JSON of a run.

    Also of a run that is at work or broke off. With more than one run the models of all stand in
    the charts of quality, and the last students are compared by paired tests.
    """
    from pipelines.preflight import check_parents
    from reports.page import write_report

    if out:
        check_parents(out / "report.html")
    with patience("drawing the report"):
        written = write_report(run, *(rivals or []), out=out)
    print(written)


def evaluate(
    model: Annotated[
        str,
        typer.Argument(help="A model folder, a run, a stage's folder, a GGUF file or a hub id."),
    ],
    tasks: Annotated[
        str | None, typer.Option(help="Tasks, with commas between them.", metavar="TASK,...")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Documents a task.", min=1)] = None,
    mirror: Annotated[
        Path | None, typer.Option(help="A folder of JSONL files instead of the hub's data.")
    ] = None,
    fewshot: Annotated[
        int | None, typer.Option(help="Examples in each prompt.", metavar="N", min=0)
    ] = None,
    chat_template: Annotated[
        bool, typer.Option("--chat-template", help="Put prompts into the model's chat template.")
    ] = False,
    teacher: Annotated[
        str | None,
        typer.Option(
            help="Hold the model's answers on wikitext2 against this one's.", metavar="MODEL"
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write the scorecard to this file.", metavar="FILE")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure one model and show its scorecard. A run stands for its last measured model."""
    from pipelines.evaluate import evaluate_model, scorecard_table
    from pipelines.preflight import check_file

    if out:
        check_file(out)
    settings: dict[str, Any] = {
        "limit": limit,
        "mirror": str(mirror) if mirror else None,
        "num_fewshot": fewshot,
        "chat_template": chat_template,
    }
    if tasks is not None:
        settings["tasks"] = [name.strip() for name in tasks.split(",") if name.strip()]
    with stop_signals():
        scorecard = evaluate_model(
            model,
            settings,
            teacher=teacher,
            cache=download_cache(),
            console=make_console(stderr=True),
        )
    if as_json:  # shown before it is written: a path that can't be written costs no result
        print_json(scorecard)
    else:
        make_console().print(scorecard_table(scorecard))
    if out:
        write_json(out, scorecard)


def diff(
    first: Annotated[
        str, typer.Argument(help="A: a scorecard, a stage's folder, a run or a model.", metavar="A")
    ],
    second: Annotated[str, typer.Argument(help="B: the same; it is held against A.", metavar="B")],
    tasks: Annotated[
        str | None,
        typer.Option(help="Tasks for models that are measured now.", metavar="TASK,..."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Documents a task, for the same.", min=1)
    ] = None,
    mirror: Annotated[
        Path | None, typer.Option(help="A folder of JSONL files instead of the hub's data.")
    ] = None,
    every_metric: Annotated[
        bool, typer.Option("--all", help="Compare every metric, and the tasks inside groups.")
    ] = False,
    as_json: JsonOption = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
) -> None:
    """Say whether B is better or worse than A, by how much, and whether that is more than noise.

    A run stands for its last model. A model that has no scorecard is measured first: on the tasks
    of the other side's scorecard, or on --tasks.
    """
    from pipelines import difference

    if as_json and as_markdown:
        raise ShearlingError("Both --json and --markdown are asked for.", hint="Choose one.")
    settings: dict[str, Any] = {"limit": limit, "mirror": str(mirror) if mirror else None}
    if tasks is not None:
        settings["tasks"] = [name.strip() for name in tasks.split(",") if name.strip()]
    with stop_signals():
        found = difference.compare_targets(
            first,
            second,
            settings,
            every_metric=every_metric,
            cache=download_cache(),
            console=make_console(stderr=True),
        )
    if as_json:
        print_json(found.to_json())
    elif as_markdown:
        print(difference.as_markdown(found))
    else:
        console = make_console()
        console.print(difference.as_table(found))
        for note in found.footnotes():
            console.print(note, style="dim", highlight=False, markup=False)


def regress(
    update: Annotated[
        bool, typer.Option("--update", help="Write what is measured now as the baselines.")
    ] = False,
    only: Annotated[str | None, typer.Option(help="Run only this recipe.", metavar="NAME")] = None,
    out: Annotated[
        Path, typer.Option(help="Where the runs go; made anew each time.", metavar="DIR")
    ] = Path("runs/regress"),
    as_json: JsonOption = False,
) -> None:
    """Run the small recipes and hold their numbers against the baselines.

    Exits with 1 if a number got worse than its tolerance allows.
    """
    from pipelines.regress import regress as hold_against_baselines

    with stop_signals():
        found = hold_against_baselines(
            out,
            only=only,
            update=update,
            cache=download_cache(),
            console=make_console(stderr=as_json),
        )
    if as_json:
        recipes = {name: [asdict(each) for each in findings] for name, findings in found.items()}
        print_json({"schema": 1, "recipes": recipes})
    if any(finding.fails for findings in found.values() for finding in findings):
        raise typer.Exit(1)


def serve(
    run: RunArgument,
    port: Annotated[
        int, typer.Option(help="The port on 127.0.0.1; 0: any that is free.", min=0, max=65535)
    ] = 8573,
) -> None:
    """Show the report of a run in a browser on this machine; it follows a run that is at work.

    Listens on 127.0.0.1 only and writes nothing. Ctrl-C ends it.
    """
    from pipelines.serve import make_server

    with make_server(run.expanduser(), port) as server, stop_signals(quiet=True):
        print(f"The report: http://127.0.0.1:{server.server_port}/", flush=True)
        server.serve_forever()
