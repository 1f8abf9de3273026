"""Which optimizer moves which weights, and their state as plain named tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from compress.checkpointing import Group, fill, names_in
from compress.muon import Muon, imitates_bfloat16
from compress.parallel import processes
from compress.settings import DistillSettings
from compress.split_muon import SplitMuon

Named = tuple[str, nn.Parameter]

_MUCH = 10_000_000
"""Weights from which on it matters how fast Muon's products are; measuring that takes a moment."""


def build_optimizers(
    model: nn.Module, settings: DistillSettings, *, wide: bool = False
) -> dict[str, torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the layers' matrices and AdamW for the rest.

    ``wide``: Muon multiplies in float32 (``wide_products``).
    Embeddings and output head learn at a share of the rate (`set_learning_rate`).
    Weight decay pulls on matrices only. The Llama papers say nothing of exceptions, but a norm's
    gain has no reason to tend to 0: in a pruned student it holds the scale of the kept dims.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    inner = _inner(named)
    ends = [(name, p) for name, p in named if p.ndim >= 2 and ".layers." not in f".{name}"]
    vectors = [entry for entry in named if entry[1].ndim < 2]
    optimizers: dict[str, torch.optim.Optimizer] = {}
    if settings.optimizer == "muon":
        kind = Muon if processes() == 1 else SplitMuon
        optimizers["muon"] = kind(
            _parameters(inner),
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            products=torch.float32 if wide else torch.bfloat16,
        )
        inner = []
    decay, share = settings.weight_decay, settings.embedding_learning_rate
    groups = [
        {"params": _parameters(inner), "weight_decay": decay},
        {"params": _parameters(ends), "weight_decay": decay, "share": share},
        {"params": _parameters(vectors), "weight_decay": 0.0},
    ]
    optimizers["adamw"] = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.eps,
        fused=_can_fuse(named),
    )
    return optimizers


def wide_products(model: nn.Module, settings: DistillSettings) -> bool:
    """Whether Muon had better multiply in float32 here. Measured, so a run asks once."""
    if settings.optimizer != "muon":
        return False
    matrices = _parameters(_inner((name, p) for name, p in model.named_parameters()))
    return sum(p.numel() for p in matrices) > _MUCH and imitates_bfloat16(matrices[0].device)


def _inner(named: Iterable[Named]) -> list[Named]:
    """The matrices of the layers that are trained."""
    return [
        (name, p)
        for name, p in named
        if p.requires_grad and p.ndim >= 2 and ".layers." in f".{name}"
    ]


def _parameters(named: Iterable[Named]) -> list[nn.Parameter]:
    return [p for _, p in named]


def _can_fuse(named: Iterable[Named]) -> bool:
    """PyTorch's one-pass AdamW exists for real floating-point weights on these devices."""
    return all(
        p.is_floating_point() and p.device.type in ("cpu", "cuda", "mps", "xpu") for _, p in named
    )


def set_learning_rate(optimizers: Mapping[str, torch.optim.Optimizer], rate: float) -> None:
    """Give every group of every optimizer this rate, or its ``share`` of it."""
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("share", 1.0)


def optimizer_tensors(
    model: nn.Module, optimizers: Mapping[str, torch.optim.Optimizer]
) -> dict[str, Tensor]:
    """All state as {"adamw/exp_avg/model.norm.weight": tensor, ...}."""
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    return {
        f"{kind}/{field}/{names[p]}": value
        for kind, optimizer in optimizers.items()
        for p, state in optimizer.state.items()
        for field, value in state.items()
    }


def restore_optimizers(
    model: nn.Module, optimizers: Mapping[str, torch.optim.Optimizer], saved: Group
) -> None:
    """Put back what `optimizer_tensors` gave."""
    parameters = dict(model.named_parameters())
    states: dict[str, Tensor] = {}
    for key in names_in(saved):
        kind, field, name = key.split("/", 2)
        p, state = parameters[name], optimizers[kind].state[parameters[name]]
        if field == "step":  # a number, which fused AdamW has where the weights are
            fused = optimizers[kind].param_groups[0].get("fused")
            state[field] = torch.zeros((), device=p.device if fused else "cpu")
        else:
            state[field] = torch.zeros_like(p)
        states[key] = state[field]
    fill(states, saved)
