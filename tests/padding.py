"""Models whose vocabulary is padded (more rows than there are tokens), or has other numbers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from teachers.tokenizer import copy_tokenizer


def padded(folder: Path, out: Path, rows: int) -> Path:
    """The same model with more rows in its embedding, which hold large numbers."""
    model = LlamaForCausalLM.from_pretrained(folder)
    before = model.config.vocab_size
    model.resize_token_embeddings(before + rows, mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[before:] = 3.0
    model.save_pretrained(out)
    copy_tokenizer(folder, out)
    return out


def other_ids(folder: Path, out: Path) -> Path:
    """The same model with a tokenizer of the same size in which two tokens change places."""
    shutil.copytree(folder, out)
    path = out / "tokenizer.json"
    data = json.loads(path.read_text())
    vocabulary = data["model"]["vocab"]
    one, two = list(vocabulary)[-2:]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    path.write_text(json.dumps(data))
    return out
