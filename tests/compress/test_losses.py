"""The losses against each other, against known values, and fused against dense."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.losses import (
    DIVERGENCES,
    HIDDEN_LOSSES,
    IGNORED,
    FusedLoss,
    Term,
    compare,
    cross_entropy,
    forward_kl,
    jensen_shannon,
    masked_mean,
    pad_vocabulary,
    reverse_kl,
    skewed_kl,
)

N, V, D, E = 37, 101, 16, 24


def logits(seed: int, rows: int = N, columns: int = V) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64) * 3


# --- dense -----------------------------------------------------------------------------------


def test_forward_kl_is_pytorch_s_kl_and_the_definition() -> None:
    student, teacher = logits(0), logits(1)
    expected = torch.nn.functional.kl_div(
        student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    torch.testing.assert_close(forward_kl(student, teacher), expected)


def test_kl_of_two_coins_by_hand() -> None:
    fair, loaded = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log()
    by_hand = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    assert forward_kl(fair, loaded).item() == pytest.approx(by_hand, rel=1e-6)
    assert reverse_kl(loaded, fair).item() == pytest.approx(by_hand, rel=1e-6)


def test_cross_entropy_is_pytorch_s() -> None:
    student, labels = logits(0), torch.arange(N) % V
    labels[3] = IGNORED
    expected = torch.nn.functional.cross_entropy(student, labels, reduction="none")
    torch.testing.assert_close(cross_entropy(student, labels), expected)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_perfect_match_costs_nothing_and_any_other_something(name: str) -> None:
    loss = DIVERGENCES[name]
    assert loss(logits(0), logits(0)).abs().max() < 1e-12
    assert loss(logits(0) + 5.0, logits(0)).abs().max() < 1e-12  # logits are up to a constant
    assert (loss(logits(0), logits(1)) > 0.01).all()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_gradients_of_divergences_are_those_of_finite_differences(name: str) -> None:
    student, teacher = logits(0, 2, 5).requires_grad_(), logits(1, 2, 5)
    assert torch.autograd.gradcheck(lambda x: DIVERGENCES[name](x, teacher), student)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_masked_positions_never_count_whatever_stands_there(name: str) -> None:
    mask = torch.arange(N) % 3 != 0
    student, teacher = logits(0), logits(1)
    clean = DIVERGENCES[name](student, teacher)
    student[~mask], teacher[~mask] = float("nan"), float("-inf")
    student.requires_grad_()
    values = DIVERGENCES[name](student, teacher, mask)
    torch.testing.assert_close(values[mask], clean[mask])
    assert (values[~mask] == 0).all()
    values.sum().backward()
    assert (student.grad[~mask] == 0).all()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_fully_masked_batch_is_zero_not_nan(name: str) -> None:
    mask = torch.zeros(N, dtype=torch.bool)
    student = logits(0).requires_grad_()
    value = masked_mean(DIVERGENCES[name](student, logits(1), mask), mask)
    value.backward()
    assert value.item() == 0
    assert (student.grad == 0).all()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_padding_of_the_vocabulary_has_no_probability(name: str) -> None:
    student = logits(0).requires_grad_()
    padded = torch.cat([student, torch.full((N, 7), 9.0, dtype=torch.float64)], dim=1)
    other = torch.cat([logits(1), torch.full((N, 7), 4.0, dtype=torch.float64)], dim=1)
    value = DIVERGENCES[name](pad_vocabulary(padded, V), pad_vocabulary(other, V))
    torch.testing.assert_close(value, DIVERGENCES[name](student, logits(1)))
    value.sum().backward()
    assert student.grad.isfinite().all()


def test_generalised_jensen_shannon_tends_to_both_kls() -> None:
    student, teacher = logits(0) / 3, logits(1) / 3
    small = 1e-6
    near_forward = jensen_shannon(student, teacher, beta=small) / small
    near_reverse = jensen_shannon(student, teacher, beta=1 - small) / small
    torch.testing.assert_close(near_forward, forward_kl(student, teacher), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(near_reverse, reverse_kl(student, teacher), rtol=1e-3, atol=1e-3)


def test_jensen_shannon_is_symmetric_and_bounded() -> None:
    forth, back = jensen_shannon(logits(0), logits(1)), jensen_shannon(logits(1), logits(0))
    torch.testing.assert_close(forth, back)
    assert (forth <= math.log(2)).all()


def test_the_skewed_loss_is_finite_where_the_student_excludes_a_token() -> None:
    student, teacher = torch.tensor([[0.0, float("-inf")]]), torch.tensor([[0.0, 0.0]])
    assert forward_kl(student, teacher).item() == float("inf")
    assert 0 < skewed_kl(student, teacher, skew=0.1).item() <= math.log(1 / 0.1)


def test_temperature_divides_logits_and_keeps_the_gradient_s_size() -> None:
    student, teacher = logits(0), logits(1)
    warm = forward_kl(student, teacher, temperature=4.0)
    torch.testing.assert_close(warm, 16 * forward_kl(student / 4, teacher / 4))


@given(st.floats(-50, 50), st.integers(0, 5))
@settings(max_examples=25, deadline=None)
def test_divergences_are_never_negative_nor_nan(shift: float, seed: int) -> None:
    student, teacher = logits(seed, 3, 7) * 20, logits(seed + 1, 3, 7)
    teacher[:, 0] += shift
    for loss in DIVERGENCES.values():
        value = loss(student, teacher)
        assert value.isfinite().all()
        assert (value > -1e-9).all()


# --- hidden states ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", HIDDEN_LOSSES)
def test_hidden_losses_are_zero_on_a_match_only(name: str) -> None:
    student, teacher = logits(0, N, D).float(), logits(1, N, D).float()
    assert HIDDEN_LOSSES[name](teacher, teacher).abs().max() < 1e-6
    assert (HIDDEN_LOSSES[name](student, teacher) > 0.05).all()


def test_hidden_losses_know_their_scales() -> None:
    teacher = logits(1, N, D).float()
    assert HIDDEN_LOSSES["cosine"](3 * teacher, teacher).abs().max() < 1e-6
    torch.testing.assert_close(HIDDEN_LOSSES["normalised_mse"](0 * teacher, teacher), torch.ones(N))
    torch.testing.assert_close(HIDDEN_LOSSES["mse"](teacher + 2, teacher), torch.full((N,), 4.0))


# --- fused -----------------------------------------------------------------------------------

OBJECTIVES: dict[str, dict[str, Any]] = {
    "forward": {"terms": (Term("forward_kl", 0.7),)},
    "forward and labels": {"terms": (Term("forward_kl", 0.7),), "cross_entropy": 0.3},
    "warm": {"terms": (Term("forward_kl", 0.7),), "temperature": 2.0},
    "warm and labels": {
        "terms": (Term("forward_kl", 0.7),),
        "cross_entropy": 0.3,
        "temperature": 2.0,
    },
    "labels only": {"terms": (Term("forward_kl", 0.0),), "cross_entropy": 1.0},
    "mixture": {
        "terms": (
            Term("forward_kl", 0.5),
            Term("reverse_kl", 0.4),
            Term("jensen_shannon", 0.3, {"beta": 0.3}),
            Term("skewed_kl", 0.2, {"skew": 0.2}),
        ),
        "cross_entropy": 0.1,
        "temperature": 1.5,
    },
}


def problem(dtype: torch.dtype, padding: int = 0) -> dict[str, Tensor]:
    labels = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(4))
    labels[[3, 20]] = IGNORED
    return {
        "student_ND": logits(0, N, D).to(dtype).requires_grad_(),
        "head_VD": (logits(1, V + padding, D) / 4).to(dtype).requires_grad_(),
        "teacher_NE": logits(2, N, E).to(dtype),
        "teacher_head_VE": (logits(3, V, E) / 4).to(dtype),
        "labels_N": labels,
    }


def dense(given: dict[str, Tensor], objective: dict[str, Any]) -> Tensor:
    """The oracle: all logits at once, the dense losses, autograd."""
    student = (given["student_ND"] @ given["head_VD"].T)[:, :V]
    teacher = given["teacher_NE"] @ given["teacher_head_VE"].T
    value = cross_entropy(student, given["labels_N"]).sum() / (N - 2)
    value = value * objective.get("cross_entropy", 0.0)
    for term in objective["terms"]:
        part = term(student, teacher, objective.get("temperature", 1.0))
        value = value + term.weight * part.mean()
    return value


@pytest.mark.parametrize("chunk", [1, 10, 512])
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_fused_equals_dense(name: str, chunk: int, dtype: torch.dtype, bound: float) -> None:
    objective, given = OBJECTIVES[name], problem(dtype)
    expected = dense(given, objective)
    wanted = torch.autograd.grad(expected, (given["student_ND"], given["head_VD"]))
    value, _ = FusedLoss(**objective, chunk=chunk, dtype=dtype)(**given)
    value.backward()
    assert value.item() == pytest.approx(expected.item(), abs=bound * 10, rel=bound)
    for found, want in zip((given["student_ND"].grad, given["head_VD"].grad), wanted, strict=True):
        assert (found - want).abs().max() <= bound * max(1.0, want.abs().max().item())


def test_the_caller_s_factor_reaches_the_gradient() -> None:
    given, again = problem(torch.float64), problem(torch.float64)
    fused = FusedLoss(**OBJECTIVES["forward"], dtype=torch.float64)
    fused(**given)[0].backward()
    (fused(**again)[0] * 2.5).backward()
    torch.testing.assert_close(again["head_VD"].grad, given["head_VD"].grad * 2.5)


def test_padding_columns_of_the_student_s_head_get_no_gradient() -> None:
    given = problem(torch.float64, padding=5)
    value, _ = FusedLoss(**OBJECTIVES["forward"], dtype=torch.float64)(**given)
    value.backward()
    assert value.item() == pytest.approx(dense(given, OBJECTIVES["forward"]).item())
    assert (given["head_VD"].grad[V:] == 0).all()
    assert (given["head_VD"].grad[:V] != 0).any()


def test_accumulated_micro_batches_are_the_whole_step() -> None:
    """Unequal parts, divided by the counts of the step: the sum is the step's own loss."""
    objective = OBJECTIVES["forward and labels"]
    whole, parts = problem(torch.float64), problem(torch.float64)
    fused = FusedLoss(**objective, dtype=torch.float64)
    fused(**whole)[0].backward()
    total = 0.0
    for rows in (slice(0, 5), slice(5, N)):
        cut = {k: t if "head" in k else t[rows] for k, t in parts.items()}
        value, _ = fused(**cut, positions=N, labelled=N - 2)
        value.backward()
        total += value.item()
    assert total == pytest.approx(dense(whole, objective).item())
    torch.testing.assert_close(parts["student_ND"].grad, whole["student_ND"].grad)
    torch.testing.assert_close(parts["head_VD"].grad, whole["head_VD"].grad)


