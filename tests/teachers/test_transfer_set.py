"""The transfer set: what is in it, in which order, and what is said of text that can't be read."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from pipelines.tiny import make_tiny_llama, tiny_documents
from shearling import ShearlingError
from teachers.heldout import is_reserved
from teachers.readers import (
    dataset_documents,
    detokenize,
    documents,
    is_data_set,
    local_files,
)
from teachers.settings import SourceSettings, TransferSetSettings
from teachers.transfer_set import TransferSet, _positions, build_transfer_set

WINDOW = 16


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tokenizer"))


def source(path: Path | str, name: str = "text", **more: Any) -> SourceSettings:
    return SourceSettings(name=name, path=str(path), **more)


def build(
    tokenizer: Path,
    out: Path,
    *sources: SourceSettings,
    seed: int = 0,
    window: int = WINDOW,
    heldout: int = 4,
) -> tuple[dict[str, Any], TransferSet]:
    recipe = TransferSetSettings(sources=sources, window=window, heldout_windows=heldout)
    facts = build_transfer_set(recipe, tokenizer, out, seed=seed, cache=out.parent / "cache")
    return facts, TransferSet(out)


def split(tokens: np.ndarray, starts: np.ndarray) -> list[list[int]]:
    """The documents of a packed array, the unfinished last one left out."""
    flat = tokens.reshape(-1).astype(int)
    return [part.tolist() for part in np.split(flat, starts[1:])][:-1]


def write_jsonl(path: Path, texts: list[str], **more: Any) -> Path:
    path.write_text("".join(json.dumps({"text": t, **more}) + "\n" for t in texts))
    return path


# --- what is in it ---


def test_documents_are_whole_in_seeded_order_and_end_with_eos(
    tokenizer: Path, tiny_text: Path, tmp_path: Path
) -> None:
    facts, packed = build(tokenizer, tmp_path / "set", source(tiny_text))
    encode = AutoTokenizer.from_pretrained(tokenizer)
    texts = [json.loads(line)["text"] for line in tiny_text.read_text().splitlines()]
    expected = {(*encode(text).input_ids, encode.eos_token_id) for text in texts}
    trained = [tuple(ids) for ids in split(packed.tokens, packed.starts)]
    assert set(trained) <= expected
    assert len(trained) == len(set(trained)) > 200
    in_file_order = [t for t in expected if t in trained]
    assert trained != in_file_order
    heldout = [ids[:-1] for ids in split(packed.heldout, packed.heldout_starts)]
    assert heldout
    for ids in heldout:  # a cut document is the beginning of one, and not trained on
        mine = [text for text in expected if list(text[: len(ids)]) == ids]
        assert mine
        assert not any(text in trained for text in mine)
    assert packed.tokens.dtype == np.uint16
    assert packed.tokens.shape == (facts["windows"], WINDOW)
    assert packed.heldout.shape == (4, WINDOW)


def test_the_same_settings_give_the_same_bytes_and_another_seed_others(
    tokenizer: Path, tiny_text: Path, tmp_path: Path
) -> None:
    first, _ = build(tokenizer, tmp_path / "a", source(tiny_text))
    second, _ = build(tokenizer, tmp_path / "b", source(tiny_text))
    other, _ = build(tokenizer, tmp_path / "c", source(tiny_text), seed=1)
    assert first["sha256"] == second["sha256"] != other["sha256"]
    arrays = ("tokens.npy", "document_starts.npy", "document_sources.npy")
    arrays += tuple(f"heldout_{name}" for name in arrays)
    for name in arrays:
        a, b = (tmp_path / folder / name for folder in "ab")
        assert a.read_bytes() == b.read_bytes()
    assert {p.name for p in (tmp_path / "a").iterdir()} == {*arrays, "transfer_set.json"}


def test_every_format_gives_the_same_set(tokenizer: Path, tmp_path: Path) -> None:
    texts = tiny_documents(120, seed=3)
    rows = [{"text": t, "title": f"t{i}"} for i, t in enumerate(texts)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    files: dict[str, dict[str, Any]] = {
        "a.jsonl": {},
        "a.jsonl.gz": {},
        "a.json": {},
        "titles.json": {},
        "a.parquet": {},
        "a.jsonl.zst": {},
        "a.feather": {},
        "stream.arrow": {},
        "B.JSONL.GZ": {},
        "B.JSONL.ZST": {},
        "renamed": {"format": "jsonl"},
        "folder": {},
    }
    (tmp_path / "a.jsonl").write_text(lines)
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write(lines)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "titles.json").write_text(json.dumps({row["title"]: row for row in rows}))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=50)
    table = pa.Table.from_pylist(rows)
    half = len(lines) // 2  # two frames, as of a file that was compressed in parallel
    frames = [
        pa.compress(part.encode(), "zstd", asbytes=True) for part in (lines[:half], lines[half:])
    ]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(frames))
    pa.feather.write_feather(table, tmp_path / "a.feather")
    with pa.ipc.new_stream(tmp_path / "stream.arrow", table.schema) as stream:
        stream.write_table(table, max_chunksize=50)
    for ending in ("jsonl.gz", "jsonl.zst"):
        shutil.copyfile(tmp_path / f"a.{ending}", tmp_path / f"B.{ending.upper()}")
    (tmp_path / "renamed").write_text(lines)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "1.jsonl").write_text("".join(lines.splitlines(True)[:50]))
    (tmp_path / "folder" / "2.jsonl").write_text("".join(lines.splitlines(True)[50:]))
    (tmp_path / "folder" / "notes.csv").write_text("not text")
    hashes = {
        name: build(tokenizer, tmp_path / f"out-{name}", source(tmp_path / name, **more))[0]
        for name, more in files.items()
    }
    assert len({facts["sha256"] for facts in hashes.values()}) == 1
    assert all(facts["sources"][0]["documents"] == 120 for facts in hashes.values())


def test_a_token_s_number_may_be_beyond_how_many_there_are(
    tokenizer: Path, tiny_text: Path, tmp_path: Path
) -> None:
    """Few tokens, the last one with a number that 16 bits don't hold."""
    folder, last = Path(shutil.copytree(tokenizer, tmp_path / "gaps")), 1 << 16
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text())
    numbers = data["model"]["vocab"]
    before, numbers["Ġthe"] = numbers["Ġthe"], last
    path.write_text(json.dumps(data))
    _, close = build(tokenizer, tmp_path / "close", source(tiny_text))
    facts, far = build(folder, tmp_path / "far", source(tiny_text))
    assert facts["vocabulary"] == last + 1
    tokens = close.tokens.astype(int)
    assert (tokens == before).any()
    assert np.array_equal(far.tokens, np.where(tokens == before, last, tokens))


