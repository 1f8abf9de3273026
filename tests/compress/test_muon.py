from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from compress.muon import POLYNOMIALS, Muon, orthogonalised

SIZES = [(48, 96), (96, 48), (64, 64)]


def spread_matrix(size: tuple[int, int], least: float) -> tuple[Tensor, Tensor, Tensor]:
    """U, S and Vᵀ of a matrix whose singular values fall evenly from 1 to ``least``."""
    torch.manual_seed(0)
    u, _, vt = torch.linalg.svd(torch.randn(size, dtype=torch.float64), full_matrices=False)
    return u, torch.logspace(0, np.log10(least), min(size), dtype=torch.float64), vt


@pytest.mark.parametrize("products", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES)
def test_singular_values_come_near_one_and_their_vectors_stay(
    size: tuple[int, int], products: torch.dtype
) -> None:
    u, s, vt = spread_matrix(size, 0.05)
    (found,) = orthogonalised([(1e-4 * (u * s) @ vt).float()], 1, products)
    assert found.dtype == products
    inside = u.T @ found.double() @ vt.T
    assert (inside.diagonal() > 0.68).all()
    assert (inside.diagonal() < 1.32).all()
    apart = inside - torch.diag(inside.diagonal())
    assert apart.abs().max() < (1e-5 if products == torch.float32 else 0.1)


def test_a_matrix_that_one_direction_rules_is_turned_too() -> None:
    """As gradients are: the 4-norm is the largest value itself there, and nothing is lost."""
    u, s, vt = spread_matrix((48, 96), 1.0)
    s[1:] = 0.01
    values = torch.linalg.svdvals(orthogonalised([((u * s) @ vt).float()], 1, torch.float32)[0])
    assert values.min() > 0.68
    assert values.max() < 1.32


def test_no_gradient_is_no_update() -> None:
    assert not orthogonalised([torch.zeros(8, 4)], 1, torch.bfloat16).any()


@pytest.mark.parametrize("products", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stacked", [1, 2 * 48 * 96, 10**9])
def test_matrices_move_together_as_they_do_alone(
    stacked: int, products: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several sizes, some without a gradient, in stacks of one, two and all."""
    torch.manual_seed(0)
    sizes = [(48, 96), (96, 48), (48, 96), (64, 64), (48, 96), (48, 96)]
    starts = [torch.randn(size) for size in sizes]
    gradients = [torch.randn(size) * 10.0**-number for number, size in enumerate(sizes)]

    def moved(numbers: list[int]) -> list[Tensor]:
        weights = [nn.Parameter(starts[number].clone()) for number in numbers]
        for weight, number in zip(weights, numbers, strict=True):
            weight.grad = gradients[number].clone() if number != 2 else None
        Muon(weights, lr=0.1, weight_decay=0.1, products=products).step()
        return [weight.detach() for weight in weights]

    alone = [moved([number])[0] for number in range(len(sizes))]
    monkeypatch.setattr("compress.muon.STACKED", stacked)
    for start, one, found in zip(starts, alone, moved([*range(len(sizes))]), strict=True):
        torch.testing.assert_close(
            found, one, rtol=1e-4, atol=1e-5 if products == torch.float32 else 1e-2
        )
        assert torch.equal(found, start) == torch.equal(start, starts[2])


def test_each_polynomial_is_the_nearest_to_one() -> None:
    """Its error is equally large with alternating signs at four points (Chebyshev)."""
    least, most = 0.01, 1.0
    for a, b, c in POLYNOMIALS:
        x = np.linspace(least, most, 200_001)
        error = a * x + b * x**3 + c * x**5 - 1
        turns = 1 + np.flatnonzero(np.diff(np.sign(np.diff(error))))
        ends = error[[0, *turns, -1]]
        assert len(ends) == 4
        assert np.abs(ends) == pytest.approx(np.abs(ends).max(), abs=1e-3)
        assert (np.sign(ends[1:]) == -np.sign(ends[:-1])).all()
        least, most = 1 - np.abs(ends).max(), 1 + np.abs(ends).max()
    assert least == pytest.approx(0.731, abs=1e-3)


@pytest.mark.parametrize("size", SIZES)
def test_steps_go_where_pytorchs_own_go(size: tuple[int, int]) -> None:
    """With more accurate products it differs by how far each is from orthogonal."""
    torch.manual_seed(0)
    theirs = nn.Parameter(torch.randn(size))
    ours = copy.deepcopy(theirs)
    optimizers = (
        torch.optim.Muon([theirs], lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        Muon([ours], lr=0.1, weight_decay=0.1, products=torch.float32),
    )
    start = theirs.detach().clone()
    for _ in range(3):
        theirs.grad = torch.randn(size)
        ours.grad = theirs.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    moves = [(p.detach() - start).flatten() for p in (theirs, ours)]
    assert torch.cosine_similarity(*moves, dim=0) > 0.97
    assert moves[1].norm() / moves[0].norm() == pytest.approx(1, abs=0.2)
    states = [optimizer.state[p] for optimizer, p in zip(optimizers, (theirs, ours), strict=True)]
    assert torch.equal(states[0]["momentum_buffer"], states[1]["momentum_buffer"])
