"""Every generation in small: same features, real tokenizer, through the whole pipeline."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from pipelines.accelerators import named_machine
from pipelines.display import Display
from pipelines.plan import make_plan, teacher_facts
from pipelines.recipe import load_recipe
from pipelines.runner import Options, run_recipe
from shearling import read_json
from teachers.families import FAMILIES
from teachers.gguf_file import convert

GENERATIONS = {
    "llama-1-65b": "llama2",  # Llama 1 has Llama 2's tokenizer
    "llama-2-70b": "llama2",
    "code-llama-7b": "llama2",
    "llama-3-8b": "llama3",
    "llama-3.1-8b": "llama3",
    "llama-3.2-1b": "llama3",
}
STUDENT = {"hidden_size": 48, "num_hidden_layers": 2, "intermediate_size": 64}


def replica(name: str, tokenizer: Path, out: Path) -> Path:
    """A tiny Llama with a family's features: grouping, ties, RoPE, context, epsilon, vocabulary."""
    family = FAMILIES[name]
    small = {
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2 if family.grouped_attention else 4,
        "head_dim": 16,
        "intermediate_size": 96,
        "initializer_range": 0.2,
        "dtype": "float32",
    }
    torch.manual_seed(0)
    words = AutoTokenizer.from_pretrained(tokenizer)
    special = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id}
    LlamaForCausalLM(LlamaConfig(**{**family.config(), **small, **special})).save_pretrained(out)
    for file in tokenizer.glob("tokenizer*"):
        shutil.copyfile(file, out / file.name)
    return out


def recipe_for(teacher: Path, data: dict[str, Any], folder: Path) -> Path:
    settings = json.loads(json.dumps(data))
    settings["teacher"]["model"] = str(teacher)
    settings["stages"][0]["shape"] = STUDENT
    settings["stages"][1] |= {"tokens": 512, "save_every_seconds": 60}
    settings["stages"].append({"name": "small", "kind": "export", "to": "gguf", "quantise": "q8_0"})
    path = folder / "generation.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.mark.parametrize("name", GENERATIONS)
def test_a_generation_goes_all_the_way(
    name: str, recipe_data: dict[str, Any], shared_data: Path, tmp_path: Path
) -> None:
    teacher = replica(name, shared_data / "tokenizers" / GENERATIONS[name], tmp_path / "teacher")
    recipe = load_recipe(str(recipe_for(teacher, recipe_data, tmp_path)))
    run = tmp_path / "run"
    options = Options(run=run, cache=tmp_path / "cache", again="")
    run_recipe(recipe, options, Display(Console(quiet=True)))

    student = run / "stages" / "distill" / "model"
    before, after = (LlamaConfig.from_pretrained(folder) for folder in (teacher, student))
    for key in ("rope_parameters", "max_position_embeddings", "rms_norm_eps", "vocab_size"):
        assert getattr(after, key) == getattr(before, key)
    assert after.tie_word_embeddings == FAMILIES[name].shape.tie_word_embeddings
    assert (student / "tokenizer.json").read_bytes() == (teacher / "tokenizer.json").read_bytes()

    plan = make_plan(recipe, teacher_facts(recipe.teacher), named_machine("l4"))
    scorecard = read_json(run / "stages" / "distill" / "scorecard.json")
    planned = {row["name"]: row["parameters"] for row in plan["stages"]}
    assert scorecard["parameters"] == planned["distill"]
    assert scorecard["results"]["copa"]["acc"]["value"] is not None

    (file,) = (run / "stages" / "small" / "export").glob("*.gguf")
    convert(file, tmp_path / "back")
    ids = torch.arange(300, 332)[None]
    with torch.no_grad():
        wanted, found = (
            LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
            for folder in (student, tmp_path / "back")
        )
    assert float((found - wanted).norm() / wanted.norm()) < 0.05
