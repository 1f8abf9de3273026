"""Projection to the vocabulary, losses and gradients in one pass, some hundred positions at a time.

On real vocabularies the logits are the largest tensor of a training step by far. Here they never
stand as one tensor [N, V]: a chunk of positions is projected, its losses and the gradient in its
logits computed in the same memory, and the gradient projected back, before the next chunk begins.
`compress.losses` has the dense references.

Legend of shape suffixes: N positions, C positions of a chunk, B of a block of rows that fits into
the processor's cache, V vocabulary, R some of it, D student hidden, E teacher hidden,
K kept tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import astuple, dataclass, field, fields
from operator import add
from typing import Any

import torch
from torch import Tensor

from compress.losses import (
    DIVERGENCES,
    IGNORED,
    LEAST_TAIL,
    LiveAnswer,
    LiveTargets,
    MixedTargets,
    SparseTargets,
    Targets,
    cross_entropy,
)
from compress.parallel import total
from compress.workspace import Workspace


@dataclass(frozen=True)
class Term:
    """One divergence of the objective: its function, weight, and further arguments."""

    name: str
    weight: float
    arguments: Mapping[str, float] = field(default_factory=dict)

    def __call__(self, student_NV: Tensor, teacher_NV: Tensor, temperature: float) -> Tensor:
        loss = DIVERGENCES[self.name]
        return loss(student_NV, teacher_NV, temperature=temperature, **self.arguments)


@dataclass(frozen=True, kw_only=True)
class FusedLoss:
    """Projection to the vocabulary, losses and gradients in one pass over chunks of positions.

    Calling it gives the same value and gradients as projecting everything and adding up the dense
    losses, but the gradients are computed in the forward pass, while a chunk's logits exist.
    The method is Liger Kernel's (https://arxiv.org/abs/2410.10989, section 3.2), carried over to
    several divergences from a live teacher.

    The matrix products run in ``dtype``; everything between them, the softmax and all sums, in
    float32 (float64 when the student is float64). The head's gradient is summed in that too.
    """

    terms: tuple[Term, ...]
    cross_entropy: float = 0.0
    temperature: float = 1.0
    chunk: int = 512
    dtype: torch.dtype = torch.float32
    vocabulary: int | None = None
    """Rows of the heads that are tokens; the others, padding, are as if their logits were minus
    infinity, and get no gradient. None: as many as all models have."""
    workspace: Workspace = field(default_factory=Workspace)

    def __call__(
        self,
        student_ND: Tensor,
        head_VD: Tensor,
        targets: Targets,
        labels_N: Tensor,
        *,
        positions: int | None = None,
        labelled: int | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Give the loss (a scalar to call backward on) and each term's sum over the positions.

        Every row counts (leave masked ones out beforehand). ``positions`` and ``labelled`` are
        what the divergences' and the labels' sums are divided by: the tokens of the whole
        optimizer step when gradients are accumulated; by default the rows here.
        """
        labelled = int((labels_N != IGNORED).sum()) if labelled is None else labelled
        scales = (
            1.0 / max(positions if positions is not None else len(student_ND), 1),
            self.cross_entropy / max(labelled, 1),
        )
        loss, *sums = _Fused.apply(  # type: ignore[no-untyped-call]
            student_ND, head_VD, targets, labels_N, self, scales
        )
        names = [*(term.name for term in self.terms), "cross_entropy"]
        return loss, dict(zip(names, sums, strict=True))

    def logits(self, hidden_ND: Tensor, head_VD: Tensor, name: str) -> Tensor:
        """Project a chunk into the workspace, in the products' dtype."""
        size = (len(hidden_ND), len(head_VD))
        out_NV = self.workspace.take(name, size, self.dtype, hidden_ND)
        return torch.mm(hidden_ND.to(self.dtype), head_VD.T, out=out_NV)

    def is_forward_kl(self) -> bool:
        """Whether the hand-written pass serves: forward KL, labels only at temperature 1."""
        forward_only = [term.name for term in self.terms] == ["forward_kl"]
        return forward_only and (self.temperature == 1 or self.cross_entropy == 0)


