"""Tensors in a safetensors file that names the hash of its content, and is held against it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from shearling import file_aside


def save_hashed(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write named tensors so that a reader sees the old file or the new, never a part."""
    ready = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    with file_aside(path) as aside:
        save_file(ready, aside, metadata={"sha256": _hash_of(ready)})


def load_hashed(path: Path) -> dict[str, Tensor]:
    """Read what `save_hashed` wrote.

    Raises:
        SafetensorError: its content is not what was written, or nobody hashed it.
        OSError: it can't be read.
    """
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        expected = (file.metadata() or {}).get("sha256")
    if _hash_of(tensors) != expected:
        raise SafetensorError(f"{path.name} holds something else than what was written")
    return tensors


def _hash_of(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
