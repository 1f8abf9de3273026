"""One process or many: who this one is, how models are split, what all must agree on.

With one process every function here does nothing. With many, started by `torchrun` or by
`shearling run --processes`, each model is split with FSDP2 (`fully_shard`): a layer is gathered
when it is computed, and the embeddings, the final norm and the head once for the whole pass.

Three mistakes that this file is built around: calling a part of a split model skips its hooks, so
everything runs `Inside` its root; a tied head that is split by itself learns apart from the
embeddings, so it is never split alone; accelerate's plugin does not split on a CPU, so PyTorch's
own call is used.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import LlamaForCausalLM

from teachers.checkpoint import Checkpoint

Given = TypeVar("Given")
_PATIENCE = timedelta(hours=2)
"""How long one process waits for another inside a stage, as for a checkpoint on a slow disk."""
_BETWEEN_STAGES = timedelta(days=30)
"""How long the others wait while rank 0 does what is done alone, as pruning."""
_waiting: list[dist.ProcessGroup] = []
"""The group over which rank 0 speaks to those who wait."""


# --- who is there ----------------------------------------------------------------------------


def started_with_others() -> bool:
    """Whether torchrun, or what works like it, started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def processes() -> int:
    """How many processes work together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def leads() -> bool:
    """Whether this process is the one that writes files."""
    return rank() == 0


def own_device(kind: str) -> torch.device:
    """This process's device of a kind: each takes the accelerator of its place on the machine."""
    if processes() > 1 and kind.startswith("cuda"):
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device(kind)


@contextmanager
def together(kind: str) -> Iterator[None]:
    """While open, the processes that were started together can talk. ``kind``: cpu or cuda."""
    if not started_with_others() or dist.is_initialized():
        yield
        return
    cuda = kind.startswith("cuda")
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    # gloo stays for what lies on the CPU: flags, paths, counts.
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=_PATIENCE)
    _waiting[:] = [dist.new_group(backend="gloo", timeout=_BETWEEN_STAGES)]
    try:
        yield
    finally:
        _waiting.clear()
        dist.destroy_process_group()


# --- what they agree on ----------------------------------------------------------------------


def total(tensor: Tensor) -> Tensor:
    """The sum over all processes; with one process the tensor itself."""
    if processes() > 1:
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def agreed(*flags: bool) -> list[bool]:
    """Each flag, set for all processes where it is for one of them."""
    if processes() == 1:
        return list(flags)
    found = torch.tensor(flags, dtype=torch.int32)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return [bool(flag) for flag in found]


def largest(number: int) -> int:
    """The largest of the processes' numbers."""
    if processes() == 1:
        return number
    found = torch.tensor(number)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


def leader_says(data: Any, *, patiently: bool = False) -> Any:
    """Rank 0's plain JSON data, given to all. Not pickled, as `broadcast_object_list` would.

    ``patiently``: it may take rank 0 days to speak.
    """
    if processes() == 1:
        return data
    group = _waiting[0] if patiently and _waiting else None
    text = json.dumps(data).encode() if leads() else b""
    size = torch.tensor(len(text))
    dist.broadcast(size, 0, group)
    letters = torch.zeros(int(size), dtype=torch.uint8)
    if leads():
        letters.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
    dist.broadcast(letters, 0, group)
    return json.loads(letters.numpy().tobytes())


def meet() -> None:
    """Wait until all processes are here."""
    if processes() > 1:
        dist.barrier()


@contextmanager
def leader_first() -> Iterator[None]:
    """Rank 0 goes through the body first; the others find what it made."""
    if not leads():
        meet()
    yield
    if leads():
        meet()


# --- split models ----------------------------------------------------------------------------


class Inside(nn.Module):
    """The root of a model, split or not: what works with its weights runs inside its forward.

    There the embeddings and the head are whole, and gradients find their way back.
    """

    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[LlamaForCausalLM], Given]) -> Given:
        return work(self.model)

    def release(self) -> None:
        """Give back what a pass without a backward left gathered; it would go stale."""
        if isinstance(self, FSDPModule):
            self.reshard()


def open_split(
    folder: Path, dtype: torch.dtype, device: torch.device, products: torch.dtype
) -> Inside:
    """A Llama from a Hugging Face folder, split over all processes while it is read.

    No process ever holds more than its part, one whole layer and the embeddings. Layers' weights
    wider than the matrix products' dtype are gathered in that, at half the traffic: autocast would
    narrow matrices anyway, and norms' gains are rounded once more. Embeddings, final norm and head
    are gathered as they are, for the stream is made of them. Gradients are added in the
    weights' own dtype.
    """
    checkpoint = Checkpoint(folder)
    with torch.device("meta"):
        model = LlamaForCausalLM(checkpoint.config)
    rotary = type(model.model.rotary_emb)
    model.model.rotary_emb = rotary(model.config).to(device)
    inside = Inside(model)
    narrowed = MixedPrecisionPolicy(
        param_dtype=products, reduce_dtype=dtype, cast_forward_inputs=False
    )
    mesh = init_device_mesh(device.type, (processes(),))
    for number, layer in enumerate(model.model.layers):
        _read(layer, f"model.layers.{number}", checkpoint, dtype, device)
        fully_shard(layer, mesh=mesh, mp_policy=narrowed)
    for name in ("model.embed_tokens", "model.norm", "lm_head"):
        if name != "lm_head" or not model.config.tie_word_embeddings:
            _read(model.get_submodule(name), name, checkpoint, dtype, device)
    model.tie_weights()
    fully_shard(inside, mesh=mesh)
    return inside


def _read(
    module: nn.Module, prefix: str, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device
) -> None:
    """Put the checkpoint's weights in the place of a module's empty ones."""
    for name, _ in list(module.named_parameters()):
        owner, _, last = name.rpartition(".")
        weight = checkpoint.tensor(f"{prefix}.{name}", dtype).to(device)
        setattr(module.get_submodule(owner), last, nn.Parameter(weight))


def sum_gradients(inside: Inside) -> None:
    """Add the processes' gradients instead of averaging: the loss counts the step's positions."""
    for module in inside.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def whole(tensor: Tensor) -> Tensor:
    """The tensor with all its parts; every process must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def put(target: Tensor, source: Tensor) -> None:
    """Copy a tensor, whole or split alike, into one that may be split."""
    if isinstance(target, DTensor) and not isinstance(source, DTensor):
        # Every process has the source, so each takes its part and nothing is sent.
        source = distribute_tensor(
            source.to(target.device), target.device_mesh, target.placements, src_data_rank=None
        )
    target.copy_(source)
