"""Greedy removal against least squares solved from the beginning."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.greedy import DAMPING, Removal, keep_heads, keep_inputs


def problem(inputs: int = 12, outputs: int = 5) -> tuple[Tensor, Tensor]:
    """A damped Gram matrix and weights, float64."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    samples = torch.randn(300, inputs, generator=generator, dtype=torch.float64) @ mixing
    weight = torch.randn(outputs, inputs, generator=generator, dtype=torch.float64)
    return samples.T @ samples, weight


def error_without(gram: Tensor, weight: Tensor, gone: list[int]) -> float:
    """The least squared error that is possible without some inputs, from the normal equations."""
    gram = gram + DAMPING * gram.diagonal().mean() * torch.eye(len(gram)).double()
    left = [index for index in range(len(gram)) if index not in gone]
    fitted = torch.zeros_like(weight)
    fitted[:, left] = torch.linalg.solve(gram[left][:, left], gram[left] @ weight.T).T
    wrong = weight - fitted
    return float(((wrong @ gram) * wrong).sum())


def test_costs_are_the_rise_of_the_least_squares_error() -> None:
    gram, weight = problem()
    removal = Removal(gram, weight, torch.float64)
    removal.remove(torch.tensor([3, 7]))
    before = error_without(gram, weight, [3, 7])
    groups = torch.tensor([[0, 1], [4, 11]])
    for group, cost in zip(groups.tolist(), removal.costs(groups).tolist(), strict=True):
        expected = error_without(gram, weight, [3, 7, *group]) - before
        assert abs(cost - expected) < 1e-8 * abs(expected)


@pytest.mark.parametrize(("dense", "rows"), [(0.0, 1024), (7 / 8, 5), (1.0, 4)])
def test_what_is_left_is_the_inverse_of_the_rest(
    monkeypatch: pytest.MonkeyPatch, dense: float, rows: int
) -> None:
    """Moved together never, at times and every time; in one product and in blocks."""
    monkeypatch.setattr("compress.greedy.DENSE", dense)
    monkeypatch.setattr("compress.greedy._ROWS", rows)
    gram, weight = problem()
    removal, gone = Removal(gram, weight, torch.float64), []
    for inputs in ([5, 2], [11], [0, 8, 6]):
        removal.remove(torch.tensor(inputs))
        gone += inputs
        left = [index for index in range(12) if index not in gone]
        damped = gram + DAMPING * gram.diagonal().mean() * torch.eye(12).double()
        inverse = torch.linalg.inv(damped[left][:, left])
        fitted = weight @ damped[:, left] @ inverse
        costs = torch.full((12,), torch.inf).double()
        costs[left] = fitted.square().sum(0) / inverse.diagonal()
        torch.testing.assert_close(removal.single_costs(), costs, rtol=1e-9, atol=0)
        groups = torch.tensor(left)[:, None]
        torch.testing.assert_close(removal.costs(groups), costs[left], rtol=1e-9, atol=0)


def test_removed_one_at_a_time_the_cheapest_goes_first() -> None:
    gram, weight = problem()
    cheapest = min(range(12), key=lambda index: error_without(gram, weight, [index]))
    kept = keep_inputs(gram, weight, 11, at_once=1).tolist()
    assert kept == [index for index in range(12) if index != cheapest]


def test_an_input_that_others_can_replace_goes_before_a_small_one() -> None:
    torch.manual_seed(0)
    samples = torch.randn(500, 4).double()
    samples[:, 3] = samples[:, 0] + samples[:, 1]  # large, and said twice
    samples[:, 2] *= 0.5
    kept = keep_inputs(samples.T @ samples, torch.eye(4).double(), 3)
    assert 2 in kept.tolist()


def test_float64_chooses_where_float32_is_too_coarse() -> None:
    """Two inputs a millionth apart, beside whose size the damping is nothing."""
    torch.manual_seed(0)
    samples = torch.randn(500, 4).double()
    samples[:, :2] = 1e4 * samples[:, :1] + 1e-2 * samples[:, :2]
    gram = samples.T @ samples
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compress.greedy.DAMPING", 1e-12)
        with pytest.raises(torch.linalg.LinAlgError):
            Removal(gram, torch.eye(4), torch.float32)
        kept = keep_inputs(gram, torch.eye(4), 3).tolist()
    assert kept in ([0, 2, 3], [1, 2, 3])


def test_heads_go_inside_their_groups_after_whole_groups() -> None:
    gram, weight = problem(inputs=24, outputs=7)
    heads, groups = keep_heads(gram, weight, head_dim=2, groups=4, groups_kept=2, kept=4)
    assert len(groups) == 2
    assert groups.tolist() == sorted(groups.tolist())
    assert heads.tolist() == sorted(heads.tolist())
    assert sorted(head // 3 for head in heads.tolist()) == sorted(groups.tolist() * 2)
