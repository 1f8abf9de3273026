"""What a student is blamed for: divergences from the teacher, dense and fused with the projection.

Legend of shape suffixes: N positions, V vocabulary, D student hidden, E teacher hidden.

The dense functions take logits and give one value a position; they are the reference. They share
these habits: positions outside ``mask_N`` give exactly 0 in value and gradient whatever garbage
stands there; a token whose logit is minus infinity in both (vocabulary padding) costs nothing;
equal logits give 0; with a temperature t the logits are divided by t and the value multiplied by
t², which keeps the gradient's size (Hinton, Vinyals, Dean 2015, https://arxiv.org/abs/1503.02531).

`FusedLoss` computes the same from hidden states and output heads, some hundred positions at a
time, and keeps no tensor of N x V: it is what `compress.distill` trains with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import astuple, dataclass, field, fields
from operator import add
from typing import Any

import torch
from torch import Tensor

IGNORED = -100
"""The label of a position that has no next token, as PyTorch's cross-entropy writes it."""


def pad_vocabulary(logits_NV: Tensor, vocabulary: int) -> Tensor:
    """Give the columns from ``vocabulary`` on (padding of the matrix) probability 0."""
    if vocabulary >= logits_NV.shape[-1]:
        return logits_NV
    padding_V = torch.arange(logits_NV.shape[-1], device=logits_NV.device) >= vocabulary
    return logits_NV.masked_fill(padding_V, float("-inf"))


def masked_mean(values_N: Tensor, mask_N: Tensor) -> Tensor:
    """Mean over the positions of the mask; 0 where the mask is empty."""
    kept_N = torch.where(mask_N, values_N, 0)
    return kept_N.sum() / mask_N.sum().clamp(min=1)


def _log_probabilities(logits_NV: Tensor, mask_N: Tensor | None, temperature: float) -> Tensor:
    """log_softmax(logits / temperature) in at least float32; masked rows become uniform."""
    if mask_N is not None:
        logits_NV = torch.where(mask_N.unsqueeze(-1), logits_NV, 0)
    wide = torch.promote_types(logits_NV.dtype, torch.float32)
    return torch.log_softmax(logits_NV.to(wide) / temperature, dim=-1)


def _expectation(probability_NV: Tensor, values_NV: Tensor) -> Tensor:
    """Sum of p x over the vocabulary with 0 · anything = 0, in the gradient too."""
    possible_NV = probability_NV > 0
    return (probability_NV * torch.where(possible_NV, values_NV, 0)).sum(-1)


def _unmasked(values_N: Tensor, mask_N: Tensor | None) -> Tensor:
    return values_N if mask_N is None else torch.where(mask_N, values_N, 0)


def _log_mixture(first_NV: Tensor, second_NV: Tensor, share: float) -> Tensor:
    """log(share · exp(first) + (1 - share) · exp(second)), finite where both are minus infinity."""
    mixture_NV = share * first_NV.exp() + (1 - share) * second_NV.exp()
    # Below the smallest number the clamp has no gradient; the logarithm's would be infinite.
    return mixture_NV.clamp(min=torch.finfo(mixture_NV.dtype).tiny).log()


def forward_kl(
    student_NV: Tensor, teacher_NV: Tensor, mask_N: Tensor | None = None, temperature: float = 1.0
) -> Tensor:
    """KL(p ‖ q) = Σ p (log p - log q) for teacher p and student q, in nats a position.

    Hinton, Vinyals, Dean 2015, https://arxiv.org/abs/1503.02531
    """
    log_p_NV = _log_probabilities(teacher_NV, mask_N, temperature)
    log_q_NV = _log_probabilities(student_NV, mask_N, temperature)
    return _unmasked(_expectation(log_p_NV.exp(), log_p_NV - log_q_NV), mask_N) * temperature**2


def reverse_kl(
    student_NV: Tensor, teacher_NV: Tensor, mask_N: Tensor | None = None, temperature: float = 1.0
) -> Tensor:
    """KL(q ‖ p) = Σ q (log q - log p) for teacher p and student q, in nats a position.

    Gu et al. 2023, MiniLLM, https://arxiv.org/abs/2306.08543
    """
    log_p_NV = _log_probabilities(teacher_NV, mask_N, temperature)
    log_q_NV = _log_probabilities(student_NV, mask_N, temperature)
    return _unmasked(_expectation(log_q_NV.exp(), log_q_NV - log_p_NV), mask_N) * temperature**2


