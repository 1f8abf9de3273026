"""The text tower of a vision model, against transformers' own Mllama on text alone."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from shapes import llama3_rope
from transformers import MllamaConfig, MllamaForConditionalGeneration
from vision import SMALL_VISION

from shearling import ShearlingError, read_json, write_json
from teachers.checkpoint import import_teacher, open_checkpoint
from teachers.settings import TeacherSettings
from teachers.tokenizer import copy_tokenizer, load_tokenizer, token_count

IMAGE = "<|image|>"


@pytest.fixture(scope="module")
def vision_model(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A replica with six layers, two of which look at the image."""
    torch.manual_seed(0)
    config = MllamaConfig(
        text_config={
            "vocab_size": len(load_tokenizer(tiny_llama)),
            "hidden_size": 32,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 64,
            "cross_attention_layers": [1, 4],
            "initializer_range": 0.3,
            "rope_parameters": llama3_rope(original=64),
            "max_position_embeddings": 512,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "pad_token_id": 0,
        },
        vision_config=SMALL_VISION,
    )
    folder = tmp_path_factory.mktemp("mllama") / "model"
    MllamaForConditionalGeneration(config).eval().save_pretrained(folder)
    add_image(tiny_llama, folder)
    return folder


def add_image(source: Path, folder: Path) -> None:
    """The tokenizer as it is released: ``<|image|>`` has a number that the text has no row for."""
    tokenizer = load_tokenizer(source)
    image = {"content": IMAGE, "special": True, "normalized": False, "lstrip": False}
    image |= {"rstrip": False, "single_word": False}
    number = len(tokenizer)
    tokenizer.save_pretrained(folder)
    data = read_json(folder / "tokenizer.json")
    data["added_tokens"].append({"id": number, **image})
    write_json(folder / "tokenizer.json", data)
    config = read_json(folder / "tokenizer_config.json")
    config["added_tokens_decoder"] = {str(number): image}
    config["additional_special_tokens"] = [IMAGE]
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "added_tokens.json", {IMAGE: number})
    write_json(folder / "special_tokens_map.json", {"additional_special_tokens": [image]})
    assert token_count(load_tokenizer(folder)) == number + 1


def test_the_tokenizer_has_no_token_that_the_text_has_no_row_for(
    vision_model: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    import_teacher(TeacherSettings(model=str(vision_model)), tmp_path / "out", cache=tmp_path)
    teacher = tmp_path / "out/model"
    ours, theirs = load_tokenizer(teacher), load_tokenizer(tiny_llama)
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert ours("<|endoftext|>A lamb").input_ids == theirs("<|endoftext|>A lamb").input_ids
    assert not [file for file in teacher.glob("*.json") if IMAGE in file.read_text()]


def test_the_text_tower_has_the_logits_of_the_vision_model(
    vision_model: Path, tmp_path: Path
) -> None:
    facts = import_teacher(
        TeacherSettings(model=str(vision_model)), tmp_path / "out", cache=tmp_path
    )
    assert facts["format"] == "mllama"
    assert facts["shape"]["num_hidden_layers"] == 4
    whole = MllamaForConditionalGeneration.from_pretrained(vision_model, dtype=torch.float32)
    ids = torch.arange(100)[None] % facts["shape"]["vocab_size"]
    with torch.no_grad():
        theirs = whole.eval()(input_ids=ids).logits
        ours = open_checkpoint(tmp_path / "out/model").model(torch.float32)(ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_older_and_newer_names_are_known(vision_model: Path, tmp_path: Path, prefix: str) -> None:
    folder = tmp_path / "renamed"
    folder.mkdir()
    copy_tokenizer(vision_model, folder)
    (folder / "config.json").write_text((vision_model / "config.json").read_text())
    renamed = {}
    for name, tensor in load_file(vision_model / "model.safetensors").items():
        plain = name.removeprefix("model.").removeprefix("language_model.").removeprefix("model.")
        text = plain.startswith(("layers.", "embed_tokens.", "norm."))
        renamed[prefix + plain if text else name] = tensor
    save_file(renamed, folder / "model.safetensors")
    facts = import_teacher(TeacherSettings(model=str(folder)), tmp_path / "out", cache=tmp_path)
    assert facts["shape"]["num_hidden_layers"] == 4


@pytest.mark.parametrize("times", [1, 2])
def test_a_tied_vision_model_may_carry_its_matrix_twice_but_not_two(
    vision_model: Path, tmp_path: Path, times: int
) -> None:
    folder = Path(shutil.copytree(vision_model, tmp_path / "tied"))
    config = read_json(folder / "config.json")
    config["text_config"]["tie_word_embeddings"] = True
    write_json(folder / "config.json", config)
    tensors = load_file(folder / "model.safetensors")
    head, embedding = (f"language_model.{n}.weight" for n in ("lm_head", "model.embed_tokens"))
    tensors[head] = times * tensors[embedding][: len(tensors[head])]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ShearlingError, match="not its embedding") if times > 1 else nullcontext():
        import_teacher(TeacherSettings(model=str(folder)), tmp_path / "out", cache=tmp_path)


def test_a_vision_model_without_its_text_is_refused(vision_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    config = json.loads((vision_model / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(vision_model / "model.safetensors")
    save_file({n: t for n, t in tensors.items() if "q_proj" not in n}, folder / "model.safetensors")
    with pytest.raises(ShearlingError, match="tensors are missing"):
        import_teacher(TeacherSettings(model=str(folder)), tmp_path / "out", cache=tmp_path)
