"""Muon: momentum that is made nearly orthogonal before it moves a matrix.

Three steps of a composite polynomial (Amsel et al. 2025, Polar Express,
https://arxiv.org/abs/2505.16932) stand in for torch.optim.Muon's five of Newton-Schulz, which in
small batches were nearly half of a training step (docs/LOG.md).

Legend: L matrices of one size, M rows, N columns; K the smaller and N the larger where one lies
on its side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from compress.precision import undisturbed_rate
from compress.workspace import momentary

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

STACKED = 2_000_000
"""Numbers of the matrices that are made orthogonal together: a batched product is up to twice as
fast as many small ones. Larger matrices go one by one."""

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
            for matrices in stacks(p for p in group["params"] if p.grad is not None):
                updates = orthogonalised(map(self.momentum, matrices), len(matrices), self.products)
                for p, update_MN in zip(matrices, updates, strict=True):
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


def stacks(matrices: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Matrices of one size, as many together as `STACKED` allows."""
    alike: dict[tuple[torch.Size, torch.device], list[nn.Parameter]] = {}
    for p in matrices:
        alike.setdefault((p.shape, p.device), []).append(p)
    for (size, _), some in alike.items():
        together = max(1, STACKED // size.numel())
        yield from (some[start : start + together] for start in range(0, len(some), together))


def orthogonalised(matrices: Iterable[Tensor], count: int, products: torch.dtype) -> Tensor:
    """Nearly the orthogonal matrices next to ``count`` of one size, [L, M, N] in ``products``;
    valid until the next call. Each is asked for when the one before has its place.

    X ← (a + b A + c A²) X with A = X Xᵀ does to each singular value what the polynomial does to a
    number. They have to be 1 at most before: the first A gives the root of its Frobenius norm (the
    singular values' 4-norm) as a bound, which is nearer to the largest than the matrix's own norm.
    """
    matrices = iter(matrices)
    like = next(matrices)
    tall, size = like.shape[0] > like.shape[1], (count, min(like.shape), max(like.shape))
    square = (size[0], size[1], size[1])
    x_LKN, next_LKN = (momentary(f"muon {name}", size, products, like) for name in ("x", "next"))
    gram_LKK, factor_LKK = (
        momentary(f"muon {name}", square, products, like) for name in ("gram", "factor")
    )
    for x_KN, matrix_MN in zip(x_LKN, chain([like], matrices), strict=True):
        x_KN.copy_(matrix_MN.T if tall else matrix_MN)
    del like
    x_LKN.div_(_sizes(x_LKN))
    for number, (a, b, c) in enumerate(POLYNOMIALS):
        torch.bmm(x_LKN, x_LKN.mT, out=gram_LKK)
        if number == 0:
            squares = _sizes(gram_LKK)
            gram_LKK.div_(squares)
            x_LKN.div_(squares.sqrt())
        a, b, c = a / MARGIN, b / MARGIN**3, c / MARGIN**5
        torch.baddbmm(gram_LKK, gram_LKK, gram_LKK, beta=b, alpha=c, out=factor_LKK)
        torch.baddbmm(x_LKN, factor_LKK, x_LKN, beta=a, out=next_LKN)
        x_LKN, next_LKN = next_LKN, x_LKN
    return x_LKN.mT if tall else x_LKN


def _sizes(matrices_LMN: Tensor) -> Tensor:
    """The Frobenius norm of each, [L, 1, 1]."""
    sizes: Tensor = torch.linalg.vector_norm(matrices_LMN, dim=(1, 2), keepdim=True)
    return sizes.clamp_min(1e-30)
