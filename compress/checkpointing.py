"""Checkpoints of a training run: complete or absent, plain files, resumable to the last bit.

A folder ``step-00000120/`` holds ``student.safetensors``, ``optimizer.safetensors``,
``random.safetensors`` (states of the random generators), with an average of the weights
``average.safetensors``, and ``state.json``. It is filled under another name and renamed when all
of it is on the disk; only then are earlier ones removed. So at any moment of a kill there is a
whole one, once there was one. Each file carries a hash of what it holds, and is held against it
when it is read.

Many processes write ``student/``, ``optimizer/`` and ``average/`` instead: folders of safetensors
in which each process has its part (torch.distributed.checkpoint, which keeps no hashes). Either
form is read by any number of processes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_parts
from torch.distributed.checkpoint.state_dict_saver import save as save_parts

from compress.hashed import load_hashed, save_hashed
from compress.parallel import leader_says, leads, meet, processes, put
from shearling import ShearlingError, folder_aside, read_json, sha256_of_json, write_json

SCHEMA = 2
_BEST = "best-{:08d}"
_STEP = "step-{:08d}"
_WHOLE = ".safetensors"
Group = Mapping[str, Tensor] | Path
"""Named tensors, or the folder that holds their parts."""


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """What a run needs to go on: groups of named tensors, and facts that JSON can hold."""

    step: int
    state: dict[str, Any]
    tensors: Mapping[str, Group] = field(default_factory=dict)

    def whole(self, name: str) -> Mapping[str, Tensor]:
        """A group that is never split into parts.

        Raises:
            ShearlingError: its file is gone.
        """
        group = self.tensors.get(name)
        if group is None:
            raise ShearlingError(
                f"The checkpoint of step {self.step} is damaged: {name}{_WHOLE} is gone",
                hint="Delete the stage's resume folder to start it from its beginning.",
            )
        assert not isinstance(group, Path), f"{name} is one file"
        return group


def save_checkpoint(folder: Path, checkpoint: TrainingState) -> None:
    """Write ``folder/step-N``, then remove what it replaces: earlier steps and surpassed bests.

    All processes call it together.
    """
    with _shared_folder(folder / _STEP.format(checkpoint.step)) as aside:
        for group, tensors in checkpoint.tensors.items():
            _save_group(aside, group, tensors)
        if leads():
            _write_state(aside, checkpoint)
    if leads():
        _remove_replaced(folder, checkpoint)
    meet()


def save_checkpoint_alone(folder: Path, checkpoint: TrainingState) -> None:
    """`save_checkpoint` of work that one process does, while others may wait for another call."""
    with folder_aside(folder / _STEP.format(checkpoint.step)) as aside:
        for group in checkpoint.tensors:
            _save_whole(aside, group, checkpoint.whole(group))
        _write_state(aside, checkpoint)
    _remove_replaced(folder, checkpoint)


def _write_state(folder: Path, checkpoint: TrainingState) -> None:
    # As it will be read: JSON turns tuples into lists, and keys into texts.
    state = json.loads(json.dumps({**checkpoint.state, "schema": SCHEMA, "step": checkpoint.step}))
    write_json(folder / "state.json", {**state, "sha256": sha256_of_json(state)})


def _remove_replaced(folder: Path, checkpoint: TrainingState) -> None:
    best = _BEST.format(checkpoint.state.get("best_step", -1))
    _remove_all_but({_STEP.format(checkpoint.step), best, best + _WHOLE}, folder)


def _save_whole(folder: Path, name: str, tensors: Mapping[str, Tensor]) -> None:
    save_hashed(tensors, folder / f"{name}{_WHOLE}")


def _save_group(folder: Path, name: str, tensors: Group) -> None:
    """One file, or a folder with a part from each process; random states are rank 0's."""
    assert not isinstance(tensors, Path), "what is saved is in memory"
    if processes() == 1 or name == "random":
        if leads():
            _save_whole(folder, name, tensors)
        return
    ready = {key: tensor.detach().contiguous() for key, tensor in tensors.items()}
    save_parts(
        ready,
        storage_writer=HuggingFaceStorageWriter(str(folder / name), save_distributed=True),
    )


