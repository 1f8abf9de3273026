"""A full disk ends in one clear error, not in a bus error. Needs a small file system."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from compress.streams import Streams
from pipelines.tiny import tiny_documents, write_documents
from shearling import ShearlingError, disk_errors
from teachers.settings import SourceSettings, TransferSetSettings
from teachers.transfer_set import build_transfer_set
from teachers.weights import save_shards


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 kB, where this user may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(disk)]
    try:
        done = subprocess.run(command, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount here")
    if done.returncode != 0:
        pytest.skip("this user may not mount a small file system")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def build(disk: Path, tokenizer: Path, tmp_path: Path, documents: int) -> None:
    text = write_documents(tmp_path / "text.jsonl", tiny_documents(documents))
    recipe = TransferSetSettings(
        sources=(SourceSettings(name="text", path=str(text)),), window=16, heldout_windows=4
    )
    build_transfer_set(recipe, tokenizer, disk / "set", seed=0, cache=tmp_path)


def test_a_transfer_set_that_fits(small_disk: Path, tiny_llama: Path, tmp_path: Path) -> None:
    build(small_disk, tiny_llama, tmp_path, 200)


@pytest.mark.parametrize("documents", range(700, 1300, 100))
def test_a_transfer_set_that_does_not_fit(
    small_disk: Path, tiny_llama: Path, tmp_path: Path, documents: int
) -> None:
    """The disk fills up while the ids are written, or the windows, or the starts."""
    with pytest.raises(ShearlingError, match="disk is full"):
        build(small_disk, tiny_llama, tmp_path, documents)


def test_streams_that_do_not_fit(small_disk: Path) -> None:
    """A map of a file without blocks would end the process where it is first written."""
    streams = Streams(small_disk / "streams", torch.float32, limit_bytes=0)
    kept = streams.empty("one", (1 << 15,)).fill_(1.0)
    with pytest.raises(ShearlingError, match="disk is full"), disk_errors(small_disk):
        streams.empty("other", (1 << 16,)).fill_(2.0)
    assert bool((kept == 1).all())
    assert not list(streams.folder.iterdir())


def test_weights_that_do_not_fit(small_disk: Path) -> None:
    tensors = iter([("a", torch.zeros(1 << 17))])
    with pytest.raises(ShearlingError, match="disk is full"), disk_errors(small_disk):
        save_shards(tensors, [4 << 17], small_disk, what="write")
