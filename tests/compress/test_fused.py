"""The fused loss against the dense ones, in value and gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from compress.fused import FusedLoss, Term, compare
from compress.losses import (
    IGNORED,
    LiveTargets,
    MixedTargets,
    SparseTargets,
    cross_entropy,
    forward_kl,
    mix_sparse,
    sparse_forward_kl,
)

N, V, D, E = 37, 101, 16, 24


def logits(seed: int, rows: int = N, columns: int = V) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64) * 3


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


def problem(dtype: torch.dtype, padding: int = 0) -> dict[str, Any]:
    labels = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(4))
    labels[[3, 20]] = IGNORED
    return {
        "student_ND": logits(0, N, D).to(dtype).requires_grad_(),
        "head_VD": (logits(1, V + padding, D) / 4).to(dtype).requires_grad_(),
        "targets": LiveTargets(logits(2, N, E).to(dtype), (logits(3, V, E) / 4).to(dtype)),
        "labels_N": labels,
    }


def rows(given: dict[str, Any], chosen: slice) -> dict[str, Any]:
    """The same problem for some of the positions."""
    return {
        "student_ND": given["student_ND"][chosen],
        "head_VD": given["head_VD"],
        "targets": given["targets"].rows(chosen),
        "labels_N": given["labels_N"][chosen],
    }


def teacher_logits(given: dict[str, Any]) -> Tensor:
    targets = given["targets"]
    if isinstance(targets, MixedTargets):
        said = [(part.hidden_NE @ part.head_VE.T).softmax(-1) for part in targets.parts]
        return sum(w * p for w, p in zip(targets.weights, said, strict=True)).log()
    return targets.hidden_NE @ targets.head_VE.T


def dense(given: dict[str, Any], objective: dict[str, Any]) -> Tensor:
    """The oracle: all logits at once, the dense losses, autograd."""
    student = (given["student_ND"] @ given["head_VD"].T)[:, :V]
    teacher = teacher_logits(given)
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


def test_what_the_labels_cost_is_told_without_the_temperature() -> None:
    """Whichever way the loss is computed, the log shows the same number."""
    given, told = problem(torch.float32), []
    for temperature, more in ((1.0, ()), (2.0, ()), (2.0, (Term("reverse_kl", 1e-9),))):
        fused = FusedLoss(terms=(Term("forward_kl", 1.0), *more), temperature=temperature)
        told.append(fused(**given)[1]["cross_entropy"].item())
    assert told == pytest.approx([told[0]] * 3, rel=1e-5)


def second_teacher(dtype: torch.dtype) -> LiveTargets:
    """One with another hidden size."""
    return LiveTargets(logits(7, N, E + 8).to(dtype), (logits(8, V, E + 8) / 4).to(dtype))


@pytest.mark.parametrize("name", ["forward and labels", "mixture"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_several_teachers_are_one_that_says_their_mixture(
    name: str, dtype: torch.dtype, bound: float
) -> None:
    objective, given = OBJECTIVES[name], problem(dtype)
    given["targets"] = MixedTargets((given["targets"], second_teacher(dtype)), (0.3, 0.7))
    expected = dense(given, objective)
    wanted = torch.autograd.grad(expected, (given["student_ND"], given["head_VD"]))
    value, _ = FusedLoss(**objective, chunk=10, dtype=dtype)(**given)
    value.backward()
    assert value.item() == pytest.approx(expected.item(), rel=bound)
    for found, want in zip((given["student_ND"].grad, given["head_VD"].grad), wanted, strict=True):
        assert (found - want).abs().max() <= bound * max(1.0, want.abs().max().item())
    same = MixedTargets((given["targets"].parts[0],) * 2, (0.5, 0.5))
    one = compare(**{**problem(dtype), "targets": same}, fused=FusedLoss(terms=(), dtype=dtype))
    two = compare(**problem(dtype), fused=FusedLoss(terms=(), dtype=dtype))
    assert one.forward_kl == pytest.approx(two.forward_kl, rel=1e-5)
    assert one.agreements == two.agreements


def test_mixed_samples_have_the_mixture_s_gradient() -> None:
    """All tokens kept is the exact answer; the mixture's constant apart, so is the loss."""
    given, other = problem(torch.float64), second_teacher(torch.float64)
    student = (given["student_ND"] @ given["head_VD"].T).detach().requires_grad_()
    said = [teacher_logits(given).softmax(-1), (other.hidden_NE @ other.head_VE.T).softmax(-1)]
    kept = [SparseTargets(torch.arange(V).expand(N, V), p, -(p * p.log()).sum(-1)) for p in said]
    mixture = (0.25 * said[0] + 0.75 * said[1]).log()
    (wanted,) = torch.autograd.grad(forward_kl(student, mixture).sum(), student)
    values = sparse_forward_kl(student, mix_sparse(kept, (0.25, 0.75)))
    (found,) = torch.autograd.grad(values.sum(), student)
    torch.testing.assert_close(found, wanted)
    apart = [w * forward_kl(student, p.log()) for w, p in zip((0.25, 0.75), said, strict=True)]
    torch.testing.assert_close(values, apart[0] + apart[1])


def test_the_caller_s_factor_reaches_the_gradient() -> None:
    given, again = problem(torch.float64), problem(torch.float64)
    fused = FusedLoss(**OBJECTIVES["forward"], dtype=torch.float64)
    fused(**given)[0].backward()
    (fused(**again)[0] * 2.5).backward()
    torch.testing.assert_close(again["head_VD"].grad, given["head_VD"].grad * 2.5)


