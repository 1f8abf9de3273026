"""Where the teacher's answers come from during distillation: the teacher itself, or its cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM

from compress.attention import choose_attention
from compress.data import Batch, StepData
from compress.hidden import HiddenMatch, hidden_outputs
from compress.losses import LiveTargets, SparseTargets, Targets
from compress.parallel import (
    Inside,
    largest,
    leader_first,
    leader_says,
    leads,
    meet,
    open_split,
    processes,
    rank,
    whole,
)
from compress.precision import PrecisionChoice
from compress.saving import load_model
from compress.settings import DistillSettings
from shearling import Progress
from teachers.checkpoint import Checkpoint
from teachers.targets import TargetCache, TargetFormat, capture

_SAMPLE_SEED = 0
"""Of the kept samples; not the run's seed, so runs of any seed share one cache."""


class Answers(Protocol):
    """What the loop asks a teacher."""

    def targets(self, batch: Batch) -> tuple[Targets, list[Tensor]]:
        """What the student should say where the batch counts, and hidden states to match."""
        ...

    def heldout(self, number: int, batch: Batch) -> LiveTargets:
        """The whole answer on the held-out batch of this number."""
        ...


def trunk(model: LlamaForCausalLM, batch: Batch, precision: PrecisionChoice) -> Tensor:
    """Hidden states before the output head, [N, hidden], of the positions that count.

    The positions restart with each document, and transformers makes of that the mask that keeps
    documents from seeing each other. Where the weights are wider than ``precision`` (the student)
    autocast narrows them for the matrix products only.
    """
    narrow = precision.dtype != torch.float32 and model.dtype != precision.dtype
    with torch.autocast(batch.input_BT.device.type, precision.dtype, enabled=narrow):
        hidden_BTD: Tensor = model.model(
            input_ids=batch.input_BT, position_ids=batch.positions_BT, use_cache=False
        ).last_hidden_state
    return hidden_BTD[batch.mask_BT]


def head(model: LlamaForCausalLM) -> Tensor:
    """The output head's weight, [V, hidden]; with tied embeddings it is the embeddings'."""
    return whole(model.get_output_embeddings().weight)


def open_teacher(
    folder: Path, precision: PrecisionChoice, device: torch.device, window: int
) -> Inside:
    """The teacher in the fast dtype, frozen, with the attention that is fastest here."""
    if processes() == 1:
        inside = Inside(load_model(folder, precision.dtype, device))
    else:
        inside = open_split(folder, precision.dtype, device, precision.dtype)
    inside.eval().requires_grad_(False)
    inside.model.set_attn_implementation(choose_attention(device, precision.dtype, window))
    return inside


class LiveAnswers:
    """The teacher runs along in every step."""

    def __init__(
        self, inside: Inside, precision: PrecisionChoice, match: HiddenMatch | None
    ) -> None:
        self.inside, self.precision, self.match = inside, precision, match
        self._heldout_NE: dict[int, Tensor] = {}

    @torch.no_grad()
    def targets(self, batch: Batch) -> tuple[Targets, list[Tensor]]:
        with self._listening() as layers_BTE:
            targets = self._ask(batch)
        return targets, layers_BTE

    @torch.no_grad()
    def heldout(self, number: int, batch: Batch) -> LiveTargets:
        """Hidden states are computed once and kept: a few megabytes."""
        if number not in self._heldout_NE:
            self._heldout_NE[number] = self._ask(batch).hidden_NE
        return LiveTargets(self._heldout_NE[number], head(self.inside.model))

    def _ask(self, batch: Batch) -> LiveTargets:
        found: LiveTargets = self.inside(
            lambda model: LiveTargets(trunk(model, batch, self.precision), head(model))
        )
        return found

    def _listening(self) -> AbstractContextManager[list[Tensor]]:
        return hidden_outputs(self.inside.model, self.match, "teacher")


