"""A finished student in the form that others take: a Hugging Face folder, or one GGUF file.

Tensors are read, converted and written one by one: no more than a shard is in memory.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from gguf import GGUFWriter
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType
from gguf.quants import quantize
from numpy.typing import NDArray
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerBase

from shearling import Progress, ShearlingError, silent
from students.build import StudentWriter
from students.gguf_layout import ROPE_FACTORS, gguf_name, llama3_rope_factors, stored_kind
from students.gguf_vocabulary import vocabulary_metadata
from students.shape import Shape

Read = Callable[[str], Tensor]
"""One tensor by its Hugging Face name."""

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

# Those that the gguf package can write itself; its K-quants it only reads.
_KINDS: dict[str, tuple[GGMLQuantizationType, LlamaFileType]] = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q5_1": (GGMLQuantizationType.Q5_1, LlamaFileType.MOSTLY_Q5_1),
    "q5_0": (GGMLQuantizationType.Q5_0, LlamaFileType.MOSTLY_Q5_0),
    "q4_1": (GGMLQuantizationType.Q4_1, LlamaFileType.MOSTLY_Q4_1),
    "q4_0": (GGMLQuantizationType.Q4_0, LlamaFileType.MOSTLY_Q4_0),
}
QUANTISATIONS = tuple(kind for kind in _KINDS if kind.startswith("q"))


def export_folder(
    config: LlamaConfig,
    names: Sequence[str],
    read: Read,
    out: Path,
    *,
    dtype: str,
    progress: Progress = silent,
) -> int:
    """Write weights (in shards) and config.json into ``out``; returns the number of parameters.

    Raises:
        ShearlingError: a weight is too large for ``dtype``.
    """
    writer = StudentWriter(out, config, DTYPES[dtype])
    for number, name in enumerate(names):
        progress("export", number, len(names))
        try:
            writer.add(name, read(name))
        except FloatingPointError as error:
            raise ShearlingError(
                f"The model can't be written as {dtype}: {error}.",
                hint="Export it in bfloat16 or float32 (--dtype).",
            ) from error
    writer.finish()
    progress("export", len(names), len(names))
    return Shape.from_config(config).parameters


def export_gguf(
    config: LlamaConfig,
    shapes: Mapping[str, tuple[int, ...]],
    read: Read,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    *,
    kind: str,
    name: str,
    end_of_turn: int | None = None,
    origin: Mapping[str, Sequence[str]] = MappingProxyType({}),
    progress: Progress = silent,
) -> dict[str, float]:
    """Write one GGUF file. ``kind`` is f32, f16, bf16 or one of ``QUANTISATIONS``; ``shapes``
    are those of all tensors by their Hugging Face names. ``origin`` has what is known of license,
    license_name, license_link and base_model (hub ids).

    ``stored_kind`` says in which kind of number each tensor is kept. Returns the share of the
    weights in each, the largest first.

    Raises:
        ShearlingError: RoPE scaling or a tokenizer that a GGUF of a Llama can't hold.
    """
    _, file_type = _KINDS[kind]
    shape = Shape.from_config(config)
    writer = GGUFWriter(out, "llama")
    writer.add_name(name)
    _add_origin(writer, origin)
    writer.add_file_type(file_type)
    if kind in QUANTISATIONS:
        writer.add_quantization_version(2)
    _add_shape(writer, config, shape)
    factors = _add_rope(writer, config, shape)
    vocabulary = vocabulary_metadata(tokenizer, shape.vocab_size)
    if end_of_turn is not None:
        vocabulary["tokenizer.ggml.eot_token_id"] = end_of_turn
    _add_vocabulary(writer, vocabulary)
    plan = {tensor: _KINDS[stored_kind(tensor, sizes, kind)][0] for tensor, sizes in shapes.items()}
    if factors is not None:
        writer.add_tensor_info(ROPE_FACTORS, factors.shape, factors.dtype, factors.nbytes)
    for tensor, stored in plan.items():
        _announce(writer, gguf_name(tensor), shapes[tensor], stored)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors)
        for number, (tensor, stored) in enumerate(plan.items()):
            progress("export", number, len(plan))
            writer.write_tensor_data(_stored(tensor, read(tensor), stored, shape))
        progress("export", len(plan), len(plan))
    finally:
        writer.close()
    return _shares(shapes, plan)


def _shares(
    shapes: Mapping[str, tuple[int, ...]], plan: Mapping[str, GGMLQuantizationType]
) -> dict[str, float]:
    counts: Counter[str] = Counter()
    for tensor, stored in plan.items():
        counts[stored.name.lower()] += math.prod(shapes[tensor])
    return {kind: count / counts.total() for kind, count in counts.most_common()}


def _add_origin(writer: GGUFWriter, origin: Mapping[str, Sequence[str]]) -> None:
    for term, add in (
        ("license", writer.add_license),
        ("license_name", writer.add_license_name),
        ("license_link", writer.add_license_link),
    ):
        if origin.get(term):
            add(", ".join(origin[term]))
    bases = origin.get("base_model", ())
    if bases:
        writer.add_base_model_count(len(bases))
    for number, base in enumerate(bases):
        owner, _, model = base.rpartition("/")
        writer.add_base_model_name(number, model)
        writer.add_base_model_organization(number, owner)
        writer.add_base_model_repo_url(number, f"https://huggingface.co/{base}")


def _add_shape(writer: GGUFWriter, config: LlamaConfig, shape: Shape) -> None:
    writer.add_vocab_size(shape.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_block_count(shape.num_hidden_layers)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.num_attention_heads)
    writer.add_head_count_kv(shape.num_key_value_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _add_rope(writer: GGUFWriter, config: LlamaConfig, shape: Shape) -> NDArray[np.float32] | None:
    """RoPE's base and scaling; Llama 3.1's scaling is a tensor of factors, which is returned."""
    rope: dict[str, Any] = dict(config.rope_parameters)
    base, kind = float(rope["rope_theta"]), rope.get("rope_type", "default")
    writer.add_rope_freq_base(base)
    if kind == "linear":
        from gguf.constants import RopeScalingType

        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    elif kind == "llama3":
        factors = llama3_rope_factors(
            base,
            shape.head_dim,
            float(rope["factor"]),
            float(rope["low_freq_factor"]),
            float(rope["high_freq_factor"]),
            int(rope["original_max_position_embeddings"]),
        )
        return factors.astype(np.float32)
    elif kind != "default":
        raise ShearlingError(
            f"RoPE scaling of the kind {kind!r} can't be written into a GGUF.",
            hint="Export the model as a Hugging Face folder instead (--to hf).",
        )
    return None


def _add_vocabulary(writer: GGUFWriter, metadata: dict[str, Any]) -> None:
    for key, value in metadata.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_string(key, value)


def _announce(
    writer: GGUFWriter, name: str, shape: tuple[int, ...], kind: GGMLQuantizationType
) -> None:
    """Tell the writer a tensor's place before its data come."""
    block, width = GGML_QUANT_SIZES[kind]
    row = shape[-1] // block * width
    size = row
    for rows in shape[:-1]:
        size *= rows
    # The type is given, so the dtype only has to be none that the writer looks into.
    writer.add_tensor_info(name, shape, np.dtype(np.float32), size, raw_dtype=kind)


def _stored(name: str, tensor: Tensor, kind: GGMLQuantizationType, shape: Shape) -> NDArray[Any]:
    """A tensor's data as they go into the file."""
    tensor = tensor.float()
    if ".self_attn.q_proj." in name:
        tensor = _pairs_together(tensor, shape.num_attention_heads)
    elif ".self_attn.k_proj." in name:
        tensor = _pairs_together(tensor, shape.num_key_value_heads)
    values = np.ascontiguousarray(tensor.numpy())
    largest = float(np.finfo(np.float16).max)
    if kind == GGMLQuantizationType.F16 and float(np.abs(values).max()) > largest:
        raise ShearlingError(
            f"{name} is too large for 16-bit floats.", hint="Export in bf16 or f32 (--dtype)."
        )
    stored: NDArray[Any] = quantize(values, kind)
    return stored


def _pairs_together(rows: Tensor, heads: int) -> Tensor:
    """Rows of a query or key matrix (or bias) from Hugging Face's rotary layout to GGUF's.

    Hugging Face keeps the two numbers of a RoPE pair half a head apart, GGUF beside each other.
    """
    half = rows.shape[0] // heads // 2
    halves = rows.reshape(heads, 2, half, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)
