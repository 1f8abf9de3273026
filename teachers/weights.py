"""Weight files on disk, tensor by tensor: one safetensors file, shards with an index, or .bin.

Only headers are read when a folder is opened; a tensor is read when it is asked for. Nothing here
knows what a Llama is.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from shearling import Progress, ShearlingError, read_json, silent, write_json
from students.tensors import save_tensors

SHARD_BYTES = 2 << 30
_MAX_HEADER_BYTES = 100_000_000
"""The bound of the safetensors library itself."""

_SAMPLED_ROWS = 64
_AGAIN = "Download or copy the model again."

# The dtypes of safetensors that hold plain numbers; FP8 and integers are quantised forms.
FLOAT_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_TORCH_DTYPE_NAMES = {dtype: name for name, dtype in FLOAT_DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and what it is. ``dtype`` is safetensors' name for it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def read_safetensors_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors that a safetensors file declares, held against the file's own size.

    Raises:
        ShearlingError: damaged or truncated file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else None
        if length is None or length > _MAX_HEADER_BYTES or 8 + length > size:
            raise ShearlingError(
                f"{path} is not a whole safetensors file: its {size:,} bytes end before the "
                "header does.",
                hint=_AGAIN,
            )
        text = file.read(length)
    try:
        header: dict[str, Any] = json.loads(text)
        header.pop("__metadata__", None)
        infos = {
            name: TensorInfo(path, str(entry["dtype"]), tuple(int(n) for n in entry["shape"]))
            for name, entry in header.items()
        }
        end = max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise ShearlingError(
            f"{path} has a damaged safetensors header: {error}", hint=_AGAIN
        ) from error
    if 8 + length + end != size:
        raise ShearlingError(
            f"{path} is truncated or damaged: its header promises {8 + length + end:,} bytes, "
            f"the file has {size:,}.",
            hint=_AGAIN,
        )
    return infos


def _inside(folder: Path, name: str) -> Path:
    """A shard's path; an index must not point out of its folder."""
    path = folder / name
    if Path(name).name != name:
        raise ShearlingError(
            f"The index in {folder} names {name!r}, which is not a file of that folder.",
            hint=_AGAIN,
        )
    return path


def _indexed_files(folder: Path, index: Path) -> list[Path]:
    """The shards of an index; all that are missing are named at once."""
    data = read_json(index, hint=_AGAIN)
    entries = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(entries, dict) or not all(isinstance(v, str) for v in entries.values()):
        raise ShearlingError(f"{index} has no usable weight_map.", hint=_AGAIN)
    files = [_inside(folder, name) for name in sorted(set(entries.values()))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ShearlingError(
            f"{folder} lacks {len(missing)} of {len(files)} weight files: {', '.join(missing)}.",
            hint="Finish the download or copy the missing files.",
        )
    return files


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a Hugging Face folder: safetensors before .bin, a single file before an
    index that an earlier save may have left beside it, as transformers has it.

    Raises:
        ShearlingError: none there, or some of an index's files missing.
    """
    for stem, ending in (("model", "safetensors"), ("pytorch_model", "bin")):
        single = folder / f"{stem}.{ending}"
        if single.is_file():
            return [single]
        index = folder / f"{stem}.{ending}.index.json"
        if index.is_file():
            return _indexed_files(folder, index)
    found = sorted(path.name for path in folder.iterdir() if path.is_file())
    raise ShearlingError(
        f"{folder} holds no weights (model.safetensors, shards with "
        "model.safetensors.index.json, or pytorch_model.bin).",
        hint=f"There is: {', '.join(found[:12]) or 'nothing'}."
        + (" For a GGUF name the .gguf file." if any(n.endswith(".gguf") for n in found) else ""),
    )


def load_state(file: Path) -> dict[str, Tensor]:
    """The tensors of a file that ``torch.save`` wrote, memory-mapped where its format allows.

    weights_only keeps pickle from running code.
    """
    try:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the format before torch 1.6 can't be mapped
            state = torch.load(file, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # bytes of any kind, given to pickle
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise ShearlingError(
            f"{file} can't be read as plain weights: {why}",
            hint=f"{_AGAIN} A safetensors version is safer and faster.",
        ) from error
    if not isinstance(state, dict):
        raise ShearlingError(f"{file} holds no dictionary of tensors.", hint=_AGAIN)
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


class WeightFiles:
    """Tensors by name over one or more files. Use one instance in one thread."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files
        self._handles: dict[Path, Any] = {}
        self._bins: dict[Path, dict[str, Tensor]] = {}
        self.infos: dict[str, TensorInfo] = {}
        for file in files:
            infos = (
                self._bin_infos(file) if file.suffix == ".bin" else read_safetensors_header(file)
            )
            self.infos.update(infos)

    def names(self) -> Iterator[str]:
        return iter(self.infos)

    def tensor(self, name: str) -> Tensor:
        """The tensor as stored; KeyError for an unknown name."""
        file = self.infos[name].file
        if file.suffix == ".bin":
            return self._bin(file)[name]
        try:
            if file not in self._handles:
                self._handles[file] = safe_open(file, framework="pt", device="cpu")
            tensor: Tensor = self._handles[file].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ShearlingError(f"{file} can't be read: {error}", hint=_AGAIN) from error
        return tensor

    def _bin(self, file: Path) -> dict[str, Tensor]:
        if file not in self._bins:
            self._bins[file] = load_state(file)
        return self._bins[file]

    def _bin_infos(self, file: Path) -> dict[str, TensorInfo]:
        return {
            name: TensorInfo(
                file, _TORCH_DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape)
            )
            for name, tensor in self._bin(file).items()
        }


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite: one pass, no copy (aminmax propagates NaN)."""
    if tensor.numel() == 0:
        return True
    low, high = tensor.aminmax()
    return bool(torch.isfinite(low)) and bool(torch.isfinite(high))


def are_equal(one_VD: Tensor, other_VD: Tensor) -> bool:
    """Whether two mapped matrices are equal; some rows tell of most that they aren't.

    All of Llama 3's two tables would be 2 GB to read, only to learn that they differ.
    """
    if one_VD.shape != other_VD.shape or one_VD.dtype != other_VD.dtype:
        return False
    some = slice(None, None, max(1, len(one_VD) // _SAMPLED_ROWS))
    return torch.equal(one_VD[some], other_VD[some]) and torch.equal(one_VD, other_VD)


def _split(sizes: list[int]) -> list[int]:
    """How many tensors go into each shard, so that one is about SHARD_BYTES."""
    counts, filled = [0], 0
    for size in sizes:
        if counts[-1] and filled + size > SHARD_BYTES:
            counts.append(0)
            filled = 0
        counts[-1] += 1
        filled += size
    return counts


def save_shards(
    tensors: Iterator[tuple[str, Tensor]],
    sizes: list[int],
    out: Path,
    *,
    what: str,
    progress: Progress = silent,
) -> None:
    """Write tensors as safetensors with an index, one shard in memory at a time.

    ``sizes`` are the bytes of the tensors to come, in their order.
    """
    counts, weight_map, done = _split(sizes), {}, 0
    for number, count in enumerate(counts, 1):
        name = f"model-{number:05d}-of-{len(counts):05d}" if len(counts) > 1 else "model"
        file = out / f"{name}.safetensors"
        shard: dict[str, Tensor] = {}
        for tensor_name, tensor in islice(tensors, count):
            shard[tensor_name] = tensor.contiguous()
            weight_map[tensor_name] = file.name
            done += 1
            progress(what, done, len(sizes))
        save_tensors(shard, file)
    if len(counts) > 1:
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
        write_json(out / "model.safetensors.index.json", index)