class CachedAnswers:
    """The teacher was asked before; of it only the output head is needed, for the evaluation."""

    def __init__(self, cache: TargetCache, heldout_NE: list[Tensor], head_VE: Tensor) -> None:
        self.cache, self.heldout_NE, self.head_VE = cache, heldout_NE, head_VE

    def targets(self, batch: Batch) -> tuple[Targets, list[Tensor]]:
        device, mask_BT = batch.input_BT.device, batch.mask_BT.cpu()
        parts = (part[mask_BT].to(device) for part in self.cache.read(batch.windows))
        return SparseTargets(*parts), []

    def heldout(self, number: int, batch: Batch) -> LiveTargets:
        absent = number >= len(self.heldout_NE)  # a batch in which nothing counts
        hidden_NE = self.heldout_NE[0][:0] if absent else self.heldout_NE[number]
        return LiveTargets(hidden_NE, self.head_VE)


def cached_answers(
    teacher: Path,
    root: Path,
    data: StepData,
    settings: DistillSettings,
    precision: PrecisionChoice,
    device: torch.device,
    progress: Progress,
) -> tuple[CachedAnswers, dict[str, Any]]:
    """Open the cache, ask the teacher for what this run needs and it lacks; give facts about it."""
    checkpoint = Checkpoint(teacher)
    assert settings.targets != "live", "live answers need no cache"
    shape = TargetFormat(
        kind=settings.targets,
        slots=min(settings.target_slots, checkpoint.shape.vocab_size),
        vocabulary=checkpoint.shape.vocab_size,
    )
    count, window = data.text.tokens.shape
    with leader_first():  # hashing the teacher and making the files is done once
        identity = {
            "teacher": checkpoint.fingerprint(),
            "transfer_set": data.text.facts["sha256"],
            "tokenizer": data.text.facts["tokenizer_sha256"],
            "dtype": precision.name,
        }
        cache = TargetCache(root, identity, shape, windows=count, window=window)
    facts: dict[str, Any] = {"folder": str(cache.folder), "bytes_per_token": shape.bytes_per_token}
    heldout = cache.folder / "heldout.safetensors"
    missing = cache.missing(data.all_windows())
    if leader_says(bool(missing) or not heldout.exists()):
        inside = open_teacher(teacher, precision, device, window)
        facts |= _capture(cache, inside, data, leader_says(missing), precision, progress)
        _keep_heldout(heldout, inside, data, precision)
        del inside
        meet()
    positions = [batch.positions for batch in data.heldout()]
    hidden_NE = torch.split(load_file(heldout, device=str(device))["hidden"], positions)
    head_VE = checkpoint.tensor("lm_head.weight", precision.dtype).to(device)
    return CachedAnswers(cache, list(hidden_NE), head_VE), facts


def _capture(
    cache: TargetCache,
    inside: Inside,
    data: StepData,
    missing: list[int],
    precision: PrecisionChoice,
    progress: Progress,
) -> dict[str, Any]:
    """Each process asks for its part of the windows; all make equally many passes."""
    passes = largest(-(-len(missing[rank() :: processes()]) // data.micro_windows))

    def answer(windows: list[int]) -> Iterator[tuple[int, Tensor]]:
        yield from _logits(inside, data, windows, precision)
        idle = passes - -(-len(windows) // data.micro_windows)
        for _ in range(idle):  # a split teacher needs every process in every pass
            for _ in _logits(inside, data, missing[:1], precision):
                pass

    mine = missing[rank() :: processes()]
    facts = capture(cache, mine, answer, seed=_SAMPLE_SEED, progress=progress)
    return {**facts, "captured_windows": len(missing)}


@torch.no_grad()
def _logits(
    inside: Inside, data: StepData, windows: list[int], precision: PrecisionChoice
) -> Iterator[tuple[int, Tensor]]:
    """The teacher's logits, a window at a time, [T, V], at every position."""
    for batch in data.in_batches(windows):
        hidden_NE = inside(partial(trunk, batch=batch.counting_everywhere(), precision=precision))
        hidden_BTE = hidden_NE.view(*batch.input_BT.shape, -1)
        for number, hidden_TE in zip(batch.windows, hidden_BTE, strict=True):
            yield number, hidden_TE @ head(inside.model).T


@torch.no_grad()
def _keep_heldout(path: Path, inside: Inside, data: StepData, precision: PrecisionChoice) -> None:
    """Hidden states of the held-out windows, one after the other however they are batched."""
    hidden_NE = torch.cat(
        [inside(partial(trunk, batch=batch, precision=precision)) for batch in data.heldout()]
    )
    if leads():
        aside = path.with_suffix(".partial")
        save_file({"hidden": hidden_NE}, aside)
        aside.replace(path)
