"""What is already done: artefacts by the hash of what they were made from.

    store/KIND-KEY16/             a finished artefact; stage.json inside is written last
    store/.KIND-KEY16.partial/    a stage at work; stays after a kill, so that the stage may go on

An artefact comes to be by one rename of a synced folder, so it is there whole or not at all.
``stage.json`` lists every file with its size and sha256: a file that was cut off, changed or lost
afterwards is noticed before the artefact is used again. What a stage at work needs to go on lies in
its folder's ``resume``, and is kept until the artefact is there.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from shearling import (
    disk_errors,
    sha256_of_file,
    sha256_of_json,
    sweep,
    sync,
    without_secrets,
    write_json,
)
from teachers.file_memory import FileMemory

SCHEMA = 1
STAGE_FILE = "stage.json"
RESUME_FOLDER = "resume"
SMALL_BYTES = 1 << 20
"""Files up to this size are hashed at each reuse; larger ones when their size or time changed."""


def stage_key(
    kind: str, code_version: int, settings: Mapping[str, Any], inputs: Mapping[str, str]
) -> str:
    """The key of a stage's artefact: hex sha256 of all that it is a function of."""
    return sha256_of_json(
        {"kind": kind, "code_version": code_version, "settings": settings, "inputs": inputs}
    )


class Store:
    """The artefacts of one run folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def artefact(self, kind: str, key: str) -> Path:
        return self.root / f"{kind}-{key[:16]}"

    def partial(self, kind: str, key: str) -> Path:
        return self.root / f".{kind}-{key[:16]}.partial"

    def open_work(self, kind: str, key: str, *, resumable: bool) -> Path:
        """The folder that a stage fills; what a killed run left in it stays if it is resumable."""
        work = self.partial(kind, key)
        with disk_errors(work):
            if work.exists() and not resumable:
                shutil.rmtree(work)
            work.mkdir(parents=True, exist_ok=True)
            inside = [each for each in work.rglob("*") if each.is_dir() and not each.is_symlink()]
            for folder in (work, *inside):  # an index in model/ may have been killed half-written
                sweep(folder)
        return work

    def has_checkpoint(self, kind: str, key: str) -> bool:
        """Whether an unfinished artefact left what its stage goes on from."""
        return any(self.partial(kind, key).glob(f"{RESUME_FOLDER}/step-*"))

    def publish(self, kind: str, key: str, record: Mapping[str, Any]) -> Path:
        """Turn the filled work folder into the artefact; ``record`` becomes its stage.json.

        The stage's checkpoints are no part of it. They go when it is there, not before: a kill in
        between would find neither, and one while they go would find half of them.
        """
        work, final = self.partial(kind, key), self.artefact(kind, key)
        with disk_errors(final):
            _sync_tree(work)
            told = json.loads(without_secrets(json.dumps(record)))
            write_json(work / STAGE_FILE, {**told, "files": self.list_files(work)})
            sync(work)
            if final.exists():  # only a damaged one is ever made again
                shutil.rmtree(final)
            os.replace(work, final)
            sync(self.root)
            self.sweep()
        return final

    def sweep(self) -> None:
        """Remove checkpoints of finished artefacts."""
        for folder in self.root.glob(f"[!.]*/{RESUME_FOLDER}"):
            shutil.rmtree(folder, ignore_errors=True)

    def read(self, kind: str, key: str) -> dict[str, Any] | None:
        """The stage.json of a finished artefact; None if there is none that can be read."""
        try:
            text = (self.artefact(kind, key) / STAGE_FILE).read_text(encoding="utf-8")
            record = json.loads(text)
        except (OSError, ValueError):
            return None
        return record if isinstance(record, dict) else None

    def damage(self, kind: str, key: str, *, verify: bool = False) -> str | None:
        """What is wrong with a finished artefact, in words; None if it is whole.

        Sizes are always compared, hashes for small files and for files whose modification time is
        not the recorded one. ``verify`` hashes all.
        """
        folder = self.artefact(kind, key)
        record = self.read(kind, key)
        if record is None or not isinstance(record.get("files"), dict) or record.get("key") != key:
            return f"{STAGE_FILE} can't be read"
        for name, known in record["files"].items():
            if not _is_known(known):
                return f"{STAGE_FILE} can't be read"
            problem = self._file_damage(folder / name, known, verify=verify)
            if problem:
                return f"{name} {problem}"
        return None

    def size(self, kind: str, key: str) -> int:
        """Bytes of a finished artefact, as its record says; 0 if there is none."""
        files = (self.read(kind, key) or {}).get("files")
        known = files.values() if isinstance(files, Mapping) else ()
        return sum(facts["size"] for facts in known if _is_known(facts))

    def _file_damage(self, path: Path, known: Mapping[str, Any], *, verify: bool) -> str | None:
        try:
            stat = path.stat()
        except OSError:
            return "is missing"
        if stat.st_size != known["size"]:
            return f"has {stat.st_size:,} of {known['size']:,} bytes"
        unchanged = stat.st_mtime_ns == known["mtime_ns"] and stat.st_size > SMALL_BYTES
        if unchanged and not verify:
            return None
        if sha256_of_file(path) != known["sha256"]:
            return "has other content than when it was made"
        return None

    def leftovers(self, keys: set[str]) -> list[tuple[Path, int]]:
        """Folders (and their bytes) that stages of other keys than ``keys`` left unfinished."""
        mine = tuple(f"-{key[:16]}.partial" for key in keys)
        folders = sorted(p for p in self.root.glob(".*.partial") if not p.name.endswith(mine))
        return [(p, sum(f.stat().st_size for f in _files_below(p))) for p in folders]

    def list_files(self, folder: Path) -> dict[str, dict[str, Any]]:
        """Size, mtime_ns and sha256 of every file, by path; without stage.json and checkpoints."""
        listed = {}
        for path in _files_below(folder):
            name = path.relative_to(folder).as_posix()
            if name != STAGE_FILE and not name.startswith(f"{RESUME_FOLDER}/"):
                stat = path.stat()
                listed[name] = {
                    "size": stat.st_size,
                    "mtime_ns": stat.st_mtime_ns,
                    "sha256": sha256_of_file(path),
                }
        return listed


def _is_known(facts: Any) -> bool:
    """Whether these are a file's facts as `Store.list_files` writes them."""
    return isinstance(facts, Mapping) and all(
        isinstance(facts.get(name), kind)
        for name, kind in (("size", int), ("mtime_ns", int), ("sha256", str))
    )


