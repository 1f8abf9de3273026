"""The command `shearling`.

Only typer is imported here at the top: everything that loads torch, and everything that loads what
loads torch, is imported inside the commands, so that `shearling --help` answers at once.

Exit codes: 0 done; 1 a regression, or an unexpected error (its traceback is in error.log);
2 a mistake that the user can mend; 130 interrupted.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shearling import ShearlingError, __version__, write_json, write_text

if TYPE_CHECKING:
    from rich.console import Console

EPILOG = (
    "Exit codes: 0 done, 1 a regression or an unexpected error (see error.log), 2 a mistake to "
    "mend, 130 interrupted."
)
app = typer.Typer(
    name="shearling",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Small language models out of large ones: prune a Llama, teach what is left, measure it.",
    epilog=EPILOG,
)

SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a key of the recipe, as in distill.tokens=100000. Can be repeated.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for other programs.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"shearling {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Options of the command itself; typer needs a function to hang them on."""


@app.command(epilog="Example: shearling run quickstart --set distill.tokens=100000")
def run(
    recipe: Annotated[str, typer.Argument(help="A recipe's path, or the name of a shipped one.")],
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
) -> None:
    """Run a recipe, or go on with a run that was interrupted.

    A stage whose recipe, inputs and code have not changed is not run again.
    """
    from pipelines.display import Display
    from pipelines.recipe import load_recipe
    from pipelines.runner import Options, check, decisions, run_recipe

    loaded = load_recipe(recipe, overrides or [])
    folder = out or Path("runs") / loaded.name
    options = Options(
        run=folder.expanduser(),
        cache=_cache(),
        again=_run_command(recipe, overrides, out),
        verify=verify,
    )
    if dry_run:
        for step, decision in decisions(check(loaded, options), options):
            print(f"{step.name}: {decision}")
        return
    console = _console()
    with _stop_signals(options.again), _log_unexpected(options.run):
        run_recipe(loaded, options, Display(console))
    console.print(f"The report: {options.run / 'report.html'}", highlight=False, soft_wrap=True)


@app.command(epilog="Example: shearling status runs/quickstart")
def status(
    run: Annotated[Path, typer.Argument(help="The run's folder.", metavar="RUN")],
    as_json: JsonOption = False,
) -> None:
    """Say how far a run is, also while it is running."""
    from pipelines.journal import read_status

    found = read_status(run)
    if as_json:
        _print_json(found)
        return
    from pipelines.status import status_lines

    console = _console()
    for line in status_lines(found):
        console.print(line, highlight=False, soft_wrap=True)


@app.command(epilog="Example: shearling report runs/quickstart")
def report(
    run: Annotated[Path, typer.Argument(help="The run's folder.", metavar="RUN")],
) -> None:
    """Write report.html and report.json anew from the files of a run."""
    from pipelines.journal import read_status
    from reports.page import write_report

    read_status(run)  # says what is wrong with a folder that is no run
    print(write_report(run))


