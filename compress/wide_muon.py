"""Muon for processors that only imitate bfloat16.

torch.optim.Muon's Newton-Schulz iteration multiplies in bfloat16. On a processor without units for
it one step of a 135M model's student took five minutes; in float32 the iteration is the same, and
takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

# PyTorch offers Muon's formula for the size of a step under this name only.
from torch.optim._muon import _adjust_lr

from compress.precision import product_rate

IMITATED = 8
"""How many times slower than float32 bfloat16 is where it is imitated; with units of its own it is
faster, and at worst half as fast."""


@cache
def imitates_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 products are so slow here that float32 must stand in for them."""
    if device.type != "cpu":
        return False
    return IMITATED * product_rate(torch.bfloat16, device) < product_rate(torch.float32, device)


class WideMuon(torch.optim.Muon):
    """`torch.optim.Muon` with its products in float32, state and all."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of all matrices."""
        assert closure is None, "the training loop computes the loss itself"
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p.grad))
                update = with_momentum(p.grad, buffer, group)
                update = orthogonalised(update, group["ns_coefficients"], group["ns_steps"])
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-_adjust_lr(group["lr"], group["adjust_lr_fn"], p.shape))


def with_momentum(grad: Tensor, buffer: Tensor, group: Mapping[str, Any]) -> Tensor:
    """Take a gradient into Muon's running mean; gives what is to be orthogonalised."""
    buffer.lerp_(grad, 1 - group["momentum"])
    return grad.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer


def orthogonalised(
    matrix_MN: Tensor, coefficients: tuple[float, float, float], steps: int
) -> Tensor:
    """Nearly the orthogonal matrix next to this one, by Newton-Schulz in the matrix's own dtype.

    X ← a X + (b A + c A²) X with A = X Xᵀ, from X = matrix / ‖matrix‖_F (Jordan et al. 2024,
    https://kellerjordan.github.io/posts/muon/).
    """
    a, b, c = coefficients
    tall = matrix_MN.shape[0] > matrix_MN.shape[1]
    x = matrix_MN.T if tall else matrix_MN
    x = x / x.norm().clamp_min(1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x
