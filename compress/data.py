"""The transfer set as the training loop takes it: which windows a step sees, and what counts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.losses import IGNORED
from compress.settings import DistillSettings
from shearling import ShearlingError
from teachers.transfer_set import TransferSet

_MICRO_TOKENS = 1024
"""Tokens of one forward pass by default: enough for fast products, few enough to stay small."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Windows of text; B windows, T positions, N positions that count.

    A position counts unless it is a document's last token: what comes after the end of a text is
    no question for a language model. ``labels_N`` is the next token, `IGNORED` at a window's end.
    """

    input_BT: Tensor
    positions_BT: Tensor
    mask_BT: Tensor
    labels_N: Tensor
    positions: int
    labelled: int


def make_batch(input_BT: Tensor, positions_BT: Tensor, device: torch.device) -> Batch:
    """Derive masks and labels from tokens and positions that restart with each document."""
    follows_BT = positions_BT[:, 1:] == positions_BT[:, :-1] + 1
    at_end_B1 = torch.ones(len(input_BT), 1, dtype=torch.bool)
    mask_BT = torch.cat([follows_BT, at_end_B1], dim=1)
    next_BT = torch.cat([input_BT[:, 1:], torch.full_like(input_BT[:, :1], IGNORED)], dim=1)
    labels_N = next_BT[mask_BT]
    return Batch(
        input_BT=input_BT.to(device),
        positions_BT=positions_BT.to(device),
        mask_BT=mask_BT.to(device),
        labels_N=labels_N.to(device),
        positions=int(mask_BT.sum()),
        labelled=int((labels_N != IGNORED).sum()),
    )


class StepData:
    """Windows by optimizer step: a pure function of transfer set, settings, seed and step.

    So nothing but the step's number is needed to go on where a run was interrupted. Each epoch
    has an order of its own.
    """

    def __init__(
        self, text: TransferSet, settings: DistillSettings, *, seed: int, device: torch.device
    ) -> None:
        if len(text.tokens) == 0 or len(text.heldout) == 0:
            raise ShearlingError(
                "The transfer set has no training or no held-out windows.",
                hint="Add text to transfer_set.sources, or make transfer_set.window smaller.",
            )
        self.text, self.seed, self.device = text, seed, device
        self.step_windows = max(1, round(settings.batch_tokens / text.window))
        self.step_tokens = self.step_windows * text.window
        self.steps = max(1, round(settings.tokens / self.step_tokens))
        by_default = max(1, _MICRO_TOKENS // text.window)
        self.micro_windows = min(settings.micro_batch_windows or by_default, self.step_windows)

    def windows(self, step: int) -> list[int]:
        """The window numbers of ``step`` (from 0), through as many epochs as it takes."""
        count = len(self.text.tokens)
        first = step * self.step_windows
        places = [divmod(place, count) for place in range(first, first + self.step_windows)]
        orders = {epoch: self.text.order(self.seed, epoch) for epoch, _ in places}
        return [int(orders[epoch][place]) for epoch, place in places]

    def step(self, step: int) -> list[Batch]:
        """The micro-batches of ``step``."""
        windows = self.windows(step)
        return [
            self._batch(windows[start : start + self.micro_windows])
            for start in range(0, len(windows), self.micro_windows)
        ]

    def heldout(self) -> Iterator[Batch]:
        """The held-out windows, always the same and in the same order."""
        count = len(self.text.heldout)
        for start in range(0, count, self.micro_windows):
            numbers = list(range(start, min(start + self.micro_windows, count)))
            batch = self.text.heldout_batch(numbers)
            yield make_batch(batch["input_ids"], batch["position_ids"], self.device)

    def _batch(self, windows: list[int]) -> Batch:
        batch = self.text.batch(windows)
        return make_batch(batch["input_ids"], batch["position_ids"], self.device)
