"""The whole teacher in memory, for the few things that need it before anything is pruned."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaForCausalLM


def dtype_on(device: str) -> torch.dtype:
    """In which numbers a teacher reads and writes: the fast ones that such a device surely has."""
    return torch.bfloat16 if device.startswith("cuda") else torch.float32


def open_model(folder: Path, device: str) -> LlamaForCausalLM:
    """A frozen model from a Hugging Face folder, on the device."""
    model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(
        folder, dtype=dtype_on(device), local_files_only=True
    )
    return model.to(device).eval().requires_grad_(False)
