"""Muon for matrices whose rows lie in several processes.

To be made orthogonal a matrix has to be whole. Of as many matrices as there are processes each
process gathers one, makes it orthogonal and sends the rows back, so the work is shared out and no
process holds more than one matrix whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from compress.muon import Muon, mine, move, orthogonalised
from compress.parallel import processes, rank


class SplitMuon(Muon):
    """`Muon` over FSDP2's parameters (split by rows), state and all."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of all matrices, as many at a time as there are processes."""
        assert closure is None, "the training loop computes the loss itself"
        for group in self.param_groups:
            matrices = [p for p in group["params"] if p.grad is not None]
            for start in range(0, len(matrices), processes()):
                self._step_some(matrices[start : start + processes()], group)

    def _step_some(self, matrices: list[Any], group: dict[str, Any]) -> None:
        shapes = [p.shape for p in matrices]
        updates = [self.momentum(p) for p in matrices]
        whole = gather_rows(updates, shapes)
        if whole is not None:
            whole = orthogonalised([whole], 1, self.products)[0].to(whole.dtype)
        updates = return_rows(whole, updates, shapes)
        for p, shape, update in zip(matrices, shapes, updates, strict=True):
            move(mine(p), shape, update, group)


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
