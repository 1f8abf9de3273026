"""Mistral and Qwen2 as Llamas, against transformers' own models."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from compress.distill import distill
from compress.prune import prune
from compress.settings import DistillSettings, PruneSettings
from pipelines.plan import teacher_facts
from shearling import ShearlingError, read_json, write_json
from teachers.checkpoint import import_teacher, open_checkpoint
from teachers.settings import SourceSettings, TeacherSettings, TransferSetSettings
from teachers.tokenizer import copy_tokenizer, load_tokenizer
from teachers.transfer_set import build_transfer_set

PROBE = torch.arange(5, 45)[None]
AXES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}
KINDS: dict[str, tuple[Any, Any, dict[str, Any], torch.dtype]] = {
    "mistral": (
        MistralConfig,
        MistralForCausalLM,
        {"sliding_window": None, "head_dim": 16},
        torch.bfloat16,
    ),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True}, torch.float32),
}


@pytest.fixture(scope="module", params=KINDS)
def relative(
    request: pytest.FixtureRequest, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    config, model, axes, dtype = KINDS[request.param]
    torch.manual_seed(0)
    made = model(config(**AXES, **axes, vocab_size=len(load_tokenizer(tiny_llama))))
    for name, parameter in made.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, 0, 0.3)
    folder = tmp_path_factory.mktemp("relative") / str(request.param)
    made.to(dtype).save_pretrained(folder)
    copy_tokenizer(tiny_llama, folder)
    return folder


@torch.no_grad()
def logits(folder: Path, kind: Any = AutoModelForCausalLM) -> Tensor:
    answer: Tensor = kind.from_pretrained(folder, dtype=torch.float32).eval()(PROBE).logits
    return answer


def brought_in(folder: Path, out: Path) -> Path:
    facts = import_teacher(TeacherSettings(model=str(folder)), out, cache=out)
    assert facts["format"] == "relative"
    assert facts["shape"] == teacher_facts(TeacherSettings(model=str(folder))).shape.to_dict()
    return out / "model"


def test_the_llama_answers_as_the_relative_does(relative: Path, tmp_path: Path) -> None:
    teacher = brought_in(relative, tmp_path / "in")
    assert read_json(teacher / "config.json")["model_type"] == "llama"
    assert torch.equal(logits(teacher, LlamaForCausalLM), logits(relative))
    assert open_checkpoint(teacher).torch_dtype is KINDS[relative.name][3]


def test_it_is_pruned_and_teaches(relative: Path, tiny_text: Path, tmp_path: Path) -> None:
    teacher = brought_in(relative, tmp_path / "in")
    source = SourceSettings(name="tiny", path=str(tiny_text))
    text = tmp_path / "text"
    settings = TransferSetSettings(sources=(source,), window=32, heldout_windows=4)
    build_transfer_set(settings, teacher, text, seed=0, cache=tmp_path)
    whole = open_checkpoint(teacher).shape
    how = PruneSettings(calibration_tokens=2048, precision="float32")
    prune(teacher, tmp_path / "same", whole, text, how, seed=0)
    wanted = logits(relative)
    error = (logits(tmp_path / "same/model") - wanted).abs().max() / wanted.abs().max()
    assert float(error) < 1e-4 + 4 * torch.finfo(KINDS[relative.name][3]).eps
    shape = replace(whole, hidden_size=24, num_hidden_layers=3, intermediate_size=40)
    prune(teacher, tmp_path / "cut", shape, text, how, seed=0)
    taught = DistillSettings(
        tokens=32 * 8 * 6, batch_tokens=32 * 8, learning_rate=5e-3, precision="float32"
    )
    cut = tmp_path / "cut"
    summary = distill(
        teacher, cut / "model", tmp_path / "out", text, taught, selection=cut / "selection.json"
    )
    assert summary["heldout_end"]["heldout_kl"] < summary["heldout_start"]["heldout_kl"]
    student = LlamaForCausalLM.from_pretrained(tmp_path / "out/model")
    assert student.config.model_type == "llama"


@pytest.mark.parametrize("kind", KINDS)
def test_attention_that_slides_is_refused(kind: str, tiny_llama: Path, tmp_path: Path) -> None:
    config = KINDS[kind][0](**AXES, vocab_size=384).to_dict()
    slides = {"sliding_window": 64, "use_sliding_window": True}
    write_json(tmp_path / "model/config.json", config | slides)
    settings = TeacherSettings(model=str(tmp_path / "model"))
    for ask in (lambda: import_teacher(settings, tmp_path / "in", cache=tmp_path),
                lambda: teacher_facts(settings)):  # fmt: skip
        with pytest.raises(ShearlingError, match="its last 64 tokens only"):
            ask()


@pytest.mark.parametrize(
    ("kind", "why"),
    [("qwen3", "normalises queries and keys"), ("mixtral", "experts"), ("gemma2", "scales"),
     ("phi3", "fused"), ("mamba", "not a Llama")],
)  # fmt: skip
def test_others_are_refused_with_what_is_unlike(kind: str, why: str, tmp_path: Path) -> None:
    write_json(tmp_path / "model/config.json", {"model_type": kind})
    with pytest.raises(ShearlingError, match=why) as told:
        import_teacher(
            TeacherSettings(model=str(tmp_path / "model")), tmp_path / "in", cache=tmp_path
        )
    assert "'mistral' or 'qwen2'" in str(told.value.hint)
    with pytest.raises(ShearlingError, match=why):
        teacher_facts(TeacherSettings(model=str(tmp_path / "model")))


@pytest.mark.parametrize("times", [1, 2])
def test_a_tied_relative_may_carry_its_matrix_twice_but_not_two(
    relative: Path, tmp_path: Path, times: int
) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(relative / "model.safetensors")
    copy_tokenizer(relative, tmp_path)
    config = read_json(relative / "config.json")
    write_json(tmp_path / "config.json", {**config, "tie_word_embeddings": True})
    weights["lm_head.weight"] = times * weights["model.embed_tokens.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ShearlingError, match="not its embedding") if times > 1 else nullcontext():
        brought_in(tmp_path, tmp_path / "in")


def test_a_missing_tensor_is_named(relative: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(relative / "model.safetensors")
    del weights["model.layers.1.self_attn.q_proj.weight"]
    copy_tokenizer(relative, tmp_path)
    write_json(tmp_path / "config.json", read_json(relative / "config.json"))
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ShearlingError, match=r"missing.*q_proj"):
        import_teacher(TeacherSettings(model=str(tmp_path)), tmp_path / "in", cache=tmp_path)


def test_a_tokenizer_that_a_llama_reads_in_another_way_keeps_its_ids(
    shared_data: Path, tmp_path: Path
) -> None:
    """Llama 2's older layout: transformers chooses the class by the model's kind, and a Llama's
    does not follow the normaliser of the file."""
    folder = tmp_path / "mistral"
    config = MistralConfig(**AXES, head_dim=16, sliding_window=None, vocab_size=32_000)
    MistralForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer = read_json(shared_data / "tokenizers/llama2/tokenizer.json")
    tokenizer["pre_tokenizer"] = None
    tokenizer["normalizer"] = {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ],
    }
    write_json(folder / "tokenizer.json", tokenizer)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "legacy": False}
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", **names})
    theirs = load_tokenizer(folder)
    ours = load_tokenizer(brought_in(folder, tmp_path / "in"))
    for text in (" x", "  two", "<s>[INST] sheep [/INST]", "plain words", "a\n b"):
        assert ours(text)["input_ids"] == theirs(text)["input_ids"], text
