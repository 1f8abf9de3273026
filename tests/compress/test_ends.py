"""The metric of the output head against the divergence it stands for."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from compress.ends import final_map, fisher_metric, keeping


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
