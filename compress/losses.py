"""What a student is blamed for: divergences from the teacher, dense and fused with the projection.

Legend of shape suffixes: N positions, V vocabulary, D student hidden, E teacher hidden, K kept
tokens.

The dense functions take logits and give one value a position; they are the reference. They share
these habits: positions outside ``mask_N`` give exactly 0 in value and gradient whatever garbage
stands there; a token whose logit is minus infinity in both (vocabulary padding) costs nothing;
equal logits give 0; with a temperature t the logits are divided by t and the value multiplied by
t², which keeps the gradient's size (Hinton, Vinyals, Dean 2015, https://arxiv.org/abs/1503.02531).

`compress.fused` computes the same from hidden states and output heads, some hundred positions at
a time: it is what `compress.distill` trains with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

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
    return forward_kl(teacher_NV, student_NV, mask_N, temperature)


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


# --- targets that hold a few tokens a position -------------------------------------------------


@dataclass(frozen=True)
class LiveTargets:
    """What the teacher says, as its hidden states and its output head."""

    hidden_NE: Tensor
    head_VE: Tensor

    def rows(self, chunk: slice | Tensor) -> LiveTargets:
        return LiveTargets(self.hidden_NE[chunk], self.head_VE)


@dataclass(frozen=True)
class SparseTargets:
    """What the teacher said, as K tokens a position with their probabilities.

    ``entropy_N`` is the teacher's exact entropy, with which a sample's cross-entropy becomes an
    unbiased estimate of the KL; ``tail_N`` the mass of all other tokens, None for an unbiased
    sample, whose weights stand for everything.
    """

    ids_NK: Tensor
    weights_NK: Tensor
    entropy_N: Tensor
    tail_N: Tensor | None = None

    def rows(self, chunk: slice | Tensor) -> SparseTargets:
        tail_N = None if self.tail_N is None else self.tail_N[chunk]
        return SparseTargets(
            self.ids_NK[chunk], self.weights_NK[chunk], self.entropy_N[chunk], tail_N
        )


@dataclass(frozen=True)
class MixedTargets:
    """What several teachers with one vocabulary say together: Σ weight · probability."""

    parts: tuple[LiveTargets, ...]
    weights: tuple[float, ...]

    def rows(self, chunk: slice | Tensor) -> MixedTargets:
        return MixedTargets(tuple(part.rows(chunk) for part in self.parts), self.weights)


LiveAnswer = LiveTargets | MixedTargets
Targets = LiveAnswer | SparseTargets


def mix_sparse(parts: Sequence[SparseTargets], weights: Sequence[float]) -> SparseTargets:
    """Unbiased samples of several teachers as one of their mixture.

    With the weighted mean of their entropies the loss is Σ weight · KL(teacher ‖ student): that
    of the mixture but for a constant, with the same gradient.
    """
    return SparseTargets(
        torch.cat([part.ids_NK for part in parts], dim=-1),
        torch.cat([part.weights_NK * w for part, w in zip(parts, weights, strict=True)], dim=-1),
        torch.stack([p.entropy_N * w for p, w in zip(parts, weights, strict=True)]).sum(0),
    )


def sparse_forward_kl(student_NV: Tensor, targets: SparseTargets) -> Tensor:
    """Forward KL from sparse targets, in nats a position: the dense reference.

    Without a tail: Σ w (-log q) - H(p), whose expectation over samples is KL(p ‖ q) (Anshumann et
    al. 2025, Sparse Logit Sampling, https://arxiv.org/abs/2503.16870). With one: the KL of the
    distributions over K + 1 outcomes, the last being "any other token".
    """
    log_q_NV = _log_probabilities(student_NV, None, 1.0)
    log_q_NK = log_q_NV.gather(-1, targets.ids_NK)
    crossed_N = -_expectation(targets.weights_NK, log_q_NK)
    if targets.tail_N is None:
        return crossed_N - targets.entropy_N
    others_N = (1 - log_q_NK.exp().sum(-1)).clamp(min=LEAST_TAIL)
    known_N = torch.xlogy(targets.weights_NK, targets.weights_NK).sum(-1)
    tail_N = torch.xlogy(targets.tail_N, targets.tail_N) - targets.tail_N * others_N.log()
    return crossed_N + known_N + tail_N


LEAST_TAIL = 1e-6
"""The least mass that a student is taken to give to all other tokens together."""