def test_plain_text_is_cut_at_blank_lines_and_nothing_is_lost(tmp_path: Path) -> None:
    texts = tiny_documents(400)
    path = tmp_path / "a.txt"
    path.write_text("\ufeff" + "\n\n".join(texts) + "\n")
    pieces = [d.text for d in documents(path, "text", source(path))]
    assert 10 < len(pieces) < 40
    assert "\n\n".join(pieces) == "\n\n".join(texts)


def test_a_file_is_one_document_if_asked(tokenizer: Path, tmp_path: Path) -> None:
    texts, folder = tiny_documents(300), tmp_path / "texts"
    folder.mkdir()
    for number in range(30):
        (folder / f"{number}.txt").write_text("\n\n".join(texts[number::3]))
    asked = source(folder, documents="files")
    path = folder / "7.txt"
    (whole,) = documents(path, "text", asked)
    assert whole.text == path.read_text()
    pieces, _ = build(tokenizer, tmp_path / "pieces", source(folder))
    files, _ = build(tokenizer, tmp_path / "files", asked)
    assert pieces["sources"][0]["documents"] > files["sources"][0]["documents"] == 30
    assert "documents" not in source(folder).model_dump()  # keys of earlier runs hold
    assert SourceSettings(**asked.model_dump()) == asked