@app.command(
    name="eval", epilog="Example: shearling eval runs/quickstart/stages/distill --tasks wikitext2"
)
def evaluate(
    model: Annotated[
        str, typer.Argument(help="A model folder, a stage's folder, a GGUF file or a hub id.")
    ],
    tasks: Annotated[
        str | None, typer.Option(help="Tasks, with commas between them.", metavar="TASK,...")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Documents a task.", min=1)] = None,
    mirror: Annotated[
        Path | None, typer.Option(help="A folder of JSONL files instead of the hub's data.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write the scorecard to this file.", metavar="FILE")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure one model and show its scorecard."""
    from pipelines.evaluate import evaluate_model, scorecard_table
    from pipelines.preflight import check_parents

    if out:
        check_parents(out)
    settings: dict[str, Any] = {"limit": limit, "mirror": str(mirror) if mirror else None}
    if tasks is not None:
        settings["tasks"] = [name.strip() for name in tasks.split(",") if name.strip()]
    with _stop_signals():
        scorecard = evaluate_model(model, settings, cache=_cache(), console=_console(stderr=True))
    if as_json:  # shown before it is written: a path that can't be written costs no result
        _print_json(scorecard)
    else:
        _console().print(scorecard_table(scorecard))
    if out:
        write_json(out, scorecard)


@app.command(epilog="Example: shearling init --teacher ./my-llama --out my-recipe.yaml")
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


@app.command(epilog="Example: shearling regress --only regress-tiny")
def regress(
    update: Annotated[
        bool, typer.Option("--update", help="Write what is measured now as the baselines.")
    ] = False,
    only: Annotated[str | None, typer.Option(help="Run only this recipe.", metavar="NAME")] = None,
    out: Annotated[
        Path, typer.Option(help="Where the runs go; made anew each time.", metavar="DIR")
    ] = Path("runs/regress"),
) -> None:
    """Run the small recipes and hold their numbers against the baselines.

    Exits with 1 if a number got worse than its tolerance allows.
    """
    from pipelines.regress import regress as hold_against_baselines

    with _stop_signals():
        whole = hold_against_baselines(
            out, only=only, update=update, cache=_cache(), console=_console()
        )
    if not whole:
        raise typer.Exit(1)


# --- around the commands ------------------------------------------------------------------------


def main() -> None:
    """Run the command line; every way out of it has an exit code and a message."""
    _quiet_libraries()
    try:
        app()
    except ShearlingError as error:
        _complain(error.what, error.hint)
        sys.exit(2)
    except BrokenPipeError:
        # The reader of our output went away (`shearling status RUN | head`): nothing is wrong.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        log = getattr(error, "shearling_log", None) or _log_traceback(Path())
        _complain(
            f"Unexpected error: {type(error).__name__}: {error}",
            f"This is a fault of shearling. The traceback is in {log}.",
        )
        sys.exit(1)


@contextmanager
def _log_unexpected(run: Path) -> Iterator[None]:
    """Put the traceback of an unexpected error into the run's folder, where its user looks."""
    try:
        yield
    except ShearlingError:
        raise
    except Exception as error:
        error.shearling_log = _log_traceback(run)  # type: ignore[attr-defined]
        raise


def _log_traceback(folder: Path) -> str:
    """Append the current traceback to error.log in ``folder``; returns where it lies, in words."""
    import traceback

    from pipelines.runner import log_traceback

    try:
        return log_traceback(folder if folder.is_dir() else Path())
    except OSError:
        traceback.print_exc()
        return "the lines above"


def _complain(what: str, hint: str) -> None:
    from rich.text import Text

    console = _console(stderr=True)
    console.print(Text.assemble(("Error: ", "bold red"), what), highlight=False, soft_wrap=True)
    if hint:
        console.print(Text(hint), highlight=False, soft_wrap=True)


def _console(*, stderr: bool = False) -> Console:
    """A console without colours where the output is no terminal or NO_COLOR is set."""
    from rich.console import Console

    console = Console(stderr=stderr)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 160  # a file has no edge at which a table must be cut
    return console


def _print_json(data: Any) -> None:
    import json

    print(json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False))


def _cache() -> Path:
    from teachers.fetch import default_cache

    return default_cache()


def _run_command(recipe: str, overrides: list[str] | None, out: Path | None) -> str:
    parts = ["shearling", "run", recipe]
    for override in overrides or []:
        parts += ["--set", override]
    if out:
        parts += ["--out", str(out)]
    return shlex.join(parts)


def _quiet_libraries() -> None:
    """Libraries' own progress bars and advice would tear our lines; a user's setting stays."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("LMEVAL_LOG_LEVEL", "ERROR")


@contextmanager
def _stop_signals(again: str = "") -> Iterator[None]:
    """Ctrl-C and SIGTERM end the work cleanly and exit with 130; a second one ends it at once.

    Both are set by hand: a shell starts background jobs with SIGINT ignored. ``again`` is the
    command that goes on.
    """
    stops = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in stops}

    def stop(number: int, frame: Any) -> None:
        for each in stops:
            signal.signal(each, signal.SIG_DFL)
        raise KeyboardInterrupt

    for number in stops:
        signal.signal(number, stop)
    try:
        yield
    except KeyboardInterrupt:
        _complain("Interrupted.", f"Go on with: {again}" if again else "")
        raise typer.Exit(130) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    main()
