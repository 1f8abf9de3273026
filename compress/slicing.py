"""Cut a layer of the teacher to the student's shape, its weights as well as what it says.

Legend: N positions, O outputs, K key/value heads, C teacher head dim, c student head dim.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.coupling import HIDDEN, KEY_VALUE, NEURONS, QUERY, Coupling, narrowed
from compress.layer import ATTENTION, BLOCKS, MLP, LayerWeights
from compress.selection import Plan, rotary_channels, rows_of_heads
from students.shape import Shape

_LEAST_NORM = 0.01
"""Least weight of a norm, as a share of the mean: maps are divided by it."""
_SMALLEST_NORM = 1e-6
"""And of a norm that is zero everywhere."""


@dataclass(frozen=True, kw_only=True)
class Slicer:
    """From the teacher's shape to the student's, as the plan says."""

    teacher: Shape
    student: Shape
    plan: Plan
    coupling: Coupling

    def kept(self, stream_BTE: Tensor) -> Tensor:
        """The student's dims of a teacher's stream."""
        return narrowed(stream_BTE, self.plan.stream)

    def outside_layers(self, name: str, tensor: Tensor) -> Tensor:
        """The embedding or the output head in the student's hidden dims."""
        return self.coupling.cut(name, tensor, {HIDDEN: self.plan.stream})

    def norm(self, norm_E: Tensor) -> Tensor:
        """A norm's weights in the student's hidden dims, [D].

        A direction that mixes dims gets the root mean square of their weights: the maps that read
        through the norm keep about the size that they had, and take the rest (``layer``).
        """
        if self.plan.basis_DE is None:
            return narrowed(norm_E, self.plan.hidden)
        size_D = (self.plan.basis_DE.square().to(norm_E) @ norm_E.square()).sqrt()
        return torch.maximum(size_D, (_LEAST_NORM * size_D.mean()).clamp_min(_SMALLEST_NORM))

    def layer(self, number: int, teacher: LayerWeights) -> LayerWeights:
        """The student's layer ``number``, sliced and not yet refitted."""
        chosen, basis = self.plan.chosen[number], self.plan.value_basis_KCc[number]
        wide = self.teacher.head_dim
        rotary = rotary_channels(wide, self.student.head_dim, chosen.heads.device)
        every = torch.arange(wide, device=chosen.heads.device)
        kept = {HIDDEN: self.plan.stream, NEURONS: chosen.neurons}
        rotated = kept | {
            QUERY: rows_of_heads(chosen.heads, rotary, wide),
            KEY_VALUE: rows_of_heads(chosen.key_value_heads, rotary, wide),
        }
        whole = kept | {
            QUERY: rows_of_heads(chosen.heads, every, wide),
            KEY_VALUE: rows_of_heads(chosen.key_value_heads, every, wide),
        }
        norms = {block.norm: teacher[block.norm] for block in BLOCKS}
        student = {}
        for name, tensor in self._with_norms_inside(teacher).items():
            side = rotated if name.startswith(ATTENTION.inputs[:2]) else whole
            student[name] = self.coupling.cut(name, tensor, side)
        self._take_norms_out(student, norms)
        if basis is not None:
            self._narrow_heads(student, basis)
        return student

    def _with_norms_inside(self, teacher: LayerWeights) -> LayerWeights:
        """The same layer with its norms' weights in the maps that read through them.

        A basis that mixes dims can't be taken through a norm's weights. Picked dims can.
        """
        if self.plan.basis_DE is None:
            return teacher
        inside = dict(teacher)
        for block in BLOCKS:
            for name in block.inputs:
                inside[f"{name}.weight"] = teacher[f"{name}.weight"] * teacher[block.norm]
        return inside

    def _take_norms_out(self, student: LayerWeights, norms: Mapping[str, Tensor]) -> None:
        """Give the student norms of its own, and take them out of the maps behind them."""
        if self.plan.basis_DE is None:
            return
        for block in BLOCKS:
            norm_D = student[block.norm] = self.norm(norms[block.norm])
            for name in block.inputs:
                student[f"{name}.weight"] /= norm_D

    def _narrow_heads(self, student: LayerWeights, basis_KCc: Tensor) -> None:
        """Project values onto their basis and let the queries carry the change of softmax scale.

        A stock model divides scores by the square root of its own, smaller head dim.
        """
        wide, narrow = basis_KCc.shape[1:]
        scale = math.sqrt(narrow / wide)
        for name in [n for n in student if n.startswith(ATTENTION.inputs[0])]:
            student[name] = student[name] * scale
        for name in [n for n in student if n.startswith(ATTENTION.inputs[2])]:
            basis = basis_KCc.to(student[name])
            value = student[name].view(len(basis), wide, -1)
            projected = torch.einsum("kci,kcd->kdi", value, basis).flatten(0, 1)
            student[name] = projected.reshape(-1, *student[name].shape[1:])
        name = f"{ATTENTION.output}.weight"
        output = student[name].view(-1, len(basis_KCc), self.student.group_size, wide)
        narrowed = torch.einsum("ekgc,kcd->ekgd", output, basis_KCc.to(output))
        student[name] = narrowed.flatten(1)

    def target(self, number: int, name: str, output_NO: Tensor) -> Tensor:
        """What the teacher's q, k, v, gate or up output becomes in the student's shape."""
        chosen, basis = self.plan.chosen[number], self.plan.value_basis_KCc[number]
        if name in MLP.inputs:
            return output_NO[:, chosen.neurons]
        wide = self.teacher.head_dim
        heads = chosen.heads if name == ATTENTION.inputs[0] else chosen.key_value_heads
        if name == ATTENTION.inputs[2]:
            value = output_NO.view(len(output_NO), -1, wide)[:, heads]
            if basis is not None:
                value = torch.einsum("nkc,kcd->nkd", value, basis.to(value))
            return value.flatten(1)
        rotary = rotary_channels(wide, self.student.head_dim, heads.device)
        target = output_NO[:, rows_of_heads(heads, rotary, wide)]
        if name == ATTENTION.inputs[0]:
            target = target * math.sqrt(self.student.head_dim / wide)
        return target