def jensen_shannon(
    student_NV: Tensor,
    teacher_NV: Tensor,
    mask_N: Tensor | None = None,
    temperature: float = 1.0,
    beta: float = 0.5,
) -> Tensor:
    """JSD_β = β KL(p ‖ m) + (1 - β) KL(q ‖ m) with m = β p + (1 - β) q; β = ½ is symmetric.

    Divided by β it tends to the forward KL for β to 0, by 1 - β to the reverse KL for β to 1.
    Agarwal et al. 2023, GKD, https://arxiv.org/abs/2306.13649, equation 1.
    """
    log_p_NV = _log_probabilities(teacher_NV, mask_N, temperature)
    log_q_NV = _log_probabilities(student_NV, mask_N, temperature)
    log_m_NV = _log_mixture(log_p_NV, log_q_NV, beta)
    teacher_N = _expectation(log_p_NV.exp(), log_p_NV - log_m_NV)
    student_N = _expectation(log_q_NV.exp(), log_q_NV - log_m_NV)
    return _unmasked(beta * teacher_N + (1 - beta) * student_N, mask_N) * temperature**2


def skewed_kl(
    student_NV: Tensor,
    teacher_NV: Tensor,
    mask_N: Tensor | None = None,
    temperature: float = 1.0,
    skew: float = 0.1,
) -> Tensor:
    """KL(p ‖ α p + (1 - α) q), finite even where the student q gives a token no chance.

    Ko et al. 2024, DistiLLM, https://arxiv.org/abs/2402.03898, equation 3; α = 0.1 is theirs.
    """
    log_p_NV = _log_probabilities(teacher_NV, mask_N, temperature)
    log_q_NV = _log_probabilities(student_NV, mask_N, temperature)
    log_m_NV = _log_mixture(log_p_NV, log_q_NV, skew)
    return _unmasked(_expectation(log_p_NV.exp(), log_p_NV - log_m_NV), mask_N) * temperature**2


def skewed_reverse_kl(
    student_NV: Tensor,
    teacher_NV: Tensor,
    mask_N: Tensor | None = None,
    temperature: float = 1.0,
    skew: float = 0.1,
) -> Tensor:
    """KL(q ‖ α q + (1 - α) p). Ko et al. 2024, DistiLLM, https://arxiv.org/abs/2402.03898."""
    return skewed_kl(teacher_NV, student_NV, mask_N, temperature, skew)


