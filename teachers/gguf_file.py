"""A Llama in a GGUF file becomes a Hugging Face folder with 32-bit safetensors.

transformers can load a GGUF too (``gguf_file=``) and is the oracle of the tests, but it (5.23)
leaves out the ``rope_freqs`` tensor that holds Llama 3.1's RoPE scaling, and it holds the whole
model in memory twice; here it is one shard.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig

from shearling import Progress, ShearlingError, silent
from students.gguf_layout import ROPE_FACTORS, hf_name, llama3_rope_factors
from students.shape import Shape
from teachers.gguf_header import Gguf, read_gguf, refusal
from teachers.gguf_tokenizer import llama_tokenizer, save_tokenizer, special_ids
from teachers.layout import halves_apart, tensor_problems
from teachers.origin import Origin, known_terms
from teachers.weights import save_shards

_BASE = re.compile(r"general\.base_model\.\d+\.repo_url")

# --- configuration ------------------------------------------------------------------------------


@contextmanager
def _making_sense(path: Path) -> Iterator[None]:
    """Metadata may be of any type and value, and libraries are given them."""
    try:
        yield
    except ShearlingError:
        raise
    except Exception as error:
        raise refusal(path, f"its metadata make no sense: {error}") from error


def llama_config(gguf: Gguf) -> LlamaConfig:
    """The configuration that a GGUF's metadata and tensors say.

    Raises:
        ShearlingError: another architecture, or features that a stock Llama can't hold, by name.
    """
    with _making_sense(gguf.path):
        return _llama_config(gguf)


def _llama_config(gguf: Gguf) -> LlamaConfig:
    meta = gguf.metadata
    if problems := _architecture_problems(gguf):
        raise refusal(gguf.path, *problems)
    needed = (
        "embedding_length",
        "block_count",
        "attention.head_count",
        "feed_forward_length",
        "attention.layer_norm_rms_epsilon",
    )
    missing = [f"llama.{key}" for key in needed if f"llama.{key}" not in meta]
    missing += [n for n in ("token_embd.weight",) if n not in gguf.tensors]
    if missing:
        raise refusal(gguf.path, f"it lacks {', '.join(missing)}")
    heads = meta["llama.attention.head_count"]
    hidden = meta["llama.embedding_length"]
    uniform = [heads, hidden, meta["llama.feed_forward_length"], meta["llama.block_count"]]
    key_value_heads = meta.get("llama.attention.head_count_kv", heads)
    if not all(isinstance(n, int) and n > 0 for n in [*uniform, key_value_heads]):
        raise refusal(gguf.path, "its layers are not all of one size, or a size is not positive")
    head_dim = meta.get("llama.attention.key_length", hidden // heads)
    rotary = meta.get("llama.rope.dimension_count", head_dim)
    if rotary != head_dim or meta.get("llama.attention.value_length", head_dim) != head_dim:
        raise refusal(gguf.path, f"rotary embedding on {rotary} of {head_dim} dimensions of a head")
    special = special_ids(meta)
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=gguf.tensors["token_embd.weight"].shape[0],
        hidden_size=hidden,
        num_hidden_layers=meta["llama.block_count"],
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        head_dim=head_dim,
        intermediate_size=meta["llama.feed_forward_length"],
        max_position_embeddings=int(meta.get("llama.context_length", 2048)),
        rms_norm_eps=_shortest_float32(meta["llama.attention.layer_norm_rms_epsilon"]),
        rope_parameters=_rope_parameters(gguf, head_dim),
        tie_word_embeddings="output.weight" not in gguf.tensors,
        attention_bias="blk.0.attn_q.bias" in gguf.tensors,
        mlp_bias="blk.0.ffn_up.bias" in gguf.tensors,
        bos_token_id=special.get("bos_token"),
        eos_token_id=special.get("eos_token"),
        pad_token_id=special.get("pad_token"),
        dtype="float32",
    )


def _shortest_float32(value: float) -> float:
    """The shortest decimal that is this 32-bit float: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _architecture_problems(gguf: Gguf) -> list[str]:
    meta, problems = gguf.metadata, []
    if meta.get("general.architecture") != "llama":
        problems.append(f"its architecture is {meta.get('general.architecture')!r}, not 'llama'")
    if meta.get("llama.expert_count"):
        problems.append(f"a mixture of {meta['llama.expert_count']} experts")
    if meta.get("split.count", 0) > 1:
        problems.append(
            f"one of {meta['split.count']} parts; join them with `llama-gguf-split --merge` first"
        )
    extra = [n for n in gguf.tensors if n != ROPE_FACTORS and hf_name(n) is None]
    if extra and not problems:
        problems.append(f"tensors that a stock Llama does not have: {', '.join(extra[:8])}")
    return problems