class FileHashes:
    """Hashes of the user's own files; the cache remembers those of large ones.

    Not the run folder: it must not change before a run has begun.
    """

    def __init__(self, cache: Path) -> None:
        self._memory = FileMemory(cache)

    def fingerprint(self, path: Path, files: Iterable[Path] | None = None) -> str:
        """One hash over a local file, or over ``files`` of a folder: by default those directly
        in it."""
        if not path.is_dir():
            return sha256_of_json({"": self._memory.sha256(path)})
        if files is None:
            files = [file for file in path.iterdir() if file.is_file()]
        names = {Path(os.path.relpath(file, path)).as_posix(): file for file in files}
        return sha256_of_json({name: self._memory.sha256(f) for name, f in names.items()})


def _files_below(folder: Path) -> Iterator[Path]:
    """All files below ``folder``. A linked folder (a user's own teacher) counts one level deep."""
    for path in sorted(folder.iterdir()):
        if path.is_symlink() and path.is_dir():
            yield from sorted(p for p in path.iterdir() if p.is_file())
        elif path.is_dir():
            yield from _files_below(path)
        elif path.is_file():
            yield path


def _sync_tree(folder: Path) -> None:
    for parent, folders, files in os.walk(folder):
        for name in (*files, *folders):
            path = Path(parent) / name
            if not path.is_symlink():
                sync(path)