class _Fused(torch.autograd.Function):
    """The autograd face of `FusedLoss`: gradients are made in forward and scaled in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        student_ND: Tensor,
        head_VD: Tensor,
        targets: Targets,
        labels_N: Tensor,
        fused: FusedLoss,
        scales: tuple[float, float],
    ) -> tuple[Tensor, ...]:
        work = torch.promote_types(student_ND.dtype, torch.float32)
        ready, vocabulary = _ready(targets, len(head_VD), fused)
        head_used_VD = _narrowed(fused, head_VD[:vocabulary])
        grad_ND = torch.empty_like(student_ND, dtype=work)
        grad_VD = torch.zeros_like(head_VD, dtype=work)
        loss = torch.zeros((), dtype=work, device=student_ND.device)
        sums = torch.zeros(len(fused.terms) + 1, dtype=work, device=student_ND.device)
        with torch.autocast(student_ND.device.type, enabled=False):
            for start in range(0, len(student_ND), fused.chunk):
                chunk = slice(start, start + fused.chunk)
                hidden_CD = student_ND[chunk].to(fused.dtype)
                student_CV = fused.logits(hidden_CD, head_used_VD, "student")
                chunk_targets, chunk_labels = ready.rows(chunk), labels_N[chunk]
                for value, parts in _chunk_losses(
                    student_CV, chunk_targets, chunk_labels, work, fused, scales
                ):
                    loss += value
                    sums += parts
                _project_back(student_CV, hidden_CD, head_used_VD, grad_ND[chunk], grad_VD, fused)
        ctx.save_for_backward(grad_ND.to(student_ND.dtype), grad_VD.to(head_VD.dtype))
        terms: tuple[Tensor, ...] = sums.unbind()
        ctx.mark_non_differentiable(*terms)
        return (loss, *terms)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_ND, grad_VD = ctx.saved_tensors
        # In place: the head's gradient is large, and the loop calls backward once. A second call
        # finds saved tensors changed, which autograd refuses.
        return grad_ND.mul_(grads[0]), grad_VD.mul_(grads[0]), None, None, None, None


_BLOCK_BYTES = 8 * 2**20
"""Rows are worked on in blocks of this size so that the softmax's passes stay in the cache."""
_HEAD_BYTES = 8 * 2**20
"""A chunk's part of the head's gradient is made so much at a time, in the products' dtype, and
added in the wide one: whole, its two copies were a tenth of a step's memory on a CPU."""

Sums = tuple[Tensor, Tensor]
"""A block's part of the loss, and its sums by term."""


def _ready(targets: Targets, student_rows: int, fused: FusedLoss) -> tuple[Targets, int]:
    """Cut padding off the teachers' heads and narrow them once; give the vocabulary's size too."""
    if isinstance(targets, SparseTargets):
        return targets, fused.vocabulary or student_rows
    parts = targets.parts if isinstance(targets, MixedTargets) else (targets,)
    smallest = min(student_rows, *(len(part.head_VE) for part in parts))
    vocabulary = fused.vocabulary or smallest
    ready = tuple(
        LiveTargets(part.hidden_NE, part.head_VE[:vocabulary].to(fused.dtype)) for part in parts
    )
    if isinstance(targets, MixedTargets):
        return MixedTargets(ready, targets.weights), vocabulary
    return ready[0], vocabulary


def _teacher_logits(targets: LiveAnswer, fused: FusedLoss, work: torch.dtype) -> Tensor:
    """What the teacher says of a chunk, [C, V]; of several teachers the mixture's logarithm."""
    if isinstance(targets, LiveTargets):
        return fused.logits(targets.hidden_NE, targets.head_VE, "teacher")
    mixed_CV: Tensor | None = None
    for part, weight in zip(targets.parts, targets.weights, strict=True):
        logits_CV = fused.logits(part.hidden_NE, part.head_VE, "teacher").to(work)
        said_CV = logits_CV.log_softmax(-1).add_(math.log(weight))
        mixed_CV = said_CV if mixed_CV is None else torch.logaddexp(mixed_CV, said_CV)
    assert mixed_CV is not None, "a mixture has parts"
    return mixed_CV


