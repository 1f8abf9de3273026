"""Overlap with benchmarks: what counts as a benchmark's question and what does not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from teachers.contamination import Index, index_of, ngrams, words_of

LONG = (
    "When the shearers had finished with the last ewe of the morning, the old dog got up and "
    "walked slowly to the gate where the boy was waiting."
)
SHORT = "The keys to the old cabinet are on the table."  # ten words
TINY = "Sheep eat grass."


def index() -> Index:
    return index_of({"story": [[LONG, TINY]], "grammar": [[SHORT]], "again": [[LONG]]})


def test_a_question_is_found_inside_a_text_with_all_its_tasks() -> None:
    page = f"Home | News\nYesterday we read: «{LONG.upper()}» and went home."
    assert index().overlap(page) == ["story", "again"]
    assert index().overlap(f"He said: {SHORT} Then he left.") == ["grammar"]


def test_thirteen_words_are_enough_and_twelve_are_not() -> None:
    words = LONG.split()
    assert index().overlap("x " + " ".join(words[5:18]) + " y") == ["story", "again"]
    assert index().overlap("x " + " ".join(words[5:17]) + " y") == []


def test_short_questions_count_only_whole_and_tiny_ones_never() -> None:
    assert index().overlap("The keys to the old cabinet are on the floor.") == []
    assert index().overlap(f"Here: {TINY} {TINY} {TINY} {TINY} {TINY}") == []


def test_punctuation_case_and_accents_do_not_hide_it() -> None:
    changed = LONG.replace(",", " --").replace("old", "òld").replace(" dog", "\n\nDog")
    assert index().overlap(changed) == ["story", "again"]
    assert words_of("Él niño_2 «Straße»") == ["el", "nino", "2", "straße"]


def test_a_tasks_own_wording_is_no_question() -> None:
    """Eleven questions share a preamble; a text that quotes it holds none of them."""
    preamble = "Read this passage with care and choose the most plausible of the four endings below"
    tails = [f"{LONG} number {n} {n + 1} {n + 2} of all these" for n in range(0, 33, 3)]
    found = index_of({"task": [[f"{preamble} {tail}"] for tail in tails]})
    assert found.overlap(preamble + ".") == []
    assert found.overlap(f"see number {3} {4} {5} of all these") == []
    assert found.overlap(tails[2]) == ["task"]


def test_an_index_survives_the_disk(tmp_path: Path) -> None:
    index().save(tmp_path / "index.npz")
    again = Index.load(tmp_path / "index.npz")
    assert again.tasks == index().tasks
    assert again.overlap(f"{LONG} {SHORT}") == ["story", "grammar", "again"]


def test_no_benchmarks_no_overlap() -> None:
    assert index_of({}).overlap(LONG) == []
    assert index_of({"empty": []}).overlap(LONG) == []


@given(st.lists(st.sampled_from("abcdef"), max_size=40))
@settings(max_examples=100, deadline=None)
def test_equal_ngrams_have_equal_hashes_and_others_not(words: list[str]) -> None:
    for length, hashes in ngrams(words).items():
        plain = [tuple(words[i : i + length]) for i in range(len(words) - length + 1)]
        assert len(hashes) == len(plain)
        assert len(np.unique(hashes)) == len(set(plain))
