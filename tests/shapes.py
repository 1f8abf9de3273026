"""Shapes of published models, for tests that compute with them."""

from __future__ import annotations

import dataclasses
from typing import Any

from students.shape import Shape

SMOLLM2_135M = Shape(
    hidden_size=576,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    intermediate_size=1536,
    vocab_size=49152,
    tie_word_embeddings=True,
)
LLAMA_2_7B = Shape(
    hidden_size=4096,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    head_dim=128,
    intermediate_size=11008,
    vocab_size=32000,
    tie_word_embeddings=False,
)
LLAMA_3_1_8B = dataclasses.replace(
    LLAMA_2_7B, num_key_value_heads=8, intermediate_size=14336, vocab_size=128256
)


def llama3_rope(*, factor: float = 8.0, original: int = 8192) -> dict[str, Any]:
    """The rotary embedding of Llama 3.1 (factor 8) and 3.2 (32), made for ``original`` tokens."""
    return {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": original,
    }