def test_documents_are_files_of_plain_text_only(tokenizer: Path, tmp_path: Path) -> None:
    for more in ({"format": "jsonl"}, {"messages": "m"}):
        with pytest.raises(ValueError, match="documents: files is for plain text"):
            source("a", documents="files", **more)
    with pytest.raises(ShearlingError, match="owner/texts is a data set, not files"):
        build(tokenizer, tmp_path / "set", source("owner/texts", documents="files"))
    path = write_jsonl(tmp_path / "a.jsonl", ["a"])
    with pytest.raises(ShearlingError, match="has no plain text"):
        build(tokenizer, tmp_path / "set", source(path, documents="files"))


def test_a_line_without_end_does_not_become_one_huge_document(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("word " * 50_000)
    pieces = [d.text for d in documents(path, "text", source(path))]
    assert max(map(len, pieces)) <= 1 << 16
    assert "".join(pieces) == "word " * 50_000


def test_datasets_are_opened(tokenizer: Path, tmp_path: Path) -> None:
    from datasets import Dataset

    rows = Dataset.from_dict({"body": tiny_documents(100)})
    rows.save_to_disk(tmp_path / "saved")
    (tmp_path / "plain").mkdir()
    rows.to_parquet(tmp_path / "plain" / "train.parquet")
    for name in ("saved", "plain"):
        settings_ = source(tmp_path / name, format="dataset", field="body", tokens=900)
        facts, _ = build(tokenizer, tmp_path / f"out-{name}", settings_)
        assert facts["sources"][0]["tokens"] == 900


@pytest.mark.parametrize("form", ["auto", "arrow", "dataset"])
def test_of_a_saved_data_set_the_split_is_read(tmp_path: Path, form: Any) -> None:
    from datasets import Dataset, DatasetDict

    splits = {name: Dataset.from_dict({"text": [f"a {name} text"]}) for name in ("train", "test")}
    DatasetDict(splits).save_to_disk(tmp_path / "saved")
    for name in splits:
        asked = source(tmp_path / "saved", format=form, split=name)
        assert is_data_set(asked)
        assert [d.text for d in dataset_documents(asked, seed=0)] == [f"a {name} text"]
    with pytest.raises(ShearlingError, match="has no split 'dev'") as caught:
        list(dataset_documents(source(tmp_path / "saved", format=form, split="dev"), seed=0))
    assert "train, test" in caught.value.hint


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"),
        ("train.parquet", "deep/validation.parquet"),
        ("train/0.parquet", "Test/0.parquet"),
    ],
)
def test_a_folder_of_several_splits_is_not_read_as_one(
    tokenizer: Path, tmp_path: Path, train: str, test: str
) -> None:
    """A data set as the hub gives it: its card is no text, and its test split no training."""
    folder = tmp_path / "copy"
    texts = dict(zip((train, test), (tiny_documents(100), ["kept for tests"]), strict=True))
    for name, rows in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"text": rows}), folder / name)
    (folder / "README.md").write_text("# The card")
    with pytest.raises(ShearlingError, match=r"holds several splits: (test, train|train, val)"):
        build(tokenizer, tmp_path / "set", source(folder))
    (folder / test).unlink()
    assert [path.name for path in local_files(source(folder))] == [Path(train).name]
    facts, _ = build(tokenizer, tmp_path / "set", source(folder))
    assert facts["sources"][0]["documents"] == 100


def test_what_names_no_split_may_be_called_anything(tmp_path: Path) -> None:
    for name in ("a test.txt", "train ride.md"):
        (tmp_path / name).write_text("text")
    assert len(local_files(source(tmp_path))) == 2
    for name in ("train-test.jsonl", "train-0.jsonl"):
        write_jsonl(tmp_path / name, ["text"])
    assert len(local_files(source(tmp_path))) == 3  # the Markdown tells of the tables


