"""A student is written in shards; a writer that was killed anywhere goes on to the same files."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from shearling import ShearlingError
from students.build import Shard, StudentWriter

TENSORS = {f"model.layers.{n}.weight": torch.arange(8.0) + n for n in range(6)}


def writer(folder: Path, shard_bytes: int = 64) -> StudentWriter:
    """A tensor has 32 bytes, so two make a shard."""
    return StudentWriter(folder, LlamaConfig(), torch.float32, shard_bytes)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def add(student: StudentWriter, first: int, last: int) -> None:
    for name in list(TENSORS)[first:last]:
        student.add(name, TENSORS[name])


class Killed(BaseException):
    """Nothing tidies up after it."""


def killed_at(monkeypatch: pytest.MonkeyPatch, change: int) -> None:
    """The process dies right before so many renamings or writings of JSON."""
    left = [change]
    for name in ("rename", "write_text"):
        real = getattr(Path, name)

        def counted(path: Path, *args: Any, real: Any = real, **named: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return real(path, *args, **named)

        monkeypatch.setattr(Path, name, counted)


@pytest.mark.parametrize("shard_bytes", [64, 10**6])
@pytest.mark.parametrize("change", range(6))
def test_a_writer_that_was_killed_while_it_ended_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: int, shard_bytes: int
) -> None:
    """With a checkpoint before the end, killed at every step of ``finish``, and after it."""

    def written(folder: Path) -> tuple[StudentWriter, list[Shard]]:
        student = writer(folder, shard_bytes)
        add(student, 0, 4)
        shards = student.checkpoint()
        add(student, 4, 6)
        return student, shards

    whole, _ = written(tmp_path / "whole")
    whole.finish()
    student, shards = written(tmp_path / "killed")
    with monkeypatch.context() as patch:
        killed_at(patch, change)
        with contextlib.suppress(Killed):
            student.finish()
    again = writer(tmp_path / "killed", shard_bytes)
    again.restore(shards)
    add(again, 4, 6)
    again.finish()
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_what_was_written_after_the_checkpoint_does_not_stay(tmp_path: Path) -> None:
    """Other shards come out this time, as when a checkpoint falls elsewhere."""
    student = writer(tmp_path)
    add(student, 0, 2)
    shards = student.checkpoint()
    add(student, 2, 6)
    student.finish()
    again = writer(tmp_path)
    again.restore(shards)
    add(again, 2, 3)
    again.checkpoint()
    add(again, 3, 6)
    again.finish()
    names = set(files(tmp_path))
    assert "model-00004-of-00004.safetensors" in names
    assert not [name for name in names if name.endswith("-of-00003.safetensors")]


def test_a_shard_that_is_gone_is_told(tmp_path: Path) -> None:
    student = writer(tmp_path / "model")
    add(student, 0, 2)
    shards = student.checkpoint()
    (tmp_path / "model" / ".shard-00001.safetensors").unlink()
    with pytest.raises(ShearlingError, match="part 1 is gone") as caught:
        writer(tmp_path / "model").restore(shards)
    assert str(tmp_path) in caught.value.hint


def test_a_shard_with_a_flipped_bit_is_told(tmp_path: Path) -> None:
    student = writer(tmp_path / "model")
    add(student, 0, 4)
    shards = student.checkpoint()
    shard = tmp_path / "model" / ".shard-00002.safetensors"
    content = bytearray(shard.read_bytes())
    content[-5] ^= 64
    shard.write_bytes(content)
    with pytest.raises(ShearlingError, match="something else than what was written") as caught:
        writer(tmp_path / "model").restore(shards)
    assert str(tmp_path) in caught.value.hint
