"""Where the student's and the teacher's hidden states meet: the pruner's own selection.

Student layer i was teacher layer ``layers[i]``, and student dim j teacher dim ``hidden[j]`` or
the j-th column of a map that the pruner wrote, so no projection has to be learnt. Layers that
turn the stream toward an output head merged with the embedding have no such map and no part.

Legend: B windows, T positions, N positions that count, D student hidden, E teacher hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from compress.data import Batch
from compress.losses import HIDDEN_LOSSES
from compress.selection import read_map
from compress.settings import DistillSettings, HiddenLoss, Ramp
from shearling import ShearlingError, read_json

Place = Literal["hidden", "attention"]


@dataclass(frozen=True, kw_only=True)
class HiddenMatch:
    """Which layers are compared at which place, and how the teacher's become student-sized.

    The place ``hidden`` is the stream after a layer, ``attention`` what its attention adds to it.
    """

    place: Place
    kind: str
    weight: float | Ramp
    teacher_layers: tuple[int, ...]
    student_layers: tuple[int, ...]
    dims_D: Tensor | None
    map_ED: Tensor | None

    def to_student(self, teacher_NE: Tensor) -> Tensor:
        """The teacher's hidden states as the student was cut, [N, D]."""
        if self.map_ED is not None:
            return teacher_NE.float() @ self.map_ED
        return teacher_NE if self.dims_D is None else teacher_NE.index_select(-1, self.dims_D)

    def loss(
        self, student_BTD: Sequence[Tensor], teacher_BTE: Sequence[Tensor], batch: Batch
    ) -> Tensor:
        """Sum over the positions that count of the mean over the layers."""
        measure = HIDDEN_LOSSES[self.kind]
        values = [
            measure(batch.pick(student), self.to_student(batch.pick(teacher))).sum()
            for student, teacher in zip(student_BTD, teacher_BTE, strict=True)
        ]
        return torch.stack(values).mean()


Collected = dict[Place, list[Tensor]]
"""The outputs of the compared layers, [B, T, hidden] each, by place."""


@contextmanager
def hidden_outputs(
    model: LlamaForCausalLM, matches: Sequence[HiddenMatch], role: Literal["teacher", "student"]
) -> Iterator[Collected]:
    """While open, collect what the compared layers give out."""
    collected: Collected = {match.place: [] for match in matches}
    hooks = []
    for match in matches:
        wanted = match.teacher_layers if role == "teacher" else match.student_layers
        for number in wanted:
            layer = model.model.layers[number]
            module = layer.self_attn if match.place == "attention" else layer
            hooks.append(module.register_forward_hook(_collector(collected[match.place])))
    try:
        yield collected
    finally:
        for hook in hooks:
            hook.remove()


def _collector(found: list[Tensor]) -> Callable[[nn.Module, Any, Any], None]:
    def collect(module: nn.Module, arguments: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    return collect


def open_matches(
    config: LlamaConfig,
    student: LlamaForCausalLM,
    selection: Path | None,
    settings: DistillSettings,
) -> tuple[HiddenMatch, ...]:
    """The places that the recipe wants compared, in a teacher of this config."""
    wanted: dict[Place, HiddenLoss] = {"hidden": settings.hidden, "attention": settings.attention}
    return tuple(
        _open_match(config, student, selection, place, loss)
        for place, loss in wanted.items()
        if loss.weight != 0
    )


def _open_match(
    config: LlamaConfig,
    student: LlamaForCausalLM,
    selection: Path | None,
    place: Place,
    settings: HiddenLoss,
) -> HiddenMatch:
    """Read the pruner's selection for a teacher of this config.

    Where a map of the stream lies beside ``selection``, it replaces picking dims. Without a
    selection both models must have the same layers and hidden size.

    Raises:
        ShearlingError: the selection is missing or does not fit the two models.
    """
    cut = student.config
    depth, width = cut.num_hidden_layers, cut.hidden_size
    layers, dims = list(range(config.num_hidden_layers)), list(range(config.hidden_size))
    map_ED, turned = None, set[int]()
    if selection is not None:
        chosen = read_json(selection)
        layers, dims = chosen["layers"], chosen["hidden"]
        map_ED, turned = read_map(selection), set(chosen.get("turned", []))
    fits = len(layers) == depth and max(layers, default=0) < config.num_hidden_layers
    if map_ED is None:
        fits = fits and len(dims) == width and max(dims, default=0) < config.hidden_size
    else:
        fits = fits and tuple(map_ED.shape) == (config.hidden_size, width)
    if not fits:
        raise ShearlingError(
            f"The loss of {place} can't map the teacher ({config.num_hidden_layers} layers of "
            f"{config.hidden_size}) to the student ({depth} of {width})"
            + (f" by {selection}." if selection else " without the pruner's selection."),
            hint=f"Put a prune stage before this one, or set {place}.weight to 0.",
        )
    met = [number for number in range(depth) if number not in turned]
    if not met:
        raise ShearlingError(
            f"The loss of {place} has no layer to compare: all turn the stream toward the output "
            "head that was merged with the embedding.",
            hint=f"Set {place}.weight to 0.",
        )
    device = student.device
    whole = map_ED is None and dims == list(range(config.hidden_size))
    return HiddenMatch(
        place=place,
        kind=settings.kind,
        weight=settings.weight,
        teacher_layers=tuple(layers[number] for number in met),
        student_layers=tuple(met),
        dims_D=None if whole or map_ED is not None else torch.tensor(dims, device=device),
        map_ED=None if map_ED is None else map_ED.float().to(device),
    )
