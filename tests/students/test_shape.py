"""Shape arithmetic against published numbers and against transformers' own count."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import LLAMA_3_1_8B, SMOLLM2_135M
from transformers import LlamaConfig, LlamaForCausalLM

from shearling import ShearlingError
from students.shape import PRESETS, Shape, resolve_shape


def test_published_parameter_counts() -> None:
    assert LLAMA_3_1_8B.parameters == 8_030_261_248
    assert resolve_shape("llama-3.2-3b", LLAMA_3_1_8B).parameters == 3_212_749_824
    assert resolve_shape("llama-3.2-1b", LLAMA_3_1_8B).parameters == 1_235_814_400
    assert SMOLLM2_135M.parameters == 134_515_008


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("sheared-llama-2.7b", 2_701_560_320),  # the Hugging Face releases' safetensors totals
        ("sheared-llama-1.3b", 1_345_423_360),
        ("minitron-4b-width", 4_512_746_496),
        ("minitron-4b-depth", 4_540_469_248),
        ("llama-3.1-8b", 8_030_261_248),
        ("llama-3.1-70b", 70_553_706_496),
    ],
)
def test_shapes_of_other_papers(name: str, parameters: int) -> None:
    teacher = LLAMA_3_1_8B
    if name.startswith("sheared"):  # out of Llama 2 7B
        wide = {"num_key_value_heads": 32, "intermediate_size": 11008, "vocab_size": 32000}
        teacher = dataclasses.replace(teacher, **wide)
    elif name.startswith("llama"):  # out of Llama 3.1 405B
        sizes = {"hidden_size": 16384, "num_hidden_layers": 126, "num_attention_heads": 128}
        teacher = dataclasses.replace(teacher, **sizes, intermediate_size=53248)
    assert resolve_shape(name, teacher).parameters == parameters


def test_proportional_presets_give_the_published_shapes_on_the_published_teacher() -> None:
    for small in ("3b", "1b"):
        assert resolve_shape(f"like-{small}", LLAMA_3_1_8B) == resolve_shape(
            f"llama-3.2-{small}", LLAMA_3_1_8B
        )


def test_proportional_presets_on_a_small_teacher() -> None:
    three = resolve_shape("like-3b", SMOLLM2_135M)
    assert three.parameters == 63_848_304
    assert (three.hidden_size, three.num_hidden_layers, three.intermediate_size) == (432, 26, 880)
    assert (three.num_attention_heads, three.num_key_value_heads, three.head_dim) == (6, 3, 64)
    one = resolve_shape("like-1b", SMOLLM2_135M)
    assert (one.hidden_size, one.num_hidden_layers, one.intermediate_size) == (288, 15, 880)
    assert (one.num_attention_heads, one.num_key_value_heads, one.head_dim) == (9, 3, 32)


widths = st.integers(1, 6)


@settings(max_examples=25, deadline=None)
@given(
    hidden=widths,
    layers=widths,
    groups=widths,
    group=widths,
    half_dim=widths,
    ffn=widths,
    tied=st.booleans(),
    attention_bias=st.booleans(),
    mlp_bias=st.booleans(),
)
def test_parameters_are_those_that_transformers_makes(
    hidden: int,
    layers: int,
    groups: int,
    group: int,
    half_dim: int,
    ffn: int,
    tied: bool,
    attention_bias: bool,
    mlp_bias: bool,
) -> None:
    shape = Shape(
        hidden_size=hidden * groups * group,
        num_hidden_layers=layers,
        num_attention_heads=groups * group,
        num_key_value_heads=groups,
        head_dim=2 * half_dim,
        intermediate_size=ffn,
        vocab_size=11,
        tie_word_embeddings=tied,
        attention_bias=attention_bias,
        mlp_bias=mlp_bias,
    )
    config = LlamaConfig(**shape.to_dict(), bos_token_id=None, eos_token_id=None)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.tie_weights()
    assert sum(p.numel() for p in model.parameters()) == shape.parameters
    assert Shape.from_config(config) == shape
    assert Shape.from_config(config.to_dict()) == shape


@settings(max_examples=50, deadline=None)
@given(
    groups=st.integers(1, 8),
    group=st.integers(1, 8),
    width=st.integers(1, 600),
    layers=st.integers(2, 40),
)
def test_proportional_presets_always_fit_their_teacher(
    groups: int, group: int, width: int, layers: int
) -> None:
    hidden = width * groups * group
    teacher = dataclasses.replace(
        LLAMA_3_1_8B,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=groups * group,
        num_key_value_heads=groups,
        intermediate_size=hidden * 3,
    )
    for name in ("like-3b", "like-1b"):
        assert PRESETS[name](teacher).problems_as_student_of(teacher) == []


def test_all_problems_of_a_shape_come_at_once() -> None:
    with pytest.raises(ShearlingError) as caught:
        resolve_shape(
            {"hidden_size": 600, "num_attention_heads": 8, "num_hidden_layers": 0}, SMOLLM2_135M
        )
    text = str(caught.value)
    assert "num_hidden_layers is 0" in text
    assert "hidden_size 600 is larger than the teacher's 576" in text
    with pytest.raises(ShearlingError, match="8 is not a multiple of num_key_value_heads 3"):
        resolve_shape({"num_attention_heads": 8}, SMOLLM2_135M)


def test_unknown_axis_and_unknown_preset_name_the_nearest() -> None:
    with pytest.raises(ShearlingError, match="did you mean 'hidden_size'"):
        resolve_shape({"hiden_size": 432}, SMOLLM2_135M)
    with pytest.raises(ShearlingError, match="Did you mean 'like-3b'"):
        resolve_shape("like3b", SMOLLM2_135M)
    with pytest.raises(ShearlingError, match="must be a whole number"):
        resolve_shape({"hidden_size": "many"}, SMOLLM2_135M)


def test_flops_of_a_token_are_twice_the_multiplied_weights_and_attention() -> None:
    matrices = SMOLLM2_135M.parameters - 61 * 576  # the norms multiply no matrix
    assert SMOLLM2_135M.flops_per_token(0) == 2 * matrices
    more = SMOLLM2_135M.flops_per_token(512) - SMOLLM2_135M.flops_per_token(0)
    assert more == 30 * 2 * (2 * 256 * 576)