def test_large_vocabularies_get_wide_integers(
    shared_data: Path, tiny_text: Path, tmp_path: Path
) -> None:
    folder = shared_data / "tokenizers/llama3"
    facts, packed = build(folder, tmp_path / "set", source(tiny_text))
    assert packed.tokens.dtype == np.uint32
    bos, eos = 128000, facts["eos_token_id"]
    encode = AutoTokenizer.from_pretrained(folder)
    first = split(packed.tokens, packed.starts)[0]
    assert first[-1] == eos
    # BOS is there exactly if the tokenizer itself puts it.
    assert (first[0] == bos) == (encode("a").input_ids[0] == bos)


def test_bos_is_kept_where_the_tokenizer_adds_it(
    shared_data: Path, tiny_text: Path, tmp_path: Path
) -> None:
    _, packed = build(shared_data / "tokenizers/llama2", tmp_path / "set", source(tiny_text))
    for ids in split(packed.tokens, packed.starts):
        assert ids[0] == 1
        assert ids[-1] == 2
        assert 1 not in ids[1:]


def test_control_tokens_spelt_out_in_a_text_end_no_document(
    tokenizer: Path, tmp_path: Path
) -> None:
    texts = [f"A lamb {n} <|endoftext|> sees the hill" for n in range(60)]
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    facts, packed = build(tokenizer, tmp_path / "set", source(path))
    eos = facts["eos_token_id"]
    for ids in split(packed.tokens, packed.starts):
        assert ids.count(eos) == 1
        assert ids[-1] == eos


# --- shares, mixing, held-out ---


def test_a_share_is_exact_and_drawn_from_all_of_the_file(tokenizer: Path, tmp_path: Path) -> None:
    texts = [f"{number:05d} sheep follow the old ewe" for number in range(4000)]
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    facts, packed = build(tokenizer, tmp_path / "set", source(path, tokens=3000))
    assert facts["sources"][0]["tokens"] == 3000
    assert facts["notes"] == []
    encode = AutoTokenizer.from_pretrained(tokenizer)
    numbers = [int(encode.decode(d[:-1])[:5]) for d in split(packed.tokens, packed.starts)]
    assert np.mean(np.array(numbers) > 2000) == pytest.approx(0.5, abs=0.15)


def test_the_estimate_of_a_share_is_corrected_when_the_sample_misled(
    tokenizer: Path, tmp_path: Path
) -> None:
    """The first documents need a token a byte, the others far less."""
    texts = ["éß" * 20] * 256 + ["The shepherd sees the hill in the morning."] * 3000
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    facts, _ = build(tokenizer, tmp_path / "set", source(path, tokens=15_000))
    assert facts["sources"][0]["tokens"] == 15_000


def test_too_small_a_source_is_told_not_refused(
    tokenizer: Path, tiny_text: Path, tmp_path: Path
) -> None:
    facts, _ = build(tokenizer, tmp_path / "set", source(tiny_text, tokens=10**7))
    assert "10,000,000 tokens were asked for" in facts["notes"][0]
    assert f"{facts['sources'][0]['tokens']:,}" in facts["notes"][0]


def test_sources_are_mixed_evenly_in_both_parts(tokenizer: Path, tmp_path: Path) -> None:
    encode = AutoTokenizer.from_pretrained(tokenizer)
    marks = [encode(mark).input_ids[0] for mark in "#%"]
    a = write_jsonl(tmp_path / "a.jsonl", ["# " + t for t in tiny_documents(400, seed=1)])
    b = write_jsonl(tmp_path / "b.jsonl", ["% " + t for t in tiny_documents(800, seed=2)])
    _, packed = build(
        tokenizer,
        tmp_path / "set",
        source(a, "a", tokens=9000),
        source(b, "b", tokens=27_000),
        heldout=40,
    )
    owners = packed.tokens.reshape(-1)[packed.starts]
    assert set(owners.tolist()) == set(marks)
    for quarter in np.array_split(owners, 4):
        assert np.mean(quarter == marks[1]) == pytest.approx(0.75, abs=0.12)
    heldout = packed.heldout.reshape(-1)[packed.heldout_starts]
    assert np.mean(heldout == marks[1]) == pytest.approx(0.75, abs=0.15)