def test_no_positions_at_all_is_zero() -> None:
    given = {k: t if "head" in k else t[:0] for k, t in problem(torch.float32).items()}
    value, _ = FusedLoss(**OBJECTIVES["forward and labels"])(**given)
    value.backward()
    assert value.item() == 0


def test_bfloat16_products_stay_near_the_exact_loss() -> None:
    given = problem(torch.float32)
    expected = dense(given, OBJECTIVES["forward"])
    (wanted,) = torch.autograd.grad(expected, given["head_VD"])
    value, _ = FusedLoss(**OBJECTIVES["forward"], dtype=torch.bfloat16)(**given)
    value.backward()
    assert value.dtype == torch.float32
    assert given["head_VD"].grad.dtype == torch.float32
    assert value.item() == pytest.approx(expected.item(), rel=0.02)
    cosine = torch.cosine_similarity(given["head_VD"].grad.flatten(), wanted.flatten(), dim=0)
    assert cosine > 0.999


def test_nothing_of_the_size_of_all_logits_is_kept_for_backward() -> None:
    kept: list[int] = []

    def record(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    given = problem(torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        FusedLoss(**OBJECTIVES["forward"], chunk=8)(**given)
    assert kept
    assert max(kept) <= V * D < N * V


def test_the_sums_for_the_log_are_the_dense_sums() -> None:
    given = problem(torch.float64)
    _, sums = FusedLoss(**OBJECTIVES["mixture"], chunk=7, dtype=torch.float64)(**given)
    student = given["student_ND"] @ given["head_VD"].T
    teacher = given["teacher_NE"] @ given["teacher_head_VE"].T
    for term in OBJECTIVES["mixture"]["terms"]:
        torch.testing.assert_close(sums[term.name], term(student, teacher, 1.5).sum())
    torch.testing.assert_close(
        sums["cross_entropy"], cross_entropy(student, given["labels_N"]).sum()
    )


def test_compare_is_the_dense_measure() -> None:
    given = problem(torch.float64)
    found = compare(**given, fused=FusedLoss(terms=(), chunk=7, dtype=torch.float64))
    student = given["student_ND"] @ given["head_VD"].T
    teacher = given["teacher_NE"] @ given["teacher_head_VE"].T
    assert (found.positions, found.labelled) == (N, N - 2)
    assert found.forward_kl == pytest.approx(forward_kl(student, teacher).sum().item())
    labels = given["labels_N"]
    assert found.cross_entropy == pytest.approx(cross_entropy(student, labels).sum().item())
    assert found.teacher_cross_entropy == pytest.approx(cross_entropy(teacher, labels).sum().item())
    assert found.agreements == (student.argmax(-1) == teacher.argmax(-1)).sum()
