"""Which documents hold a benchmark's questions: overlap of 13 words in a row, as in GPT-3's paper
(https://arxiv.org/abs/2005.14165, appendix C).

Words are compared in lower case without punctuation or accents. A question of 8 to 12 words counts
as a whole; a shorter one can't be told from common speech. An n-gram that stands in many of one
task's questions is the task's own wording ("choose the most plausible"), not a question.

Hashes of n-grams are polynomials of the words' hashes, so all lengths of a document are computed
with a dozen vector operations. datatrove's own filter does not serve here: its index needs
lighteval's tasks, and it names one task a document.

Legend of shape suffixes: W words of a text, G n-grams of one length.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

LONGEST = 13
SHORTEST = 8
_COMMON = 10
"""An n-gram in more questions of one task than this is no question's own."""

Hashes = NDArray[np.uint64]
_BASE = np.uint64(0x9E3779B97F4A7C15)
_WORD = re.compile(r"[^\W_]+")
_ACCENTS = re.compile("[\u0300-\u036f]")


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation and accents."""
    plain = unicodedata.normalize("NFKD", text.lower())
    if not plain.isascii():
        plain = _ACCENTS.sub("", plain)
    return _WORD.findall(plain)


@functools.lru_cache(1 << 18)
def _hash(word: str) -> int:
    return xxhash.xxh64_intdigest(word.encode("utf-8", "surrogatepass"))


def ngrams(words: list[str]) -> dict[int, Hashes]:
    """Length -> hashes [G] of all n-grams of that length, from SHORTEST to LONGEST."""
    word_W = np.fromiter(map(_hash, words), np.uint64, len(words))
    hash_G = word_W
    found = {}
    for length in range(2, LONGEST + 1):
        if word_W.size < length:
            break
        hash_G = hash_G[:-1] * _BASE + word_W[length - 1 :]
        if length >= SHORTEST:
            found[length] = hash_G
    return found


def _of_question(text: str) -> dict[int, Hashes]:
    """A question's n-grams: all of LONGEST words, or itself where it is shorter."""
    words = words_of(text)
    if len(words) < SHORTEST:
        return {}
    length = min(len(words), LONGEST)
    return {length: ngrams(words)[length]}


@dataclass(frozen=True)
class Index:
    """N-grams of benchmarks: for each length sorted hashes, and whose each is."""

    tasks: tuple[str, ...]
    hashes: Mapping[int, Hashes]
    owners: Mapping[int, NDArray[np.uint16]]

    def overlap(self, text: str) -> list[str]:
        """The tasks of which the text holds a question."""
        hit: set[int] = set()
        for length, hash_G in ngrams(words_of(text)).items():
            known = self.hashes.get(length)
            if known is None or not known.size:
                continue
            first_G = np.searchsorted(known, hash_G)
            inside_G = np.minimum(first_G, known.size - 1)
            for place in np.unique(first_G[known[inside_G] == hash_G]):
                end = int(np.searchsorted(known, known[place], side="right"))
                hit.update(self.owners[length][place:end].tolist())
        return [self.tasks[number] for number in sorted(hit)]

    def save(self, path: Path) -> None:
        arrays: dict[str, NDArray[np.generic]] = {"tasks": np.array(self.tasks, np.str_)}
        for length, hash_G in self.hashes.items():
            arrays |= {f"hashes{length}": hash_G, f"owners{length}": self.owners[length]}
        with path.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: Path) -> Index:
        with np.load(path, allow_pickle=False) as arrays:
            lengths = [int(name[6:]) for name in arrays.files if name.startswith("hashes")]
            return cls(
                tuple(str(task) for task in arrays["tasks"]),
                {length: arrays[f"hashes{length}"] for length in lengths},
                {length: arrays[f"owners{length}"] for length in lengths},
            )


def index_of(questions: Mapping[str, Iterable[Iterable[str]]]) -> Index:
    """The index of benchmarks: task -> its documents -> each one's texts (question, answers)."""
    tasks = tuple(questions)
    by_length: dict[int, list[tuple[Hashes, int]]] = {}
    for number, documents in enumerate(questions.values()):
        for length, hash_G in _own_ngrams(documents).items():
            by_length.setdefault(length, []).append((hash_G, number))
    hashes, owners = {}, {}
    for length, parts in by_length.items():
        all_G = np.concatenate([hash_G for hash_G, _ in parts])
        owner_G = np.concatenate([np.full(h.size, number, np.uint16) for h, number in parts])
        order = np.argsort(all_G, kind="stable")
        hashes[length], owners[length] = all_G[order], owner_G[order]
    return Index(tasks, hashes, owners)


def _own_ngrams(documents: Iterable[Iterable[str]]) -> dict[int, Hashes]:
    """One task's n-grams, without those that many of its documents share."""
    seen: dict[int, list[Hashes]] = {}
    for texts in documents:
        mine: dict[int, list[Hashes]] = {}
        for text in texts:
            for length, hash_G in _of_question(text).items():
                mine.setdefault(length, []).append(hash_G)
        for length, parts in mine.items():
            seen.setdefault(length, []).append(np.unique(np.concatenate(parts)))
    found = {}
    for length, parts in seen.items():
        unique_G, counts_G = np.unique(np.concatenate(parts), return_counts=True)
        found[length] = unique_G[counts_G <= _COMMON]
    return found