@contextmanager
def _shared_folder(final: Path) -> Iterator[Path]:
    """`folder_aside` of rank 0, for all processes; it is renamed when all have filled it."""
    if not leads():
        yield Path(leader_says(None))
        meet()
        return
    with folder_aside(final) as aside:
        leader_says(str(aside))
        yield aside
        meet()


def _remove_all_but(keep: set[str], folder: Path) -> None:
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
    if not (newest / "state.json").is_file():
        raise ShearlingError(f"The checkpoint {newest} is damaged: no state.json", hint=again)
    state = read_json(newest / "state.json", hint=again)
    if not isinstance(state, dict) or state.get("schema") != SCHEMA:
        raise ShearlingError(f"{newest} was written by another version.", hint=again)
    if state.pop("sha256", None) != sha256_of_json(state):
        raise ShearlingError(f"The checkpoint {newest} is damaged: state.json", hint=again)
    tensors: dict[str, Group] = {path.name: path for path in newest.iterdir() if path.is_dir()}
    try:
        tensors |= {path.stem: load_hashed(path) for path in sorted(newest.glob(f"*{_WHOLE}"))}
    except (SafetensorError, OSError) as error:
        raise ShearlingError(f"The checkpoint {newest} is damaged: {error}", hint=again) from error
    return TrainingState(step=int(state["step"]), state=state, tensors=tensors)


def fill(targets: Mapping[str, Tensor], source: Group) -> None:
    """Copy saved tensors into those of the same names, whole or split as these may be."""
    if not isinstance(source, Path):
        for name, target in targets.items():
            put(target, source[name])
        return
    try:
        load_parts(
            {name: target.detach() for name, target in targets.items()},
            storage_reader=HuggingFaceStorageReader(str(source)),
            no_dist=processes() == 1,
        )
    except (SafetensorError, OSError, CheckpointException) as error:
        raise ShearlingError(
            f"The checkpoint {source} is damaged: {error}",
            hint=f"Delete {source.parent.parent} to start this stage from its beginning.",
        ) from error


def names_in(source: Group) -> list[str]:
    """The names of the tensors that were saved together."""
    if not isinstance(source, Path):
        return list(source)
    return list(HuggingFaceStorageReader(str(source)).read_metadata().state_dict_metadata)


def save_best(folder: Path, step: int, weights: Mapping[str, Tensor]) -> None:
    """Keep the weights of the best evaluation so far, and beside them only those that the last
    checkpoint names: they are what a killed run goes on from."""
    name = _BEST.format(step)
    parts, whole = folder / name, folder / f"{name}{_WHOLE}"
    # What another number of processes kept for this step, before a kill, would be taken for these.
    if processes() > 1:
        with _shared_folder(parts) as aside:
            _save_group(aside, "student", weights)
        if leads():
            whole.unlink(missing_ok=True)
    else:
        save_hashed(weights, whole)
        shutil.rmtree(parts, ignore_errors=True)
    if leads():
        checkpoints = sorted(folder.glob("step-*"))
        needed = {name, *(path.name for path in checkpoints)}
        if checkpoints:
            needed.add(_BEST.format(read_json(checkpoints[-1] / "state.json").get("best_step", -1)))
        _remove_all_but(needed | {best + _WHOLE for best in needed}, folder)
    meet()


def best_name(step: int) -> str:
    """What `save_best` calls what it keeps for ``step``: a file, or a folder of parts."""
    return _BEST.format(step) + (_WHOLE if processes() == 1 else "")


def load_best(folder: Path, step: int) -> Group:
    """The weights that `save_best` kept for ``step``.

    Raises:
        ShearlingError: they are not what was written.
    """
    path = folder / _BEST.format(step)
    if path.is_dir():
        return path / "student"
    whole = path.with_name(path.name + _WHOLE)
    try:
        return load_hashed(whole)
    except (SafetensorError, OSError) as error:
        raise ShearlingError(
            f"The weights of the best evaluation are damaged: {error}",
            hint=f"Delete {folder} to start this stage from its beginning.",
        ) from error


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
