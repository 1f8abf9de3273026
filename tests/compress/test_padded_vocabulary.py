"""Teacher and student of one family whose vocabularies are padded to different sizes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from padding import padded
from transformers import LlamaForCausalLM

from compress.answers import Taught, first_teacher
from compress.course import open_course
from compress.data import vocabulary_of
from compress.distill import _batches as step_batches
from compress.distill import distill
from compress.on_policy import continued
from compress.prune import prune
from compress.search import search
from compress.settings import DistillSettings, PruneSettings
from pipelines.tiny import make_tiny_llama
from shearling import ShearlingError, read_json, silent
from students.shape import resolve_shape
from teachers.checkpoint import Checkpoint
from teachers.tokenizer import (
    TOKENIZER_FILES,
    check_same_tokenizer,
    ids_fingerprint,
    load_tokenizer,
    token_count,
)
from teachers.transfer_set import TransferSet


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


OBJECTIVES: dict[str, dict[str, Any]] = {
    "live": {"cross_entropy": 0.5},
    "mixture": {"reverse_kl": 0.5, "jensen_shannon": 0.5, "temperature": 2.0},
    "labels alone": {"forward_kl": 0.0, "cross_entropy": 1.0},
    "top_k": {"targets": "top_k", "target_slots": 256},
    "sample": {"targets": "sample", "cross_entropy": 0.5},
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_padding_of_both_has_no_part_in_anything(
    name: str, tiny_llama: Path, tiny_student: Path, tiny_transfer_set: Path, tmp_path: Path
) -> None:
    """The student of a padded teacher is padded alike, for pruning keeps the vocabulary."""
    both = padded(tiny_llama, tmp_path / "teacher", 40), padded(tiny_student, tmp_path / "cut", 40)
    runs = {"plain": (tiny_llama, tiny_student), "padded": both}
    chosen = DistillSettings(
        tokens=512, batch_tokens=128, precision="float32", evaluate_every=2, **OBJECTIVES[name]
    )
    for kind, (teacher, student) in runs.items():
        cache = tmp_path / f"cache-{kind}"
        distill(teacher, student, tmp_path / kind, tiny_transfer_set, chosen, cache=cache)
    plain, wide = (numbers(tmp_path / kind) for kind in runs)
    assert len(plain) == 7
    for line, wanted in zip(wide, plain, strict=True):
        assert line == pytest.approx(wanted, rel=1e-4)
    taught = [LlamaForCausalLM.from_pretrained(tmp_path / kind / "model") for kind in runs]
    weights, rows = [dict(model.named_parameters()) for model in taught], taught[0].vocab_size
    assert len(weights[1]["model.embed_tokens.weight"]) == rows + 40
    for key, weight in weights[0].items():
        torch.testing.assert_close(weights[1][key][: len(weight)], weight, rtol=0, atol=1e-5)


def numbers(out: Path) -> list[dict[str, float]]:
    """The lines of a run without what a clock says."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    clocks = {"seconds", "tokens_per_second"}
    return [{key: line[key] for key in line.keys() - clocks} for line in lines]


def test_live_and_kept_answers_of_padded_models_are_the_same(
    tiny_llama: Path, tiny_student: Path, tiny_transfer_set: Path, tmp_path: Path
) -> None:
    teacher = padded(tiny_llama, tmp_path / "teacher", 40)
    student = padded(tiny_student, tmp_path / "student", 40)
    chosen = {"tokens": 128, "batch_tokens": 128, "precision": "float32"}
    for name, how in (("live", {}), ("kept", {"targets": "sample", "target_slots": 256})):
        settings = DistillSettings(**chosen, **how)
        cache = tmp_path / "cache"
        distill(teacher, student, tmp_path / name, tiny_transfer_set, settings, cache=cache)
    live, kept = numbers(tmp_path / "live"), numbers(tmp_path / "kept")
    assert kept[0] == live[0]
    assert kept[1]["cross_entropy"] == pytest.approx(live[1]["cross_entropy"], rel=1e-6)
    assert kept[1]["forward_kl"] == pytest.approx(live[1]["forward_kl"], rel=0.02)  # a sample


def test_labels_alone_know_no_padding_either(
    tiny_student: Path, tiny_transfer_set: Path, tmp_path: Path
) -> None:
    wide = padded(tiny_student, tmp_path / "wide", 40)
    chosen = DistillSettings(tokens=256, batch_tokens=128, precision="float32", cross_entropy=1.0)
    for name, student in (("plain", tiny_student), ("padded", wide)):
        distill(None, student, tmp_path / name, tiny_transfer_set, chosen)
    plain, found = numbers(tmp_path / "plain"), numbers(tmp_path / "padded")
    for line, wanted in zip(found, plain, strict=True):
        assert line == pytest.approx(wanted, rel=1e-4)


WAYS_TO_PRUNE: dict[str, dict[str, Any]] = {
    "activation": {},
    "taylor": {"importance": "taylor"},
    "divergence": {"depth": "divergence"},
    "dims": {"basis": "dims"},
    "merged": {"merge": "least_squares"},
    "split": {"merge": "split"},
}


