"""Where the teacher's answers come from during distillation: the teacher itself, or its cache."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import LlamaForCausalLM

from compress.attention import choose_attention
from compress.data import Batch, StepData
from compress.hashed import load_hashed, save_hashed
from compress.hidden import Collected, HiddenMatch, hidden_outputs
from compress.losses import (
    LiveAnswer,
    LiveTargets,
    MixedTargets,
    SparseTargets,
    Targets,
    mix_sparse,
)
from compress.parallel import (
    Inside,
    agreed,
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
from compress.precision import PrecisionChoice, in_precision
from compress.saving import load_model
from compress.settings import DistillSettings
from shearling import Progress, ShearlingError
from teachers.checkpoint import Checkpoint
from teachers.layout import HEAD
from teachers.targets import HiddenCache, TargetCache, TargetFormat, WindowCache, capture
from teachers.tokenizer import check_same_tokenizer

_SAMPLE_SEED = 0
"""Of the kept samples; not the run's seed, so runs of any seed share one cache."""
_LOGIT_POSITIONS = 512
"""Positions whose logits are in memory at once while a teacher is asked for kept targets."""


@dataclass(frozen=True)
class Taught:
    """One teacher: its Hugging Face folder, and its share where there are several."""

    folder: Path
    weight: float = 1.0


class Answers(Protocol):
    """What the loop asks a teacher."""

    def targets(self, batch: Batch) -> tuple[Targets, Collected]:
        """What the student should say where the batch counts, and hidden states to match."""
        ...

    def heldout(self, number: int, batch: Batch) -> LiveAnswer | None:
        """The whole answer on the held-out batch of this number; None where there is no teacher."""
        ...


def trunk(model: LlamaForCausalLM, batch: Batch, precision: PrecisionChoice) -> Tensor:
    """Hidden states before the output head, [N, hidden], of the positions that count.

    The positions restart with each document, and transformers makes of that the mask that keeps
    documents from seeing each other.
    """
    with in_precision(model, precision):
        hidden_BTD: Tensor = model.model(
            input_ids=batch.input_BT, position_ids=batch.positions_BT, use_cache=False
        ).last_hidden_state
    return batch.pick(hidden_BTD)


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
        self, inside: Inside, precision: PrecisionChoice, matches: Sequence[HiddenMatch]
    ) -> None:
        self.inside, self.precision, self.matches = inside, precision, matches
        self._heldout_NE: dict[int, Tensor] = {}

    @torch.no_grad()
    def targets(self, batch: Batch) -> tuple[LiveTargets, Collected]:
        with hidden_outputs(self.inside.model, self.matches, "teacher") as layers_BTE:
            targets = self._ask(batch)
        return targets, layers_BTE

    @torch.no_grad()
    def heldout(self, number: int, batch: Batch) -> LiveTargets:
        """Hidden states are computed once and kept in the host's memory: of large models with
        long windows they are gigabytes."""
        if number not in self._heldout_NE:
            self._heldout_NE[number] = self._ask(batch).hidden_NE.cpu()
        hidden_NE = self._heldout_NE[number].to(batch.input_BT.device)
        return LiveTargets(hidden_NE, head(self.inside.model))

    def _ask(self, batch: Batch) -> LiveTargets:
        found: LiveTargets = self.inside(
            lambda model: LiveTargets(trunk(model, batch, self.precision), head(model))
        )
        return found


