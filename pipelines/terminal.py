"""What stands around every command: consoles, JSON, messages of errors, and the signals that stop.

Imports nothing heavy, for `shearling --help` answers at once.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shearling import ShearlingError, without_secrets

if TYPE_CHECKING:
    from rich.console import Console

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for other programs.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a key of the recipe, as in distill.tokens=100000. Can be repeated.",
    ),
]


def shipped_recipes() -> list[str]:
    """Names that the shell completes; a path it completes by itself."""
    return sorted(path.stem for path in (Path(__file__).parent / "recipes").glob("*.yaml"))


RecipeArgument = Annotated[
    str,
    typer.Argument(
        help="A recipe's path, or the name of a shipped one.",
        autocompletion=lambda incomplete: [
            name for name in shipped_recipes() if name.startswith(incomplete)
        ],
    ),
]
RunArgument = Annotated[Path, typer.Argument(help="The run's folder.", metavar="RUN")]


def make_console(*, stderr: bool = False) -> Console:
    """A console without colours where the output is no terminal or NO_COLOR is set."""
    from rich.console import Console

    console = Console(stderr=stderr)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 160  # a file has no edge at which a table must be cut
    return console


PATIENCE_SECONDS = 1.5
"""What takes longer says what it is doing."""


@contextmanager
def patience(what: str) -> Iterator[None]:
    """Say on stderr what takes so long, if it does; for work whose end can't be foretold."""
    console = make_console(stderr=True)
    if console.is_terminal:
        with console.status(what, spinner="line"):
            yield
        return
    timer = threading.Timer(PATIENCE_SECONDS, lambda: print(f"  {what}", file=sys.stderr))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def print_json(data: Any) -> None:
    import json

    print(json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False))


def complain(what: str, hint: str) -> None:
    """Say on stderr what is wrong and what to do about it."""
    from rich.text import Text

    what, hint = without_secrets(what), without_secrets(hint)
    console = make_console(stderr=True)
    console.print(Text.assemble(("Error: ", "bold red"), what), highlight=False, soft_wrap=True)
    if hint:
        console.print(Text(hint), highlight=False, soft_wrap=True)


def download_cache() -> Path:
    """The cache's folder, which is made here, for the first that writes into it may be anyone.

    Raises:
        ShearlingError: no folder can be there.
    """
    from teachers.fetch import default_cache

    cache = default_cache()
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, FileNotFoundError, NotADirectoryError) as error:
        raise ShearlingError(
            f"The cache can't be at {cache}: {error.filename} is no place for a folder.",
            hint="Name another folder in SHEARLING_CACHE.",
        ) from error
    except OSError:
        pass  # not everything writes there; what does says what is wrong
    return cache


@contextmanager
def log_unexpected(run: Path) -> Iterator[None]:
    """Put the traceback of an unexpected error into the run's folder, where its user looks."""
    try:
        yield
    except ShearlingError:
        raise
    except Exception as error:
        error.shearling_log = log_traceback_in(run)  # type: ignore[attr-defined]
        raise


def log_traceback_in(folder: Path) -> str:
    """Append the current traceback to error.log in ``folder``; returns where it lies, in words."""
    import traceback

    from pipelines.runner import log_traceback

    try:
        return log_traceback(folder if folder.is_dir() else Path())
    except OSError:
        traceback.print_exc()
        return "the lines above"


@contextmanager
def stop_signals(again: str = "", *, quiet: bool = False) -> Iterator[None]:
    """Ctrl-C and SIGTERM end the work cleanly and exit with 130; a second one ends it at once.

    Both are set by hand: a shell starts background jobs with SIGINT ignored. ``again`` is the
    command that goes on. ``quiet``: nothing was lost, so nothing is said.
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
        if not quiet:
            complain("Interrupted.", f"Go on with: {again}" if again else "")
        raise typer.Exit(130) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
