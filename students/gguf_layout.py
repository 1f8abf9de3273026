"""How a GGUF names and lays out a Llama's tensors: used to read one and to write one.

Source: llama.cpp's converter, https://github.com/ggml-org/llama.cpp/blob/master/convert_hf_to_gguf.py
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

OUTER_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_FACTORS = "rope_freqs.weight"
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""The regular expression by which Llama 3's tokenizer splits text."""
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
"""Qwen2's: the same, each digit for itself."""


BLOCK = 32
"""Numbers of a row that share a scale, in every kind of quantisation that is written here."""
_TABLES = ("model.embed_tokens.weight", "lm_head.weight")


def stored_kind(name: str, size: Sequence[int], wanted: str) -> str:
    """In which kind of number a GGUF of the kind ``wanted`` holds one tensor.

    Vectors stay in 32 bits; with four or five bits a weight, embedding and output matrix have
    eight; a matrix whose rows are no multiple of the quantisation's block is kept in 16 bits.
    """
    if len(size) < 2:
        return "f32"
    few_bits = wanted.startswith(("q4", "q5"))
    kind = "q8_0" if few_bits and name in _TABLES else wanted
    return "f16" if kind.startswith("q") and size[-1] % BLOCK else kind


def hf_name(name: str) -> str | None:
    """``blk.3.attn_q.weight`` -> ``model.layers.3.self_attn.q_proj.weight``; None if unknown."""
    if name in OUTER_NAMES:
        return OUTER_NAMES[name]
    parts = name.split(".")
    if len(parts) != 4 or parts[0] != "blk" or not parts[1].isdecimal():
        return None
    if parts[2] not in LAYER_NAMES or parts[3] not in ("weight", "bias"):
        return None
    return f"model.layers.{int(parts[1])}.{LAYER_NAMES[parts[2]]}.{parts[3]}"


_GGUF_OUTER = {hf: gguf for gguf, hf in OUTER_NAMES.items()}
_GGUF_LAYER = {hf: gguf for gguf, hf in LAYER_NAMES.items()}


def gguf_name(name: str) -> str:
    """The inverse of ``hf_name``; KeyError for a tensor that no stock Llama has."""
    if name in _GGUF_OUTER:
        return _GGUF_OUTER[name]
    _, _, layer, rest = name.split(".", 3)
    part, _, kind = rest.rpartition(".")
    return f"blk.{layer}.{_GGUF_LAYER[part]}.{kind}"


def llama3_rope_factors(
    base: float, head_dim: int, factor: float, low: float, high: float, original: int
) -> NDArray[np.float64]:
    """What each frequency is divided by under Llama 3.1's scaling, [head_dim / 2].

    As in transformers' ``_compute_llama3_parameters`` and llama.cpp's converter.
    """
    frequencies = base ** -(np.arange(0, head_dim, 2) / head_dim)
    wavelengths = 2 * np.pi / frequencies
    smooth = np.clip((original / wavelengths - low) / (high - low), 0, 1)
    factors: NDArray[np.float64] = 1 / ((1 - smooth) / factor + smooth)
    return factors
