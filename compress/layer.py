"""One decoder layer of a Llama as plain functions on plain weights.

The walk needs what lies between the parts of a layer (inputs of each linear map, the stream after
attention), for a teacher's layer read from disk and for a student's layer that is being made.

Legend: B windows, T positions, D hidden, Q query rows, K key/value rows, C head dim, F neurons.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from teachers.checkpoint import Checkpoint

BATCH_TOKENS = 4096
"""Positions that pass a layer at one time; of a longer window all."""

OPENING_EVERY = 32
"""Every so many-th token of the calibration windows also passes the layers as a window's first."""

LayerWeights = dict[str, Tensor]
"""A layer's parameters by their name inside it: ``self_attn.q_proj.weight`` and so on."""


@dataclass(frozen=True)
class Block:
    """One of a layer's two halves: a norm, maps that read through it, a map that writes back."""

    norm: str
    inputs: tuple[str, ...]
    output: str


ATTENTION = Block(
    "input_layernorm.weight",
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj",
)
MLP = Block("post_attention_layernorm.weight", ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj")
BLOCKS = (ATTENTION, MLP)


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
    repeats_heads: bool = field(init=False)
    """Keys and values, for each query head of a group: in float32 an accelerator has no grouped
    attention but the one that makes all T² scores."""

    def __post_init__(self) -> None:
        self.repeats_heads = self.device.type != "cpu" and self.dtype is torch.float32
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
        grouped = key.shape[1] < query.shape[1]
        if grouped and self.repeats_heads:
            times = query.shape[1] // key.shape[1]
            key, value = (part.repeat_interleave(times, dim=1) for part in (key, value))
            grouped = False
        mixed = F.scaled_dot_product_attention(
            query.to(self.dtype),
            key.to(self.dtype),
            value.to(self.dtype),
            is_causal=True,
            enable_gqa=grouped,
        )
        return mixed.float().transpose(1, 2).reshape(batch, length, -1)

    def gate(self, gate_BTF: Tensor, up_BTF: Tensor) -> Tensor:
        """down_proj's input: act(gate) * up."""
        activation: Tensor = ACT2FN[self.config.hidden_act](gate_BTF)
        return activation * up_BTF

    def read(
        self, block: Block, stream_BTD: Tensor, weights: LayerWeights
    ) -> tuple[Tensor, list[Tensor]]:
        """The stream over its size, before the norm's weights, and the outputs of the maps that
        read it behind them (queries before rotation)."""
        normed_BTD = normed(stream_BTD, self.eps)
        input_BTD = normed_BTD * weights[block.norm]
        return normed_BTD, [self.linear(input_BTD, weights, name) for name in block.inputs]

    def mix(self, block: Block, parts: Sequence[Tensor]) -> Tensor:
        """What the block's output map reads: attention's mixture of values, or active neurons."""
        return self.attend(*parts) if block is ATTENTION else self.gate(*parts)

    def layer(self, stream_BTD: Tensor, weights: LayerWeights) -> Tensor:
        """The stream after the whole layer."""
        for block in BLOCKS:
            _, parts = self.read(block, stream_BTD, weights)
            stream_BTD = stream_BTD + self.linear(self.mix(block, parts), weights, block.output)
        return stream_BTD

    def advance(self, stream_BTD: Tensor, weights: LayerWeights) -> None:
        """Take a whole stream through a layer in place, some windows at a time on the device."""
        for rows in batches(stream_BTD):
            before_BTD = stream_BTD[rows].to(self.device, torch.float32)
            stream_BTD[rows] = self.layer(before_BTD, weights).to(stream_BTD)


def openings(windows_BT: Tensor, config: LlamaConfig) -> Tensor:
    """Windows of one token each out of long ones, [N, 1]; every fourth is the begin token of the
    configuration, if it names one.

    The first position is the attention sink: its stream is a hundred times larger than all others,
    every head rests on it, and it is made of nothing but its own token. Long windows show few of
    it, and a fit to a hundred such positions knows no other token to begin with. These cost one
    position each. The begin token may not be in the windows at all, but users and benchmarks put
    it before their texts.
    """
    tokens_N1 = alone(windows_BT).clone()
    if config.bos_token_id in range(config.vocab_size):  # some name one that there isn't
        tokens_N1[::4] = config.bos_token_id
    return tokens_N1


def alone(windows_BT: Tensor) -> Tensor:
    """What ``windows_BT`` says of the positions that also pass the layers alone, [N, 1]."""
    return windows_BT[:, ::OPENING_EVERY].reshape(-1, 1)


def batches(stream_BTD: Tensor) -> Iterator[slice]:
    """Slices of whole windows, about BATCH_TOKENS positions each."""
    step = max(1, BATCH_TOKENS // stream_BTD.shape[1])
    for first in range(0, stream_BTD.shape[0], step):
        yield slice(first, min(first + step, stream_BTD.shape[0]))


def read_layer(
    source: Checkpoint,
    number: int,
    device: torch.device,
    dtype: torch.dtype | None = torch.float32,
) -> LayerWeights:
    """All weights of one decoder layer on the device, by their name inside it; without ``dtype``
    as they are stored, which on a CPU are pages of the teacher's files and no memory (float64,
    with which nothing here is multiplied, in float32)."""
    prefix = f"model.layers.{number}."
    weights = {
        name.removeprefix(prefix): source.tensor(name, dtype)
        for name in source.names()
        if name.startswith(prefix)
    }
    return {
        name: (weight.float() if weight.dtype is torch.float64 else weight).to(device)
        for name, weight in weights.items()
    }
