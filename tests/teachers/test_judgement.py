"""What the teacher thinks of texts: its hidden states and losses, and what is made of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from pipelines.tiny import make_tiny_llama, tiny_documents
from shearling import ShearlingError, silent
from teachers.conversations import ChatTemplate
from teachers.judgement import (
    Reader,
    _taught,
    alike,
    bad_texts,
    directions,
    excerpt,
    same_meaning,
)
from teachers.settings import ClassifierSettings


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("teacher"), steps=30)


@pytest.fixture(scope="module")
def reader(folder: Path) -> Reader:
    return Reader(folder, "cpu", silent)


def ids_of(folder: Path, texts: list[str]) -> list[np.ndarray]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [np.array(tokenizer(text).input_ids, np.uint32) for text in texts]


def test_padding_changes_neither_states_nor_losses(folder: Path, reader: Reader) -> None:
    documents = ids_of(folder, tiny_documents(20, seed=5))
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    means, losses = reader.meanings(documents), reader.losses(documents)
    for ids, mean, loss in zip(documents, means, losses, strict=True):
        alone = torch.from_numpy(ids.astype(np.int64))[None, :256]
        with torch.no_grad():
            hidden = model.model(alone).last_hidden_state[0].mean(0)
            expected = model(alone, labels=alone).loss
        assert np.allclose(mean, hidden.numpy(), atol=1e-4)
        assert loss == pytest.approx(float(expected), abs=1e-4)


def test_copies_mean_the_same_and_others_do_not(folder: Path, reader: Reader) -> None:
    texts = tiny_documents(40, seed=6)
    documents = ids_of(folder, [*texts, *texts[:5]])
    doomed = same_meaning(reader, documents, 0.999, seed=0)
    assert doomed.tolist() == [False] * 40 + [True] * 5


@pytest.mark.parametrize("group", [4096, 64])
def test_near_copies_are_found_in_groups_too(group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teachers.judgement._GROUP", group)
    draw = np.random.default_rng(0)
    first = draw.normal(size=(300, 32)).astype(np.float32)
    near = first[:50] + 0.02 * draw.normal(size=(50, 32)).astype(np.float32)
    # A mean and a direction that all share would make everything alike.
    shared = 30 * draw.normal(size=(1, 32)) + draw.normal(size=(350, 1)) * draw.normal(size=(1, 32))
    found = alike(directions((np.concatenate([first, near]) + shared).astype(np.float32)), 0.95, 0)
    assert found[300:].mean() > (0.9 if group == 64 else 0.99)
    assert not found[:300].any()


def test_the_classifier_learns_what_the_teacher_dislikes(folder: Path, reader: Reader) -> None:
    good = tiny_documents(150, seed=7)
    draw = np.random.default_rng(1)
    bad = ["".join(draw.permutation(list(text)))[:120] for text in good[:40]]
    texts = good + bad
    documents = ids_of(folder, texts)
    numbers = np.arange(len(texts))
    settings = ClassifierSettings(sample=150, keep=0.8)
    doomed, facts = bad_texts(
        reader, numbers, lambda: texts, lambda some: [documents[n] for n in some], settings, seed=0
    )
    assert facts["used"]
    assert facts["heldout_auc"] > 0.7
    assert doomed[150:].mean() > 0.8
    assert doomed[:150].mean() < 0.1


def test_what_can_not_be_learnt_removes_nothing() -> None:
    texts = tiny_documents(200, seed=8)
    labels = np.random.default_rng(2).random(200) < 0.25
    _, auc = _taught(texts, labels, seed=0)
    assert abs(auc - 0.5) < 0.2


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_few_documents_teach_nothing(folder: Path, reader: Reader, count: int) -> None:
    texts = tiny_documents(count, seed=9)
    documents = ids_of(folder, texts)
    doomed, facts = bad_texts(
        reader,
        np.arange(count),
        lambda: texts,
        lambda some: [documents[n] for n in some],
        ClassifierSettings(),
        seed=0,
    )
    assert not facts["used"]
    assert not doomed.any()


def test_a_teacher_without_template_can_not_be_asked(reader: Reader) -> None:
    with pytest.raises(ShearlingError, match="no chat template"):
        reader.recommendations(["a text"])


def test_a_document_is_shown_in_part_and_can_not_end_its_turn(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.chat_template = "{{ messages[0].content }}"
    template = ChatTemplate(tokenizer, folder)
    assert excerpt("a short text", template) == "a short text"
    assert excerpt("so <|im_end|> it ends", template) == "so < |im_end|> it ends"
    for long in ("美洲驼是一种动物。" * 7000, "1,2,3," * 15_000, "a word " * 5000):
        shown = excerpt(long, template)
        assert 100 < len(tokenizer(shown, add_special_tokens=False)["input_ids"]) <= 2 * 768
        assert long.startswith(shown[:200].rstrip("\N{REPLACEMENT CHARACTER}"))
