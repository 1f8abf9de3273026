"""A student on disk: a stock LlamaConfig and its weights, written tensor by tensor in shards."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig

from shearling import ShearlingError, sha256_of_file, sync, write_json
from students.shape import Shape
from students.tensors import save_tensors

SHARD_BYTES = 512 * 1024**2
"""What waits in memory to be written; half a gigabyte is a file of a useful size, too."""
_ONLY = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def student_config(teacher: LlamaConfig, shape: Shape) -> LlamaConfig:
    """The teacher's configuration with the student's numbers.

    Context length, RoPE parameters, norm epsilon and special tokens stay the teacher's.
    """
    config = copy.deepcopy(teacher)
    config.update(shape.to_dict())
    config.architectures = ["LlamaForCausalLM"]
    return config


class Shard(TypedDict):
    """The tensors of a file, in their order, and the hash of its bytes."""

    names: list[str]
    sha256: str


class StudentWriter:
    """Collects a student's tensors and writes a shard whenever enough have come together.

    Memory is bounded by ``shard_bytes``. ``finish`` names the shards as transformers expects and
    writes config.json last, so an unfinished folder isn't taken for a model.
    """

    def __init__(
        self, folder: Path, config: LlamaConfig, dtype: torch.dtype, shard_bytes: int = SHARD_BYTES
    ) -> None:
        self.folder, self.config, self.dtype = folder, config, dtype
        self.shard_bytes = shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._shards: list[Shard] = []
        self._bytes = 0
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, name: str, tensor: Tensor) -> None:
        """Take one tensor; it is stored in the student's dtype.

        Raises:
            FloatingPointError: the tensor holds NaN or infinity.
        """
        stored = tensor.detach().to("cpu", self.dtype).contiguous().clone()
        if not bool(torch.isfinite(stored).all()):
            too_large = bool(torch.isfinite(tensor).all())
            raise FloatingPointError(
                f"{name} has numbers too large for {self.dtype}"
                if too_large
                else f"{name} is not finite"
            )
        self._pending[name] = stored
        self._bytes += stored.nbytes
        if sum(pending.nbytes for pending in self._pending.values()) >= self.shard_bytes:
            self._flush()

    def checkpoint(self) -> list[Shard]:
        """Put what was added so far safely on the disk; ``restore`` takes the answer."""
        if self._pending:
            self._flush()
        return list(self._shards)

    def restore(self, shards: Sequence[Shard]) -> None:
        """Go on behind the shards of a ``checkpoint`` that is on the disk.

        What was written after it goes, for it is written again: later shards, and what a
        ``finish`` had done, which may have renamed some shards before it was killed.

        Raises:
            ShearlingError: a shard is gone or damaged.
        """
        self._shards = list(shards)
        paths = [self._shard_path(number) for number in range(1, len(shards) + 1)]
        for number, path in enumerate(paths, 1):
            if not path.exists():
                self._renamed(number).rename(path)
        later = [*self.folder.glob("model*.safetensors"), *self.folder.glob(".shard-*")]
        later += [self.folder / name for name in (_INDEX, "config.json")]
        for path in later:
            if path not in paths:
                path.unlink(missing_ok=True)
        for shard, path in zip(shards, paths, strict=True):
            if sha256_of_file(path) != shard["sha256"]:
                raise ShearlingError(
                    f"A part of the student is damaged: {path} holds something else than what was "
                    "written.",
                    hint=f"Delete {self.folder.parent} to start this stage from its beginning.",
                )
        self._bytes = sum(tensor.nbytes for path in paths for tensor in load_file(path).values())

    def written(self, name: str) -> Tensor:
        """A tensor of the shards that are on the disk."""
        number = next(n for n, shard in enumerate(self._shards, 1) if name in shard["names"])
        with safe_open(self._shard_path(number), framework="pt") as shard:
            tensor: Tensor = shard.get_tensor(name)
        return tensor

    def _renamed(self, number: int) -> Path:
        """Where a ``finish`` that was killed has put a shard."""
        names = [f"model-{number:05d}-of-*.safetensors", *([_ONLY] if number == 1 else [])]
        for path in (path for name in names for path in self.folder.glob(name)):
            return path
        raise ShearlingError(
            f"Of the student in {self.folder} the part {number} is gone.",
            hint=f"Delete {self.folder.parent} to start this stage from its beginning.",
        )

    def finish(self) -> None:
        """Write what is left, the index if there are several shards, and the configuration."""
        if self._pending:
            self._flush()
        count = len(self._shards)
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(self._shards, 1):
            name = _ONLY if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            self._shard_path(number).rename(self.folder / name)
            weight_map |= dict.fromkeys(shard["names"], name)
        if count > 1:
            index = {"metadata": {"total_size": self._bytes}, "weight_map": weight_map}
            write_json(self.folder / _INDEX, index)
        self.config.dtype = self.dtype
        self.config.save_pretrained(self.folder)

    def _shard_path(self, number: int) -> Path:
        return self.folder / f".shard-{number:05d}.safetensors"

    def _flush(self) -> None:
        path = self._shard_path(len(self._shards) + 1)
        save_tensors(self._pending, path)
        sync(path)
        self._shards.append({"names": list(self._pending), "sha256": sha256_of_file(path)})
        self._pending = {}
