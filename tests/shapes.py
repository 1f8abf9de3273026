"""Shapes of published models, for tests that compute with them."""

from __future__ import annotations

import dataclasses

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