class CachedAnswers:
    """The teacher was asked before; of it only the output head is needed, for the evaluation."""

    def __init__(
        self,
        cache: TargetCache,
        heldout_NE: Mapping[int, Tensor],
        head_VE: Tensor,
        layers: HiddenCache | None,
    ) -> None:
        self.cache, self.heldout_NE, self.head_VE = cache, heldout_NE, head_VE
        self.layers = layers

    def targets(self, batch: Batch) -> tuple[SparseTargets, Collected]:
        device, read = batch.input_BT.device, self.cache.read(batch.windows)
        ids, weights, tail, entropy = (part[batch.mask_BT] for part in read)
        kept: Collected = {}
        if self.layers is not None:
            kept["hidden"] = [states.to(device) for states in self.layers.read(batch.windows)]
        tail_N = tail.to(device) if self.cache.format.kind == "top_k" else None
        return SparseTargets(ids.to(device), weights.to(device), entropy.to(device), tail_N), kept

    def heldout(self, number: int, batch: Batch) -> LiveTargets:
        nothing_NE = self.head_VE[:0]  # for a batch in which nothing counts
        hidden_NE = self.heldout_NE.get(number, nothing_NE)
        return LiveTargets(hidden_NE.to(self.head_VE.device), self.head_VE)


class MixedAnswers:
    """Several teachers, all live or all from caches; hidden states are the first one's."""

    def __init__(self, parts: Sequence[LiveAnswers | CachedAnswers], shares: Sequence[float]):
        self.parts = parts
        self.weights = tuple(share / sum(shares) for share in shares)

    def targets(self, batch: Batch) -> tuple[Targets, Collected]:
        asked = [part.targets(batch) for part in self.parts]
        live = tuple(said for said, _ in asked if isinstance(said, LiveTargets))
        if live:
            return MixedTargets(live, self.weights), asked[0][1]
        kept = [said for said, _ in asked if isinstance(said, SparseTargets)]
        return mix_sparse(kept, self.weights), asked[0][1]

    def heldout(self, number: int, batch: Batch) -> MixedTargets:
        said = tuple(part.heldout(number, batch) for part in self.parts)
        return MixedTargets(said, self.weights)


class NoAnswers:
    """No teacher: nothing but the labels is to be learnt."""

    def targets(self, batch: Batch) -> tuple[SparseTargets, Collected]:
        none_N1 = torch.zeros(batch.positions, 1, device=batch.input_BT.device)
        return SparseTargets(none_N1.long(), none_N1, none_N1[:, 0]), {}

    def heldout(self, number: int, batch: Batch) -> None:
        return None


def first_teacher(answers: Answers) -> LlamaForCausalLM:
    """The model that answers live, of several the first.

    Raises:
        ShearlingError: there is no teacher.
    """
    first = answers.parts[0] if isinstance(answers, MixedAnswers) else answers
    if isinstance(first, NoAnswers):
        raise ShearlingError(
            "on_policy_writer is teacher, and there is no teacher.",
            hint="Set on_policy_writer to student.",
        )
    assert isinstance(first, LiveAnswers), "settings allow on_policy with live targets only"
    return first.inside.model


def open_answers(
    teachers: Sequence[Taught],
    settings: DistillSettings,
    data: StepData,
    matches: Sequence[HiddenMatch],
    precision: PrecisionChoice,
    device: torch.device,
    root: Path,
    progress: Progress,
    vocabulary: int,
) -> tuple[Answers, dict[str, Any]]:
    """Load the teachers, or open their caches below ``root`` and ask for what these lack.

    What is kept are probabilities of the first ``vocabulary`` rows: the others are padding.

    Raises:
        ShearlingError: teachers with different tokenizers.
    """
    if not teachers:
        return NoAnswers(), {}
    for other in teachers[1:]:
        _check_ids_alike(teachers[0].folder, other.folder)
    parts: list[LiveAnswers | CachedAnswers] = []
    facts: dict[str, Any] = {}
    for number, teacher in enumerate(teachers):
        if settings.targets == "live":
            inside = open_teacher(teacher.folder, precision, device, data.text.window)
            parts.append(LiveAnswers(inside, precision, () if number else matches))
            continue
        answers, found = cached_answers(
            teacher.folder,
            root,
            data,
            settings,
            precision,
            device,
            progress,
            vocabulary,
            () if number else matches,
        )
        parts.append(answers)
        facts = {**facts, f"teacher {number + 1}": found} if len(teachers) > 1 else found
    if len(parts) == 1:
        return parts[0], facts
    return MixedAnswers(parts, [teacher.weight for teacher in teachers]), facts


