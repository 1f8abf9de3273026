"""Reconstruction: refit kept weights to the teacher's activations, in closed form.

For a linear map with inputs x (the student's own) and wanted outputs y (the teacher's),

    W* = argmin_W  Σ_n w_n ‖W x_n - y_n‖²  +  λ ‖W - W₀‖²

with W₀ the sliced weights. Only the second moments Σ w x xᵀ and Σ w x yᵀ are kept, so memory does
not grow with the tokens.

Legend: N positions, I inputs, O outputs, V vocabulary, D student hidden, E teacher hidden.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

HELD_OUT = 8
"""Every eighth window judges the ridge."""
RIDGES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""What is chosen from, each a share of the mean of the Gram matrix's diagonal."""
JUDGED_OUTPUTS = 512
"""Outputs that choose the ridge: all share it, and a solution for each costs as much as a fit."""
_SOLVED = 2048
"""Outputs that are solved for at one time."""
_GRAM_ROWS = 1024
"""Rows of a Gram matrix in one product."""


@dataclass
class Moments:
    """Weighted second moments of inputs and targets, added up batch by batch in float32.

    ``dtype`` is what the factors of their products may be rounded to (``add_product``).
    """

    gram_II: Tensor
    cross_IO: Tensor
    target_energy: Tensor
    dtype: torch.dtype = torch.float32

    @classmethod
    def zeros(
        cls, inputs: int, outputs: int, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> Moments:
        return cls(
            torch.zeros(inputs, inputs, device=device),
            torch.zeros(inputs, outputs, device=device),
            torch.zeros((), dtype=torch.float64, device=device),
            dtype,
        )

    def add(
        self,
        input_NI: Tensor,
        target_NO: Tensor,
        weight_N: Tensor | None,
        energy_N: Tensor | None = None,
    ) -> None:
        """Take in positions; ``weight_N`` says how much each counts, None that all count alike.

        ``energy_N`` is ‖y‖² of each where y is what a map makes of these targets later.
        """
        energy_N = target_NO.square().sum(1) if energy_N is None else energy_N
        if weight_N is not None:
            # Half of a weight on either side: rounded factors still make a Gram matrix.
            root_N1 = weight_N.sqrt()[:, None]
            input_NI, target_NO = input_NI * root_N1, target_NO * root_N1
            energy_N = energy_N * weight_N
        add_gram(self.gram_II, input_NI, self.dtype)
        add_product(self.cross_IO, input_NI, target_NO, self.dtype)
        self.target_energy += energy_N.sum(dtype=torch.float64)

    def take(self, other: Moments) -> None:
        """Take in what another one holds."""
        self.gram_II += other.gram_II
        self.cross_IO += other.cross_IO
        self.target_energy += other.target_energy

    def relative_error(self, weight_OI: Tensor) -> float:
        """Σ w ‖W x - y‖² / Σ w ‖y‖² on what was taken in, to about six digits."""
        error = torch.zeros_like(self.target_energy)
        for some in _blocks(len(weight_OI)):
            weight_IO = weight_OI[some].T.float()
            fitted_IO = self.gram_II @ weight_IO - 2 * self.cross_IO[:, some]
            error += (fitted_IO * weight_IO).sum(dtype=torch.float64)
        return self.relative(error)

    def relative(self, error: Tensor) -> float:
        """An error without the energy of the targets in it, Σ w ‖W x‖² - 2 Σ w ⟨W x, y⟩, as a
        share of that."""
        energy = self.target_energy.clamp_min(torch.finfo(torch.float64).tiny)
        return float((1 + error / energy).clamp_min(0))

    def outputs(self, some: slice, map_OP: Tensor | None) -> Moments:
        """The moments of some outputs alone, the energy of all: enough to compare their errors."""
        cross_IO = self.cross_IO[:, some] if map_OP is None else self.cross_IO @ map_OP[:, some]
        return Moments(self.gram_II, cross_IO, self.target_energy)


def _blocks(outputs: int) -> Iterator[slice]:
    """Outputs that are worked on at one time."""
    return (slice(first, first + _SOLVED) for first in range(0, outputs, _SOLVED))


def add_gram(gram_II: Tensor, input_NI: Tensor, dtype: torch.dtype) -> None:
    """gram += inputᵀ input, which is symmetric: what lies above the diagonal is mirrored."""
    for first in range(0, input_NI.shape[1], _GRAM_ROWS):
        rows, upto = slice(first, first + _GRAM_ROWS), slice(0, first + _GRAM_ROWS)
        add_product(gram_II[rows, upto], input_NI[:, rows], input_NI[:, upto], dtype)
        gram_II[:first, rows] = gram_II[rows, :first].T


def add_product(sum_XY: Tensor, left_NX: Tensor, right_NY: Tensor, dtype: torch.dtype) -> None:
    """sum += leftᵀ right, added up in float32.

    A CPU may round the factors to bfloat16 where that is the ``dtype`` of products: half to a
    third of the time with AMX, and what the maps themselves read is rounded alike.
    """
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    if dtype is torch.bfloat16:
        matmul.fp32_precision = "bf16"
    try:
        sum_XY.addmm_(left_NX.T, right_NY)
    finally:
        matmul.fp32_precision = before


def judging(windows: int, length: int) -> Tensor:
    """Which positions judge the ridge: those of every HELD_OUT-th window, of fewer windows the
    last's, of one window the last eighth; boolean, [windows, length]."""
    if windows == 1:
        return (torch.arange(length) >= length - length // HELD_OUT)[None]
    number_B = torch.arange(1, windows + 1)
    return (number_B % min(HELD_OUT, windows) == 0)[:, None].expand(windows, length)


class SplitMoments:
    """Moments of most windows, and apart from them those of every HELD_OUT-th.

    The second kind tells how strong the ridge has to be: with few calibration tokens a free fit
    learns them by heart, with many a strong pull toward the sliced weights loses what they teach.
    """

    def __init__(
        self, inputs: int, outputs: int, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> None:
        self.fitted = Moments.zeros(inputs, outputs, device, dtype)
        self.heldout = Moments.zeros(inputs, outputs, device, dtype)

    def add(
        self,
        input_NI: Tensor,
        target_NO: Tensor,
        weight_N: Tensor | None,
        heldout_N: Tensor,
        energy_N: Tensor | None = None,
    ) -> None:
        """Take in positions; ``heldout_N`` is true where they are held out."""
        for part, chosen in ((self.fitted, ~heldout_N), (self.heldout, heldout_N)):
            if bool(chosen.any()):
                weight, energy = (None if x is None else x[chosen] for x in (weight_N, energy_N))
                part.add(input_NI[chosen], target_NO[chosen], weight, energy)

    def scale_toward(self, map_IO: Tensor) -> float:
        """The factor c that brings c x nearest to M y, M = ``map_IO``: Σ w ⟨x, M y⟩ / Σ w ‖x‖².

        1 where no input ever spoke.
        """
        parts = (self.fitted, self.heldout)
        energy = sum(float(part.gram_II.diagonal().sum()) for part in parts)
        shared = sum(float((part.cross_IO * map_IO).sum(dtype=torch.float64)) for part in parts)
        return shared / energy if energy else 1.0

    def rescale_inputs(self, scale: float) -> None:
        """As if every input had been multiplied by ``scale``."""
        for part in (self.fitted, self.heldout):
            part.gram_II *= scale**2
            part.cross_IO *= scale

    def refit(
        self,
        sliced_OI: Tensor,
        ridge: float | None,
        map_OP: Tensor | None = None,
        near: float | None = None,
    ) -> Refit:
        """Refit on all windows; without a ``ridge``, with the best one on held-out windows.

        With ``map_OP`` each target is what that makes of it, and the energy is that already.
        ``near`` is about where the search begins. The moments are used up: those of a
        large layer are gigabytes.
        """
        strength = self._best_ridge(sliced_OI, map_OP, near) if ridge is None else ridge
        everything = self.fitted
        everything.take(self.heldout)
        del self.fitted, self.heldout
        if map_OP is not None:
            everything.cross_IO = everything.cross_IO @ map_OP
        sliced_error = everything.relative_error(sliced_OI)
        found = RidgeFit(everything, sliced_OI).solve(strength)
        return Refit(**vars(found), sliced_error=sliced_error)

    def _best_ridge(self, sliced_OI: Tensor, map_OP: Tensor | None, near: float | None) -> float:
        """Downhill from ``near``, else from the middle: the error falls and rises once, and each
        look costs a solve."""
        some = slice(None, None, max(1, len(sliced_OI) // JUDGED_OUTPUTS))
        fit = RidgeFit(self.fitted.outputs(some, map_OP), sliced_OI[some], torch.float32)
        heldout = self.heldout.outputs(some, map_OP)

        @cache
        def error(place: int) -> float:
            return heldout.relative_error(fit.solve(RIDGES[place]).weight_OI)

        last = len(RIDGES) - 1
        place = last // 2 if near is None else bisect_right(RIDGES[1:], near)
        for step in (1, -1):
            while 0 <= place + step <= last and error(place + step) < error(place):
                place += step
        return RIDGES[place]


@dataclass(frozen=True, kw_only=True)
class Solution:
    """Weights, [O, I], their Σ w ‖W x - y‖² / Σ w ‖y‖², to about six digits, and the ridge."""

    weight_OI: Tensor
    error: float
    ridge: float


@dataclass(frozen=True, kw_only=True)
class Refit(Solution):
    """The solution that was taken, and the error of the sliced weights."""

    sliced_error: float


class RidgeFit:
    """The problem of the module's formula for any λ.

    In float64, or in float32 where a third of the time buys a λ and not the weights. Solved for
    some outputs at a time: of an 8B's gate and up maps everything at once would be gigabytes.
    """

    def __init__(
        self, moments: Moments, sliced_OI: Tensor, dtype: torch.dtype = torch.float64
    ) -> None:
        self.sliced_OI, self._moments = sliced_OI, moments
        self._gram_II = moments.gram_II.to(dtype, copy=True)
        self._diagonal_I = self._gram_II.diagonal().clone()
        mean = self._diagonal_I.mean()
        # Inputs that never spoke leave the weights as they are, for any λ above zero.
        self._mean = torch.where(mean == 0, torch.ones_like(mean), mean)

    def solve(self, ridge: float) -> Solution:
        """The weights W* and what they are worth; λ is ``ridge`` times the mean of diag(Gram).

        Solved by Cholesky. Where the Gram matrix is too ill-conditioned for it, the ridge is
        raised tenfold until it isn't, and that one returned: with λ large enough the answer is
        the sliced weights.

        Raises:
            FloatingPointError: the moments hold NaN or infinity.
        """
        factor_II, used = self._factor(ridge)
        shift = used * self._mean
        weight_OI = torch.empty_like(self.sliced_OI)
        error = torch.zeros((), dtype=torch.float64, device=weight_OI.device)
        for some in _blocks(len(weight_OI)):
            base_IO = self.sliced_OI[some].T.to(factor_II)
            cross_IO = self._moments.cross_IO[:, some].to(factor_II)
            weight_IO = torch.cholesky_solve(base_IO * shift + cross_IO, factor_II)
            # Σ w ‖W x‖² is ⟨Gram W, W⟩, and Gram W is cross + λ (W₀ - W).
            rest_IO = (base_IO - weight_IO) * shift - cross_IO
            error += (rest_IO * weight_IO).sum(dtype=torch.float64)
            weight_OI[some] = weight_IO.T.to(weight_OI)
        return Solution(weight_OI=weight_OI, error=self._moments.relative(error), ridge=used)

    def _factor(self, ridge: float) -> tuple[Tensor, float]:
        """The Cholesky factor of Gram + λ I, and the ridge for which there is one."""
        while True:
            # In place: another matrix of this size would be half a gigabyte for an 8B's student.
            self._gram_II.diagonal().copy_(self._diagonal_I + ridge * self._mean)
            factor_II, failed = torch.linalg.cholesky_ex(self._gram_II)
            self._gram_II.diagonal().copy_(self._diagonal_I)
            if not failed:
                return factor_II, ridge
            if ridge > 1e12:  # not even a diagonal matrix
                raise FloatingPointError("the calibration activations are not finite")
            ridge *= 10


def final_norm_refit(
    student_gram_DD: Tensor,
    cross_DE: Tensor,
    metric_DD: Tensor,
    metric_DE: Tensor,
    start_D: Tensor,
    ridge: float,
) -> Tensor:
    """The final norm's weights g, [D], for which the student's output is nearest the teacher's.

        g* = argmin_g  Σ_n w_n ‖K diag(g) z_n - H a_n‖²_F  +  λ ‖g - g₀‖²

    with z the student's and a the teacher's normed final hidden states (a with the teacher's norm
    weights in it), K and H their output heads, and ‖·‖_F the norm in which a distance between
    logits counts by the divergence it causes. ``metric_DD`` and ``metric_DE`` are K's columns with
    themselves and with H's in that metric (``compress.ends``), so no logit is ever computed.
    ``student_gram_DD`` is Σ w z zᵀ and ``cross_DE`` is Σ w z aᵀ. g₀ is ``start_D`` times the
    factor that suits best, λ ``ridge`` times the mean of the diagonal.
    """
    normal_DD = metric_DD.double() * student_gram_DD.double()
    wanted_D = (metric_DE.double() * cross_DE.double()).sum(1)
    start = start_D.double()
    start = start * (wanted_D @ start) / (start @ normal_DD @ start)
    strength = ridge * normal_DD.diagonal().mean()
    shifted = normal_DD + strength * torch.eye(len(start)).to(start)
    change_D: Tensor = torch.linalg.solve(shifted, wanted_D - normal_DD @ start)
    return (start + change_D).to(start_D)
