"""A Llama layer's norms and gated products, with gradients by hand that keep less.

transformers' norm keeps its input, the normalised input and, under autocast, a narrow copy of what
it gives for each product that reads it; here the input and one narrow copy are all. Of the gated
product the gate's activation is computed again instead of kept. The values are transformers' own.

Legend: N positions (any leading sizes), D hidden, F neurons.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm


class _Norm(torch.autograd.Function):
    """w · x / sqrt(mean(x²) + eps), in float32 inside; given in the dtype of what reads it.

    Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467. With r = 1 / sqrt(...) and g = dy · w
    the gradient in x is r (g - x r² mean(g x)).
    """

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_D: Tensor, eps: float, out: torch.dtype) -> Tensor:
        wide_ND = x_ND.float()
        scale_N1 = wide_ND.pow(2).mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x_ND, weight_D, scale_N1)
        return (weight_D * (wide_ND * scale_N1).to(x_ND.dtype)).to(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, weight_D, scale_N1 = ctx.saved_tensors
        normed_ND = x_ND.float() * scale_N1
        grad_ND = grads[0].float()
        grad_D = (grad_ND * normed_ND).flatten(0, -2).sum(0)
        grad_ND = grad_ND * weight_D.float()
        along_N1 = torch.linalg.vecdot(grad_ND, normed_ND).unsqueeze(-1).div_(x_ND.shape[-1])
        grad_ND.sub_(normed_ND.mul_(along_N1)).mul_(scale_N1)
        return grad_ND.to(x_ND.dtype), grad_D.to(weight_D.dtype), None, None


class _Gated(torch.autograd.Function):
    """silu(gate) · up."""

    @staticmethod
    def forward(ctx: Any, gate_NF: Tensor, up_NF: Tensor) -> Tensor:
        ctx.save_for_backward(gate_NF, up_NF)
        return nn.functional.silu(gate_NF).mul_(up_NF)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate_NF, up_NF = ctx.saved_tensors
        grad_up_NF = nn.functional.silu(gate_NF).mul_(grads[0])
        return torch.ops.aten.silu_backward(grads[0] * up_NF, gate_NF), grad_up_NF


class LeanNorm(LlamaRMSNorm):  # type: ignore[misc]
    """transformers' norm but for what it keeps."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        kind = hidden_states.device.type
        out = torch.promote_types(self.weight.dtype, hidden_states.dtype)
        if torch.is_autocast_enabled(kind) and out == torch.float32:
            out = torch.get_autocast_dtype(kind)  # as the products would narrow it, each for itself
        with torch.autocast(kind, enabled=False):
            normed: Tensor = _Norm.apply(  # type: ignore[no-untyped-call]
                hidden_states, self.weight, self.variance_epsilon, out
            )
        return normed


class LeanMLP(LlamaMLP):  # type: ignore[misc]
    """transformers' MLP but for what it keeps, where its activation is SiLU."""

    def forward(self, x: Tensor) -> Tensor:
        gated = _Gated.apply(self.gate_proj(x), self.up_proj(x))  # type: ignore[no-untyped-call]
        down: Tensor = self.down_proj(gated)
        return down


def make_lean(model: LlamaForCausalLM) -> None:
    """Have the layers of a model compute as above; what it is saved as stays the same.

    The final norm stays transformers' own: what reads it wants its full width. Classes are
    changed, not the modules' `forward`: torch.compile would compile each layer anew for that.
    """
    for layer in model.model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.__class__ = LeanNorm
        if model.config.hidden_act == "silu":
            layer.mlp.__class__ = LeanMLP
