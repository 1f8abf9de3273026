"""Building a transfer set against the tokenizers library alone, on the same cores and text.

Run by `make bench`. The requirement: 100 MB of text in no more than 1.3 times the library's time.
`SHEARLING_BENCH_MB=100` takes as much (the texts again and again); by default it is 20, for both
sides grow with the text alike. Both take turns, so that what else the machine does meets both.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from teachers.settings import SourceSettings, TransferSetSettings
from teachers.transfer_set import build_transfer_set

MEGABYTES = int(os.environ.get("SHEARLING_BENCH_MB", "20"))
ROUNDS = 3


def best(*runs: Callable[[], object]) -> list[tuple[float, float]]:
    """Of each run the least seconds by the clock, and of processor time, over a few rounds."""
    clock: list[list[float]] = [[] for _ in runs]
    busy: list[list[float]] = [[] for _ in runs]
    for _ in range(ROUNDS):
        for place, run in enumerate(runs):
            before = time.perf_counter(), time.process_time()
            run()
            clock[place].append(time.perf_counter() - before[0])
            busy[place].append(time.process_time() - before[1])
    return [(min(one), min(other)) for one, other in zip(clock, busy, strict=True)]


def test_tokenising_is_near_the_librarys_own_speed(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    folder = shared_data / "tokenizers/llama3"
    files = sorted((shared_data / "text").glob("*/part-*.jsonl"))
    texts = [json.loads(line)["text"] for file in files for line in file.open(encoding="utf-8")]
    texts = texts * -(-(MEGABYTES << 20) // _sizes(texts)[-1])
    texts = texts[: next(i + 1 for i, size in enumerate(_sizes(texts)) if size >= MEGABYTES << 20)]
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

    (theirs, their_work), (mine, my_work) = best(library, ours)
    size = corpus.stat().st_size / 1e6
    print(f"\n{size:.0f} MB: tokenizers {theirs:.1f} s, transfer set {mine:.1f} s", end=" ")
    print(f"({mine / theirs:.2f} times; processor time {their_work:.1f} s and {my_work:.1f} s)")
    assert mine < 1.3 * theirs


def _sizes(texts: list[str]) -> list[int]:
    total, sizes = 0, []
    for text in texts:
        total += len(text.encode())
        sizes.append(total)
    return sizes