@pytest.mark.parametrize("total", [8000, None])
def test_sources_are_mixed_by_weight(tokenizer: Path, tmp_path: Path, total: int | None) -> None:
    """Of a total, or else as much as the source that is used up first allows."""
    a = write_jsonl(tmp_path / "a.jsonl", tiny_documents(800, seed=1))
    b = write_jsonl(tmp_path / "b.jsonl", tiny_documents(800, seed=2))
    c = write_jsonl(tmp_path / "c.jsonl", tiny_documents(800, seed=3))
    sources = (source(a, "a", weight=0.75), source(b, "b", weight=0.25), source(c, "c", tokens=500))
    recipe = TransferSetSettings(
        sources=sources, window=WINDOW, heldout_windows=4, tokens=total and total + 500
    )
    facts = build_transfer_set(recipe, tokenizer, tmp_path / "set", seed=0, cache=tmp_path)
    tokens = [entry["tokens"] for entry in facts["sources"]]
    assert tokens[2] == 500
    assert tokens[0] / tokens[1] == pytest.approx(3, rel=1e-3)
    if total:
        assert tokens[:2] == [6000, 2000]
    else:
        everything, _ = build(
            tokenizer, tmp_path / "all", sources[0].model_copy(update={"weight": None})
        )
        assert tokens[0] == pytest.approx(everything["sources"][0]["tokens"], abs=3)
    assert facts["notes"] == []


def test_a_mix_that_does_not_add_up_is_refused() -> None:
    with pytest.raises(ValueError, match="all need one or tokens: b"):
        TransferSetSettings(sources=(source("a", "a", weight=1), source("b", "b")))
    with pytest.raises(ValueError, match="each source needs a weight"):
        TransferSetSettings(sources=(source("a", "a"),), tokens=5)
    with pytest.raises(ValueError, match="nothing is left"):
        TransferSetSettings(
            sources=(source("a", "a", weight=1), source("b", "b", tokens=9)), tokens=9
        )
    with pytest.raises(ValueError, match="not both"):
        source("a", "a", weight=1, tokens=5)
    with pytest.raises(ValueError, match="shared by sources with a weight, and there are none"):
        TransferSetSettings(sources=(source("a", "a", tokens=9),), tokens=9)


def test_heldout_text_comes_from_many_documents(tokenizer: Path, tmp_path: Path) -> None:
    long = [" ".join(tiny_documents(20, seed=n)) for n in range(200)]
    path = write_jsonl(tmp_path / "a.jsonl", long)
    facts, _ = build(tokenizer, tmp_path / "set", source(path), heldout=8)
    assert facts["heldout_documents"] >= 8
    assert facts["documents"] == 200 - facts["heldout_documents"]


def test_articles_reserved_for_benchmarks_are_left_out(tokenizer: Path, tmp_path: Path) -> None:
    articles = {f"Article {n}": {"extract": f"{n:04d} is a number"} for n in range(800)}
    path = tmp_path / "a.json"
    path.write_text(json.dumps(articles))
    settings_ = source(path, field="extract", reserve=True)
    facts, packed = build(tokenizer, tmp_path / "set", settings_)
    encode = AutoTokenizer.from_pretrained(tokenizer)
    seen = {int(encode.decode(d[:-1])[:4]) for d in split(packed.tokens, packed.starts)}
    reserved = {n for n in range(800) if is_reserved(f"Article {n}")}
    assert facts["sources"][0]["reserved"] == len(reserved)
    assert len(reserved) / 800 == pytest.approx(0.25, abs=0.05)
    assert seen
    assert not seen & reserved


