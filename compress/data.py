"""The transfer set as the training loop takes it: which windows a step sees, and what counts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compress.losses import IGNORED
from compress.mixing import Mix
from compress.parallel import processes, rank
from compress.settings import DistillSettings
from shearling import ShearlingError
from teachers.checkpoint import Checkpoint
from teachers.tokenizer import has_tokenizer, load_tokenizer, token_count
from teachers.transfer_set import TransferSet

_MICRO_TOKENS = 1024
"""Tokens of one forward pass by default: enough for fast products, few enough to stay small."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Windows of text; B windows, T positions, N positions that count.

    A position counts unless the next one begins another document (what comes after the end of a
    text is no question for a language model) or the transfer set says that its next token isn't
    learnt. So a window's last position counts: its document mostly goes on beyond, and the rare
    one that ends just there can't be told from the window. There the models are compared, but no
    label is: ``labels_N`` is the next token of the window, and `IGNORED` at its end.
    """

    input_BT: Tensor
    positions_BT: Tensor
    mask_BT: Tensor
    """What counts. It stays on the CPU: to pick by it, a device would have to count it first."""
    rows_N: Tensor
    """The same as numbers of places, row after row."""
    labels_N: Tensor
    positions: int
    labelled: int
    windows: tuple[int, ...] = ()
    sources_BT: Tensor | None = None
    """Of which source each token is; known of held-out windows where the mix adapts."""

    def pick(self, states_BTD: Tensor) -> Tensor:
        """The positions that count, [N, D]."""
        return states_BTD.flatten(0, 1).index_select(0, self.rows_N)

    def labels(self) -> Tensor:
        """The labels by place, [B, T] on the CPU, `IGNORED` wherever there is none."""
        labels_BT = torch.full(self.mask_BT.shape, IGNORED)
        labels_BT[self.mask_BT] = self.labels_N.cpu()
        return labels_BT

    def counting(self, mask_BT: Tensor, labels_BT: Tensor) -> Batch:
        """The same text with other positions that count, and other labels; both on the CPU."""
        labels_N, device = labels_BT[mask_BT], self.input_BT.device
        return replace(
            self,
            mask_BT=mask_BT,
            rows_N=mask_BT.flatten().nonzero().flatten().to(device),
            labels_N=labels_N.to(device),
            positions=len(labels_N),
            labelled=int((labels_N != IGNORED).sum()),
        )

    def counting_everywhere(self) -> Batch:
        """The same text with every position counted, for a cache that serves any mask."""
        return self.counting(torch.ones_like(self.mask_BT), self.labels())

    def blank(self, rows: int) -> Batch:
        """The same text with nothing counted in the last ``rows`` windows.

        Split models need every process in every pass, also one that has no window left.
        """
        if not rows:
            return self
        mask_BT = self.mask_BT.clone()
        mask_BT[-rows:] = False
        return self.counting(mask_BT, self.labels())


def make_batch(
    input_BT: Tensor,
    positions_BT: Tensor,
    device: torch.device,
    windows: Sequence[int] = (),
    loss_mask_BT: Tensor | None = None,
) -> Batch:
    """Derive masks and labels from tokens and positions that restart with each document.

    ``loss_mask_BT`` says at which positions the next token is to be learnt; None: at all.
    """
    follows_BT = positions_BT[:, 1:] == positions_BT[:, :-1] + 1
    at_end_B1 = torch.ones(len(input_BT), 1, dtype=torch.bool)
    mask_BT = torch.cat([follows_BT, at_end_B1], dim=1)
    if loss_mask_BT is not None:
        mask_BT &= loss_mask_BT
    next_BT = torch.cat([input_BT[:, 1:], torch.full_like(input_BT[:, :1], IGNORED)], dim=1)
    none = torch.empty(0, dtype=torch.long)
    text = Batch(
        input_BT=input_BT.to(device),
        positions_BT=positions_BT.to(device),
        mask_BT=mask_BT,
        rows_N=none,
        labels_N=none,
        positions=0,
        labelled=0,
        windows=tuple(windows),
    )
    return text.counting(mask_BT, next_BT)


def vocabulary_of(folders: Sequence[Path], text: TransferSet) -> int:
    """How many tokens there are that all models have a row for.

    Rows beyond the tokens are padding: nothing ever trained them, so what they say is of no
    account. The text tells how many tokens its tokenizer had, the first model's how many it has.
    """
    first = folders[0]
    tokens = token_count(load_tokenizer(first)) if has_tokenizer(first) else 0
    rows = [Checkpoint(folder).shape.vocab_size for folder in folders]
    return min(*rows, max(tokens, int(text.facts["vocabulary"])))


class StepData:
    """Windows by optimizer step: a pure function of transfer set, settings, seed and step.

    So nothing but the step's number is needed to go on where a run was interrupted. Each epoch
    has an order of its own; windows in which nothing is learnt are in none. With many processes
    each takes its share of a step's windows.
    """

    def __init__(
        self, text: TransferSet, settings: DistillSettings, *, seed: int, device: torch.device
    ) -> None:
        if len(text.taught) == 0 or len(text.heldout) == 0:
            raise ShearlingError(
                "The transfer set has no training or no held-out windows.",
                hint="Add text to transfer_set.sources, or make transfer_set.window smaller.",
            )
        self.text, self.seed, self.device = text, seed, device
        self._orders: dict[int, NDArray[np.int64]] = {}
        self.step_windows = max(1, round(settings.batch_tokens / text.window))
        self.step_tokens = self.step_windows * text.window
        self.steps = max(1, round(settings.tokens / self.step_tokens))
        by_default = max(1, _MICRO_TOKENS // text.window)
        self.share = -(-self.step_windows // processes())
        """Windows of a step that one process takes."""
        self.micro_windows = min(settings.micro_batch_windows or by_default, self.share)
        if self.step_windows < processes():
            raise ShearlingError(
                f"A step of {settings.batch_tokens} tokens has {self.step_windows} windows of "
                f"{text.window}, fewer than the {processes()} processes.",
                hint=f"Set batch_tokens to {processes() * text.window} or more, or start fewer "
                "processes.",
            )
        self.mix = self._open_mix() if settings.adaptive_mix else None
        """What decides on the windows where sources that lag get more."""

    def _open_mix(self) -> Mix:
        if len(self.text.source_names) < 2:
            raise ShearlingError(
                "adaptive_mix needs several sources, and the transfer set has one.",
                hint="Add to transfer_set.sources, or remove adaptive_mix.",
            )
        return Mix(
            self.text.source_names,
            self.text.window_owners(),
            step_windows=self.step_windows,
            seed=self.seed,
            order=lambda epoch: self.text.order(self.seed, epoch),
        )

    def windows(self, step: int) -> list[int]:
        """The window numbers of ``step`` (from 0), through as many epochs as it takes."""
        if self.mix is not None:
            return self.mix.windows(step)
        count = len(self.text.taught)
        first = step * self.step_windows
        places = [divmod(place, count) for place in range(first, first + self.step_windows)]
        return [int(self._order(epoch)[place]) for epoch, place in places]

    def _order(self, epoch: int) -> NDArray[np.int64]:
        """The epoch's order; the latest two are kept, for a step may lie across two epochs."""
        if epoch not in self._orders:
            self._orders = {e: self._orders[e] for e in self._orders if e == epoch - 1}
            self._orders[epoch] = self.text.order(self.seed, epoch)
        return self._orders[epoch]

    def step(self, step: int) -> list[Batch]:
        """This process's micro-batches of ``step``, as many as every other process has."""
        windows = self.windows(step)
        mine = windows[rank() :: processes()]
        absent = self.share - len(mine)
        batches = list(self.in_batches(mine + windows[:absent]))
        batches[-1] = batches[-1].blank(absent)
        return batches

    def all_windows(self) -> set[int]:
        """Every window that any step sees."""
        return {window for step in range(self.steps) for window in self.windows(step)}

    def in_batches(self, windows: Sequence[int]) -> Iterator[Batch]:
        """These windows, as many in a batch as one forward pass takes."""
        for start in range(0, len(windows), self.micro_windows):
            chosen = list(windows[start : start + self.micro_windows])
            batch = self.text.batch(chosen)
            yield self._batch(batch, chosen)

    def my_heldout(self) -> Iterator[tuple[int, Batch]]:
        """This process's part of the held-out batches, numbered; the same count everywhere."""
        batches = list(self.heldout())
        for start in range(0, len(batches), processes()):
            number = start + rank()
            if number < len(batches):
                yield number, batches[number]
            else:
                yield number, batches[0].blank(len(batches[0].input_BT))

    def heldout(self) -> Iterator[Batch]:
        """The held-out windows, always the same and in the same order."""
        count = len(self.text.heldout)
        for start in range(0, count, self.micro_windows):
            numbers = list(range(start, min(start + self.micro_windows, count)))
            batch = self._batch(self.text.heldout_batch(numbers))
            owners_BT = self.text.heldout_owners(numbers) if self.mix is not None else None
            yield replace(batch, sources_BT=owners_BT)

    def _batch(self, batch: Mapping[str, Tensor], windows: Sequence[int] = ()) -> Batch:
        ids_BT, positions_BT = batch["input_ids"], batch["position_ids"]
        return make_batch(ids_BT, positions_BT, self.device, windows, batch.get("loss_mask"))
