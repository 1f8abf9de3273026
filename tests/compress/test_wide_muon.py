from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from compress.wide_muon import WideMuon, orthogonalised


@pytest.mark.parametrize("size", [(48, 96), (96, 48), (64, 64)])
def test_steps_as_pytorchs_own_does(size: tuple[int, int]) -> None:
    """But for the seven bits that bfloat16 keeps."""
    torch.manual_seed(0)
    theirs = nn.Parameter(torch.randn(size))
    ours = copy.deepcopy(theirs)
    how = {"lr": 0.1, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    optimizers = torch.optim.Muon([theirs], **how), WideMuon([ours], **how)
    start = theirs.detach().clone()
    for _ in range(3):
        theirs.grad = torch.randn(size)
        ours.grad = theirs.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    moved = (theirs - start).norm()
    assert moved > 0
    assert (ours - theirs).norm() < 0.02 * moved
    states = [optimizer.state[p] for optimizer, p in zip(optimizers, (theirs, ours), strict=True)]
    assert torch.equal(states[0]["momentum_buffer"], states[1]["momentum_buffer"])


def test_singular_values_come_near_one() -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalised(torch.randn(32, 80), (3.4445, -4.775, 2.0315), 5))
    assert values.min() > 0.6
    assert values.max() < 1.3
