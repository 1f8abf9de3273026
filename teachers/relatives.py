"""Mistral and Qwen2 (Qwen2.5) as ordinary Llamas.

Both are built as a Llama is. Mistral's weights have the same names and the same meaning. Qwen2 has
biases on queries, keys and values and none behind the attention, where a stock Llama with
``attention_bias`` has one as well: it gets one that is zero. So the student is a stock Llama.

What differs elsewhere can't be said in a Llama's weights, and is refused by name: windows of
attention that slide, norms on queries and keys, experts, fused or scaled parts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, MistralConfig, Qwen2Config

from shearling import Progress, ShearlingError, read_json, silent, write_json
from students.shape import Shape
from teachers.layout import (
    AGAIN,
    EMBEDDING,
    HEAD,
    as_llama,
    check_tied,
    misfit,
    model_type,
    tensor_problems,
)
from teachers.tokenizer import copy_companions, load_tokenizer, same_ids
from teachers.weights import FLOAT_DTYPES, WeightFiles, save_shards, weight_files

RELATIVES: dict[str, type[MistralConfig] | type[Qwen2Config]] = {
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
}
UNLIKE = {
    "qwen3": "it normalises queries and keys, which a stock Llama does not",
    "qwen2_moe": "it is a mixture of experts",
    "qwen3_moe": "it is a mixture of experts",
    "mixtral": "it is a mixture of experts",
    "llama4": "it is a mixture of experts",
    "deepseek_v3": "it is a mixture of experts",
    "gemma": "it scales its embeddings, and its norms add one to their weights",
    "gemma2": "it scales its embeddings and has norms behind its blocks",
    "gemma3": "it scales its embeddings and has norms behind its blocks",
    "gemma3_text": "it scales its embeddings and has norms behind its blocks",
    "phi3": "its projections are fused, and some of its rotary embeddings are longrope's",
    "olmo2": "its norms stand behind its blocks",
    "granite": "it scales its embeddings, residuals and logits",
    "gpt2": "its positions are learnt, not rotary",
    "opt": "its positions are learnt, not rotary",
}
"""Models that are often asked for -> what keeps them from being a stock Llama."""


def relative_in(folder: Path) -> str | None:
    """``mistral`` or ``qwen2`` where a Hugging Face folder holds one."""
    kind = model_type(folder)
    return kind if kind in RELATIVES else None


def llama_config(folder: Path) -> LlamaConfig:
    """The configuration of the same model as a Llama.

    Raises:
        ShearlingError: its attention slides, or the configuration is damaged.
    """
    kind = relative_in(folder)
    assert kind is not None, "asked for by relative_in"
    try:
        theirs: Any = RELATIVES[kind].from_pretrained(folder, local_files_only=True)
        config = as_llama(
            theirs, head_dim=getattr(theirs, "head_dim", None), attention_bias=kind == "qwen2"
        )
    except Exception as error:  # transformers' strict dataclasses raise types of their own
        raise ShearlingError(
            f"{folder / 'config.json'} is not a usable {kind} configuration: {error}",
            hint=AGAIN,
        ) from error
    slides = theirs.use_sliding_window if kind == "qwen2" else True
    window = theirs.sliding_window if slides else None
    if window is not None and window < theirs.max_position_embeddings:
        raise ShearlingError(
            f"{folder} attends to its last {window:,} tokens only (sliding_window), which a stock "
            "Llama does not.",
            hint="Take a version without it (Mistral from v0.2 on). If no text is longer than the "
            f"window, set max_position_embeddings to {window} in its config.json.",
        )
    return config


class Relative:
    """The weights of a relative under Llama's names, read lazily."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.config = folder, llama_config(folder)
        self.weights = WeightFiles(weight_files(folder))
        self.shapes = {name: info.shape for name, info in self.weights.infos.items()}
        if self.config.attention_bias:
            for layer in range(self.config.num_hidden_layers):
                name = f"model.layers.{layer}.self_attn.o_proj.bias"
                self.shapes.setdefault(name, (self.config.hidden_size,))
        copy = self.shapes.pop(HEAD, None) if self.config.tie_word_embeddings else None
        shape = Shape.from_config(self.config)
        if problems := tensor_problems(shape, self.shapes, "config.json says"):
            raise misfit(folder, problems)
        if copy is not None:
            check_tied(folder, self.weights.tensor(EMBEDDING), self.weights.tensor(HEAD))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, size in self.shapes.items():
            if name in self.weights.infos:
                yield name, self.weights.tensor(name)
            else:
                yield name, torch.zeros(size, dtype=FLOAT_DTYPES[self._dtype(name)])

    def sizes(self) -> list[int]:
        """Bytes of each of ``tensors``."""
        return [
            FLOAT_DTYPES[self._dtype(name)].itemsize * math.prod(size)
            for name, size in self.shapes.items()
        ]

    def _dtype(self, name: str) -> str:
        """A bias that is made up is stored as the matrix before it is."""
        info = self.weights.infos.get(name)
        found = info or self.weights.infos[f"{name.removesuffix('.bias')}.weight"]
        if found.dtype not in FLOAT_DTYPES:
            raise ShearlingError(
                f"{self.folder} stores {name} as {found.dtype}, not as plain numbers.",
                hint="Use the original weights in 16 or 32 bits.",
            )
        return found.dtype


def convert(folder: Path, out: Path, *, progress: Progress = silent) -> None:
    """Write a relative as a Llama's Hugging Face folder in the dtype it has."""
    relative = Relative(folder)
    out.mkdir(parents=True, exist_ok=True)
    relative.config.save_pretrained(out)
    copy_companions(folder, out)
    _keep_ids(folder, out)
    save_shards(relative.tensors(), relative.sizes(), out, what="teacher", progress=progress)


def _keep_ids(folder: Path, out: Path) -> None:
    """Have the converted folder's tokenizer give the ids that the relative's gives.

    transformers chooses a tokenizer's class by the model's kind, and a Llama's may read the same
    files in another way: then the class that follows tokenizer.json is named in them.

    Raises:
        ShearlingError: that one gives other ids too.
    """
    theirs = load_tokenizer(folder)
    if same_ids(theirs, load_tokenizer(out)):
        return
    path = out / "tokenizer_config.json"
    config = read_json(path) if path.is_file() else {}
    write_json(path, {**config, "tokenizer_class": "PreTrainedTokenizerFast"})
    if not same_ids(theirs, load_tokenizer(out)):
        raise ShearlingError(
            f"The tokenizer in {folder} gives other tokens as a Llama's than as its own kind's.",
            hint="Save it again with a tokenizer.json (AutoTokenizer and save_pretrained).",
        )
