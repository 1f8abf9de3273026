"""The metric of the output head against the divergence it stands for."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import compress.merging
from compress.ends import final_map, fisher_metric, keeping
from compress.merging import BothEnds, joint_ends, split_ends


def test_the_metric_is_the_curvature_of_the_divergence() -> None:
    torch.manual_seed(0)
    hidden, head = torch.randn(6, 4), torch.randn(11, 4)
    metric, cross = fisher_metric(hidden, head, head, torch.float32)
    torch.testing.assert_close(metric, cross)

    def divergence(step: torch.Tensor) -> torch.Tensor:
        teacher = F.log_softmax(hidden.double() @ head.double().T, -1)
        student = F.log_softmax((hidden.double() + step) @ head.double().T, -1)
        return F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1).mean()

    curvature = torch.autograd.functional.hessian(divergence, torch.zeros(4).double())
    torch.testing.assert_close(metric.double(), curvature, rtol=1e-5, atol=1e-6)


def test_a_row_that_all_tokens_share_is_not_in_the_metric() -> None:
    """In bfloat16 the metric of a head with such a row would be far off, or no metric at all."""
    torch.manual_seed(0)
    hidden, head, shared = torch.randn(64, 8), torch.randn(300, 8), 10 * torch.randn(8)
    exact, _ = fisher_metric(hidden, head, head[:, :5], torch.float32)
    rounded, _ = fisher_metric(hidden, head + shared, (head + shared)[:, :5], torch.bfloat16)
    assert float((rounded - exact).norm() / exact.norm()) < 0.02


def test_what_dropped_dims_say_is_said_by_kept_ones() -> None:
    torch.manual_seed(0)
    kept, norm = torch.tensor([0, 2]), torch.tensor([1.0, 0.5, 2.0])
    head = torch.randn(50, 3)
    head[:, 1] = 3 * head[:, 0]  # the second dim's column is the first's, times three
    metric = (head.T @ head)[kept]
    found = keeping(final_map(metric[:, kept], metric, norm[kept], norm), kept)
    torch.testing.assert_close(
        found, torch.tensor([[1.0, 1.5, 0.0], [0.0, 0.0, 1.0]]), rtol=1e-2, atol=1e-2
    )


def two_ends(vocabulary: int = 60, hidden: int = 6) -> BothEnds:
    torch.manual_seed(0)
    return BothEnds(
        torch.randn(vocabulary, hidden).bfloat16(),
        torch.randn(vocabulary, hidden).bfloat16(),
        torch.rand(hidden) + 0.5,
        vocabulary,
    )


def test_joint_ends_span_the_directions_in_which_both_matrices_lie_best() -> None:
    both, stream = two_ends(), torch.tensor([0, 2, 3, 5])
    embedding = both.embedding_VE.double()
    head = both.head_VE.double() * both.norm_E.double()
    stacked = torch.cat([embedding / embedding.norm(), head / head.norm()], 1)
    leading = torch.linalg.svd(stacked).U[:, :4]
    merged, norm = joint_ends(both, stream)
    merged = merged.double()
    torch.testing.assert_close(leading @ (leading.T @ merged), merged, rtol=1e-4, atol=1e-4)
    assert float(norm[0]) == pytest.approx(float(head.norm() / merged.norm()), rel=1e-4)


@pytest.mark.parametrize("merge", [joint_ends, split_ends])
@pytest.mark.parametrize("turned", [False, True])
def test_parts_of_the_vocabulary_make_the_whole(
    merge: compress.merging.Merge, turned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = two_ends()
    stream = torch.linalg.qr(torch.randn(6, 4)).Q.T if turned else torch.tensor([0, 2, 3, 5])
    whole = merge(both, stream)
    monkeypatch.setattr(compress.merging, "_ROWS", 7)
    for part, expected in zip(merge(both, stream), whole, strict=True):
        torch.testing.assert_close(part, expected, rtol=1e-4, atol=1e-5)
