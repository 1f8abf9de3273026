"""The header of a GGUF file: parsed with every length held against the file before it is believed.

A truncated or hostile file ends in a ShearlingError, not in a crash or in all memory used. The
tensors stay in the file until they are asked for; the dequantisation itself is the ``gguf``
package's.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray

from shearling import ShearlingError, itemised

AGAIN = "Download or copy the file again."
_CHUNK_ELEMENTS = 1 << 18
"""Dequantised at once: 1 MB of floats stays in the processor's cache; 64 MB took twice as long."""
_MAX_ENTRIES = 1 << 16  # metadata keys, tensors: a 405B model has some 1,200 tensors
_MAX_DIMENSIONS = 4
_STRING, _ARRAY = 8, 9
_SCALARS = {
    **{0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?"},
    **{10: "<Q", 11: "<q", 12: "<d"},
}


def refusal(path: Path, *problems: str) -> ShearlingError:
    """What a stock Llama can't hold, by name."""
    return ShearlingError(
        itemised(f"{path} can't be taken as a stock Llama:", problems),
        hint="Use the original Hugging Face checkpoint, or a GGUF of a plain Llama.",
    )


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies in the file. ``shape`` is in PyTorch's order, slowest axis first."""

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    bytes: int


@dataclass
class Gguf:
    """A GGUF's header; the tensors stay in the file."""

    path: Path
    metadata: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, GgufTensor] = field(default_factory=dict)

    def read(self, name: str) -> NDArray[np.float32]:
        """One tensor as 32-bit floats, dequantised a bounded number of rows at a time."""
        info = self.tensors[name]
        columns = info.shape[-1]
        rows = math.prod(info.shape[:-1])
        block, width = GGML_QUANT_SIZES[info.kind]
        row_bytes = columns // block * width
        stored = np.memmap(self.path, np.uint8, "r", info.offset, (rows, row_bytes))
        result = np.empty((rows, columns), np.float32)
        step = max(1, _CHUNK_ELEMENTS // columns)
        for row in range(0, rows, step):
            result[row : row + step] = _dequantise(np.array(stored[row : row + step]), info.kind)
        return result.reshape(info.shape)


def _dequantise(data: NDArray[np.uint8], kind: GGMLQuantizationType) -> NDArray[np.float32]:
    if kind == GGMLQuantizationType.F64:
        return data.view(np.float64).astype(np.float32)
    values: NDArray[np.float32] = dequantize(data, kind)
    return values


class _Damaged(Exception):
    """The header does not make sense; turned into a ShearlingError with the file's name."""


class _Cursor:
    """Reads little-endian values and never past the end of the file."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at, self.size = data, 0, len(data)

    def take(self, count: int) -> int:
        """Move over ``count`` bytes; returns where they begin."""
        if count > self.size - self.at:
            raise _Damaged(
                f"it ends at byte {self.size:,} where {count:,} more bytes from {self.at:,} on "
                "are promised"
            )
        self.at += count
        return self.at - count

    def scalar(self, form: str) -> Any:
        return struct.unpack_from(form, self.data, self.take(struct.calcsize(form)))[0]

    def string(self) -> str:
        length = self.scalar("<Q")
        start = self.take(length)
        try:
            return self.data[start : start + length].decode("utf-8")
        except UnicodeDecodeError as error:
            raise _Damaged(f"the text at byte {start:,} is not UTF-8") from error

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self._array()
        if kind not in _SCALARS:
            raise _Damaged(f"it has a value of unknown type {kind}")
        return self.scalar(_SCALARS[kind])

    def _array(self) -> list[Any]:
        kind, length = self.scalar("<I"), self.scalar("<Q")
        if kind == _STRING:
            if length > (self.size - self.at) // 8:
                raise _Damaged(f"it promises {length:,} strings, more than it has bytes for")
            return [self.string() for _ in range(length)]
        if kind not in _SCALARS:
            raise _Damaged(f"it has an array of type {kind}, which no Llama needs")
        start = self.take(length * struct.calcsize(_SCALARS[kind]))
        values = np.frombuffer(self.data, np.dtype(_SCALARS[kind]), length, start)
        return list(values.tolist())

    def count(self, what: str) -> int:
        count: int = self.scalar("<Q")
        if count > _MAX_ENTRIES:
            raise _Damaged(f"it promises {count:,} {what}")
        return count


def read_gguf(path: Path) -> Gguf:
    """Parse and check a GGUF's header.

    Raises:
        ShearlingError: not a GGUF, truncated, or a header that contradicts itself.
    """
    if path.stat().st_size < 24:
        raise ShearlingError(f"{path} is too short to be a GGUF file.", hint=AGAIN)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:4] != b"GGUF":
            raise ShearlingError(
                f"{path} is not a GGUF file: it does not begin with 'GGUF'.", hint=AGAIN
            )
        try:
            return _read_header(path, _Cursor(data))
        except _Damaged as error:
            raise ShearlingError(f"{path} is truncated or damaged: {error}.", hint=AGAIN) from error


def _read_header(path: Path, cursor: _Cursor) -> Gguf:
    cursor.take(4)
    version = cursor.scalar("<I")
    if version not in (2, 3):
        swapped = version & 0xFFFF == 0
        raise ShearlingError(
            f"{path} is a GGUF of version {version}{' or big-endian' if swapped else ''}; "
            "versions 2 and 3, little-endian, can be read.",
            hint="Convert the model anew with a current llama.cpp.",
        )
    tensors, entries = cursor.count("tensors"), cursor.count("metadata keys")
    gguf = Gguf(path)
    for _ in range(entries):
        key = cursor.string()
        if key in gguf.metadata:
            raise _Damaged(f"the metadata key {key!r} is there twice")
        gguf.metadata[key] = cursor.value(cursor.scalar("<I"))
    found = [_tensor_info(cursor) for _ in range(tensors)]
    alignment = gguf.metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise _Damaged(f"its alignment is {alignment!r}, no power of two")
    start = -(-cursor.at // alignment) * alignment
    for name, kind, shape, offset in found:
        if name in gguf.tensors:
            raise _Damaged(f"the tensor {name!r} is there twice")
        gguf.tensors[name] = _placed(name, kind, shape, start + offset, cursor.size)
    return gguf


def _tensor_info(cursor: _Cursor) -> tuple[str, int, tuple[int, ...], int]:
    name = cursor.string()
    dimensions = cursor.scalar("<I")
    if not 1 <= dimensions <= _MAX_DIMENSIONS:
        raise _Damaged(f"the tensor {name!r} has {dimensions:,} dimensions")
    shape = tuple(cursor.scalar("<Q") for _ in range(dimensions))
    return name, cursor.scalar("<I"), shape[::-1], cursor.scalar("<Q")


def _placed(name: str, kind: int, shape: tuple[int, ...], offset: int, size: int) -> GgufTensor:
    """A tensor whose bytes are known to lie inside the file."""
    try:
        quantisation = GGMLQuantizationType(kind)
    except ValueError as error:
        raise _Damaged(f"the tensor {name!r} has the unknown type {kind}") from error
    block, width = GGML_QUANT_SIZES[quantisation]
    if min(shape) < 1 or shape[-1] % block:
        raise _Damaged(f"the tensor {name!r} has the shape {list(shape)} in blocks of {block}")
    count = math.prod(shape) // block * width
    if offset + count > size:
        raise _Damaged(f"the tensor {name!r} ends at byte {offset + count:,}, the file at {size:,}")
    return GgufTensor(name, quantisation, shape, offset, count)
