"""Muon for matrices whose rows lie in several processes.

Newton-Schulz needs a whole matrix. Of as many matrices as there are processes each process
gathers one, orthogonalises it and sends the rows back, so the work is shared out and no process
holds more than one matrix whole. The arithmetic is torch.optim.Muon's own, or that of
`compress.wide_muon` where it has to be.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# PyTorch offers Muon's two formulas under these names only.
from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz

from compress.parallel import processes, rank
from compress.wide_muon import orthogonalised, with_momentum


class SplitMuon(torch.optim.Muon):
    """`torch.optim.Muon` over FSDP2's parameters (split by rows), state and all."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of all matrices, as many at a time as there are processes."""
        assert closure is None, "the training loop computes the loss itself"
        for group in self.param_groups:
            matrices = [p for p in group["params"] if p.grad is not None]
            for start in range(0, len(matrices), processes()):
                self._step_some(matrices[start : start + processes()], group)

    def _step_some(self, matrices: list[Any], group: dict[str, Any]) -> None:
        updates = [self._momentum(p, group) for p in matrices]
        mine = gather_rows(updates, [p.shape for p in matrices])
        if mine is not None:
            mine = self._orthogonalised(mine, group)
        updates = return_rows(mine, updates, [p.shape for p in matrices])
        for p, update in zip(matrices, updates, strict=True):
            local = p.to_local()
            local.mul_(1 - group["lr"] * group["weight_decay"])
            local.add_(update, alpha=-_adjust_lr(group["lr"], group["adjust_lr_fn"], p.shape))

    def _orthogonalised(self, matrix_MN: Tensor, group: dict[str, Any]) -> Tensor:
        narrow_MN = _zeropower_via_newtonschulz(
            matrix_MN, group["ns_coefficients"], group["ns_steps"], group["eps"]
        )
        return narrow_MN.to(matrix_MN.dtype)

    def _momentum(self, p: Any, group: dict[str, Any]) -> Tensor:
        """What is to be orthogonalised, as far as this process has it."""
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p.grad)
        return with_momentum(p.grad.to_local(), state["momentum_buffer"].to_local(), group)


class WideSplitMuon(SplitMuon):
    """The same with its products in float32, as `compress.wide_muon` has them."""

    def _orthogonalised(self, matrix_MN: Tensor, group: dict[str, Any]) -> Tensor:
        return orthogonalised(matrix_MN, group["ns_coefficients"], group["ns_steps"])


def rows_of(height: int, process: int) -> int:
    """How many of a matrix's rows FSDP2 gives to a process: equal parts, the last ones short."""
    part = -(-height // processes())
    return max(0, min(part, height - process * part))


def gather_rows(parts: list[Tensor], shapes: list[torch.Size]) -> Tensor | None:
    """Send part i of every process to process i; gives this process its whole matrix, if any."""
    me = rank()
    mine = shapes[me] if me < len(shapes) else torch.Size((0, 0))
    received = [rows_of(mine[0], r) * mine[1] for r in range(processes())]
    flat = _exchange(parts, [part.numel() for part in parts], received)
    return flat.view(mine) if me < len(shapes) else None


def return_rows(
    matrix: Tensor | None, parts: list[Tensor], shapes: list[torch.Size]
) -> list[Tensor]:
    """The way back of `gather_rows`: process i sends the rows of its matrix to their owners."""
    me = rank()
    sent = [0] * processes()
    if matrix is not None:
        sent = [rows_of(shapes[me][0], r) * shapes[me][1] for r in range(processes())]
    flat = _exchange([] if matrix is None else [matrix], sent, [p.numel() for p in parts], parts[0])
    pieces = torch.split(flat, [part.numel() for part in parts])
    return [piece.view(part.shape) for piece, part in zip(pieces, parts, strict=True)]


def _exchange(
    tensors: list[Tensor], sent: list[int], received: list[int], like: Tensor | None = None
) -> Tensor:
    """All-to-all of numbers: ``sent[i]`` of them to process i, ``received[i]`` from it."""
    like = tensors[0] if like is None else like
    sent, received = ([*counts, *[0] * (processes() - len(counts))] for counts in (sent, received))
    outgoing = torch.cat([t.reshape(-1) for t in tensors]) if tensors else like.new_empty(0)
    incoming = like.new_empty(sum(received))
    dist.all_to_all_single(incoming, outgoing, received, sent)
    return incoming