def test_a_second_backward_is_refused_and_not_wrong() -> None:
    """The first one scales its gradients in place."""
    value, _ = FusedLoss(**OBJECTIVES["forward"], dtype=torch.float64)(**problem(torch.float64))
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        value.backward()


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
    for part in (slice(0, 5), slice(5, N)):
        cut = rows(parts, part)
        value, _ = fused(**cut, positions=N, labelled=N - 2)
        value.backward()
        total += value.item()
    assert total == pytest.approx(dense(whole, objective).item())
    torch.testing.assert_close(parts["student_ND"].grad, whole["student_ND"].grad)
    torch.testing.assert_close(parts["head_VD"].grad, whole["head_VD"].grad)


def test_no_positions_at_all_is_zero() -> None:
    given = rows(problem(torch.float32), slice(0, 0))
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


def test_the_head_s_gradient_is_the_same_in_one_piece_and_in_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def gradient(pieces: int) -> Tensor:
        monkeypatch.setattr("compress.fused._HEAD_BYTES", V * D * 2 // pieces)
        given = problem(torch.float32)
        FusedLoss(**OBJECTIVES["forward"], chunk=7, dtype=torch.bfloat16)(**given)[0].backward()
        found: Tensor = given["head_VD"].grad
        return found

    assert gradient(1).abs().sum() > 0
    torch.testing.assert_close(gradient(1), gradient(4), rtol=0.01, atol=1e-6)


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
    teacher = teacher_logits(given)
    for term in OBJECTIVES["mixture"]["terms"]:
        torch.testing.assert_close(sums[term.name], term(student, teacher, 1.5).sum())
    torch.testing.assert_close(
        sums["cross_entropy"], cross_entropy(student, given["labels_N"]).sum()
    )


def test_compare_is_the_dense_measure() -> None:
    given = problem(torch.float64)
    found = compare(**given, fused=FusedLoss(terms=(), chunk=7, dtype=torch.float64))
    student = given["student_ND"] @ given["head_VD"].T
    teacher = teacher_logits(given)
    assert (found.positions, found.labelled) == (N, N - 2)
    assert found.forward_kl == pytest.approx(forward_kl(student, teacher).sum().item())
    labels = given["labels_N"]
    assert found.cross_entropy == pytest.approx(cross_entropy(student, labels).sum().item())
    assert found.teacher_cross_entropy == pytest.approx(cross_entropy(teacher, labels).sum().item())
    assert found.agreements == (student.argmax(-1) == teacher.argmax(-1)).sum()


# --- sparse targets --------------------------------------------------------------------------


def sparse(kind: str, dtype: torch.dtype = torch.float64, kept: int = 6) -> SparseTargets:
    """The teacher of `problem` as its top tokens, with the tail or scaled up to stand for it."""
    log_p = teacher_logits(problem(dtype)).log_softmax(-1)
    weights, ids = log_p.exp().topk(kept)
    entropy = -(log_p.exp() * log_p).sum(-1)
    if kind == "sample":
        return SparseTargets(ids, weights / weights.sum(-1, keepdim=True), entropy)
    return SparseTargets(ids, weights, entropy, (1 - weights.sum(-1)).clamp(min=0))


@pytest.mark.parametrize("kind", ["sample", "tail"])
@pytest.mark.parametrize("label_weight", [0.0, 0.3])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_fused_sparse_equals_dense_sparse(
    kind: str, label_weight: float, dtype: torch.dtype, bound: float
) -> None:
    given, targets = problem(dtype), sparse(kind, dtype)
    student = given["student_ND"] @ given["head_VD"].T
    expected = 0.7 * sparse_forward_kl(student, targets).mean()
    labels = cross_entropy(student, given["labels_N"]).sum() / (N - 2)
    expected = expected + label_weight * labels
    wanted = torch.autograd.grad(expected, (given["student_ND"], given["head_VD"]))
    fused = FusedLoss(
        terms=(Term("forward_kl", 0.7),), cross_entropy=label_weight, chunk=10, dtype=dtype
    )
    value, _ = fused(**{**given, "targets": targets})
    value.backward()
    assert value.item() == pytest.approx(expected.item(), rel=bound)
    for found, want in zip((given["student_ND"].grad, given["head_VD"].grad), wanted, strict=True):
        assert (found - want).abs().max() <= bound * max(1.0, want.abs().max().item())


@pytest.mark.parametrize("kind", ["sample", "tail"])
def test_sparse_targets_of_all_tokens_are_the_whole_teacher(kind: str) -> None:
    given = problem(torch.float64)
    student = given["student_ND"] @ given["head_VD"].T
    found = sparse_forward_kl(student, sparse(kind, kept=V))
    torch.testing.assert_close(found, forward_kl(student, teacher_logits(given)))


def test_the_tail_s_loss_is_a_lower_bound_of_the_kl() -> None:
    """Merging outcomes can only hide differences (data processing inequality)."""
    given = problem(torch.float64)
    student = given["student_ND"] @ given["head_VD"].T
    merged = sparse_forward_kl(student, sparse("tail"))
    assert (merged <= forward_kl(student, teacher_logits(given)) + 1e-9).all()
    assert (merged >= 0).all()


@pytest.mark.parametrize(("device", "rows"), [("cpu", 16), ("meta", 512)])
def test_blocks_are_as_small_as_a_processors_cache_on_a_cpu_only(device: str, rows: int) -> None:
    from compress.fused import _rows_at_once

    fused = FusedLoss(terms=())
    assert _rows_at_once(fused, torch.device(device), 128_256, torch.float32) == rows
