"""Cleaning on real text with planted junk: how much of each kind is caught, how much good stays.

Run by `make bench`. Prints a table; the good texts are web pages, Wikipedia leads, stories and
chapters of books, none of them checked by hand, so what is lost of them is not all good.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path

from planted import clean, plant, rates

from teachers.settings import CleanSettings

EACH = 25
TEXTS = 60  # of each folder
PARTS = {
    "careful": CleanSettings(
        languages=("en",),
        repetition=True,
        quality=("gopher",),
        unsafe="words",
        exact_duplicates=True,
        near_duplicates=True,
    ),
    "all rules": CleanSettings(
        languages=("en",),
        repetition=True,
        quality=("gopher", "c4", "fineweb"),
        unsafe="words",
        exact_duplicates=True,
        near_duplicates=True,
    ),
}
# C4's rules want five sentences and lines that end like one, which short articles don't have.
MOST_LOST = {"careful": 0.08, "all rules": 0.35}


def good_texts(shared_data: Path, each: int) -> list[str]:
    """So many texts of each folder, neither short nor long."""
    texts: list[str] = []
    for folder in ("web_gov", "pkg_wikipedia", "stories", "web_misc"):
        with (shared_data / "text" / folder / "part-000.jsonl").open(encoding="utf-8") as lines:
            mine = [json.loads(line)["text"] for line in lines]
        texts += [text for text in mine if 500 < len(text) < 6000][:each]
    return texts


def test_planted_junk_is_caught(shared_data: Path, tmp_path: Path) -> None:
    texts = good_texts(shared_data, TEXTS)
    with (shared_data / "eval/arc_easy.jsonl").open(encoding="utf-8") as lines:
        asked = [json.loads(line)["question"] for line in lines]
    questions = [question for question in asked if len(question.split()) > 12]
    planted = plant(texts, questions, EACH)
    size = sum(len(one.text) for one in planted) / 1e6
    print(f"\n{len(texts)} good texts, {EACH} of each kind of junk, {size:.1f} MB")
    for name, settings in PARTS.items():
        start, busy = time.perf_counter(), time.process_time()
        removed, facts = clean(
            planted, questions, settings, shared_data / "models/stories260K/hf", tmp_path / name
        )
        seconds = time.perf_counter() - start
        caught = rates(planted, removed)
        print(f"\n{name}: {seconds:.0f} s, {time.process_time() - busy:.0f} s of it at work here")
        for kind, rate in caught.items():
            print(f"  {kind:20} {'lost' if kind == 'good' else 'caught'} {rate:6.1%}")
        lost = Counter(f for n, f in removed.items() if planted[n].kind == "good")
        print(f"  of the good ones, by filter: {dict(lost)}")
        assert facts["documents_before"] == len(planted)
        assert min(rate for kind, rate in caught.items() if kind != "good") > 0.75
        assert caught["good"] < MOST_LOST[name]
