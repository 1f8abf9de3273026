"""Reconstruction: refit kept weights to the teacher's activations, in closed form.

For a linear map with inputs x (the student's own) and wanted outputs y (the teacher's),

    W* = argmin_W  Σ_n w_n ‖W x_n - y_n‖²  +  λ ‖W - W₀‖²

with W₀ the sliced weights. Only the second moments Σ w x xᵀ and Σ w x yᵀ are kept, so memory does
not grow with the tokens.

Legend: N positions, I inputs, O outputs, V vocabulary, D student hidden, E teacher hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Moments:
    """Weighted second moments of inputs and targets, added up batch by batch in float32."""

    gram_II: Tensor
    cross_IO: Tensor
    target_energy: Tensor

    @classmethod
    def zeros(cls, inputs: int, outputs: int, device: torch.device) -> Moments:
        return cls(
            torch.zeros(inputs, inputs, device=device),
            torch.zeros(inputs, outputs, device=device),
            torch.zeros((), dtype=torch.float64, device=device),
        )

    def add(self, input_NI: Tensor, target_NO: Tensor, weight_N: Tensor) -> None:
        """Take in positions; ``weight_N`` says how much each counts."""
        weighted_NI = input_NI * weight_N[:, None]
        self.gram_II.addmm_(weighted_NI.T, input_NI)
        self.cross_IO.addmm_(weighted_NI.T, target_NO)
        self.target_energy += (target_NO.square().sum(1) * weight_N).sum(dtype=torch.float64)

    def relative_error(self, weight_OI: Tensor) -> float:
        """Σ w ‖W x - y‖² / Σ w ‖y‖² on what was taken in."""
        weight_IO = weight_OI.T.double()
        fitted = ((self.gram_II.double() @ weight_IO) * weight_IO).sum()
        shared = (self.cross_IO.double() * weight_IO).sum()
        energy = self.target_energy.clamp_min(torch.finfo(torch.float64).tiny)
        return float(((fitted - 2 * shared) / energy + 1).clamp_min(0))


def ridge_refit(moments: Moments, sliced_OI: Tensor, ridge: float) -> Tensor:
    """The weights W* of the module's formula, [O, I]; λ is ``ridge`` times the mean of diag(Gram).

    Solved in float64 by Cholesky. Where the Gram matrix is too ill-conditioned for it, λ is raised
    tenfold until it isn't: with λ large enough the answer is the sliced weights themselves.
    """
    gram_II = moments.gram_II.double()
    base_IO = sliced_OI.T.double()
    residual_IO = moments.cross_IO.double() - gram_II @ base_IO
    mean = gram_II.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    strength = ridge
    while True:
        shifted = gram_II + strength * mean * torch.eye(len(gram_II)).to(gram_II)
        factor, failed = torch.linalg.cholesky_ex(shifted)
        if not failed:
            change_IO = torch.cholesky_solve(residual_IO, factor)
            refitted_OI: Tensor = (base_IO + change_IO).T.to(sliced_OI)
            return refitted_OI
        if strength > 1e12:  # not even a diagonal matrix: the moments hold NaN or infinity
            raise FloatingPointError("the calibration activations are not finite")
        strength *= 10


def scale_of_norm(student_ND: Tensor, teacher_ND: Tensor, weight_N: Tensor) -> tuple[float, float]:
    """Numerator and denominator of the factor c that best turns student into teacher.

    c = Σ w ⟨student, teacher⟩ / Σ w ‖student‖²: an RMSNorm divides by the size of the channels
    that are left, so its weights take the change of scale. Sums of batches add up.
    """
    weighted = student_ND * weight_N[:, None]
    return float((weighted * teacher_ND).sum()), float((weighted * student_ND).sum())


def final_norm_refit(
    student_gram_DD: Tensor,
    cross_DE: Tensor,
    head_VD: Tensor,
    teacher_head_VE: Tensor,
    start_D: Tensor,
    ridge: float,
) -> Tensor:
    """The final norm's weights g, [D], for which the student's logits are nearest the teacher's.

        g* = argmin_g  Σ_n w_n ‖H diag(g) z_n - H' a_n‖²  +  λ ‖g - g₀‖²

    with z the student's and a the teacher's normed final hidden states (a with the teacher's norm
    weights in it), H and H' the output heads. The normal matrix is (HᵀH) ∘ Σ w z zᵀ, so no logit
    is ever computed. ``student_gram_DD`` is Σ w z zᵀ and ``cross_DE`` is Σ w z aᵀ.
    """
    head, other = head_VD.double(), teacher_head_VE.double()
    normal_DD = (head.T @ head) * student_gram_DD.double()
    wanted_D = ((head.T @ other) * cross_DE.double()).sum(1)
    start = start_D.double()
    strength = ridge * normal_DD.diagonal().mean()
    shifted = normal_DD + strength * torch.eye(len(start)).to(start)
    change_D: Tensor = torch.linalg.solve(shifted, wanted_D - normal_DD @ start)
    return (start + change_D).to(start_D)
