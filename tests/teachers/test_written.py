"""Text that the teacher writes itself: whose it is, that it is always the same, how it ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoTokenizer, GenerationConfig, LlamaForCausalLM

from pipelines.tiny import make_tiny_llama
from shearling import ShearlingError, read_json, write_json
from teachers.settings import (
    CleanSettings,
    SourceSettings,
    TransferSetSettings,
    WrittenSettings,
)
from teachers.transfer_set import TransferSet, build_transfer_set
from teachers.written import Author, Greedy

WINDOW = 16


def written(**more: Any) -> WrittenSettings:
    return WrittenSettings(**{"tokens": 600, "length": 24, "batch": 8, **more})


def build(
    teacher: Path, out: Path, cache: Path, *, seed: int = 0, clean: Any = None, **more: Any
) -> tuple[dict[str, Any], TransferSet]:
    recipe = TransferSetSettings(
        written=written(**more), window=WINDOW, heldout_windows=2, clean=clean
    )
    facts = build_transfer_set(recipe, teacher, out, seed=seed, cache=cache)
    return facts, TransferSet(out)


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def author(tiny_llama: Path) -> Author:
    return Author(tiny_llama, written(batch=64), WINDOW, seed=3, device="cpu")


# --- what is written ---


def test_a_document_is_the_teachers_own_words_after_a_random_token(
    author: Author, tiny_llama: Path
) -> None:
    """Each token was drawn from what the teacher says next: as surprising as its entropy."""
    ids = torch.from_numpy(author.write(0)).long()
    assert ids.shape == (64, 24)
    assert len(set(ids[:, 0].tolist())) > 40
    model = LlamaForCausalLM.from_pretrained(tiny_llama)
    end = author.tokenizer.eos_token_id
    begun = torch.cat([torch.full((64, 1), end), ids.clamp(min=0)], dim=1)
    with torch.no_grad():
        logits = model(begun).logits[:, 1:-1]
    counted = ids[:, 1:] >= 0
    surprise = -logits.log_softmax(-1).gather(-1, ids[:, 1:, None].clamp(min=0))[counted]
    entropy = torch.distributions.Categorical(logits=logits[counted]).entropy()
    assert surprise.mean() == pytest.approx(entropy.mean().item(), rel=0.1)


def test_a_teacher_in_bin_writes_the_same(author: Author, tiny_llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "bin"))
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    again = Author(folder, written(batch=64), WINDOW, seed=3, device="cpu")
    assert np.array_equal(again.write(0), author.write(0))


def test_what_is_no_token_is_never_written(tiny_llama: Path, tmp_path: Path) -> None:
    """Padding of the vocabulary, and numbers that its tokenizer leaves out."""
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "gaps"))
    data = read_json(folder / "tokenizer.json")
    numbers = data["model"]["vocab"]
    last = max(numbers, key=lambda token: numbers[token])
    before, numbers[last] = numbers[last], numbers[last] + 9
    write_json(folder / "tokenizer.json", data)
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", {**config, "vocab_size": numbers[last] + 5})
    words = Author(folder, written(), WINDOW, seed=3, device="cpu").words.tolist()
    assert words[-1] == numbers[last]
    assert not set(words) & set(range(before, numbers[last]))


def test_a_document_ends_where_the_teacher_ends_it(author: Author) -> None:
    ids, end = np.concatenate([author.write(n) for n in range(4)]), 0
    assert author.tokenizer.eos_token_id == end
    over = ids == -1
    assert over.any()
    assert not over[:, 0].any()
    for row in ids:
        places = np.flatnonzero(row == end)
        assert places.size <= 1
        if places.size:  # nothing comes after it
            assert (row[places[0] + 1 :] == -1).all()
        else:
            assert (row >= 0).all()


def test_a_round_tells_how_far_it_is(author: Author) -> None:
    heard: list[int] = []
    tokens = int((author.write(0, heard.append) >= 0).sum())
    assert heard[0] == 64
    assert heard == sorted(heard)
    assert tokens - 2 * 64 <= heard[-1] <= tokens  # each document's last and its end don't count


def test_the_first_tokens_may_be_the_likeliest(tiny_llama: Path) -> None:
    author = Author(tiny_llama, written(greedy_tokens=3), WINDOW, seed=0, device="cpu")
    ids = torch.from_numpy(author.write(0)).long()
    model = LlamaForCausalLM.from_pretrained(tiny_llama)
    begun = torch.cat([torch.zeros(8, 1).long(), ids.clamp(min=0)], dim=1)
    with torch.no_grad():
        best = model(begun).logits[:, 1:-1].argmax(-1)
    counted = ids[:, 1:] >= 0
    same = (best == ids[:, 1:]) | ~counted
    assert same[:, :3].all()
    assert not same[:, 3:].all()


@given(length=st.integers(1, 6), until=st.integers(0, 6))
@settings(max_examples=30, deadline=None)
def test_greedy_leaves_one_token_up_to_its_length(length: int, until: int) -> None:
    scores = torch.randn(3, 11)
    left = Greedy(until)(torch.zeros(3, length).long(), scores)
    if length >= until:
        assert torch.equal(left, scores)
    else:
        assert torch.equal(left.softmax(-1).argmax(-1), scores.argmax(-1))
        assert (left.softmax(-1).max(-1).values == 1).all()


def test_no_special_token_and_no_padding_of_the_vocabulary_is_written(tmp_path: Path) -> None:
    """Rows beyond the tokenizer's are noise, and a special token inside a text would end it."""
    folder = make_tiny_llama(tmp_path / "padded", initializer_range=0.0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|reserved|>"]})
    tokenizer.save_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(len(tokenizer) + 300)
    model.save_pretrained(folder)
    author = Author(folder, written(batch=200), WINDOW, seed=0, device="cpu")
    ids = author.write(0)  # of a teacher to whom all tokens are alike
    assert ids.max() < len(tokenizer) - 1
    assert (ids == -1).any()


def test_what_the_teacher_recommends_for_chatting_is_no_part_of_its_text(
    tiny_llama: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "teacher")
    how = GenerationConfig(eos_token_id=[0, 7], top_k=1, do_sample=True, repetition_penalty=9.0)
    how.save_pretrained(folder)
    author = Author(folder, written(batch=64), WINDOW, seed=3, device="cpu")
    assert author.ends == {0, 7}  # but where it stops is
    ids = author.write(0)
    assert (ids[:, 1:] != 7).all()
    assert len(np.unique(ids)) > 100


# --- the set ---


def test_the_set_is_made_of_what_was_written(tiny_llama: Path, tmp_path: Path) -> None:
    facts, packed = build(tiny_llama, tmp_path / "set", tmp_path / "cache")
    (source,) = facts["sources"]
    assert source["name"] == "written by the teacher"
    assert source["tokens"] == 600
    assert source["written"]["temperature"] == 1
    assert "The teacher wrote this itself" in facts["notes"][0]
    rounds = sorted((tmp_path / "cache" / "written").rglob("round-*.npy"))
    rows = np.concatenate([np.load(path) for path in rounds])
    known = {tuple(row[row >= 0][:-1]) for row in rows}
    flat = packed.tokens.reshape(-1).astype(int)
    documents = np.split(flat, packed.starts[1:])[:-1]
    assert len(documents) > 10
    cut = [tuple(d[:-1]) for d in documents if tuple(d[:-1]) not in known]
    assert len(cut) <= 1  # the one that makes it exactly so many tokens
    assert all(d[-1] == facts["eos_token_id"] for d in documents)


def test_an_end_that_only_the_length_made_is_not_learnt(tiny_llama: Path, tmp_path: Path) -> None:
    _, packed = build(tiny_llama, tmp_path / "set", tmp_path / "cache")
    rounds = sorted((tmp_path / "cache" / "written").rglob("round-*.npy"))
    rows = np.concatenate([np.load(path) for path in rounds])
    ended = {tuple(row[row >= 0]) for row in rows if (row == 0).any()}
    assert packed.loss_mask is not None
    mask, flat = packed.loss_mask.reshape(-1), packed.tokens.reshape(-1).astype(int)
    seen = set()
    for start, document in zip(packed.starts, np.split(flat, packed.starts[1:]), strict=True):
        if len(document) < 2 or start + len(document) == flat.size:
            continue
        by_itself = tuple(document) in ended
        seen.add(by_itself)
        asks_for_the_end = mask[start + len(document) - 2]
        assert asks_for_the_end == by_itself
        assert mask[start : start + len(document) - 2].all()
    assert seen == {True, False}


def test_the_same_seed_writes_the_same_and_another_one_other_text(
    tiny_llama: Path, tmp_path: Path
) -> None:
    one, _ = build(tiny_llama, tmp_path / "one", tmp_path / "a")
    same, _ = build(tiny_llama, tmp_path / "same", tmp_path / "b")
    other, _ = build(tiny_llama, tmp_path / "other", tmp_path / "a", seed=1)
    assert files(tmp_path / "one") == files(tmp_path / "same")
    assert files(tmp_path / "a") != files(tmp_path / "b")  # two seeds lie side by side
    assert one["sha256"] == same["sha256"] != other["sha256"]


def test_another_teacher_or_another_way_of_writing_is_another_text(
    tiny_llama: Path, tiny_llama_untied: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    build(tiny_llama, tmp_path / "a", cache)
    build(tiny_llama_untied, tmp_path / "b", cache)
    build(tiny_llama, tmp_path / "c", cache, temperature=0.5)
    build(tiny_llama, tmp_path / "d", cache, top_p=0.5)
    build(tiny_llama, tmp_path / "e", cache, tokens=900)  # adds to a
    found = [read_json(path) for path in (cache / "written").rglob("written.json")]
    assert len(found) == 4
    assert len({identity["teacher"] for identity in found}) == 2


def test_more_tokens_go_on_from_what_is_there(tiny_llama: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    build(tiny_llama, tmp_path / "few", cache)
    before = files(cache)
    build(tiny_llama, tmp_path / "many", cache, tokens=1500)
    after = files(cache)
    assert before.items() < after.items()


def test_a_damaged_round_is_written_again(tiny_llama: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    build(tiny_llama, tmp_path / "one", cache)
    before = files(cache)
    first = next(cache.rglob("round-00000.npy"))
    first.write_bytes(first.read_bytes()[:200])
    build(tiny_llama, tmp_path / "two", cache)
    assert files(cache) == before
    assert files(tmp_path / "one") == files(tmp_path / "two")


BUILD = """
import sys, torch
from pathlib import Path
torch.set_num_threads(1)
from teachers.settings import TransferSetSettings, WrittenSettings
from teachers.transfer_set import build_transfer_set
recipe = TransferSetSettings(
    written=WrittenSettings(tokens=6000, length=64, batch=8), window=16, heldout_windows=2
)
teacher, out, cache = map(Path, sys.argv[1:])
build_transfer_set(recipe, teacher, out, seed=0, cache=cache)
"""


def test_a_writer_that_is_killed_goes_on_to_the_same_bytes(
    tiny_llama: Path, tmp_path: Path
) -> None:
    def writer(name: str, cache: str) -> subprocess.Popen[bytes]:
        arguments = [str(tiny_llama), str(tmp_path / name), str(tmp_path / cache)]
        root = str(Path(__file__).parents[2])
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
        return subprocess.Popen([sys.executable, "-c", BUILD, *arguments], env=environment)

    assert writer("whole", "whole-cache").wait(120) == 0
    for rounds in (1, 4):
        process = writer("killed", "cache")
        deadline = time.monotonic() + 120
        while len(list((tmp_path / "cache").rglob("round-*.npy"))) < rounds:
            assert time.monotonic() < deadline
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        shutil.rmtree(tmp_path / "killed", ignore_errors=True)  # as the store does
    assert writer("killed", "cache").wait(120) == 0
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    kept = {name for name in files(tmp_path / "cache") if "/." not in name}
    assert kept == set(files(tmp_path / "whole-cache"))


def test_it_stands_beside_other_sources(tiny_llama: Path, tiny_text: Path, tmp_path: Path) -> None:
    given = SourceSettings(name="grammar", path=str(tiny_text), weight=1)
    recipe = TransferSetSettings(
        sources=(given,), written=written(), tokens=1600, window=WINDOW, heldout_windows=2
    )
    facts = build_transfer_set(recipe, tiny_llama, tmp_path / "set", seed=0, cache=tmp_path / "c")
    assert [(s["name"], s["tokens"]) for s in facts["sources"]] == [
        ("grammar", 1000),
        ("written by the teacher", 600),
    ]
    assert set(TransferSet(tmp_path / "set").window_owners().tolist()) == {0, 1}


def test_it_is_cleaned_like_other_text(tiny_llama: Path, tmp_path: Path) -> None:
    pytest.importorskip("datatrove")
    author = Author(tiny_llama, written(), WINDOW, seed=0, device="cpu")
    assert author.length == 24
    facts, _ = build(
        tiny_llama, tmp_path / "set", tmp_path / "c", clean=CleanSettings(exact_duplicates=True)
    )
    assert facts["cleaning"]["documents_before"] >= 25
    assert facts["cleaning"]["tokens_before"] >= 600


# --- what can't be ---


def test_a_teacher_that_writes_one_token_breaks_nothing(tmp_path: Path) -> None:
    folder = make_tiny_llama(tmp_path / "parrot", initializer_range=0.0)
    model = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.norm.weight.fill_(1.0)
        model.model.embed_tokens.weight[:] = 0.01
        model.model.embed_tokens.weight[65] = 1.0
    model.save_pretrained(folder)
    facts, packed = build(folder, tmp_path / "set", tmp_path / "cache")
    assert facts["sources"][0]["documents"] >= 25
    assert (packed.tokens == 65).mean() > 0.8


def test_a_teacher_that_writes_only_blanks_is_told_of(tmp_path: Path) -> None:
    folder = make_tiny_llama(tmp_path / "blank")
    author = Author(folder, written(), WINDOW, seed=0, device="cpu")
    blank = author.tokenizer(" ").input_ids[0]
    from teachers.written import WrittenSource

    source = WrittenSource(
        written(), folder, tmp_path / "cache", window=WINDOW, seed=0, device="cpu"
    )
    source.folder.mkdir(parents=True)
    np.save(source.folder / "round-00000.npy", np.full((8, 24), blank, np.int32))
    with pytest.raises(ShearlingError, match="of 8 documents none has a word"):
        source.tokenise(tmp_path / "x.ids", lambda *_, **__: None)
    assert source.empty == 8


def test_a_teacher_without_an_end_of_text_cannot_write(tiny_llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "endless")
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config.pop("eos_token")
    path.write_text(json.dumps(config))
    with pytest.raises(ShearlingError, match="no EOS token") as caught:
        build(folder, tmp_path / "set", tmp_path / "cache")
    assert "eos_token" in caught.value.hint
    with pytest.raises(ShearlingError, match="can't write"):
        Author(folder, written(), WINDOW, seed=0, device="cpu")


def test_documents_cannot_be_longer_than_the_teachers_context(
    tiny_llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(ShearlingError, match=r"written\.length is 513") as caught:
        build(tiny_llama, tmp_path / "set", tmp_path / "cache", length=513)
    assert "512 or less" in caught.value.hint
    assert WrittenSettings().longest(WINDOW, 512) == 4 * WINDOW
    assert WrittenSettings().longest(256, 512) == 512


def test_too_little_text_says_what_to_raise(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ShearlingError) as caught:
        build(tiny_llama, tmp_path / "set", tmp_path / "cache", tokens=20)
    assert "written.tokens" in caught.value.hint


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "neither sources nor written"),
        ({"sources": []}, "neither sources nor written"),
        ({"written": {}, "tokens": 9}, "written.tokens"),
        ({"written": {"temperature": 0}}, "greater than 0"),
        (
            {"written": {}, "sources": [{"name": "written by the teacher", "path": "x"}]},
            "two sources have the name",
        ),
        (
            {"written": {}, "tokens": 9, "sources": [{"name": "x", "path": "x", "weight": 1}]},
            "nothing is left",
        ),
    ],
)
def test_settings_that_do_not_fit(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TransferSetSettings.model_validate(given)


def test_a_set_of_others_text_is_described_as_before() -> None:
    """So no finished run is made again."""
    bare = TransferSetSettings(sources=(SourceSettings(name="x", path="x"),))
    assert "written" not in bare.model_dump(mode="json")
    assert TransferSetSettings.model_validate(bare.model_dump()) == bare
    given = TransferSetSettings(written=WrittenSettings())
    assert TransferSetSettings.model_validate(given.model_dump()) == given
