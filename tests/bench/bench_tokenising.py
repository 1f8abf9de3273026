"""Building a transfer set against the tokenizers library alone, on the same cores and text.

Run by `make bench`. The requirement: 100 MB of text in no more than 1.3 times the library's time.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from teachers.settings import SourceSettings, TransferSetSettings
from teachers.transfer_set import build_transfer_set

MEGABYTES = 20
ROUNDS = 3


def best(run: Callable[[], object]) -> float:
    """Seconds of the fastest of a few rounds: the one that was disturbed least."""
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def test_tokenising_is_near_the_librarys_own_speed(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    folder = shared_data / "tokenizers/llama3"
    files = sorted((shared_data / "text").glob("*/part-*.jsonl"))
    texts = [json.loads(line)["text"] for file in files for line in file.open(encoding="utf-8")]
    texts = texts[
        : next((i for i, size in enumerate(_sizes(texts)) if size > MEGABYTES << 20), None)
    ]
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def library() -> None:
        for start in range(0, len(texts), 500):
            for encoding in tokenizer.encode_batch(texts[start : start + 500]):
                _ = encoding.ids

    def ours() -> None:
        recipe = TransferSetSettings(sources=(SourceSettings(name="text", path=str(corpus)),))
        build_transfer_set(recipe, folder, tmp_path / "set", seed=0, cache=tmp_path)

    theirs, mine = best(library), best(ours)
    size = corpus.stat().st_size / 1e6
    print(f"\n{size:.0f} MB: tokenizers {theirs:.1f} s, transfer set {mine:.1f} s", end=" ")
    print(f"({mine / theirs:.2f} times)")
    assert mine < 1.3 * theirs


def _sizes(texts: list[str]) -> list[int]:
    total, sizes = 0, []
    for text in texts:
        total += len(text.encode())
        sizes.append(total)
    return sizes
