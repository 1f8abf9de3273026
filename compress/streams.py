"""Residual streams of all calibration windows: in memory, or in a memory map when they are large.

Legend: B windows, T positions, D hidden.
"""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Streams:
    """Makes the streams of one walk, in ``dtype``.

    What doesn't fit into ``limit_bytes`` any more lies in files under ``folder``, which have no
    name there: the operating system reads and writes their pages as the walk passes over the
    windows, in order.
    """

    def __init__(self, folder: Path, dtype: torch.dtype, limit_bytes: int) -> None:
        self.folder, self.dtype = folder, dtype
        self._left = limit_bytes

    def embedded(self, name: str, embedding_VD: Tensor, tokens_BT: Tensor) -> Tensor:
        """The stream at the model's entrance, [B, T, D]: every token's embedding."""
        stream_BTD = self.empty(name, (*tokens_BT.shape, embedding_VD.shape[1]))
        for window, tokens_T in enumerate(tokens_BT):
            stream_BTD[window] = embedding_VD[tokens_T]
        return stream_BTD

    def empty(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """A tensor of this shape, in memory while there is room and in a file from then on."""
        dtype = dtype or self.dtype
        size = math.prod(shape) * dtype.itemsize
        if size <= self._left or size == 0:
            self._left -= size
            return torch.empty(shape, dtype=dtype)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{name}.stream"
        try:
            with path.open("wb") as file:
                _take_room(file.fileno(), size)
            mapped = torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=dtype)
        finally:
            # The map keeps it, and nothing stays of a process that is killed.
            path.unlink(missing_ok=True)
        return mapped.view(shape)


def _take_room(handle: int, size: int) -> None:
    """Give a file its blocks: on a full disk a write to a map without them ends the process.

    Raises:
        OSError: there is no room.
    """
    if sys.platform != "darwin":
        os.posix_fallocate(handle, 0, size)
