"""What was found out about files on this disk, so that an 8B teacher is read once, not at each use.

Nothing here loads torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shearling import ShearlingError, sha256_of_file, write_json

SMALL_BYTES = 4 << 20
"""Below it hashing is faster than remembering."""


class FileMemory:
    """Facts by path, size, time and inode, kept in a cache folder.

    Losing it costs time only, so a damaged or unwritable file is ignored.
    """

    def __init__(self, cache: Path) -> None:
        self.path = cache / "files.json"

    def _entries(self) -> dict[str, Any]:
        try:
            entries = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return entries if isinstance(entries, dict) else {}

    @staticmethod
    def _stamp(file: Path) -> list[int]:
        status = file.stat()
        return [status.st_size, status.st_mtime_ns, status.st_ino]

    def get(self, file: Path, fact: str) -> Any:
        entry = self._entries().get(str(file.resolve()))
        if isinstance(entry, dict) and entry.get("stamp") == self._stamp(file):
            return entry.get(fact)
        return None

    def put(self, file: Path, fact: str, value: Any) -> None:
        entries, key, stamp = self._entries(), str(file.resolve()), self._stamp(file)
        old = entries.get(key)
        known = old if isinstance(old, dict) and old.get("stamp") == stamp else {"stamp": stamp}
        entries = {name: entry for name, entry in entries.items() if Path(name).exists()}
        entries[key] = {**known, fact: value}
        try:
            write_json(self.path, entries)
        except (OSError, ShearlingError):
            return

    def sha256(self, file: Path) -> str:
        """Hex SHA-256 of a file; that of a large one is remembered."""
        if file.stat().st_size < SMALL_BYTES:
            return sha256_of_file(file)
        known = self.get(file, "sha256")
        if not isinstance(known, str):
            known = sha256_of_file(file)
            self.put(file, "sha256", known)
        return known
