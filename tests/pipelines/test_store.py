from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipelines.store import (
    RESUME_FOLDER,
    SMALL_BYTES,
    STAGE_FILE,
    FileHashes,
    Store,
    stage_key,
)
from teachers.file_memory import SMALL_BYTES as REMEMBERED

KEY = "a" * 64


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def publish(store: Store, **files: bytes) -> Path:
    work = store.open_work("prune", KEY, resumable=False)
    for name, content in files.items():
        (work / name).write_bytes(content)
    return store.publish("prune", KEY, {"schema": 1, "key": KEY})


def test_a_key_depends_on_everything() -> None:
    base = stage_key("prune", 1, {"a": 1}, {"teacher": "x"})
    assert base == stage_key("prune", 1, {"a": 1}, {"teacher": "x"})
    others = {
        stage_key("distill", 1, {"a": 1}, {"teacher": "x"}),
        stage_key("prune", 2, {"a": 1}, {"teacher": "x"}),
        stage_key("prune", 1, {"a": 2}, {"teacher": "x"}),
        stage_key("prune", 1, {"a": 1}, {"teacher": "y"}),
    }
    assert len(others | {base}) == 5


def test_publishing_is_one_rename_and_lists_the_files(store: Store) -> None:
    final = publish(store, model=b"weights")
    assert not store.partial("prune", KEY).exists()
    record = store.read("prune", KEY)
    assert record is not None
    assert record["files"]["model"]["size"] == 7
    assert STAGE_FILE not in record["files"]
    assert (final / "model").read_bytes() == b"weights"
    assert store.damage("prune", KEY) is None


def with_checkpoint(store: Store) -> Path:
    work = store.open_work("distill", KEY, resumable=True)
    (work / "model").write_bytes(b"weights")
    for name in ("student", "state.json"):
        (work / RESUME_FOLDER / "step-1").mkdir(parents=True, exist_ok=True)
        (work / RESUME_FOLDER / "step-1" / name).write_bytes(b"x")
    return work


