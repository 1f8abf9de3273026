"""The text tower of Llama 3.2's vision models (Mllama) as an ordinary Llama.

Between the layers of a text model Mllama puts layers that attend to an image. The text layers
were kept frozen when it was trained, so they are those of Llama 3.1 8B and 70B; without an image
the other layers are passed over. They are left out, and so are the vision model, the eight rows of
the embedding that stand for the image, and its token.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, MllamaConfig

from shearling import Progress, ShearlingError, silent
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
from teachers.tokenizer import copy_tokenizer, drop_tokens, load_tokenizer
from teachers.weights import FLOAT_DTYPES, WeightFiles, save_shards, weight_files

_LAYER = re.compile(r"(?:model\.)?language_model\.(?:model\.)?layers\.(\d+)\.(.+)")
_OUTER = re.compile(r"(?:model\.)?language_model\.(?:model\.)?((?:embed_tokens|norm)\.weight)")
_HEAD = re.compile(r"(?:(?:model\.)?language_model\.)?lm_head\.weight")


def is_mllama_folder(folder: Path) -> bool:
    """Whether a Hugging Face folder holds one of Llama's vision models."""
    return model_type(folder) == "mllama"


def text_config(folder: Path) -> tuple[LlamaConfig, list[int]]:
    """The text tower's configuration, and which of Mllama's layers it consists of."""
    try:
        text: Any = MllamaConfig.from_pretrained(folder, local_files_only=True).text_config
        across = set(text.cross_attention_layers)
        layers = [number for number in range(text.num_hidden_layers) if number not in across]
        config = as_llama(text, num_hidden_layers=len(layers))
    except Exception as error:  # transformers' strict dataclasses raise types of their own
        raise ShearlingError(
            f"{folder / 'config.json'} is not a usable Mllama configuration: {error}",
            hint=AGAIN,
        ) from error
    return config, layers


def _name(name: str, numbers: dict[int, int]) -> str | None:
    """Mllama's name of a tensor to Llama's; None if the text tower lacks it."""
    if match := _OUTER.fullmatch(name):
        return f"model.{match.group(1)}"
    if _HEAD.fullmatch(name):
        return HEAD
    match = _LAYER.fullmatch(name)
    if match is None or int(match.group(1)) not in numbers:
        return None
    return f"model.layers.{numbers[int(match.group(1))]}.{match.group(2)}"


class TextTower:
    """The text weights of a vision model under Llama's names, read lazily."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config, layers = text_config(folder)
        self.weights = WeightFiles(weight_files(folder))
        numbers = {old: new for new, old in enumerate(layers)}
        found = {target: name for name in self.weights.names() if (target := _name(name, numbers))}
        copy = found.pop(HEAD, None) if self.config.tie_word_embeddings else None
        self._stored = found
        self.shapes = {target: self._shape(target) for target in found}
        self._check()
        if copy is not None:
            check_tied(folder, self.tensor(EMBEDDING), self.weights.tensor(copy))

    def _shape(self, name: str) -> tuple[int, ...]:
        """Without the rows of the embedding that stand for the image."""
        rows, *rest = self.weights.infos[self._stored[name]].shape
        most = self.config.vocab_size if name == EMBEDDING else rows
        return (min(rows, most), *rest)

    def _check(self) -> None:
        shape = Shape.from_config(self.config)
        if problems := tensor_problems(shape, self.shapes, "config.json says"):
            raise misfit(self.folder, problems, "text weights")

    def names(self) -> list[str]:
        return list(self.shapes)

    def tensor(self, name: str) -> Tensor:
        tensor, rows = self.weights.tensor(self._stored[name]), self.shapes[name][0]
        return tensor if len(tensor) == rows else tensor[:rows].clone()

    def bytes(self, name: str) -> int:
        dtype = FLOAT_DTYPES.get(self.weights.infos[self._stored[name]].dtype, torch.float32)
        return dtype.itemsize * math.prod(self.shapes[name])


def convert(folder: Path, out: Path, *, progress: Progress = silent) -> None:
    """Write the text tower as a Hugging Face folder in the dtype it has."""
    tower = TextTower(folder)
    out.mkdir(parents=True, exist_ok=True)
    tower.config.save_pretrained(out)
    _copy_tokenizer(folder, out, tower.config.vocab_size)
    names = tower.names()
    tensors = ((name, tower.tensor(name)) for name in names)
    sizes = [tower.bytes(name) for name in names]
    save_shards(tensors, sizes, out, what="text tower", progress=progress)


def _copy_tokenizer(folder: Path, out: Path, rows: int) -> None:
    """The tokenizer without ``<|image|>``, which the text has no row for."""
    copy_tokenizer(folder, out)
    added = load_tokenizer(folder).get_added_vocab()
    if beyond := {token for token, number in added.items() if number >= rows}:
        drop_tokens(out, beyond)