def test_the_rule_of_reserved_titles_never_changes() -> None:
    """Scorecards of different times can only be compared while this holds."""
    titles = ["Llama", "Sheep", "Wool", "Alpaca", "Shepherd", "Goat", "Scissors", "Zürich", "羊"]
    assert [t for t in titles if is_reserved(t)] == ["Alpaca", "Scissors"]


# --- WikiText ---

WIKI = """ \n = First @-@ One = \n \n It cost 1 @,@ 000 , or 1 @.@ 5 % ( about ) of " it all " .
 The dog 's tail does n't wag .\n \n = = History = = \n \n = not a title\n = 1 rad / s = \n text
 \n = Second = \n \n More text ; here .\n"""


def test_wikitext_is_split_into_its_articles(tmp_path: Path) -> None:
    path = tmp_path / "wiki.raw"
    path.write_text(WIKI)
    found = list(documents(path, "wikitext", source(path, format="wikitext")))
    assert [d.title for d in found] == ["First @-@ One", "Second"]
    assert " 1 @,@ 000 , or" in found[0].text


def test_wikitext_is_detokenised_if_asked(tmp_path: Path) -> None:
    path = tmp_path / "wiki.raw"
    path.write_text(WIKI)
    found = list(documents(path, "wikitext", source(path, format="wikitext", detokenize=True)))
    assert found[0].text.startswith('= First-One =\n\nIt cost 1,000, or 1.5% (about) of "it all".')
    assert "The dog's tail doesn't wag." in found[0].text
    assert "\n== History ==\n" in found[0].text
    assert found[1].text == "= Second =\n\nMore text; here."


def test_texts_of_every_format_are_detokenised_if_asked(tmp_path: Path) -> None:
    text = "It cost 1 @,@ 000 , or so ( about ) ."
    write_jsonl(tmp_path / "a.jsonl", [text])
    (tmp_path / "set").mkdir()
    write_jsonl(tmp_path / "set" / "a.jsonl", [text])
    (tmp_path / "a.txt").write_text(text)
    pq.write_table(pa.table({"text": [text]}), tmp_path / "a.parquet")
    for name, kind in (("a.jsonl", "jsonl"), ("a.txt", "text"), ("a.parquet", "parquet")):
        path = tmp_path / name
        (found,) = documents(path, kind, source(path, detokenize=True))
        assert found.text == "It cost 1,000, or so (about)."
    asked = source(tmp_path / "set", format="dataset", detokenize=True)
    assert [d.text for d in dataset_documents(asked, seed=0)] == ["It cost 1,000, or so (about)."]


@given(st.text(alphabet=" @-,.=()\"s'n t\nab", max_size=60))
@settings(max_examples=200, deadline=None)
def test_detokenising_only_takes_spaces_and_marks_away(text: str) -> None:
    def bare(string: str) -> str:
        return "".join(c for c in string if c not in " @\n")

    assert bare(detokenize(text)) == bare(text)


# --- reading it ---


def test_positions_restart_at_documents_and_at_windows() -> None:
    starts = np.array([0, 3, 8, 9, 21])
    positions = _positions(np.array([0, 1, 2]), starts, 8)
    assert positions.tolist() == [
        [0, 1, 2, 0, 1, 2, 3, 4],
        [0, 0, 1, 2, 3, 4, 5, 6],
        [0, 1, 2, 3, 4, 0, 1, 2],
    ]


def test_batches_are_what_the_files_hold(tokenizer: Path, tiny_text: Path, tmp_path: Path) -> None:
    _, packed = build(tokenizer, tmp_path / "set", source(tiny_text))
    batch = packed.batch([5, 0, len(packed) - 1])
    assert batch["input_ids"].dtype == batch["position_ids"].dtype == torch.int64
    assert batch["input_ids"][0].tolist() == packed.tokens[5].tolist()
    flat_starts = set(packed.starts.tolist())
    for row, index in enumerate([5, 0, len(packed) - 1]):
        for column in range(WINDOW):
            first = column == 0 or index * WINDOW + column in flat_starts
            assert (batch["position_ids"][row, column] == 0) == first
    held = packed.heldout_batch([1])
    assert held["input_ids"][0].tolist() == packed.heldout[1].tolist()