def test_checkpoints_are_kept_until_the_artefact_is_there(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at any of the moments at its end, a stage has its checkpoint or its artefact."""
    work = with_checkpoint(store)
    record = {"schema": 1, "key": KEY}

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pipelines.store.os.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            store.publish("distill", KEY, record)
    assert sorted(p.name for p in (work / RESUME_FOLDER / "step-1").iterdir()) == [
        "state.json", "student",
    ]  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr("pipelines.store.shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            store.publish("distill", KEY, record)
    assert store.damage("distill", KEY) is None
    final = store.artefact("distill", KEY)
    assert (final / RESUME_FOLDER).exists()
    store.sweep()
    assert sorted(path.name for path in final.iterdir()) == ["model", STAGE_FILE]
    assert store.damage("distill", KEY, verify=True) is None


def test_checkpoints_of_a_stage_at_work_are_not_swept(store: Store) -> None:
    work = with_checkpoint(store)
    store.sweep()
    assert (work / RESUME_FOLDER / "step-1" / "student").exists()


def test_what_a_killed_writer_left_deep_in_a_stage_goes(store: Store, tmp_path: Path) -> None:
    work = with_checkpoint(store)
    left = ".model.safetensors.index.json.0ul8ce66"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (work / "parts").mkdir()
    (work / "link").symlink_to(elsewhere)
    for folder in (work / "parts", elsewhere):
        (folder / left).touch()
    store.open_work("distill", KEY, resumable=True)
    assert not (work / "parts" / left).exists()
    assert (work / RESUME_FOLDER / "step-1" / "student").exists()
    assert (elsewhere / left).exists(), "a link leads to what is not the stage's"


def test_an_interrupted_stage_starts_clean_unless_it_is_resumable(store: Store) -> None:
    (store.open_work("prune", KEY, resumable=False) / "half").write_text("x")
    assert (store.open_work("prune", KEY, resumable=True) / "half").is_file()
    assert not any(store.open_work("prune", KEY, resumable=False).iterdir())


def test_what_killed_writers_left_is_swept_away(store: Store) -> None:
    work = store.open_work("distill", KEY, resumable=True)
    (work / ".stage.json.q9rn3s_2").write_text("half")
    (work / ".step-00000004.partial-rkypld1u").mkdir()
    for kept in ("model", ".hidden", ".gitignore.text"):
        (work / kept).write_text("kept")
    (work / ".linked.abcdefgh").symlink_to(store.root)
    store.open_work("distill", KEY, resumable=True)
    assert sorted(path.name for path in work.iterdir()) == [
        ".gitignore.text",
        ".hidden",
        ".linked.abcdefgh",
        "model",
    ]


def test_leftovers_of_other_settings_are_found(store: Store) -> None:
    (store.open_work("prune", KEY, resumable=True) / "half").write_text("half")
    assert store.leftovers({KEY}) == []
    assert store.leftovers({"b" * 64}) == [(store.partial("prune", KEY), 4)]


def test_damage_is_noticed(store: Store) -> None:
    big = os.urandom(SMALL_BYTES + 10)
    folder = publish(store, small=b"0123456789", big=big)
    (folder / "small").write_bytes(b"01234")
    assert store.damage("prune", KEY) == "small has 5 of 10 bytes"
    (folder / "small").write_bytes(b"0123456780")
    assert store.damage("prune", KEY) == "small has other content than when it was made"
    (folder / "small").write_bytes(b"0123456789")
    assert store.damage("prune", KEY) is None
    (folder / "big").unlink()
    assert store.damage("prune", KEY) == "big is missing"
    (folder / STAGE_FILE).write_text("{")
    assert store.damage("prune", KEY) == "stage.json can't be read"


def test_a_flipped_bit_in_a_big_file(store: Store) -> None:
    big = bytes(SMALL_BYTES + 10)
    folder = publish(store, big=big)
    stat = (folder / "big").stat()
    (folder / "big").write_bytes(b"\1" + big[1:])
    assert store.damage("prune", KEY) == "big has other content than when it was made"
    # With size and time as they were, only --verify reads it all again.
    os.utime(folder / "big", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert store.damage("prune", KEY) is None
    assert store.damage("prune", KEY, verify=True) is not None


def test_a_copied_store_is_still_whole(store: Store) -> None:
    folder = publish(store, big=bytes(SMALL_BYTES + 10))
    os.utime(folder / "big")
    assert store.damage("prune", KEY) is None


def test_a_linked_folder_is_checked_through_the_link(store: Store, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    (teacher / "model.safetensors").write_bytes(b"weights")
    work = store.open_work("teacher", KEY, resumable=False)
    (work / "model").symlink_to(teacher)
    store.publish("teacher", KEY, {"key": KEY})
    assert store.damage("teacher", KEY) is None
    (teacher / "model.safetensors").write_bytes(b"weigh")
    assert store.damage("teacher", KEY) == "model/model.safetensors has 5 of 7 bytes"


def test_fingerprints_follow_content_and_are_remembered(tmp_path: Path) -> None:
    folder, cache = tmp_path / "teacher", tmp_path / "cache"
    folder.mkdir()
    (folder / "small").write_bytes(b"1")
    (folder / "big").write_bytes(bytes(REMEMBERED + 1))
    first = FileHashes(cache).fingerprint(folder)
    assert any("big" in mark for mark in json.loads((cache / "files.json").read_text()))
    assert FileHashes(cache).fingerprint(folder) == first
    (folder / "big").write_bytes(bytes(REMEMBERED) + b"x")
    second = FileHashes(cache).fingerprint(folder)
    assert second != first
    (cache / "files.json").write_text("broken")
    assert FileHashes(cache).fingerprint(folder) == second
    (folder / "small").rename(folder / "other")
    assert FileHashes(cache).fingerprint(folder) != second


KILLED = """
import os, sys, time
from pathlib import Path
from pipelines.store import Store
store = Store(Path(sys.argv[1]))
work = store.open_work("prune", "a" * 64, resumable=False)
(work / "model").write_bytes(b"x" * 100)
print("half", flush=True)
time.sleep(60)
"""


def test_a_kill_in_the_middle_leaves_nothing_half_done(store: Store) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(store.root)], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"half\n"
        process.send_signal(signal.SIGKILL)
    assert not store.artefact("prune", KEY).exists()
    assert store.partial("prune", KEY).exists()
    publish(store, model=b"whole")
    assert store.damage("prune", KEY) is None
    assert (store.artefact("prune", KEY) / "model").read_bytes() == b"whole"
