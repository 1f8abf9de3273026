"""One decoder layer of a Llama as plain functions on plain weights.

The walk needs what lies between the parts of a layer (inputs of each linear map, the stream after
attention), for a teacher's layer read from disk and for a student's layer that is being made.

Legend: B windows, T positions, D hidden, Q query rows, K key/value rows, C head dim, F neurons.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

INPUT_NORM, POST_NORM = "input_layernorm.weight", "post_attention_layernorm.weight"
LayerWeights = dict[str, Tensor]
"""A layer's parameters by their name inside it: ``self_attn.q_proj.weight`` and so on."""


def linear(
    input_NI: Tensor, weights: Mapping[str, Tensor], name: str, dtype: torch.dtype
) -> Tensor:
    """``name``'s linear map with its bias if it has one; multiplied in ``dtype``, float32 out."""
    output = F.linear(input_NI.to(dtype), weights[f"{name}.weight"].to(dtype)).float()
    bias = weights.get(f"{name}.bias")
    return output if bias is None else output.add_(bias)


def normed(stream_BTD: Tensor, eps: float) -> Tensor:
    """RMSNorm without its weights: x / sqrt(mean(x²) + eps)."""
    return stream_BTD * torch.rsqrt(stream_BTD.square().mean(-1, keepdim=True) + eps)


@dataclass
class LayerMath:
    """The arithmetic that all layers of one model share, for windows of one length."""

    config: LlamaConfig
    length: int
    device: torch.device
    dtype: torch.dtype
    _cos: Tensor = field(init=False)
    _sin: Tensor = field(init=False)

    def __post_init__(self) -> None:
        rotary = LlamaRotaryEmbedding(self.config).to(self.device)
        positions = torch.arange(self.length, device=self.device)[None]
        self._cos, self._sin = rotary(torch.zeros(1, device=self.device), positions)

    @property
    def eps(self) -> float:
        return float(self.config.rms_norm_eps)

    def linear(self, input_NI: Tensor, weights: LayerWeights, name: str) -> Tensor:
        return linear(input_NI, weights, name, self.dtype)

    def attend(self, query_BTQ: Tensor, key_BTK: Tensor, value_BTK: Tensor) -> Tensor:
        """Causal grouped attention with rotary positions: o_proj's input, [B, T, Q], float32."""
        batch, length, _ = query_BTQ.shape
        split = (batch, length, -1, self.config.head_dim)
        query = query_BTQ.view(split).transpose(1, 2)
        key = key_BTK.view(split).transpose(1, 2)
        value = value_BTK.view(split).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, self._cos, self._sin)
        mixed = F.scaled_dot_product_attention(
            query.to(self.dtype),
            key.to(self.dtype),
            value.to(self.dtype),
            is_causal=True,
            enable_gqa=self.config.num_key_value_heads < self.config.num_attention_heads,
        )
        return mixed.float().transpose(1, 2).reshape(batch, length, -1)

    def gate(self, gate_BTF: Tensor, up_BTF: Tensor) -> Tensor:
        """down_proj's input: act(gate) * up."""
        activation: Tensor = ACT2FN[self.config.hidden_act](gate_BTF)
        return activation * up_BTF

    def attention_inputs(self, stream_BTD: Tensor, weights: LayerWeights) -> tuple[Tensor, ...]:
        """The normed stream and what queries, keys and values are before rotation."""
        input_BTD = normed(stream_BTD, self.eps) * weights[INPUT_NORM]
        parts = [self.linear(input_BTD, weights, f"self_attn.{part}_proj") for part in "qkv"]
        return input_BTD, *parts

    def mlp_inputs(
        self, stream_BTD: Tensor, weights: LayerWeights
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The normed stream, gate and up."""
        input_BTD = normed(stream_BTD, self.eps) * weights[POST_NORM]
        gate_BTF = self.linear(input_BTD, weights, "mlp.gate_proj")
        return input_BTD, gate_BTF, self.linear(input_BTD, weights, "mlp.up_proj")

    def attention(self, stream_BTD: Tensor, weights: LayerWeights) -> Tensor:
        """The stream after the attention block."""
        _, *parts = self.attention_inputs(stream_BTD, weights)
        return stream_BTD + self.linear(self.attend(*parts), weights, "self_attn.o_proj")

    def mlp(self, stream_BTD: Tensor, weights: LayerWeights) -> Tensor:
        """The stream after the FFN block."""
        _, gate_BTF, up_BTF = self.mlp_inputs(stream_BTD, weights)
        return stream_BTD + self.linear(self.gate(gate_BTF, up_BTF), weights, "mlp.down_proj")

    def layer(self, stream_BTD: Tensor, weights: LayerWeights) -> Tensor:
        """The stream after the whole layer."""
        return self.mlp(self.attention(stream_BTD, weights), weights)