def test_the_order_is_a_function_of_seed_and_epoch(
    tokenizer: Path, tiny_text: Path, tmp_path: Path
) -> None:
    _, packed = build(tokenizer, tmp_path / "set", source(tiny_text))
    again = TransferSet(tmp_path / "set")
    assert np.array_equal(packed.order(3, 1), again.order(3, 1))
    assert sorted(packed.order(3, 1)) == list(range(len(packed)))
    assert not np.array_equal(packed.order(3, 1), packed.order(3, 2))
    assert not np.array_equal(packed.order(3, 1), packed.order(4, 1))


def test_calibration_windows_are_random_and_enough(
    tokenizer: Path, tiny_text: Path, tmp_path: Path
) -> None:
    _, packed = build(tokenizer, tmp_path / "set", source(tiny_text))
    some = packed.calibration(10 * WINDOW - 3, seed=0)
    assert some.shape == (10, WINDOW)
    assert torch.equal(some, packed.calibration(10 * WINDOW, seed=0))
    assert not torch.equal(some, packed.calibration(10 * WINDOW, seed=1))
    assert packed.calibration(10**9, seed=0).shape == (len(packed), WINDOW)


def test_a_damaged_set_is_refused(tokenizer: Path, tiny_text: Path, tmp_path: Path) -> None:
    build(tokenizer, tmp_path / "set", source(tiny_text))
    file = tmp_path / "set" / "tokens.npy"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ShearlingError, match="damaged"):
        TransferSet(tmp_path / "set")
    with pytest.raises(ShearlingError, match="does not exist"):
        TransferSet(tmp_path / "none")


# --- text that can't be read ---


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet", "a.arrow", "set"])
def test_a_null_is_an_empty_document(tokenizer: Path, tmp_path: Path, name: str) -> None:
    rows = [{"text": text} for text in [*tiny_documents(100), None, "three"]]
    table, path = pa.Table.from_pylist(rows), tmp_path / name
    if name == "a.parquet":
        pq.write_table(table, path)
    elif name == "a.arrow":
        pa.feather.write_feather(table, path)
    elif name == "a.json":
        path.write_text(json.dumps(rows))
    else:
        path = path / "a.jsonl" if name == "set" else path
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    form = "dataset" if name == "set" else "auto"
    facts, _ = build(tokenizer, tmp_path / "out", source(tmp_path / name, format=form))
    assert facts["sources"][0]["documents"] == 101
    assert facts["notes"] == ["text: 1 empty documents were left out."]