def _check_ids_alike(first: Path, other: Path) -> None:
    try:
        check_same_tokenizer(first, other)
    except ShearlingError as error:
        raise ShearlingError(
            f"{other} has another tokenizer than {first}, so what the two teachers say can't be "
            "mixed.",
            hint="Name teachers of one family in the distill stage's teachers.",
        ) from error


def cached_answers(
    teacher: Path,
    root: Path,
    data: StepData,
    settings: DistillSettings,
    precision: PrecisionChoice,
    device: torch.device,
    progress: Progress,
    vocabulary: int,
    matches: Sequence[HiddenMatch] = (),
) -> tuple[CachedAnswers, dict[str, Any]]:
    """Open the cache, ask the teacher for what this run needs and it lacks; give facts about it."""
    checkpoint = Checkpoint(teacher)
    assert settings.targets != "live", "live answers need no cache"
    shape = TargetFormat(
        kind=settings.targets,
        slots=min(settings.target_slots, vocabulary),
        vocabulary=vocabulary,
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
        layers = _hidden_cache(root, identity, checkpoint, matches, count, window)
    facts: dict[str, Any] = {"folder": str(cache.folder), "bytes_per_token": shape.bytes_per_token}
    if layers:
        facts["hidden_bytes_per_token"] = layers.record.itemsize

    def lacking(heldout_NE: Tensor | None) -> tuple[list[int], list[int]] | None:
        """The windows to ask for, and those whose hidden states are; None when nothing is."""
        missing = cache.missing(data.all_windows())
        unseen = layers.missing(data.all_windows()) if layers else []
        lacks = bool(missing or unseen) or heldout_NE is None
        # Any process's need counts: a file may be whole for one machine and damaged for another.
        return leader_says((missing, unseen)) if agreed(lacks)[0] else None

    heldout_NE = _kept_heldout(cache)
    if lacking(heldout_NE):
        # Another run may fill it just now: then there is less to ask for afterwards, or nothing.
        with _alone([cache, layers] if layers else [cache], progress):
            heldout_NE = _kept_heldout(cache)
            if lacks := lacking(heldout_NE):
                facts["captured_windows"] = len(lacks[0])
                inside = open_teacher(teacher, precision, device, window)
                _capture(cache, inside, data, lacks[0], precision, progress)
                if layers:
                    _capture_hidden(layers, inside, data, lacks[1], matches, precision, progress)
                _keep_heldout(cache, inside, data, precision)
                del inside
                if processes() > 1:
                    gc.collect()  # a split model's parts hold on to each other
                meet()
                heldout_NE = _kept_heldout(cache)
    if heldout_NE is None:
        raise ShearlingError(
            f"{cache.folder / _HELDOUT} can't be read again just after it was written.",
            hint=f"Check the disk for errors, then delete {cache.folder}; the teacher is asked "
            "again.",
        )
    facts |= cache.measured() | (layers.measured() if layers else {})
    positions = [batch.positions for batch in data.heldout()]
    # In the host's memory, and only what this process is asked for: of large models with long
    # windows all of it is gigabytes.
    mine_NE = {
        number: part_NE.clone() if processes() > 1 else part_NE
        for number, part_NE in enumerate(torch.split(heldout_NE, positions))
        if number % processes() == rank()
    }
    head_VE = checkpoint.tensor(HEAD, precision.dtype).to(device)
    return CachedAnswers(cache, mine_NE, head_VE, layers), facts


@contextmanager
def _alone(caches: Sequence[WindowCache], progress: Progress) -> Iterator[None]:
    """`WindowCache.alone` for all processes of a run; always in one order, so none deadlock."""
    with ExitStack() as locks:
        for cache in caches if leads() else ():
            locks.enter_context(cache.alone(progress))
        if leader_says(_GO, patiently=True) != _GO:
            raise KeyboardInterrupt  # rank 0 was asked to stop while it waited
        yield


_GO = "go"


def _hidden_cache(
    root: Path,
    identity: dict[str, Any],
    checkpoint: Checkpoint,
    matches: Sequence[HiddenMatch],
    windows: int,
    window: int,
) -> HiddenCache | None:
    """Where the layers that the hidden loss compares are kept; None when it is off."""
    if not matches:
        return None
    (match,) = matches  # settings allow no other place with cached targets
    size = checkpoint.shape.hidden_size
    return HiddenCache(root, identity, match.teacher_layers, size, windows=windows, window=window)


def _capture(
    cache: TargetCache,
    inside: Inside,
    data: StepData,
    missing: list[int],
    precision: PrecisionChoice,
    progress: Progress,
) -> None:
    """Each process asks for its part of the windows; all make equally many passes."""
    passes = largest(-(-len(missing[rank() :: processes()]) // data.micro_windows))

    def answer(windows: list[int]) -> Iterator[tuple[int, Iterator[Tensor]]]:
        yield from _logits(inside, data, windows, precision)
        idle = passes - -(-len(windows) // data.micro_windows)
        for _ in range(idle):  # a split teacher needs every process in every pass
            for _ in _logits(inside, data, missing[:1], precision):
                pass

    mine = missing[rank() :: processes()]
    capture(cache, mine, answer, seed=_SAMPLE_SEED, measures=leads(), progress=progress)


@torch.no_grad()
def _capture_hidden(
    cache: HiddenCache,
    inside: Inside,
    data: StepData,
    missing: list[int],
    matches: Sequence[HiddenMatch],
    precision: PrecisionChoice,
    progress: Progress,
) -> None:
    """The same for the layers' outputs."""
    mine = missing[rank() :: processes()]
    passes = largest(-(-len(mine) // data.micro_windows))
    batches = data.in_batches(mine)
    for number in range(passes):
        batch = next(batches, None)
        asked = batch or next(data.in_batches(missing[:1]))
        with hidden_outputs(inside.model, matches, "teacher") as found:
            inside(partial(trunk, batch=asked, precision=precision))
        for place, window in enumerate(batch.windows if batch else ()):
            layers_TE = [states[place] for states in found["hidden"]]
            cache.write(window, layers_TE, measures=leads())
        progress("hidden states", number + 1, passes)
    cache.flush()
    meet()


@torch.no_grad()
def _logits(
    inside: Inside, data: StepData, windows: list[int], precision: PrecisionChoice
) -> Iterator[tuple[int, Iterator[Tensor]]]:
    """The teacher's logits at every position, a window at a time, in parts [n, V]: at once those
    of a long window would be the largest thing in memory."""
    for batch in data.in_batches(windows):
        hidden_NE = inside(partial(trunk, batch=batch.counting_everywhere(), precision=precision))
        hidden_BTE, head_VE = hidden_NE.view(*batch.input_BT.shape, -1), head(inside.model)
        for number, hidden_TE in zip(batch.windows, hidden_BTE, strict=True):
            parts = torch.split(hidden_TE, _LOGIT_POSITIONS)
            yield number, (part_NE @ head_VE.T for part_NE in parts)


_HELDOUT = "heldout.safetensors"


def _kept_heldout(cache: TargetCache) -> Tensor | None:
    """What `_keep_heldout` wrote; None where it is absent, damaged, or of before it was hashed.

    The teacher is asked again then: it is a moment's work, and says the same.
    """
    try:
        return load_hashed(cache.folder / _HELDOUT)["hidden"]
    except (SafetensorError, FileNotFoundError):
        return None


@torch.no_grad()
def _keep_heldout(
    cache: TargetCache, inside: Inside, data: StepData, precision: PrecisionChoice
) -> None:
    """Hidden states of the held-out windows, one after the other however they are batched."""
    parts = []
    for batch in data.heldout():
        part_NE = inside(partial(trunk, batch=batch, precision=precision))  # by all processes
        if leads():
            parts.append(part_NE.cpu())
    if leads():
        save_hashed({"hidden": torch.cat(parts)}, cache.folder / _HELDOUT)
