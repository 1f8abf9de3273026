"""Muon: momentum that is made nearly orthogonal before it moves a matrix.

Three steps of a composite polynomial (Amsel et al. 2025, Polar Express,
https://arxiv.org/abs/2505.16932) stand in for torch.optim.Muon's five of Newton-Schulz, which in
small batches were nearly half of a training step (docs/LOG.md).

Legend: M rows, N columns of a matrix, K the smaller of both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from compress.precision import undisturbed_rate

MOMENTUM = 0.95
MATCHED = 0.2
"""An orthogonal update times this and sqrt(max(M, N)) has the size of AdamW's, so that learning
rates mean the same (Liu et al. 2025, Muon is Scalable, https://arxiv.org/abs/2502.16982)."""

POLYNOMIALS = (
    (8.09337, -23.62043, 17.44615),
    (3.63659, -2.72193, 0.53655),
    (2.6613, -1.97715, 0.45262),
)
"""(a, b, c) of x ← a x + b x³ + c x⁵, one step each: those nearest to 1 on [0.01, 1], and on what
each before it leaves of that. Together they take it to [0.73, 1.27], and smaller values to 78 times
what they were."""
MARGIN = 1.01
"""The singular values are divided by it before each step: bfloat16 rounds some above the interval,
where a polynomial climbs."""

IMITATED = 8
"""How many times slower than float32 bfloat16 is where it is imitated; with units of its own it is
faster, and at worst half as fast."""


def imitates_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 products are so slow here that float32 must stand in for them."""
    if device.type != "cpu":
        return False
    narrow, wide = (undisturbed_rate(dtype, device) for dtype in (torch.bfloat16, torch.float32))
    return IMITATED * narrow < wide


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov's momentum and decoupled weight decay, for matrices only.

    ``products`` is the dtype in which updates are made orthogonal; weights and momentum keep their
    own. Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/.
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        *,
        lr: float,
        weight_decay: float,
        products: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay})
        self.products = products

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of all matrices."""
        assert closure is None, "the training loop computes the loss itself"
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    update_MN = orthogonalised(self.momentum(p), self.products)
                    move(p, p.shape, update_MN, group)

    def momentum(self, p: Any) -> Tensor:
        """Take the gradient into its running mean; gives what is to be made orthogonal."""
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p.grad)
        grad, mean = mine(p.grad), mine(state["momentum_buffer"])
        mean.lerp_(grad, 1 - MOMENTUM)
        return grad.lerp(mean, MOMENTUM)


def mine(tensor: Any) -> Tensor:
    """This process's part of a tensor that is split over several, or the whole."""
    part: Tensor = getattr(tensor, "to_local", lambda: tensor)()
    return part


def move(weight: Tensor, whole: torch.Size, update: Tensor, group: dict[str, Any]) -> None:
    """Decay and move a matrix of the size ``whole``, or some rows of it."""
    weight.mul_(1 - group["lr"] * group["weight_decay"])
    weight.add_(update, alpha=-group["lr"] * MATCHED * math.sqrt(max(whole)))


def orthogonalised(matrix_MN: Tensor, products: torch.dtype) -> Tensor:
    """Nearly the orthogonal matrix next to this one, [M, N] in ``products``.

    X ← (a + b A + c A²) X with A = X Xᵀ does to each singular value what the polynomial does to a
    number. They have to be 1 at most before: the first A gives the root of its Frobenius norm (the
    singular values' 4-norm) as a bound, which is nearer to the largest than the matrix's own norm.
    """
    tall = matrix_MN.shape[0] > matrix_MN.shape[1]
    x_KN = (matrix_MN.T if tall else matrix_MN).to(products)
    x_KN = x_KN / x_KN.norm().clamp_min(1e-30)
    for number, (a, b, c) in enumerate(POLYNOMIALS):
        gram_KK = x_KN @ x_KN.T
        if number == 0:
            square = gram_KK.norm().clamp_min(1e-30)
            gram_KK, x_KN = gram_KK / square, x_KN / square.sqrt()
        a, b, c = a / MARGIN, b / MARGIN**3, c / MARGIN**5
        x_KN = torch.addmm(
            x_KN, torch.addmm(gram_KK, gram_KK, gram_KK, beta=b, alpha=c), x_KN, beta=a
        )
    return x_KN.T if tall else x_KN
