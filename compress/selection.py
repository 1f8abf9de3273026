"""What stays: scores and a target shape become lists of indices.

Legend: L layers, D hidden dims, H query heads, K key/value heads, F neurons.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from shearling import ShearlingError, read_json, sha256_of_file, sha256_of_json, write_json
from students.tensors import save_tensors

Depth = Literal["cosine", "contiguous", "divergence"] | list[int]


@dataclass(frozen=True, kw_only=True)
class LayerSelection:
    """What stays of one layer: sorted indices into the teacher's own numbering."""

    heads: Tensor
    key_value_heads: Tensor
    neurons: Tensor

    def to(self, device: torch.device) -> LayerSelection:
        """The same on ``device``."""
        return LayerSelection(
            heads=self.heads.to(device),
            key_value_heads=self.key_value_heads.to(device),
            neurons=self.neurons.to(device),
        )


def top(scores: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` largest scores, ascending; of equal ones the earlier stays."""
    return scores.sort(descending=True, stable=True).indices[:count].sort().values


def choose_layers(distances: Sequence[float], count: int, depth: Depth) -> list[int]:
    """Numbers of the layers that stay, ascending.

    ``distances[i]`` says how much layer i changes the residual stream. ``cosine`` keeps the
    largest; ``contiguous`` drops the run of neighbours with the smallest sum; a list is taken as
    it is. (``divergence`` needs the model itself: ``compress.depth``.)
    """
    if not isinstance(depth, str):
        return depth
    if depth != "contiguous":
        kept: list[int] = top(torch.tensor(distances), count).tolist()
        return kept
    total = len(distances)
    dropped = total - count
    sums = [sum(distances[first : first + dropped]) for first in range(total - dropped + 1)]
    first = sums.index(min(sums))
    return [layer for layer in range(total) if not first <= layer < first + dropped]


def choose_heads(
    scores_H: Tensor, teacher_kv: int, kv_heads: int, heads: int
) -> tuple[Tensor, Tensor]:
    """The query heads and key/value heads that stay, ascending.

    Whole groups stay by the sum of their heads' scores, then each keeps its best query heads, so
    every query head still finds its own keys and values.
    """
    scores_KG = scores_H.view(teacher_kv, -1)
    groups_K = top(scores_KG.sum(1), kv_heads)
    per_group = heads // kv_heads
    best = [top(scores_KG[group], per_group) + group * scores_KG.shape[1] for group in groups_K]
    return torch.cat(best), groups_K


def rows_of_heads(heads: Tensor, channels_C: Tensor, head_dim: int) -> Tensor:
    """Row numbers of the given channels of each head in a projection of all heads."""
    return (heads[:, None] * head_dim + channels_C[None, :]).flatten()


def rotary_channels(teacher_dim: int, head_dim: int, device: torch.device | str = "cpu") -> Tensor:
    """Channels of a head that keep the student's rotary embedding stock: [head_dim].

    Pair i of a head of C channels (channels i and i + C/2) turns with frequency base^(-2i/C).
    Every (C/c)-th pair therefore turns exactly as the pairs of a head of c channels do.

    Raises:
        ShearlingError: the teacher's head dim is no multiple of the student's.
    """
    if teacher_dim % head_dim:
        raise ShearlingError(
            f"head_dim {head_dim} does not divide the teacher's {teacher_dim}, so the rotary "
            "frequencies would not be those of a stock model.",
            hint=f"Set shape.head_dim to {teacher_dim} or to it divided by a whole number.",
        )
    first = torch.arange(0, teacher_dim // 2, teacher_dim // head_dim, device=device)
    return torch.cat([first, first + teacher_dim // 2])


def check_rotary(teacher: LlamaConfig, student: LlamaConfig) -> None:
    """The kept channels turn in the student as they do in the teacher, whatever scales them.

    YaRN's and longrope's frequencies depend on a pair's number, not on its frequency alone; so do
    dynamic ones, once a text is longer than the teacher's context.

    Raises:
        ShearlingError: they don't.
    """
    channels_C = rotary_channels(teacher.head_dim, student.head_dim)
    try:
        wide, narrow = LlamaRotaryEmbedding(teacher), LlamaRotaryEmbedding(student)
        kept = wide.inv_freq[channels_C[: student.head_dim // 2]]
        same = torch.equal(kept, narrow.inv_freq)
    except RuntimeError:  # a list of factors for as many pairs as the teacher has
        same = False
    kind = teacher.rope_parameters["rope_type"]
    if not same or (kind == "dynamic" and teacher.head_dim != student.head_dim):
        raise ShearlingError(
            f"head_dim can't go from {teacher.head_dim} to {student.head_dim}: with the teacher's "
            f"rotary embedding ({kind}) no heads of a stock model turn as its own do.",
            hint=f"Keep shape.head_dim at {teacher.head_dim} and take fewer heads.",
        )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What stays: layers, hidden dims, and of each kept layer heads, neurons, value basis.

    With ``basis_DE`` the student's stream is that map of the teacher's, and ``hidden`` are the
    teacher's dims to which its dims lie nearest.
    """

    layers: list[int]
    hidden: Tensor
    basis_DE: Tensor | None
    chosen: list[LayerSelection]
    value_basis_KCc: list[Tensor | None]

    @property
    def stream(self) -> Tensor:
        """How the stream is narrowed: numbers of dims, [D], or the basis, [D, E]."""
        return self.hidden if self.basis_DE is None else self.basis_DE

    def to(self, device: torch.device) -> Plan:
        """The same on ``device``: the walk cuts each batch of activations there."""
        return Plan(
            layers=self.layers,
            hidden=self.hidden.to(device),
            basis_DE=None if self.basis_DE is None else self.basis_DE.to(device),
            chosen=[layer.to(device) for layer in self.chosen],
            value_basis_KCc=[
                None if basis is None else basis.to(device) for basis in self.value_basis_KCc
            ],
        )


# --- on the disk -------------------------------------------------------------------------------


def write_selection(path: Path, plan: Plan, more: Mapping[str, Any]) -> None:
    """Write what stayed to ``path`` (JSON), and ``more``; the basis, if there is one, beside it."""
    chosen = {
        "schema": 1,
        "layers": plan.layers,
        "hidden": plan.hidden.tolist(),
        "heads": [layer.heads.tolist() for layer in plan.chosen],
        "key_value_heads": [layer.key_value_heads.tolist() for layer in plan.chosen],
        "neurons": [layer.neurons.tolist() for layer in plan.chosen],
    }
    write_json(path, chosen | dict(more))
    write_map(path, None if plan.basis_DE is None else plan.basis_DE.T)


def write_map(selection: Path, map_ED: Tensor | None) -> None:
    """Put the map of the stream beside its selection; none, where it is picked dims."""
    path = selection.with_suffix(".safetensors")
    if map_ED is None:
        path.unlink(missing_ok=True)
    else:
        save_tensors({"hidden": map_ED.cpu().contiguous()}, path)


def read_map(selection: Path) -> Tensor | None:
    """What ``write_map`` wrote: teacher's stream times it is the student's stream, [E, D]."""
    path = selection.with_suffix(".safetensors")
    return load_file(path)["hidden"] if path.is_file() else None


def mapping_fingerprint(selection: Path) -> str:
    """A hash of what a written selection says of layers and stream, its map included."""
    chosen, path = read_json(selection), selection.with_suffix(".safetensors")
    mapped = sha256_of_file(path) if path.is_file() else None
    return sha256_of_json([chosen["layers"], chosen["hidden"], mapped])
