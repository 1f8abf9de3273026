"""The command `shearling`: its list of commands, and the ways out of it.

Only typer is imported here at the top: everything that loads torch, and everything that loads what
loads torch, is imported inside the commands, so that `shearling --help` answers at once.

Exit codes: 0 done; 1 a regression, a watched run that failed, or an unexpected error (its
traceback is in error.log); 2 a mistake that the user can mend; 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from pipelines.commands import machine, models, recipes, results, runs
from pipelines.terminal import complain, log_traceback_in
from shearling import ShearlingError, __version__

EPILOG = (
    "Exit codes: 0 done, 1 a regression, a watched run that failed, or an unexpected error (see "
    "error.log), 2 a mistake to mend, 130 interrupted. "
    "Completion of commands by the Tab key: shearling --install-completion."
)
COMMANDS: dict[str, tuple[Callable[..., None], str]] = {
    "init": (recipes.init, "shearling init --teacher ./my-llama --out my-recipe.yaml"),
    "keys": (recipes.keys, "shearling keys distill"),
    "plan": (
        recipes.plan,
        "shearling plan quickstart --accelerator h100-sxm",
    ),
    "run": (runs.run, "shearling run quickstart --set distill.tokens=100000"),
    "resume": (runs.resume, "shearling resume runs/quickstart"),
    "status": (runs.status, "shearling status runs/quickstart"),
    "watch": (runs.watch, "shearling watch runs/quickstart"),
    "report": (results.report, "shearling report runs/quickstart runs/my-recipe"),
    "serve": (results.serve, "shearling serve runs/quickstart --port 8573"),
    "eval": (results.evaluate, "shearling eval runs/quickstart/stages/distill --tasks wikitext2"),
    "diff": (results.diff, "shearling diff runs/quickstart/stages/teacher runs/quickstart"),
    "export": (
        models.export,
        "shearling export runs/quickstart/stages/distill --to gguf --quantise q8_0 --out small",
    ),
    "families": (models.families, "shearling families llama-3.1-8b"),
    "doctor": (machine.doctor, "shearling doctor --json"),
    "regress": (results.regress, "shearling regress --only regress-tiny"),
}
"""Each command's function and an example of it, in the order of `shearling --help`."""

app = typer.Typer(
    name="shearling",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Small language models out of large ones: prune a Llama, teach what is left, measure it.",
    epilog=EPILOG,
)
for name, (function, example) in COMMANDS.items():
    app.command(name=name, epilog=f"Example: {example}")(function)


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


def main() -> None:
    """Run the command line; every way out of it has an exit code and a message."""
    _quiet_libraries()
    try:
        app()
    except ShearlingError as error:
        complain(error.what, error.hint)
        sys.exit(2)
    except BrokenPipeError:
        # The reader of our output went away (`shearling status RUN | head`): nothing is wrong.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        log = getattr(error, "shearling_log", None) or log_traceback_in(Path())
        complain(
            f"Unexpected error: {type(error).__name__}: {error}",
            f"This is a fault of shearling. The traceback is in {log}.",
        )
        sys.exit(1)


def _quiet_libraries() -> None:
    """Libraries' own progress bars and advice would tear our lines; a user's setting stays."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("LMEVAL_LOG_LEVEL", "ERROR")


if __name__ == "__main__":
    main()
