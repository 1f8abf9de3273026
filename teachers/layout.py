"""What tensors a stock ``LlamaForCausalLM`` consists of, whatever the file they come in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import LlamaConfig

from shearling import ShearlingError, itemised, read_json
from students.shape import Shape
from teachers.weights import are_equal

EMBEDDING, HEAD, FINAL_NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
"""The tensors outside the layers; a tied model's head is its embedding."""

AGAIN = "Download or copy the model again."

_SHOWN = 8  # names in one error message
_SHARED = (
    "vocab_size",
    "hidden_size",
    "hidden_act",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "rope_parameters",
    "rms_norm_eps",
    "max_position_embeddings",
    "initializer_range",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "dtype",
)


def model_type(folder: Path) -> str | None:
    """What the config.json of a Hugging Face folder says the model is; None where it says none."""
    path = folder / "config.json"
    config = read_json(path, hint=AGAIN) if path.is_file() else None
    kind = config.get("model_type") if isinstance(config, dict) else None
    return kind if isinstance(kind, str) else None


def as_llama(theirs: Any, **other: Any) -> LlamaConfig:
    """The configuration of a model that is built as a Llama is; ``other`` is where it differs."""
    shared = {name: getattr(theirs, name) for name in _SHARED}
    return LlamaConfig(architectures=["LlamaForCausalLM"], **{**shared, **other})


def expected_tensors(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of a stock ``LlamaForCausalLM`` of this shape.

    ``lm_head.weight`` is left out where it is tied to the embeddings. Linear weights are
    [out, in].
    """
    hidden, ffn = shape.hidden_size, shape.intermediate_size
    queries = shape.num_attention_heads * shape.head_dim
    keys = shape.num_key_value_heads * shape.head_dim
    linears = {
        "self_attn.q_proj": (queries, hidden, shape.attention_bias),
        "self_attn.k_proj": (keys, hidden, shape.attention_bias),
        "self_attn.v_proj": (keys, hidden, shape.attention_bias),
        "self_attn.o_proj": (hidden, queries, shape.attention_bias),
        "mlp.gate_proj": (ffn, hidden, shape.mlp_bias),
        "mlp.up_proj": (ffn, hidden, shape.mlp_bias),
        "mlp.down_proj": (hidden, ffn, shape.mlp_bias),
    }
    tensors: dict[str, tuple[int, ...]] = {
        EMBEDDING: (shape.vocab_size, hidden),
        FINAL_NORM: (hidden,),
    }
    if not shape.tie_word_embeddings:
        tensors[HEAD] = (shape.vocab_size, hidden)
    for layer in range(shape.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        tensors[f"{prefix}.input_layernorm.weight"] = (hidden,)
        tensors[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
        for name, (out, inp, bias) in linears.items():
            tensors[f"{prefix}.{name}.weight"] = (out, inp)
            if bias:
                tensors[f"{prefix}.{name}.bias"] = (out,)
    return tensors


def listed(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def tensor_problems(shape: Shape, found: Mapping[str, tuple[int, ...]], told_by: str) -> list[str]:
    """What is missing or of another shape than ``shape`` needs, one sentence each.

    ``found`` maps Hugging Face names to shapes; ``told_by`` says who promised the shape.
    """
    if shape.num_hidden_layers > len(found):  # before a list of a trillion layers is made
        return [f"{told_by} {shape.num_hidden_layers:,} layers, there are {len(found):,} tensors"]
    expected = expected_tensors(shape)
    problems = []
    missing = [name for name in expected if name not in found]
    if missing:
        problems.append(f"{len(missing)} tensors are missing: {listed(missing)}")
    problems += [
        f"{name} has shape {list(found[name])}, {told_by} {list(wanted)}"
        for name, wanted in expected.items()
        if name in found and found[name] != wanted
    ][:_SHOWN]
    return problems


def misfit(folder: Path, problems: Sequence[str], what: str = "weights") -> ShearlingError:
    """Why the tensors in a folder are not what its config.json says."""
    return ShearlingError(
        itemised(f"The {what} in {folder} don't fit its config.json:", problems),
        hint=AGAIN,
    )


def check_tied(folder: Path, embedding_VD: Tensor, head_VD: Tensor) -> None:
    """A tied model may carry its matrix twice, but not two matrices.

    Two are not tied by transformers 5, and were by version 4: they would be two models.

    Raises:
        ShearlingError: the head is not the embedding.
    """
    if not are_equal(embedding_VD, head_VD):
        raise ShearlingError(
            f"{folder} has an {HEAD} that is not its embedding, but its config.json ties the two "
            "(tie_word_embeddings: true).",
            hint="Set tie_word_embeddings to false in its config.json. If the model was trained "
            f"as a tied one, leave {HEAD} out of its files instead.",
        )


def halves_apart(rows: Tensor, heads: int) -> Tensor:
    """Rows of a query or key matrix (or bias) from Meta's rotary layout to Hugging Face's.

    Meta's files and GGUF keep the two numbers of a RoPE pair beside each other, Hugging Face
    half a head apart. [heads * head_dim, ...] -> the same shape.
    """
    half = rows.shape[0] // heads // 2
    pairs = rows.reshape(heads, half, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)
