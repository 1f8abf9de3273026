"""The ground floor of the house: the one error that users meet, and writes that can't be half done.

Everything here is small, imports nothing of the project and nothing heavy, so every package may
use it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

__version__ = "0.1.0"


class ShearlingError(Exception):
    """A mistake that the user can mend: what is wrong, and what to do about it.

    The command line prints both and exits with 2; a traceback never reaches a user for these.
    """

    def __init__(self, what: str, *, hint: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.what}\n{self.hint}" if self.hint else self.what


def itemised(sentence: str, items: Iterable[object]) -> str:
    """A sentence that ends with a colon, and below it an item a line."""
    return "\n".join([sentence, *(f"  - {item}" for item in items)])


class Progress(Protocol):
    """How long work tells where it is: ``progress("walk", 3, 30, tokens_per_second=410.0)``.

    Engines call it often and print nothing themselves; the caller decides how it is shown.
    """

    def __call__(self, what: str, done: int, total: int, /, **numbers: float) -> None: ...


def silent(what: str, done: int, total: int, /, **numbers: float) -> None:
    """A Progress that shows nothing."""


def _os_error_number(error: Exception) -> int | None:
    """The errno behind an error, also where a library only names it in a message of its own.

    safetensors (Rust) says "(os error 28)", torch "No space left on device".
    """
    if isinstance(error, OSError):
        return error.errno
    if "No space left on device" in str(error):
        return errno.ENOSPC
    named = re.search(r"\(os error (\d+)\)", str(error))
    return int(named[1]) if named else None


# Not folders that are called hf_something, nor words behind "bearer": a recipe is read again.
_SECRETS = (
    (re.compile(r"(?<![\w/])hf_[A-Za-z0-9]{30,}"), "hf_***"),
    (re.compile(r"(://)[^/@\s\"']+@"), r"\1***@"),
    (re.compile(r"(?i)\b(bearer\s+)[\w.~+/-]{20,}"), r"\1***"),
    (re.compile(r"(?i)\b((?:token|api[_-]?key)=\s*)[\w.~+/-]{8,}"), r"\1***"),
)
_SECRET_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")


def without_secrets(text: str) -> str:
    """``text`` without hub tokens and passwords in addresses: for logs, locks and reports."""
    for name in _SECRET_VARIABLES:
        value = os.environ.get(name, "").strip()
        if len(value) >= 8:
            text = text.replace(value, "***")
    for pattern, kept in _SECRETS:
        text = pattern.sub(kept, text)
    return text


@contextmanager
def disk_errors(
    where: Path, *, elsewhere: str = "put the run elsewhere with --out DIR"
) -> Iterator[None]:
    """Turn the operating system's errors about a disk that is full or read-only, and about places
    where no folder can be, into a ShearlingError. ``elsewhere`` is how to take another place."""
    try:
        yield
    except Exception as error:
        number = _os_error_number(error)
        if number in (errno.ENOSPC, errno.EDQUOT):
            raise ShearlingError(
                f"The disk is full: could not write {where}.",
                hint=f"Free some space, or {elsewhere}. "
                "Finished stages are kept; the same command goes on.",
            ) from error
        if number == errno.EFBIG:
            raise ShearlingError(
                f"{where} can't be written: the disk or a limit allows no file of its size.",
                hint="See `ulimit -f`, or put the run on another disk with --out DIR.",
            ) from error
        if number in (errno.EROFS, errno.EACCES, errno.EPERM):
            refused = getattr(error, "filename", None) or where
            raise ShearlingError(
                f"Not allowed to use {refused}.",
                hint=f"Change its permissions, or {elsewhere}.",
            ) from error
        if number in (errno.EEXIST, errno.ENOTDIR) or _nothing_can_be_made(where, error):
            raise ShearlingError(
                f"{where} can't be written: nothing can be made there, or a file is in the way.",
                hint="Name another place with --out, or for the cache in SHEARLING_CACHE.",
            ) from error
        raise


def _nothing_can_be_made(where: Path, error: Exception) -> bool:
    """Whether not even the folder could be made in which ``where`` was to be, as in /proc.

    Of a file that is missing anywhere else this says nothing.
    """
    if not isinstance(error, FileNotFoundError) or not isinstance(error.filename, (str, Path)):
        return False
    missing, where = Path(error.filename).absolute(), where.absolute()
    return missing == where or missing.parent in where.parents


def sync(path: Path) -> None:
    """Wait until a file or a folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file so that a reader sees the old content or the new, never a part."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never a part."""
    with file_aside(path) as aside:
        aside.write_bytes(data)


@contextmanager
def file_aside(final: Path) -> Iterator[Path]:
    """Give a path beside ``final`` to write; on success sync it and rename it to ``final``.

    Its name is nobody else's, so several may write the same file at once: the last one stays.
    """
    final = Path(final)
    with disk_errors(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=final.parent, prefix=f".{final.name}.")
        os.close(handle)
        aside = Path(name)
        try:
            yield aside
            sync(aside)
            os.chmod(aside, 0o644)
            os.replace(aside, final)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise


def write_json(path: Path, data: Any) -> None:
    """Write ``data`` as indented JSON, as a whole or not at all. NaN and infinity are refused."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def parse_json(text: str) -> Any:
    """Standard JSON: ``Infinity``, ``NaN`` and numbers too large for a float are a ValueError.

    What is read in one place is written in another, where they would be refused."""

    def refused(name: str) -> Any:
        raise ValueError(f"{name} is no number of JSON")

    def finite(number: str) -> float:
        value = float(number)
        return value if math.isfinite(value) else refused(number)

    return json.loads(text, parse_constant=refused, parse_float=finite)


def read_json(path: Path, *, hint: str = "Delete the file and run the stage again.") -> Any:
    """Read a JSON file; what can't be read is a ShearlingError that names the file.

    ``hint`` says what to do about one that is no JSON; the default is for files of a run.
    """
    try:
        return parse_json(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ShearlingError(
            f"{path} does not exist.", hint="Check the path; `shearling status` lists a run."
        ) from error
    except (ValueError, RecursionError) as error:
        raise ShearlingError(f"{path} is not valid JSON: {error}", hint=hint) from error


@contextmanager
def folder_aside(final: Path) -> Iterator[Path]:
    """Give a folder beside ``final`` to fill; on success sync it and rename it to ``final``.

    An exception removes what was written and leaves an earlier ``final`` untouched, so a reader
    never meets a half-written artefact.
    """
    final = Path(final)
    with disk_errors(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=final.parent, prefix=f".{final.name}.partial-"))
        try:
            yield aside
            for path in aside.rglob("*"):
                if path.is_file() and not path.is_symlink():
                    sync(path)
            os.chmod(aside, 0o755)
            if final.is_dir() and not final.is_symlink():
                shutil.rmtree(final)
            os.replace(aside, final)
            sync(final.parent)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise


_ASIDE = re.compile(r"\..+\.(partial-)?[a-z0-9_]{8}")
"""Names that `file_aside` and `folder_aside` give to what isn't whole yet."""


def sweep(folder: Path) -> None:
    """Remove what killed writers left in ``folder``; only for one that holds it alone."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if not _ASIDE.fullmatch(path.name) or path.is_symlink():
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def sha256_of_file(path: Path) -> str:
    """Hex SHA-256 of a file, read in pieces."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_json(data: Any) -> str:
    """Hex SHA-256 of ``data`` in canonical JSON (sorted keys, no white space)."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