def _rope_parameters(gguf: Gguf, head_dim: int) -> dict[str, Any]:
    meta = gguf.metadata
    base = _shortest_float32(meta.get("llama.rope.freq_base", 10000.0))
    if ROPE_FACTORS in gguf.tensors:
        return _llama3_rope(gguf, base, head_dim)
    # As llama.cpp reads them: the factor's old name, linear where no type is given, and 0 for none.
    factor = meta.get("llama.rope.scaling.factor", meta.get("llama.rope.scale_linear", 0.0))
    scaling = meta.get("llama.rope.scaling.type", "linear")
    if scaling == "none" or (scaling == "linear" and factor in (0, 1)):
        return {"rope_type": "default", "rope_theta": base}
    if scaling == "linear":
        return {"rope_type": "linear", "rope_theta": base, "factor": _shortest_float32(factor)}
    raise refusal(gguf.path, f"RoPE scaling of the kind {scaling!r}")


def _llama3_rope(gguf: Gguf, base: float, head_dim: int) -> dict[str, Any]:
    """Find the scaling behind ``rope_freqs``: GGUF stores its outcome, not its parameters.

    Every published Llama uses the bounds 1 and 4 over 8192 tokens; the factor (8, or 32 in Llama
    3.2) is the largest entry. Anything else is refused rather than approximated.
    """
    stored = gguf.read(ROPE_FACTORS).reshape(-1)
    factor = float(round(float(stored.max()), 4))
    low, high, original = 1.0, 4.0, 8192
    if factor <= 1:
        return {"rope_type": "default", "rope_theta": base}
    expected = llama3_rope_factors(base, head_dim, factor, low, high, original)
    if stored.shape != expected.shape or not np.allclose(stored, expected, rtol=1e-4):
        raise refusal(gguf.path, "RoPE scaling factors that are not those of Llama 3.1 or 3.2")
    return {
        "rope_type": "llama3",
        "rope_theta": base,
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


# --- weights ------------------------------------------------------------------------------------


def llama_tensors(gguf: Gguf, config: LlamaConfig) -> Iterator[tuple[str, Tensor]]:
    """Hugging Face names and 32-bit tensors, one in memory at a time, in the file's order."""
    for name in gguf.tensors:
        target = hf_name(name)
        if target is None:
            continue
        try:
            values = gguf.read(name)
        except NotImplementedError as error:
            raise ShearlingError(
                f"{gguf.path} uses the quantisation {gguf.tensors[name].kind.name}, which the "
                "gguf package can't undo.",
                hint="Use another quantisation of the model, for example Q8_0 or F16.",
            ) from error
        tensor = torch.from_numpy(values)
        if ".self_attn.q_proj." in target:
            tensor = halves_apart(tensor, config.num_attention_heads)
        elif ".self_attn.k_proj." in target:
            tensor = halves_apart(tensor, config.num_key_value_heads or config.num_attention_heads)
        yield target, tensor


# --- whose it is --------------------------------------------------------------------------------


def gguf_origin(path: Path) -> Origin:
    """Licence and base models as a GGUF's metadata tell them."""
    meta = read_gguf(path).metadata
    bases = [
        base
        for key, value in sorted(meta.items())
        if _BASE.fullmatch(key) and (base := _hub_id(value)) is not None
    ]
    return known_terms(
        {
            "license": meta.get("general.license"),
            "license_name": meta.get("general.license.name"),
            "license_link": meta.get("general.license.link"),
            "base_model": bases[0] if len(bases) == 1 else bases,
        }
    )


def _hub_id(address: Any) -> str | None:
    """``owner/name`` out of a repository's address; None where it is none of a hub."""
    parts = str(address).rstrip("/").split("/")
    return "/".join(parts[-2:]) if len(parts) == 5 and parts[0] in ("https:", "http:") else None


# --- all together -------------------------------------------------------------------------------


def convert(path: Path, out: Path, *, progress: Progress = silent) -> None:
    """Write a GGUF's Llama as a Hugging Face folder with 32-bit safetensors.

    ``out`` is filled as it stands; the caller makes it appear as a whole.
    """
    gguf = read_gguf(path)
    with _making_sense(path):
        config, tokenizer = llama_config(gguf), llama_tokenizer(gguf)
        _check_tensors(gguf, config)
    out.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(out)
    _generation_config(gguf, config).save_pretrained(out)
    save_tokenizer(tokenizer, out)
    sizes = [4 * math.prod(t.shape) for n, t in gguf.tensors.items() if hf_name(n) is not None]
    save_shards(llama_tensors(gguf, config), sizes, out, what="dequantise", progress=progress)


def _check_tensors(gguf: Gguf, config: LlamaConfig) -> None:
    shape = Shape.from_config(config)
    names = ((hf_name(name), info.shape) for name, info in gguf.tensors.items())
    found = {name: dimensions for name, dimensions in names if name is not None}
    problems = shape.internal_problems() or tensor_problems(shape, found, "the metadata say")
    if problems:
        raise refusal(gguf.path, *problems)


def _generation_config(gguf: Gguf, config: LlamaConfig) -> GenerationConfig:
    """Where generation stops: at the end of the text, or of a turn of the conversation."""
    ends = [gguf.metadata.get(f"tokenizer.ggml.{key}") for key in ("eos_token_id", "eot_token_id")]
    ends = list(dict.fromkeys(end for end in ends if isinstance(end, int)))
    return GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=(ends[0] if len(ends) == 1 else ends) if ends else None,
        pad_token_id=config.pad_token_id,
    )