@pytest.mark.parametrize("way", WAYS_TO_PRUNE)
def test_padding_has_no_say_in_what_is_pruned(
    way: str,
    tiny_llama: Path,
    tiny_llama_untied: Path,
    tiny_transfer_set: Path,
    tmp_path: Path,
) -> None:
    axes: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 3, "intermediate_size": 40}
    source = tiny_llama
    if "merge" in WAYS_TO_PRUNE[way]:
        axes["tie_word_embeddings"] = True
        source = tiny_llama_untied
    settings = PruneSettings(calibration_tokens=1024, precision="float32", **WAYS_TO_PRUNE[way])
    found: list[dict[str, torch.Tensor]] = []
    wide = padded(source, tmp_path / "wide", 40)
    for number, teacher in enumerate((source, wide)):
        out, shape = tmp_path / str(number), resolve_shape(axes, Checkpoint(teacher).shape)
        prune(teacher, out, shape, tiny_transfer_set, settings, seed=0)
        student = LlamaForCausalLM.from_pretrained(out / "model")
        found.append(dict(student.named_parameters()))
    for name, weight in found[0].items():
        torch.testing.assert_close(found[1][name][: len(weight)], weight, rtol=1e-3, atol=1e-4)


def test_padding_has_no_say_in_a_search(
    tiny_llama: Path, tiny_transfer_set: Path, tmp_path: Path
) -> None:
    settings, scores = PruneSettings(calibration_tokens=512, precision="float32"), []
    for teacher in (tiny_llama, padded(tiny_llama, tmp_path / "wide", 40)):
        shape = resolve_shape({"intermediate_size": 40}, Checkpoint(teacher).shape)
        out = tmp_path / f"search-{len(scores)}"
        scores += search(teacher, out, [shape], tiny_transfer_set, settings, tokens=512, seed=0)
    assert scores[1]["kl"] == pytest.approx(scores[0]["kl"], rel=1e-3)


@pytest.mark.parametrize("by", ["student", "teacher"])
def test_nobody_writes_padding(
    by: str, tiny_llama: Path, tiny_student: Path, tiny_transfer_set: Path, tmp_path: Path
) -> None:
    course = open_course(
        [Taught(padded(tiny_llama, tmp_path / "teacher", 40))],
        padded(tiny_student, tmp_path / "student", 40),
        TransferSet(tiny_transfer_set),
        DistillSettings(tokens=512, batch_tokens=256, on_policy=1.0, on_policy_writer=by),
        selection=None,
        seed=0,
        device=torch.device("cpu"),
        cache=tmp_path,
        checkpoint=None,
        progress=silent,
    )
    (read,), (written,) = course.data.step(0), step_batches(course)
    tokens = course.student.vocab_size - 40
    assert written.input_BT.max() < tokens
    assert not torch.equal(written.input_BT, read.input_BT)
    how: dict[str, Any] = {"share": 1.0, "temperature": 1.0, "seed": [0]}
    how["precision"] = course.precision
    writer = course.student if by == "student" else first_teacher(course.answers)
    assert continued(writer, read, **how).input_BT.max() >= tokens, "they are inclined to"


def test_models_without_a_tokenizer_go_by_the_text_s(
    tiny_llama: Path, tiny_student: Path, tiny_transfer_set: Path, tmp_path: Path
) -> None:
    teacher = padded(tiny_llama, tmp_path / "teacher", 40)
    for name in TOKENIZER_FILES:
        (teacher / name).unlink(missing_ok=True)
    losses = [
        first_loss(folder, tiny_student, tiny_transfer_set, tmp_path / folder.name, targets=kind)
        for folder, kind in ((tiny_llama, "live"), (teacher, "live"))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_token_s_number_may_be_beyond_how_many_there_are(
    tiny_llama: Path, tiny_student: Path, tiny_transfer_set: Path, tmp_path: Path
) -> None:
    """Numbers left out among the tokens; the row of the last one is none of padding."""
    folders = [padded(f, tmp_path / f"{n}", 40) for n, f in enumerate((tiny_llama, tiny_student))]
    text = TransferSet(tiny_transfer_set)
    count = token_count(load_tokenizer(tiny_llama))
    assert count == text.facts["vocabulary"] == vocabulary_of(folders, text)
    path = folders[0] / "tokenizer.json"
    data = json.loads(path.read_text())
    last = max(data["model"]["vocab"], key=lambda token: data["model"]["vocab"][token])
    data["model"]["vocab"][last] = count + 9
    path.write_text(json.dumps(data))
    tokenizer = load_tokenizer(folders[0])
    assert len(tokenizer) == count
    assert token_count(tokenizer) == count + 10 == vocabulary_of(folders, text)
    assert vocabulary_of([folders[0], tiny_student], text) == count, "no more than all have"


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
    ids = [ids_fingerprint(load_tokenizer(f)) for f in (
        newer, llama3, shared_data / "tokenizers/llama2")]  # fmt: skip
    assert ids[0] == ids[1] != ids[2]
    with pytest.raises(ShearlingError, match="different tokenizers: 32,000 tokens in"):
        check_same_tokenizer(shared_data / "tokenizers/llama2", llama3)


def test_another_chat_template_is_no_other_tokenizer(tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_llama, tmp_path / "chat")
    (tmp_path / "chat" / "chat_template.jinja").write_text("{{ messages }}")
    check_same_tokenizer(tiny_llama, tmp_path / "chat")
