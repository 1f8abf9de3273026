"""Filters of our own for datatrove's pipelines, and words for those of datatrove.

datatrove's defaults want spaCy to split English into words and downloaded models to tell languages
and obscene words. Here words are what stands between spaces, languages come from py3langid, whose
model is part of its package, and obscene words from lists that datatrove itself carries (it uses
them on addresses). Workers import this module, so nothing here loads torch.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datatrove
from datatrove.data import Document
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.utils.word_tokenizers import WordTokenizer

from teachers.contamination import Index

_SENTENCE_END = re.compile(r"[.!?]+[\"'”’)\]]*(?=\s|$)|\n+")


class PlainWords(WordTokenizer):  # type: ignore[misc]
    """What stands between spaces, as Gopher's rules count words; sentences end with . ! ?."""

    def __init__(self) -> None:
        super().__init__()

    def __eq__(self, other: object) -> bool:
        # All are alike, so filters that look at the same text share datatrove's cache of words.
        return isinstance(other, PlainWords)

    def __hash__(self) -> int:
        return hash(PlainWords)

    def word_tokenize(self, text: str) -> list[str]:
        return text.split()

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        return list(self._spans(text))

    def sent_tokenize(self, text: str) -> list[str]:
        return [sentence for a, b in self._spans(text) if (sentence := text[a:b].strip())]

    def _spans(self, text: str) -> Iterator[tuple[int, int]]:
        start = 0
        for match in _SENTENCE_END.finditer(text):
            if text[start : match.end()].strip():
                yield start, match.end()
                start = match.end()
        if text[start:].strip():
            yield start, len(text)


class ProseOnly(BaseFilter):  # type: ignore[misc]
    """Another filter, for texts but not for conversations: its rules are made for prose."""

    def __init__(self, inner: Any, exclusion_writer: Any = None) -> None:
        super().__init__(exclusion_writer)
        self.inner = inner
        self.name = inner.name

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        if doc.metadata["conversation"]:
            return True
        verdict: bool | tuple[bool, str] = self.inner.filter(doc)
        return verdict


@functools.lru_cache(1)
def _index(path: str) -> Index:
    return Index.load(Path(path))


class Decontaminate(BaseFilter):  # type: ignore[misc]
    """Drops documents that hold a benchmark's question; ``metadata.tasks`` says whose."""

    name = "benchmarks"

    def __init__(self, index: Path, exclusion_writer: Any = None) -> None:
        super().__init__(exclusion_writer)
        self.path = str(index)

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        tasks = _index(self.path).overlap(doc.text)
        if not tasks:
            return True
        doc.metadata["tasks"] = tasks
        return False, ", ".join(tasks)


_LOOKED_AT = 1200
"""Characters that are enough to tell a language: half from the start, half from the middle."""


@functools.cache
def _identify() -> Callable[[str], tuple[str, float]]:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    classify: Callable[[str], tuple[str, float]] = identifier.classify
    return classify


class PlainLanguage(BaseFilter):  # type: ignore[misc]
    """Writes each document's language into its metadata; drops those that are not to be kept."""

    name = "languages"

    def __init__(
        self, languages: tuple[str, ...], threshold: float, exclusion_writer: Any = None
    ) -> None:
        super().__init__(exclusion_writer)
        self.languages, self.threshold = languages, threshold

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        text, half = doc.text, _LOOKED_AT // 2
        if len(text) > _LOOKED_AT:
            middle = len(text) // 2
            text = text[:half] + text[middle : middle + half]
        language, sure = _identify()(text)
        doc.metadata["language"] = language
        if not self.languages or (language in self.languages and sure >= self.threshold):
            return True
        return False, language if language not in self.languages else f"{language}, unsure"


_LARGEST_SHARE = 0.02
_FEWEST = 3


@functools.cache
def _obscene() -> tuple[frozenset[str], frozenset[str], re.Pattern[str]]:
    """Words that are hardly ever harmless, words that may be, and obscene phrases."""
    assets = Path(datatrove.__file__).parent / "assets"
    words, soft, phrases = (
        frozenset(line.strip().lower() for line in file.read_text("utf-8").splitlines() if line)
        for file in (
            assets / "banned_words.txt",
            assets / "soft_banned_words.txt",
            assets / "banned_subwords.txt",
        )
    )
    several = sorted(phrase for phrase in phrases if " " in phrase)
    return words, soft, re.compile(r"\b(?:" + "|".join(map(re.escape, several)) + r")\b")


class Obscene(BaseFilter):  # type: ignore[misc]
    """Drops texts of which more than one word in fifty is obscene.

    A share, not a single word: old novels have cocks that crow, and an article on health names the
    body's parts. The words of the hard list and phrases count double.
    """

    name = "unsafe"

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        hard, soft, phrases = _obscene()
        text = doc.text.lower()
        words = re.findall(r"\w+", text)
        strong = sum(word in hard for word in words) + len(phrases.findall(text))
        weak = sum(word in soft for word in words)
        if strong + weak >= _FEWEST and 2 * strong + weak > _LARGEST_SHARE * len(words):
            return False, "obscene words"
        return True


class NamedByNumber(BaseFilter):  # type: ignore[misc]
    """Drops the documents whose numbers stand in a file, with one reason for all."""

    def __init__(self, name: str, numbers: Path, reason: str, exclusion_writer: Any = None) -> None:
        super().__init__(exclusion_writer)
        self.name, self.path, self.reason = name, str(numbers), reason
        self._numbers: frozenset[int] | None = None

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        if self._numbers is None:
            import numpy as np

            self._numbers = frozenset(np.load(self.path, allow_pickle=False).tolist())
        return (False, self.reason) if doc.metadata["number"] in self._numbers else True