def _rows_at_once(
    fused: FusedLoss, device: torch.device, vocabulary: int, work: torch.dtype
) -> int:
    """On a CPU as many rows as stay in its cache. Elsewhere a whole chunk: there each call costs
    more than what it saves."""
    if device.type != "cpu":
        return fused.chunk
    return max(1, _BLOCK_BYTES // (vocabulary * work.itemsize))


def _widened(fused: FusedLoss, name: str, logits_BV: Tensor, work: torch.dtype) -> Tensor:
    """The same memory where the dtype is right, else a copy in the workspace."""
    if logits_BV.dtype == work:
        return logits_BV
    return fused.workspace.take(name, logits_BV.shape, work, logits_BV).copy_(logits_BV)


def _narrowed(fused: FusedLoss, head_VD: Tensor) -> Tensor:
    """The student's head in the products' dtype, which it needs once a micro-batch: on a CPU in
    the workspace, elsewhere in memory that is free again behind the loss."""
    if head_VD.device.type != "cpu" or head_VD.dtype == fused.dtype:
        return head_VD.to(fused.dtype)
    return fused.workspace.take("student head", head_VD.shape, fused.dtype, head_VD).copy_(head_VD)


def _chunk_losses(
    student_CV: Tensor,
    targets: Targets,
    labels_C: Tensor,
    work: torch.dtype,
    fused: FusedLoss,
    scales: tuple[float, float],
) -> Iterator[Sums]:
    """Losses of a chunk, some rows at a time; its logits become their own gradient."""
    vocabulary, by_hand = student_CV.shape[1], fused.is_forward_kl()
    if not isinstance(targets, SparseTargets):
        teacher_CV = _teacher_logits(targets, fused, work)
    else:
        assert by_hand, "sparse targets serve the forward KL at temperature 1"
    rows = _rows_at_once(fused, student_CV.device, vocabulary, work)
    for start in range(0, len(student_CV), rows):
        block = slice(start, start + rows)
        grad_BV, labels_B = student_CV[block], labels_C[block]
        student_BV = _widened(fused, "student block", grad_BV, work)
        if isinstance(targets, SparseTargets):
            sums = _sparse_block(student_BV, targets.rows(block), labels_B, fused, scales)
        else:
            teacher_BV = _widened(fused, "teacher block", teacher_CV[block], work)
            if by_hand:
                spare_BV = fused.workspace.take("spare block", grad_BV.shape, work, grad_BV)
                sums = _forward_kl_block(student_BV, teacher_BV, spare_BV, labels_B, fused, scales)
            else:
                sums = _any_block(student_BV, teacher_BV, labels_B, fused, scales)
        if student_BV.dtype != grad_BV.dtype:
            grad_BV.copy_(student_BV)
        yield sums


def _softmax_(logits_BV: Tensor, out_BV: Tensor) -> Tensor:
    """Write softmax(logits) to ``out`` (may be the same memory); give logsumexp(logits)."""
    largest_B = logits_BV.amax(-1)
    torch.ops.aten._softmax.out(logits_BV, -1, False, out=out_BV)
    # The largest probability is exp(0) / sum, so no pass over the exponentials is needed again.
    return largest_B - out_BV.amax(-1).log()


def _forward_kl_block(
    student_BV: Tensor,
    teacher_BV: Tensor,
    spare_BV: Tensor,
    labels_B: Tensor,
    fused: FusedLoss,
    scales: tuple[float, float],
) -> Sums:
    """Forward KL and cross-entropy by hand: two softmaxes and four light passes.

    KL = Σ p (z_p - z_q) - logsumexp(z_p) + logsumexp(z_q), and its gradient in z_q is q - p.
    """
    (term,) = fused.terms
    temperature = fused.temperature
    labelled_B = labels_B != IGNORED
    safe_B1 = labels_B.clamp(min=0).unsqueeze(-1)
    at_label_B = student_BV.gather(-1, safe_B1).squeeze(-1)
    log_sum_B = None
    if temperature != 1:  # labels are learnt at 1, and here only told: see is_forward_kl
        log_sum_B = student_BV.logsumexp(-1)
        student_BV.div_(temperature)
        teacher_BV.div_(temperature)
    log_sum_p_B = _softmax_(teacher_BV, spare_BV)
    teacher_BV.sub_(student_BV).mul_(spare_BV)
    log_sum_q_B = _softmax_(student_BV, student_BV)
    kl_sum = (teacher_BV.sum(-1) - log_sum_p_B + log_sum_q_B).sum() * temperature**2
    log_sum_B = log_sum_q_B if log_sum_B is None else log_sum_B
    label_sum = torch.where(labelled_B, log_sum_B - at_label_B, 0).sum()

    kl_scale, label_scale = scales[0] * term.weight * temperature, scales[1]
    if label_scale:
        label_B1 = labelled_B.to(student_BV.dtype).mul_(label_scale).unsqueeze(-1)
        student_BV.mul_(label_B1 + kl_scale).sub_(spare_BV, alpha=kl_scale)
        student_BV.scatter_add_(-1, safe_B1, -label_B1)
    else:
        student_BV.sub_(spare_BV).mul_(kl_scale)
    value = kl_sum * (scales[0] * term.weight) + label_sum * label_scale
    return value, torch.stack([kl_sum, label_sum])


def _sparse_block(
    student_BV: Tensor,
    targets: SparseTargets,
    labels_B: Tensor,
    fused: FusedLoss,
    scales: tuple[float, float],
) -> Sums:
    """`sparse_forward_kl` and cross-entropy by hand: one softmax, one light pass.

    The gradient in the logits is q - w, and with a tail m, of which the student gives r to the
    same tokens: q (1 - m / r) on those tokens, q - w on the K known ones.
    """
    (term,) = fused.terms
    labelled_B = labels_B != IGNORED
    safe_B1 = labels_B.clamp(min=0).unsqueeze(-1)
    at_label_B = student_BV.gather(-1, safe_B1).squeeze(-1)
    at_ids_BK = student_BV.gather(-1, targets.ids_NK)
    log_sum_B = _softmax_(student_BV, student_BV)
    weights_BK, tail_B = targets.weights_NK.to(student_BV.dtype), targets.tail_N
    kl_B = (weights_BK * (log_sum_B.unsqueeze(-1) - at_ids_BK)).sum(-1)
    label_sum = torch.where(labelled_B, log_sum_B - at_label_B, 0).sum()
    kl_scale, label_scale = scales[0] * term.weight, scales[1]
    label_B1 = labelled_B.to(student_BV.dtype).mul_(label_scale).unsqueeze(-1)
    pull_BK, push_B1 = weights_BK * -kl_scale, label_B1 + kl_scale * weights_BK.sum(-1, True)
    if tail_B is not None:
        known_BK = student_BV.gather(-1, targets.ids_NK)
        others_B = (1 - known_BK.sum(-1)).clamp(min=LEAST_TAIL)
        share_B1 = (tail_B / others_B).unsqueeze(-1).to(student_BV.dtype)
        entropy_B = torch.xlogy(weights_BK, weights_BK).sum(-1) + torch.xlogy(tail_B, tail_B)
        kl_B = kl_B + entropy_B - tail_B * others_B.log()
        push_B1 = label_B1 + kl_scale * (1 - share_B1)
        pull_BK = pull_BK + kl_scale * share_B1 * known_BK
    else:
        kl_B = kl_B - targets.entropy_N
    student_BV.mul_(push_B1).scatter_add_(-1, targets.ids_NK, pull_BK)
    if label_scale:
        student_BV.scatter_add_(-1, safe_B1, -label_B1)
    kl_sum = kl_B.sum().to(label_sum.dtype)
    return kl_sum * kl_scale + label_sum * label_scale, torch.stack([kl_sum, label_sum])


def _any_block(
    student_BV: Tensor,
    teacher_BV: Tensor,
    labels_B: Tensor,
    fused: FusedLoss,
    scales: tuple[float, float],
) -> Sums:
    """Any mixture of divergences and cross-entropy, differentiated by autograd on the block."""
    with torch.enable_grad():
        leaf_BV = student_BV.detach().requires_grad_()
        parts = [term(leaf_BV, teacher_BV, fused.temperature).sum() for term in fused.terms]
        label_sum = cross_entropy(leaf_BV, labels_B).sum()
        weights = [scales[0] * term.weight for term in fused.terms]
        value = label_sum * scales[1]
        for part, weight in zip(parts, weights, strict=True):
            value = value + part * weight
        (computed_BV,) = torch.autograd.grad(value, leaf_BV)
    student_BV.copy_(computed_BV)
    return value.detach(), torch.stack([*parts, label_sum]).detach()


def _project_back(
    grad_CV: Tensor,
    hidden_CD: Tensor,
    head_VD: Tensor,
    grad_CD: Tensor,
    grad_VD: Tensor,
    fused: FusedLoss,
) -> None:
    """Turn the logits' gradient into the hidden states' (written) and the head's (added)."""
    grad_CD.copy_(grad_CV @ head_VD)
    used_VD = grad_VD[: len(head_VD)]
    if grad_CV.dtype == grad_VD.dtype:
        used_VD.addmm_(grad_CV.T, hidden_CD)
        return
    rows = max(1, _HEAD_BYTES // (head_VD.shape[1] * grad_CV.itemsize))
    if grad_CV.device.type != "cpu":
        rows = len(head_VD)  # there each call costs more than what it saves
    for start in range(0, len(head_VD), rows):
        block = slice(start, start + rows)
        wide_RD = used_VD[block]
        narrow_RD = fused.workspace.take("head", wide_RD.shape, grad_CV.dtype, grad_CV)
        wide_RD.add_(torch.mm(grad_CV[:, block].T, hidden_CD, out=narrow_RD))


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Sums over positions of what a student's predictions are worth beside the teacher's."""

    positions: int
    labelled: int
    forward_kl: float
    cross_entropy: float
    teacher_cross_entropy: float
    agreements: int

    def __add__(self, other: Comparison) -> Comparison:
        mine, others = astuple(self), astuple(other)
        return Comparison(**dict(zip(_FIELDS, map(add, mine, others), strict=True)))

    def of_all(self) -> Comparison:
        """The sums over all processes."""
        values = total(torch.tensor(astuple(self), dtype=torch.float64)).tolist()
        kinds = [type(value) for value in astuple(self)]
        return Comparison(**{n: k(v) for n, k, v in zip(_FIELDS, kinds, values, strict=True)})


_FIELDS = tuple(item.name for item in fields(Comparison))


@torch.no_grad()
def compare(
    student_ND: Tensor,
    head_VD: Tensor,
    targets: LiveAnswer,
    labels_N: Tensor,
    fused: FusedLoss,
) -> Comparison:
    """Measure without gradients, chunk by chunk: KL, cross-entropy of both, equal first choices."""
    targets, vocabulary = _ready(targets, len(head_VD), fused)  # type: ignore[assignment]
    head_VD = _narrowed(fused, head_VD[:vocabulary])
    work = torch.promote_types(student_ND.dtype, torch.float32)
    totals = torch.zeros(4, dtype=torch.float64, device=student_ND.device)
    rows = _rows_at_once(fused, student_ND.device, vocabulary, work)
    for start in range(0, len(student_ND), rows):
        block = slice(start, start + rows)
        student_BV = fused.logits(student_ND[block], head_VD, "student")
        teacher_BV = _teacher_logits(targets.rows(block), fused, work)
        totals += _compare_block(
            _widened(fused, "student block", student_BV, work),
            _widened(fused, "teacher block", teacher_BV, work),
            fused.workspace.take("spare block", student_BV.shape, work, student_BV),
            labels_N[block],
        )
    kl, labels, teacher_labels, agreements = totals.tolist()
    return Comparison(
        positions=len(student_ND),
        labelled=int((labels_N != IGNORED).sum()),
        forward_kl=kl,
        cross_entropy=labels,
        teacher_cross_entropy=teacher_labels,
        agreements=round(agreements),
    )


def _compare_block(
    student_BV: Tensor, teacher_BV: Tensor, spare_BV: Tensor, labels_B: Tensor
) -> Tensor:
    """Sums of KL, both cross-entropies and agreements over a block that may be overwritten."""
    labelled_B = labels_B != IGNORED
    safe_B1 = labels_B.clamp(min=0).unsqueeze(-1)
    student_at_B = student_BV.gather(-1, safe_B1).squeeze(-1)
    teacher_at_B = teacher_BV.gather(-1, safe_B1).squeeze(-1)
    agreements = (student_BV.argmax(-1) == teacher_BV.argmax(-1)).sum()
    log_sum_p_B = _softmax_(teacher_BV, spare_BV)
    dot_B = teacher_BV.sub_(student_BV).mul_(spare_BV).sum(-1)
    log_sum_q_B = _softmax_(student_BV, student_BV)
    kl_B = dot_B - log_sum_p_B + log_sum_q_B
    student_B = torch.where(labelled_B, log_sum_q_B - student_at_B, 0)
    teacher_B = torch.where(labelled_B, log_sum_p_B - teacher_at_B, 0)
    return torch.stack([kl_B.sum(), student_B.sum(), teacher_B.sum(), agreements]).double()
