"""A Llama's lookup, norms and gated products, with gradients by hand that keep less.

transformers' norm keeps its input, the normalised input and, under autocast, a narrow copy of what
it gives for each product that reads it; here the input and one narrow copy are all. The gated
product is computed again from gate and up instead of kept. The values are transformers' own.

Legend: B windows, T positions, N positions (any leading sizes), D hidden, F neurons, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from compress.parallel import processes
from compress.workspace import momentary


class _Norm(torch.autograd.Function):
    """w · x / sqrt(mean(x²) + eps), in float32 inside; given in the dtype of what reads it.

    Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467. With r = 1 / sqrt(...) and g = dy · w
    the gradient in x is r (g - x r² mean(g x)).
    """

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_D: Tensor, eps: float, out: torch.dtype) -> Tensor:
        wide_ND = x_ND.float()
        spare_ND = momentary("norm", wide_ND.shape, wide_ND.dtype, wide_ND)
        square_ND = torch.pow(wide_ND, 2, out=spare_ND)
        scale_N1 = square_ND.mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x_ND, weight_D, scale_N1)
        normed_ND = torch.mul(wide_ND, scale_N1, out=spare_ND).to(x_ND.dtype)
        if normed_ND.dtype == weight_D.dtype != out:
            return normed_ND.mul_(weight_D).to(out)
        return (weight_D * normed_ND).to(out)

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


class _GatedDown(torch.autograd.Function):
    """(silu(gate) · up) Wᵀ. The product in brackets is made again in backward."""

    @staticmethod
    def forward(ctx: Any, gate_NF: Tensor, up_NF: Tensor, weight_DF: Tensor) -> Tensor:
        ctx.save_for_backward(gate_NF, up_NF, weight_DF)
        gated_NF = nn.functional.silu(gate_NF).mul_(up_NF)
        return nn.functional.linear(gated_NF, weight_DF.to(gate_NF.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gate_NF, up_NF, weight_DF = ctx.saved_tensors
        grad_ND = grads[0]
        grad_NF = grad_ND @ weight_DF.to(grad_ND.dtype)
        active_NF = nn.functional.silu(gate_NF)
        gated_NF = active_NF * up_NF
        grad_DF = grad_ND.flatten(0, -2).T @ gated_NF.flatten(0, -2)
        grad_up_NF = active_NF.mul_(grad_NF)
        grad_gate_NF = torch.ops.aten.silu_backward(grad_NF.mul_(up_NF), gate_NF)
        return grad_gate_NF, grad_up_NF, grad_DF.to(weight_DF.dtype)


class _Lookup(torch.autograd.Function):
    """Rows of a table whose gradient lies in memory already, if it is not the first.

    It is for `backward` into ``.grad``: `torch.autograd.grad` and hooks of the table would see the
    first micro-batch's gradient only.
    """

    @staticmethod
    def forward(ctx: Any, weight_VD: Tensor, input_BT: Tensor, padding: int | None) -> Tensor:
        ctx.weight_VD, ctx.padding = weight_VD, padding
        ctx.save_for_backward(input_BT)
        return nn.functional.embedding(input_BT, weight_VD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        (input_BT,) = ctx.saved_tensors
        grad_BTD, sum_VD = grads[0], ctx.weight_VD.grad
        if ctx.padding is not None:
            grad_BTD = grad_BTD.masked_fill((input_BT == ctx.padding).unsqueeze(-1), 0)
        into_VD = torch.zeros_like(ctx.weight_VD) if sum_VD is None else sum_VD
        into_VD.index_add_(0, input_BT.flatten(), grad_BTD.flatten(0, -2).to(into_VD.dtype))
        return into_VD if sum_VD is None else None, None, None


class LeanEmbedding(nn.Embedding):
    """PyTorch's lookup, but that in a step's later micro-batches the gradient of the few rows is
    added to that of the earlier ones, and no table of zeros is made for it."""

    def forward(self, input: Tensor) -> Tensor:
        rows: Tensor = _Lookup.apply(self.weight, input, self.padding_idx)  # type: ignore[no-untyped-call]
        return rows


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
    """transformers' MLP but for what it keeps, where its activation is SiLU and it has no bias."""

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        if not torch.is_grad_enabled():  # the layer itself narrows its weights once a text
            written: Tensor = self.down_proj(nn.functional.silu(gate).mul_(up))
            return written
        down: Tensor = _GatedDown.apply(gate, up, self.down_proj.weight)  # type: ignore[no-untyped-call]
        return down


def make_lean(model: LlamaForCausalLM) -> None:
    """Have the layers of a model compute as above; what it is saved as stays the same.

    The final norm stays transformers' own: what reads it wants its full width. Classes are
    changed, not the modules' `forward`: torch.compile would compile each layer anew for that.

    The lookup is for a CPU and one process: elsewhere rows are added in any order, or gradients
    are not where the weights are.
    """
    if model.device.type == "cpu" and processes() == 1:
        model.model.embed_tokens.__class__ = LeanEmbedding
    for layer in model.model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.__class__ = LeanNorm
        if model.config.hidden_act == "silu" and layer.mlp.down_proj.bias is None:
            layer.mlp.__class__ = LeanMLP
