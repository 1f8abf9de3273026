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
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MllamaConfig,
    MllamaForConditionalGeneration,
)
from vision import SMALL_VISION

from pipelines.accelerators import named_machine
from pipelines.display import Display
from pipelines.plan import make_plan, teacher_facts
from pipelines.recipe import load_recipe
from pipelines.runner import Options, run_recipe
from shearling import read_json
from teachers.families import FAMILIES
from teachers.gguf_file import convert
from teachers.tokenizer import copy_tokenizer

GENERATIONS = {  # a size of each, and whose tokenizer
    "llama-1-65b": "llama2",  # Llama 1 has Llama 2's
    "llama-2-7b": "llama2",
    "llama-2-70b": "llama2",
    "code-llama-7b": "code-llama",
    "llama-3-8b": "llama3",
    "llama-3.1-8b": "llama3",
    "llama-3.2-1b": "llama3",
    "llama-3.2-11b-vision": "llama3",
    "smollm2-135m": "smollm2",
}
STUDENT = {"hidden_size": 48, "num_hidden_layers": 2, "intermediate_size": 64}
INFILLING = ("<PRE>", "<SUF>", "<MID>", "<EOT>")


@pytest.fixture
def tokenizers(shared_data: Path, tiny_llama: Path, tmp_path: Path) -> dict[str, Path]:
    """A folder with each generation's kind of tokenizer."""
    own = shared_data / "tokenizers"
    return {
        "llama2": own / "llama2",
        "llama3": own / "llama3",
        "code-llama": code_llamas(own / "llama2", tmp_path / "code-llama"),
        "smollm2": smollms(tiny_llama, tmp_path / "smollm2"),
    }


def code_llamas(llama2: Path, out: Path) -> Path:
    """Llama 2's with sixteen more tokens, four of which fill in the middle."""
    tokenizer = AutoTokenizer.from_pretrained(llama2)
    more = [f"▁{name}" for name in INFILLING] + [f"▁<{number}>" for number in range(12)]
    tokenizer.add_special_tokens({"additional_special_tokens": more})
    tokenizer.save_pretrained(out)
    return out


def smollms(tiny: Path, out: Path) -> Path:
    """A small one of SmolLM2's kind: byte-level, each digit for itself."""
    out.mkdir()
    data = json.loads((tiny / "tokenizer.json").read_text())
    digits = {"type": "Digits", "individual_digits": True}
    data["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, data["pre_tokenizer"]]}
    (out / "tokenizer.json").write_text(json.dumps(data))
    shutil.copyfile(tiny / "tokenizer_config.json", out / "tokenizer_config.json")
    return out


def replica(name: str, tokenizer: Path, out: Path) -> Path:
    """A tiny Llama with a family's features: grouping, ties, RoPE, context, epsilon, vocabulary."""
    family = FAMILIES[name]
    words = AutoTokenizer.from_pretrained(tokenizer)
    config = family.config() | {
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2 if family.grouped_attention else 4,
        "head_dim": 16,
        "intermediate_size": 96,
        "initializer_range": 0.2,
        "dtype": "float32",
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
    }
    if name == "smollm2-135m":
        config["vocab_size"] = len(words)
    assert len(words) == config["vocab_size"]
    torch.manual_seed(0)
    if family.vision:
        save_with_vision(config, out)
    else:
        LlamaForCausalLM(LlamaConfig(**config)).save_pretrained(out)
    copy_tokenizer(tokenizer, out)
    return out


def save_with_vision(config: dict[str, Any], out: Path) -> None:
    """The same as the text of a vision model, one more layer of which looks at the image."""
    text = {key: value for key, value in config.items() if key != "head_dim"}
    text |= {"num_hidden_layers": 4, "cross_attention_layers": [1], "pad_token_id": 0}
    whole = MllamaConfig(text_config=text, vision_config=SMALL_VISION)
    MllamaForConditionalGeneration(whole).save_pretrained(out)


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
    name: str, recipe_data: dict[str, Any], tokenizers: dict[str, Path], tmp_path: Path
) -> None:
    source = replica(name, tokenizers[GENERATIONS[name]], tmp_path / "teacher")
    recipe = load_recipe(str(recipe_for(source, recipe_data, tmp_path)))
    run = tmp_path / "run"
    options = Options(run=run, cache=tmp_path / "cache", again="")
    run_recipe(recipe, options, Display(Console(quiet=True)))

    teacher, student = (run / "stages" / stage / "model" for stage in ("teacher", "distill"))
    before, after = (LlamaConfig.from_pretrained(folder) for folder in (teacher, student))
    for key in ("rope_parameters", "max_position_embeddings", "rms_norm_eps", "vocab_size"):
        assert getattr(after, key) == getattr(before, key)
    assert after.max_position_embeddings == FAMILIES[name].context
    assert after.rope_parameters == FAMILIES[name].rope_parameters()
    assert after.tie_word_embeddings == FAMILIES[name].shape.tie_word_embeddings
    assert (student / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()

    plan = make_plan(recipe, teacher_facts(recipe.teacher), named_machine("l4"))
    scorecard = read_json(run / "stages" / "distill" / "scorecard.json")
    planned = {row["name"]: row["parameters"] for row in plan["stages"]}
    assert scorecard["parameters"] == planned["distill"]
    assert scorecard["results"]["copa"]["acc"]["value"] is not None

    (file,) = (run / "stages" / "small" / "export").glob("*.gguf")
    convert(file, tmp_path / "back")
    ids = torch.arange(200, 232)[None]
    with torch.no_grad():
        wanted, found = (
            LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
            for folder in (student, tmp_path / "back")
        )
    assert float((found - wanted).norm() / wanted.norm()) < 0.05
