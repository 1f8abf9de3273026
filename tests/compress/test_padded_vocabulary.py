"""Teacher and student of one family whose vocabularies are padded to different sizes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from compress.distill import distill
from compress.settings import DistillSettings
from pipelines.tiny import make_tiny_llama
from shearling import ShearlingError, read_json
from teachers.tokenizer import check_same_tokenizer, copy_tokenizer, load_tokenizer


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


def first_loss(teacher: Path, student: Path, text: Path, out: Path, **settings: object) -> float:
    chosen = DistillSettings(
        tokens=256, batch_tokens=128, precision="float32", evaluate_every=0, **settings
    )
    distill(teacher, student, out, text, chosen, cache=out / "cache")
    lines = (out / "metrics.jsonl").read_text().splitlines()
    assert read_json(out / "model" / "config.json")["vocab_size"]
    return next(
        float(line.split('"loss": ')[1].split(",")[0]) for line in lines if '"loss"' in line
    )


@pytest.mark.parametrize("targets", ["live", "sample"])
def test_padding_of_the_teacher_has_no_part_in_the_loss(
    targets: str,
    tiny_llama: Path,
    tiny_student: Path,
    tiny_transfer_set: Path,
    tmp_path: Path,
) -> None:
    wide = padded(tiny_llama, tmp_path / "wide", 40)
    check_same_tokenizer(wide, tiny_student)
    losses = [
        first_loss(teacher, tiny_student, tiny_transfer_set, tmp_path / name, targets=targets)
        for name, teacher in (("plain", tiny_llama), ("padded", wide))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_padded_student_learns_from_a_plain_teacher(
    tiny_llama: Path, tiny_student: Path, tiny_transfer_set: Path, tmp_path: Path
) -> None:
    wide = padded(tiny_student, tmp_path / "wide", 8)
    plain = first_loss(tiny_llama, tiny_student, tiny_transfer_set, tmp_path / "plain")
    assert first_loss(tiny_llama, wide, tiny_transfer_set, tmp_path / "padded") == pytest.approx(
        plain, rel=1e-5
    )


def test_another_tokenizer_is_refused_with_what_would_work(
    tiny_llama: Path, tmp_path: Path
) -> None:
    other = make_tiny_llama(tmp_path / "other", vocabulary=300)
    with pytest.raises(ShearlingError, match="different tokenizers") as caught:
        check_same_tokenizer(other, tiny_llama)
    assert "prune stage" in caught.value.hint


def renamed(folder: Path, out: Path, added: dict[str, int]) -> Path:
    """A copy of a model whose special tokens have other names."""
    shutil.copytree(folder, out)
    path = out / "tokenizer.json"
    data = json.loads(path.read_text())
    kept = {token["content"] for token in data["added_tokens"]}
    data["model"]["vocab"] = {t: i for t, i in data["model"]["vocab"].items() if t not in kept}
    for token in data["added_tokens"]:
        token["content"] = next((t for t, i in added.items() if i == token["id"]), token["content"])
    path.write_text(json.dumps(data))
    return out


def test_renamed_special_tokens_are_no_other_tokenizer(shared_data: Path, tmp_path: Path) -> None:
    """Llama 3.1 named some of Llama 3's reserved tokens and numbered the others anew."""
    llama3 = shared_data / "tokenizers/llama3"
    names = {"<|finetune_right_pad_id|>": 128004, "<|eom_id|>": 128008, "<|python_tag|>": 128010}
    newer = renamed(llama3, tmp_path / "newer", names)
    tokenizer = load_tokenizer(newer)
    assert tokenizer.convert_ids_to_tokens(128008) == "<|eom_id|>"
    assert tokenizer.get_vocab() != load_tokenizer(llama3).get_vocab()
    check_same_tokenizer(newer, llama3)
    check_same_tokenizer(llama3, newer)
    with pytest.raises(ShearlingError, match="different tokenizers: 32,000 tokens in"):
        check_same_tokenizer(shared_data / "tokenizers/llama2", llama3)


def test_another_chat_template_is_no_other_tokenizer(tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_llama, tmp_path / "chat")
    (tmp_path / "chat" / "chat_template.jinja").write_text("{{ messages }}")
    check_same_tokenizer(tiny_llama, tmp_path / "chat")
