"""Checkpoints of a training run: complete or absent, plain files, resumable to the last bit.

A folder ``step-00000120/`` holds ``student.safetensors``, ``optimizer.safetensors``,
``random.safetensors`` (states of the random generators), with an average of the weights
``average.safetensors``, and ``state.json``. It is filled under another name and renamed when all
of it is on the disk; only then are earlier ones removed. So at any moment of a kill there is a
whole one, once there was one.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from shearling import ShearlingError, folder_aside, read_json, write_json

SCHEMA = 1
_BEST = "best-{:08d}.safetensors"
_STEP = "step-{:08d}"


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """What a run needs to go on: groups of named tensors, and facts that JSON can hold."""

    step: int
    state: dict[str, Any]
    tensors: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)


def save_checkpoint(folder: Path, checkpoint: TrainingState) -> None:
    """Write ``folder/step-N``, then remove what it replaces: earlier steps and surpassed bests."""
    with folder_aside(folder / _STEP.format(checkpoint.step)) as aside:
        for name, tensors in checkpoint.tensors.items():
            save_file(_ready(tensors), aside / f"{name}.safetensors")
        state = {**checkpoint.state, "schema": SCHEMA, "step": checkpoint.step}
        write_json(aside / "state.json", state)
    keep = {_STEP.format(checkpoint.step), _BEST.format(checkpoint.state.get("best_step", -1))}
    for path in folder.iterdir():
        if path.name in keep:
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def load_checkpoint(folder: Path) -> TrainingState | None:
    """The newest checkpoint in ``folder``, or None where there is none.

    Raises:
        ShearlingError: it can't be read, or another version of the project wrote it.
    """
    steps = sorted(folder.glob("step-*")) if folder.is_dir() else []
    if not steps:
        return None
    newest = steps[-1]
    again = f"Delete {folder} to start this stage from its beginning."
    state = read_json(newest / "state.json")
    if not isinstance(state, dict) or state.get("schema") != SCHEMA:
        raise ShearlingError(f"{newest} was written by another version.", hint=again)
    try:
        tensors = {path.stem: load_file(path) for path in sorted(newest.glob("*.safetensors"))}
    except (SafetensorError, OSError) as error:
        raise ShearlingError(f"The checkpoint {newest} is damaged: {error}", hint=again) from error
    return TrainingState(step=int(state["step"]), state=state, tensors=tensors)


def save_best(folder: Path, step: int, weights: Mapping[str, Tensor]) -> None:
    """Keep the weights of the best evaluation so far; the next checkpoint drops the earlier."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _BEST.format(step)
    aside = path.with_suffix(".partial")
    save_file(_ready(weights), aside)
    aside.replace(path)


def load_best(folder: Path, step: int) -> dict[str, Tensor]:
    """The weights that `save_best` kept for ``step``."""
    return dict(load_file(folder / _BEST.format(step)))


def random_tensors() -> dict[str, Tensor]:
    """The states of PyTorch's random generators."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_random(states: Mapping[str, Tensor]) -> None:
    """Put back what `random_tensors` gave."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _ready(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
