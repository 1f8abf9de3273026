"""Meta's own release of a Llama becomes a Hugging Face folder.

    params.json  consolidated.00.pth ... consolidated.NN.pth  tokenizer.model

A vision model's file may be named consolidated.pth; of its weights those of the text tower are
taken, as ``teachers.mllama`` takes them out of the Hugging Face version.

The parts are what model parallelism (fairscale) left on each GPU: query, key, value, gate, up and
output matrices are cut between rows, the other two between columns, the embedding between columns
(Llama 1 and 2) or rows (Llama 3). They are memory-mapped and joined tensor by tensor, so no more
than one shard of the result is in memory.

Source: https://github.com/meta-llama/llama-models/blob/main/models/llama3/model.py and
https://github.com/facebookresearch/llama/blob/main/llama/model.py
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig

from shearling import Progress, ShearlingError, itemised, read_json, silent
from students.shape import Shape
from teachers.families import FAMILIES, Family
from teachers.gguf_tokenizer import save_tokenizer
from teachers.layout import halves_apart, tensor_problems
from teachers.meta_tokenizer import END_OF_TURN, meta_tokenizer
from teachers.weights import are_equal, load_state, save_shards

_AGAIN = "Download the model again, all files of its folder."
_PART = re.compile(r"consolidated(?:\.(\d+))?\.pth")
_NEEDED = ("dim", "n_layers", "n_heads", "norm_eps")
_FEATURES = {
    "moe_args": "a mixture of experts",
    "lora_args": "adapters (LoRA)",
    "quantization_args": "quantised weights",
}

_OUTER = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
}
_CUT_BY_COLUMNS = (".wo.weight", ".w2.weight")
_COMPUTED = "rope.freqs"  # Llama 1 and 2 carry the frequencies along
_TEXT = "text_model."  # what the text weights of a vision model are called
_OF_VISION = ("vision_model.", "text_model.cross_attention_layers.", "text_model.learnable_")


def is_meta_folder(folder: Path) -> bool:
    """Whether a folder looks like one of Meta's releases."""
    return (folder / "params.json").is_file() and any(
        _PART.fullmatch(path.name) for path in folder.iterdir()
    )


def hf_name(name: str) -> str | None:
    """``layers.3.attention.wq.weight`` -> Hugging Face's name; None for an unknown one."""
    if name in _OUTER:
        return _OUTER[name]
    match = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
    if match is None or match.group(2) not in _LAYER:
        return None
    return f"model.layers.{int(match.group(1))}.{_LAYER[match.group(2)]}"


