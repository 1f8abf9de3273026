"""Adaptive mixing: sources on which the student lags get more of the steps to come.

Dynamic batch loading of Sheared-LLaMA (Xia et al. 2023, https://arxiv.org/abs/2310.06694, algorithm
1). The loss that a source should come down to is the teacher's own on the same held-out text. What
is added: shares are drawn back a little to where they began, since a student that can't reach its
teacher on one source would otherwise see nothing but that source in the end.

Shapes: W windows of the transfer set, S sources.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]

DRAWN_BACK = 0.1
"""How far a change takes the shares back to those of the transfer set."""


def reweighted(shares_S: Floats, lags_S: Floats, natural_S: Floats, rate: float) -> Floats:
    """Shares after an evaluation: each times exp(rate · lag), and a tenth of the natural ones.

    ``lags_S`` is in nats a token, how far the student's loss lies above its reference.
    """
    # Less the largest: the same shares, and no overflow.
    raised_S = shares_S * np.exp(rate * (lags_S - lags_S.max()))
    mixed_S = (1 - DRAWN_BACK) * raised_S / raised_S.sum() + DRAWN_BACK * natural_S
    adding_up_S: Floats = mixed_S / mixed_S.sum()
    return adding_up_S


class Mix:
    """Which windows a step sees while the sources' shares change.

    A window belongs to the source that has most of its tokens. Each source has an order of its own
    in each epoch, and a step goes on in each where the step before ended, so no window comes again
    before all of its source have come. Everything is a function of the seed and of ``history``,
    the shares and the steps from which they hold: that is all a checkpoint keeps.
    """

    def __init__(
        self,
        names: Sequence[str],
        owner_W: Counts,
        *,
        step_windows: int,
        seed: int,
        order: Callable[[int], Counts],
    ) -> None:
        self.names, self._owner_W, self._order = list(names), owner_W, order
        self._step_windows, self._seed = step_windows, seed
        self._sizes_S = np.bincount(owner_W[order(0)], minlength=len(names))
        self.natural_S: Floats = self._sizes_S / self._sizes_S.sum()
        self.history: list[tuple[int, list[float]]] = [(0, self.natural_S.tolist())]
        self._streams: dict[tuple[int, int], Counts] = {}
        self._taken: tuple[int, Counts] = (0, np.zeros(len(names), np.int64))

    def shares(self, step: int) -> Floats:
        """The sources' shares that hold in ``step``."""
        place = bisect.bisect_right(self.history, step, key=lambda entry: entry[0])
        return np.array(self.history[place - 1][1])

    def update(self, step: int, lags: Mapping[str, float], rate: float) -> None:
        """From ``step`` on, give those sources more that lag; one without a lag is as the mean."""
        known = list(lags.values())
        lags_S = np.array([lags.get(name, np.mean(known)) for name in self.names])
        shares_S = reweighted(self.shares(step), np.maximum(lags_S, 0), self.natural_S, rate)
        self.history.append((step, shares_S.tolist()))

    def restore(self, history: Sequence[Sequence[Any]]) -> None:
        """Take over what a checkpoint kept of ``history``."""
        self.history = [(int(step), list(shares)) for step, shares in history]
        self._taken = (0, np.zeros(len(self.names), np.int64))

    def windows(self, step: int) -> list[int]:
        """The window numbers of ``step``, one source's after the other's."""
        taken_S = self.taken(step)
        return [
            self._window(source, int(taken_S[source]) + place)
            for source, count in enumerate(self._counts(step))
            for place in range(count)
        ]

    def taken(self, step: int) -> Counts:
        """How many windows of each source the steps before ``step`` have seen."""
        known, taken_S = self._taken
        if known > step:
            known, taken_S = 0, np.zeros(len(self.names), np.int64)
        for earlier in range(known, step):
            taken_S = taken_S + self._counts(earlier)
        self._taken = (step, taken_S)
        return taken_S

    def _counts(self, step: int) -> Counts:
        """How many windows each source gives: its share of the step, rounded up or down by lot."""
        edges_S = np.cumsum(self.shares(step))
        edges_S = edges_S / edges_S[-1] * self._step_windows
        lot = np.random.default_rng([self._seed, step, 6]).random()
        counts_S: Counts = np.diff(np.floor(edges_S + lot).astype(np.int64), prepend=0)
        return counts_S

    def _window(self, source: int, number: int) -> int:
        """The source's window of this number, through as many epochs as it takes."""
        epoch, place = divmod(number, int(self._sizes_S[source]))
        if (source, epoch) not in self._streams:
            order_W = self._order(epoch)
            # Of a source only the epoch it is in is kept.
            self._streams = {key: s for key, s in self._streams.items() if key[0] != source}
            self._streams[source, epoch] = order_W[self._owner_W[order_W] == source]
        return int(self._streams[source, epoch][place])