@pytest.mark.parametrize("tokens", [None, 900])
def test_half_a_surrogate_pair_ends_no_run(
    tokenizer: Path, tmp_path: Path, tokens: int | None
) -> None:
    texts = [*tiny_documents(100), "A lamb \ud83d and \U0001f411 \udc11"]
    path = write_jsonl(tmp_path / "a.jsonl", texts, title="\ud83d")
    settings_ = source(path, tokens=tokens, reserve=True)
    facts, _ = build(tokenizer, tmp_path / "set", settings_)
    assert facts["sources"][0]["documents"] > 10
    *_, last = documents(path, "jsonl", settings_)
    assert last == ("A lamb \ufffd and \U0001f411 \ufffd", "\ufffd", None)
    chat = [{"role": "user", "content": "\ud83d"}, {"role": "assistant", "content": "What?"}]
    path.write_text(json.dumps({"m": chat}))
    (read,) = documents(path, "jsonl", source(path, messages="m"))
    assert (read.text, read.turns) == (
        "\ufffd\n\nWhat?",
        (("user", "\ufffd"), ("assistant", "What?")),
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "holds no text"),
        ("a.txt", b" \n\n \n", "holds no text"),
        ("a.jsonl", b"", "holds no text"),
        ("a.txt", b"one\ntwo \xe9\xff\n", r"a\.txt, line 2 is not UTF-8: byte 0xe9 at position 5"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', r"a\.jsonl, line 2 is not JSON"),
        ("a.jsonl", b'{"text": "a"}\n\n{"txt": "b"}\n', "line 3 has no field 'text'"),
        ("a.jsonl", b'{"text": 7}\n', "holds a value of type int, not text"),
        ("a.jsonl", b"[1]\n", "not an object"),
        ("a.json", b'[{"text": "a"}, {"x": 1}]', "entry 2 has no field"),
        ("a.json", b'{"T": {"x": "b"}}', "entry 'T' has no field"),
        ("a.json", b'{"text": "a"}\n{"text": "b"}\n', "is not JSON"),
        ("a.json", b'"text"', "neither a list nor an object"),
        ("a.parquet", b"PAR1 nonsense", "no readable Parquet"),
        ("a.txt.gz", b"\x1f\x8b\x08 nonsense", "truncated or not well compressed"),
        (
            "a.txt.gz",
            gzip.compress(b"text " * 999, mtime=0)[:-9],
            "truncated or not well compressed",
        ),
        ("a.csv", b"a,b", "does not say its format"),
        ("a.jsonl", b'{"text": "a short one"}\n', "too little"),
    ],
)
def test_text_that_can_not_be_used_is_refused(
    tokenizer: Path, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ShearlingError, match=message) as caught:
        build(tokenizer, tmp_path / "set", source(tmp_path / name))
    assert caught.value.hint
    assert not list((tmp_path / "set").glob(".tokenise-*"))


def test_a_missing_column_of_parquet_is_named(tokenizer: Path, tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["a"], "title": ["b"]}), tmp_path / "a.parquet")
    with pytest.raises(ShearlingError) as caught:
        build(tokenizer, tmp_path / "set", source(tmp_path / "a.parquet"))
    assert "no field 'text'" in caught.value.what
    assert "body, title" in caught.value.hint


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing/file.txt", "does not exist"),
        ("/missing/folder", "does not exist"),
        ("nobody/no-such-data", "datasets can't open"),
    ],
)
def test_a_source_that_is_nowhere(tokenizer: Path, tmp_path: Path, path: str, message: str) -> None:
    with pytest.raises(ShearlingError, match=message):
        build(tokenizer, tmp_path / "set", source(path))


def test_a_folder_without_text(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.csv").write_text("x")
    with pytest.raises(ShearlingError, match="no file with text"):
        build(tokenizer, tmp_path / "set", source(tmp_path / "folder"))


def test_a_hash_of_what_is_not_one_file_is_refused(tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(ShearlingError, match="owner/texts is a data set, not files"):
        build(tokenizer, tmp_path / "set", source("owner/texts", sha256="0" * 64))


def test_reserving_needs_titles(tokenizer: Path, tiny_text: Path, tmp_path: Path) -> None:
    with pytest.raises(ShearlingError, match="without a title"):
        build(tokenizer, tmp_path / "set", source(tiny_text, reserve=True))


@pytest.mark.parametrize(("name", "kind"), [("a.txt.zst", "compressed"), ("a.arrow", "Arrow")])
def test_damaged_files_are_told(tokenizer: Path, tmp_path: Path, name: str, kind: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"neither of the two")
    with pytest.raises(ShearlingError, match=f"{name} is .*{kind}"):
        build(tokenizer, tmp_path / "set", source(path))


def test_a_tokenizer_without_eos_is_refused(
    tokenizer: Path, tiny_text: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.json").write_text((tokenizer / "tokenizer.json").read_text())
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(ShearlingError, match="no EOS token"):
        build(folder, tmp_path / "set", source(tiny_text))