def cross_entropy(student_NV: Tensor, labels_N: Tensor) -> Tensor:
    """-log q(label), in nats a position; 0 where the label is `IGNORED`."""
    mask_N = labels_N != IGNORED
    log_q_NV = _log_probabilities(student_NV, mask_N, 1.0)
    picked_N = log_q_NV.gather(-1, labels_N.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return torch.where(mask_N, -picked_N, 0)


def hidden_cosine(student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
    """1 - cos(student, teacher) of hidden states, a position.

    Sanh et al. 2019, DistilBERT, https://arxiv.org/abs/1910.01108
    """
    student_ND, teacher_ND = student_ND.float(), teacher_ND.float()
    return 1 - torch.nn.functional.cosine_similarity(student_ND, teacher_ND, dim=-1)


def hidden_mse(student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
    """Mean over the dims of (student - teacher)², a position.

    Jiao et al. 2019, TinyBERT, https://arxiv.org/abs/1909.10351
    """
    return (student_ND.float() - teacher_ND.float()).square().mean(-1)


def hidden_normalised_mse(student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
    """‖student - teacher‖² / ‖teacher‖², a position: layers of any size of activation weigh alike.

    Predicting 0 costs 1. The Minitron recipes normalise the same way
    (Muralidharan et al. 2024, https://arxiv.org/abs/2407.14679).
    """
    student_ND, teacher_ND = student_ND.float(), teacher_ND.float()
    size_N = teacher_ND.square().sum(-1)
    return (student_ND - teacher_ND).square().sum(-1) / size_N.clamp(min=1e-12)


DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jensen_shannon": jensen_shannon,
    "skewed_kl": skewed_kl,
    "skewed_reverse_kl": skewed_reverse_kl,
}
"""Losses between the student's and the teacher's logits, by the names that recipes use."""

HIDDEN_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cosine": hidden_cosine,
    "mse": hidden_mse,
    "normalised_mse": hidden_normalised_mse,
}
"""Losses between hidden states, by the names that recipes use."""


class Workspace:
    """Buffers that live as long as the loop: fresh memory costs a page fault for every 4 KB.

    On a CPU that made a softmax over the vocabulary take twice its time.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def take(self, name: str, rows: int, columns: int, dtype: torch.dtype, like: Tensor) -> Tensor:
        """A [rows, columns] tensor with any content, valid until ``name`` is taken again."""
        key = (name, dtype, like.device)
        held = self._buffers.get(key)
        if held is None or held.numel() < rows * columns:
            held = torch.empty(rows * columns, dtype=dtype, device=like.device)
            self._buffers[key] = held
        return held[: rows * columns].view(rows, columns)


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
    workspace: Workspace = field(default_factory=Workspace)

    def __call__(
        self,
        student_ND: Tensor,
        head_VD: Tensor,
        teacher_NE: Tensor,
        teacher_head_VE: Tensor,
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
            student_ND, head_VD, teacher_NE, teacher_head_VE, labels_N, self, scales
        )
        names = [*(term.name for term in self.terms), "cross_entropy"]
        return loss, dict(zip(names, sums, strict=True))

    def logits(self, hidden_ND: Tensor, head_VD: Tensor, name: str) -> Tensor:
        """Project a chunk into the workspace, in the products' dtype."""
        out_NV = self.workspace.take(name, len(hidden_ND), len(head_VD), self.dtype, hidden_ND)
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
        teacher_NE: Tensor,
        teacher_head_VE: Tensor,
        labels_N: Tensor,
        fused: FusedLoss,
        scales: tuple[float, float],
    ) -> tuple[Tensor, ...]:
        vocabulary = fused.vocabulary or min(len(head_VD), len(teacher_head_VE))
        work = torch.promote_types(student_ND.dtype, torch.float32)
        head_used_VD = head_VD[:vocabulary].to(fused.dtype)
        teacher_used_VE = teacher_head_VE[:vocabulary].to(fused.dtype)
        grad_ND = torch.empty_like(student_ND, dtype=work)
        grad_VD = torch.zeros_like(head_VD, dtype=work)
        loss = torch.zeros((), dtype=work, device=student_ND.device)
        sums = torch.zeros(len(fused.terms) + 1, dtype=work, device=student_ND.device)
        block_loss = _forward_kl_block if fused.is_forward_kl() else _any_block
        with torch.autocast(student_ND.device.type, enabled=False):
            for start in range(0, len(student_ND), fused.chunk):
                chunk = slice(start, start + fused.chunk)
                hidden_CD = student_ND[chunk].to(fused.dtype)
                student_CV = fused.logits(hidden_CD, head_used_VD, "student")
                teacher_CV = fused.logits(teacher_NE[chunk], teacher_used_VE, "teacher")
                for block in _blocks(student_CV, teacher_CV, labels_N[chunk], work, fused):
                    block_sums, block_value = block_loss(*block, fused, scales)
                    sums += block_sums
                    loss += block_value
                _project_back(student_CV, hidden_CD, head_used_VD, grad_ND[chunk], grad_VD, fused)
        ctx.save_for_backward(grad_ND.to(student_ND.dtype), grad_VD.to(head_VD.dtype))
        ctx.mark_non_differentiable(*(parts := tuple(sums.unbind())))
        return (loss, *parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_ND, grad_VD = ctx.saved_tensors
        # In place: the loop calls backward once, with a gradient of one for a loss of weight one.
        if grads[0] != 1:
            grad_ND, grad_VD = grad_ND * grads[0], grad_VD * grads[0]
        return grad_ND, grad_VD, None, None, None, None, None


_BLOCK_BYTES = 8 * 2**20
"""Rows are worked on in blocks of this size so that the softmax's passes stay in the cache."""

Block = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _blocks(
    student_CV: Tensor, teacher_CV: Tensor, labels_C: Tensor, work: torch.dtype, fused: FusedLoss
) -> Iterator[Block]:
    """Give (student, teacher, spare, labels, gradient) a few rows at a time, in dtype ``work``.

    The first three may be overwritten; what the taker leaves in the gradient (the chunk's own
    memory, in the products' dtype) is projected back afterwards.
    """
    vocabulary = student_CV.shape[1]
    rows = max(1, _BLOCK_BYTES // (vocabulary * work.itemsize))
    for start in range(0, len(student_CV), rows):
        grad_BV, teacher_BV = student_CV[start : start + rows], teacher_CV[start : start + rows]
        size = (len(grad_BV), vocabulary, work, student_CV)
        student_BV = grad_BV
        if student_CV.dtype != work:
            student_BV = fused.workspace.take("student block", *size).copy_(grad_BV)
            teacher_BV = fused.workspace.take("teacher block", *size).copy_(teacher_BV)
        spare_BV = fused.workspace.take("spare block", *size)
        yield student_BV, teacher_BV, spare_BV, labels_C[start : start + rows], grad_BV


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
    grad_BV: Tensor,
    fused: FusedLoss,
    scales: tuple[float, float],
) -> tuple[Tensor, Tensor]:
    """Forward KL and cross-entropy by hand: two softmaxes and four light passes.

    KL = Σ p (z_p - z_q) - logsumexp(z_p) + logsumexp(z_q), and its gradient in z_q is q - p.
    """
    (term,) = fused.terms
    temperature = fused.temperature
    labelled_B = labels_B != IGNORED
    safe_B1 = labels_B.clamp(min=0).unsqueeze(-1)
    at_label_B = student_BV.gather(-1, safe_B1).squeeze(-1)
    if temperature != 1:
        student_BV.div_(temperature)
        teacher_BV.div_(temperature)
    log_sum_p_B = _softmax_(teacher_BV, spare_BV)
    teacher_BV.sub_(student_BV).mul_(spare_BV)
    log_sum_q_B = _softmax_(student_BV, student_BV)
    kl_sum = (teacher_BV.sum(-1) - log_sum_p_B + log_sum_q_B).sum() * temperature**2
    # At a temperature other than 1 this is only a number for the log: see is_forward_kl.
    label_sum = torch.where(labelled_B, log_sum_q_B - at_label_B / temperature, 0).sum()

    kl_scale, label_scale = scales[0] * term.weight * temperature, scales[1]
    if label_scale:
        label_B1 = labelled_B.to(student_BV.dtype).mul_(label_scale).unsqueeze(-1)
        student_BV.mul_(label_B1 + kl_scale).sub_(spare_BV, alpha=kl_scale)
        student_BV.scatter_add_(-1, safe_B1, -label_B1)
    else:
        student_BV.sub_(spare_BV).mul_(kl_scale)
    if grad_BV is not student_BV:
        grad_BV.copy_(student_BV)
    value = kl_sum * (scales[0] * term.weight) + label_sum * label_scale
    return torch.stack([kl_sum, label_sum]), value


def _any_block(
    student_BV: Tensor,
    teacher_BV: Tensor,
    spare_BV: Tensor,
    labels_B: Tensor,
    grad_BV: Tensor,
    fused: FusedLoss,
    scales: tuple[float, float],
) -> tuple[Tensor, Tensor]:
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
    grad_BV.copy_(computed_BV)
    return torch.stack([*parts, label_sum]).detach(), value.detach()


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
    else:
        narrow_VD = fused.workspace.take(
            "head", head_VD.shape[0], head_VD.shape[1], grad_CV.dtype, grad_CV
        )
        used_VD.add_(torch.mm(grad_CV.T, hidden_CD, out=narrow_VD))


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


_FIELDS = tuple(item.name for item in fields(Comparison))


@torch.no_grad()
def compare(
    student_ND: Tensor,
    head_VD: Tensor,
    teacher_NE: Tensor,
    teacher_head_VE: Tensor,
    labels_N: Tensor,
    fused: FusedLoss,
) -> Comparison:
    """Measure without gradients, chunk by chunk: KL, cross-entropy of both, equal first choices."""
    vocabulary = fused.vocabulary or min(len(head_VD), len(teacher_head_VE))
    head_VD = head_VD[:vocabulary].to(fused.dtype)
    teacher_head_VE = teacher_head_VE[:vocabulary].to(fused.dtype)
    work = torch.promote_types(student_ND.dtype, torch.float32)
    totals = torch.zeros(4, dtype=torch.float64, device=student_ND.device)
    for start in range(0, len(student_ND), fused.chunk):
        chunk = slice(start, start + fused.chunk)
        student_CV = fused.logits(student_ND[chunk], head_VD, "student")
        teacher_CV = fused.logits(teacher_NE[chunk], teacher_head_VE, "teacher")
        for block in _blocks(student_CV, teacher_CV, labels_N[chunk], work, fused):
            totals += _compare_block(*block[:4])
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
