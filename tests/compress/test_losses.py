"""The losses against each other, against known values."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.losses import (
    DIVERGENCES,
    HIDDEN_LOSSES,
    IGNORED,
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