@dataclass
class MetaRelease:
    """The parts of a release, read lazily."""

    folder: Path

    @cached_property
    def params(self) -> dict[str, Any]:
        params = read_json(self.folder / "params.json", hint=_AGAIN)
        found = params if isinstance(params, dict) else {}
        nested = found.get("model")  # some fine-tuned releases have it all under this key
        found = nested if isinstance(nested, dict) else found
        problems = [f"it lacks {key}" for key in _NEEDED if not found.get(key)]
        problems += [what for key, what in _FEATURES.items() if found.get(key)]
        if problems:
            raise ShearlingError(
                itemised(f"{self.folder / 'params.json'} is not that of a stock Llama:", problems),
                hint=_AGAIN,
            )
        return found

    @cached_property
    def parts(self) -> list[dict[str, Tensor]]:
        """The tensors of each part, memory-mapped."""
        files = {
            int(match.group(1) or 0): path
            for path in self.folder.iterdir()
            if (match := _PART.fullmatch(path.name))
        }
        missing = sorted(set(range(max(files) + 1)) - set(files))
        if missing:
            names = ", ".join(f"consolidated.{number:02d}.pth" for number in missing)
            raise ShearlingError(f"{self.folder} lacks the parts {names}.", hint=_AGAIN)
        parts = [self._text(load_state(files[number])) for number in sorted(files)]
        for number, part in enumerate(parts):
            if set(part) != set(parts[0]):
                odd = sorted(set(part) ^ set(parts[0]))
                raise ShearlingError(
                    f"Part {number:02d} in {self.folder} does not fit the first: only one of both "
                    f"has {', '.join(odd[:5])}.",
                    hint=_AGAIN,
                )
        return parts

    def _text(self, part: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weights of the text, under the names that a release without vision has."""
        if not self.params.get("vision_chunk_size"):
            return part
        return {
            name.removeprefix(_TEXT): tensor
            for name, tensor in part.items()
            if not name.startswith(_OF_VISION)
        }

    def names(self) -> list[str]:
        return [name for name in self.parts[0] if name != _COMPUTED]

    def axis(self, name: str) -> int | None:
        """Along which axis the parts of a tensor are cut; None where each part has all of it."""
        first = self.parts[0][name]
        if len(self.parts) == 1 or first.dim() < 2:
            return None
        if name == "tok_embeddings.weight":
            return 0 if first.shape[1] == self.params["dim"] else 1
        return 1 if name.endswith(_CUT_BY_COLUMNS) else 0

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the joined tensor."""
        axis, shape = self.axis(name), list(self.parts[0][name].shape)
        if axis is not None:
            shape[axis] = sum(part[name].shape[axis] for part in self.parts)
        return tuple(shape)

    def tensor(self, name: str) -> Tensor:
        """The parts of one tensor, joined."""
        axis = self.axis(name)
        if axis is None:
            return self.parts[0][name]
        return torch.cat([part[name] for part in self.parts], axis)

    @cached_property
    def tied(self) -> bool:
        """Llama 3.2's small models release their tied matrix twice."""
        if "output.weight" not in self.parts[0]:
            return True
        return all(
            are_equal(part["output.weight"], part["tok_embeddings.weight"]) for part in self.parts
        )


def meta_config(release: MetaRelease) -> LlamaConfig:
    """The configuration that a release's params.json and tensors say.

    The context length is in neither; it is looked up in the families, or guessed from the RoPE.
    """
    try:
        return _config(release)
    except ShearlingError:
        raise
    except Exception as error:  # numbers of any type and value
        raise ShearlingError(
            f"{release.folder / 'params.json'} makes no sense: {error}", hint=_AGAIN
        ) from error


def _config(release: MetaRelease) -> LlamaConfig:
    params = release.params
    needed = ("tok_embeddings.weight", "layers.0.feed_forward.w1.weight")
    missing = [name for name in needed if name not in release.parts[0]]
    if missing:
        raise ShearlingError(f"{release.folder} lacks {', '.join(missing)}.", hint=_AGAIN)
    shape = Shape(
        hidden_size=params["dim"],
        num_hidden_layers=params["n_layers"],
        num_attention_heads=params["n_heads"],
        num_key_value_heads=params.get("n_kv_heads") or params["n_heads"],
        head_dim=params["dim"] // params["n_heads"],
        intermediate_size=release.shape("layers.0.feed_forward.w1.weight")[0],
        vocab_size=release.shape("tok_embeddings.weight")[0],
        tie_word_embeddings=release.tied,
    )
    base, scaled = float(params.get("rope_theta", 10_000.0)), bool(params.get("use_scaled_rope"))
    known = _family(shape, base, scaled, float(params["norm_eps"]))
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": base}
    if scaled:
        factor = params.get("rope_scaling_factor") or (known.rope_factor if known else None) or 8.0
        rope |= {
            "rope_type": "llama3",
            "factor": float(factor),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        **shape.to_dict(),
        max_position_embeddings=known.context if known else _context(base, scaled),
        rms_norm_eps=float(params["norm_eps"]),
        rope_parameters=rope,
        dtype=str(release.parts[0]["tok_embeddings.weight"].dtype).removeprefix("torch."),
    )


def _family(shape: Shape, base: float, scaled: bool, epsilon: float) -> Family | None:
    for known in FAMILIES.values():
        same = known.shape == shape and known.rope_base == base and known.norm_epsilon == epsilon
        if same and (known.rope_factor is not None) == scaled:
            return known
    return None


def _context(base: float, scaled: bool) -> int:
    """Of a shape that no release has: what the generation with this RoPE has."""
    if scaled:
        return 131_072
    return {500_000.0: 8192, 1_000_000.0: 16384}.get(base, 4096)


def _check(release: MetaRelease, shape: Shape) -> None:
    found = {hf_name(name): release.shape(name) for name in release.names()}
    known = {name: dimensions for name, dimensions in found.items() if name is not None}
    problems = shape.internal_problems() or tensor_problems(shape, known, "params.json says")
    extra = [name for name in release.names() if hf_name(name) is None]
    if extra:
        problems.append(f"tensors that a stock Llama does not have: {', '.join(extra[:8])}")
    if problems:
        raise ShearlingError(
            itemised(f"The weights in {release.folder} don't fit its params.json:", problems),
            hint=_AGAIN,
        )


def _tensors(release: MetaRelease, shape: Shape, names: list[str]) -> Iterator[tuple[str, Tensor]]:
    for name in names:
        target, tensor = hf_name(name), release.tensor(name)
        assert target is not None
        if name.endswith(".wq.weight"):
            tensor = halves_apart(tensor, shape.num_attention_heads)
        elif name.endswith(".wk.weight"):
            tensor = halves_apart(tensor, shape.num_key_value_heads)
        yield target, tensor


def convert(folder: Path, out: Path, *, progress: Progress = silent) -> None:
    """Write a release as a Hugging Face folder in the dtype it has."""
    release = MetaRelease(folder)
    config = meta_config(release)
    shape = Shape.from_config(config)
    _check(release, shape)
    tokenizer = meta_tokenizer(folder, newer=config.rope_parameters["rope_type"] == "llama3")
    tokenizer.model_max_length = config.max_position_embeddings
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, key, getattr(tokenizer, key))
    out.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(out)
    ends = [tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(_turns(tokenizer))]
    GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=ends if len(ends) > 1 else ends[0]
    ).save_pretrained(out)
    save_tokenizer(tokenizer, out)
    names = [n for n in release.names() if not (n == "output.weight" and release.tied)]
    sizes = [_bytes(release, name) for name in names]
    save_shards(_tensors(release, shape, names), sizes, out, what="convert", progress=progress)


def _turns(tokenizer: Any) -> list[str]:
    """The tokens that end a turn of a conversation, where the tokenizer has them."""
    return [token for token in END_OF_TURN if token in tokenizer.get_vocab()]


def _bytes(release: MetaRelease, name: str) -> int:
    axis = release.axis(name)
    parts = release.parts[:1] if axis is None else release.parts
    return sum(part[name].nbytes for part in parts)
