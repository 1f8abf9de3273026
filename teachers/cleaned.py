"""The sources' documents before and after cleaning: which stay, and what is told of the others."""

from __future__ import annotations

import heapq
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shearling import Progress, ShearlingError
from teachers.cleaning import (
    Plan,
    Shards,
    plan,
    processes,
    removed_folder,
    rows,
    run_phase,
    run_plan,
    was_changed,
    without,
)
from teachers.contamination import index_of
from teachers.encoding import Aside, Encoder, Tokenised, lengths_of, tokenise
from teachers.readers import Document
from teachers.settings import CleanSettings

Questions = Mapping[str, Iterable[Iterable[str]]]
"""Task -> its documents -> each one's texts."""

_SAMPLES = 4
_EXCERPT = 240
_MOST_LANGUAGES = 12


class Cleaner:
    """Takes the sources' texts while they are tokenised, and says afterwards which stay."""

    def __init__(
        self,
        settings: CleanSettings,
        work: Path,
        *,
        questions: Questions,
        teacher: Path,
        device: str,
        seed: int,
        progress: Progress,
    ) -> None:
        self.settings, self.work, self.progress = settings, work, progress
        self.questions, self.teacher = questions, teacher
        self.device, self.seed = device, seed
        self.shards = Shards(work)
        self.classifier: dict[str, Any] | None = None

    def aside(self) -> Aside:
        """Takes the next source's documents."""
        return self.shards.source()

    def share(self, share: int | None) -> int | None:
        """How many tokens of a source are to be read so that its share is left."""
        return None if share is None else -int(-share * self.settings.oversample // 1)

    def clean(
        self, taken: list[Tokenised], paths: list[Path], encoder: Encoder
    ) -> tuple[list[Tokenised], dict[str, Any]]:
        """The documents that stay, with lines that a filter took out gone, and facts for a report.

        Raises:
            ShearlingError: nothing is left.
        """
        index = self.work / "benchmarks.npz" if self.questions else None
        if index is not None:
            index_of(self.questions).save(index)
        made = plan(self.settings, self.work, self.shards.count, index)
        workers = processes(self.shards.bytes)
        run_plan(made, workers, self.progress)
        if next(rows(made.kept), None) is None:  # what follows keeps at least one
            raise ShearlingError(
                f"Cleaning left none of {self.shards.documents:,} documents.",
                hint="Remove parts of transfer_set.clean; quality rules are made for prose.",
            )
        self._ask_teacher(made, taken, workers)
        kept, changed, languages = self._left(made.kept)
        facts = self._facts(made, taken, kept, languages)
        left, trimmed = self._apply(made.kept, taken, paths, encoder, kept, changed)
        facts["tokens_in_removed_lines"] = trimmed
        facts["tokens_after"] = sum(int(one.lengths.sum()) for one in left)
        facts["lengths_after"] = lengths_of(left)
        return left, facts

    # --- the teacher's part ---

    def _ask_teacher(self, made: Plan, taken: list[Tokenised], workers: int) -> None:
        """Find texts that mean the same, and those that the teacher would not recommend."""
        settings = self.settings
        if settings.semantic_duplicates is None and settings.classifier is None:
            return
        from teachers.judgement import Reader, bad_texts, same_meaning

        reader = Reader(self.teacher, self.device, self.progress)
        if settings.semantic_duplicates is not None:
            numbers = np.array([row["metadata"]["number"] for row in rows(made.kept)], np.int64)
            doomed = same_meaning(
                reader, self._beginnings(taken, numbers), settings.semantic_duplicates, self.seed
            )
            name = "semantic duplicates"
            run_phase(without(made, name, numbers[doomed], "same meaning"), self.work, workers)
        if settings.classifier is not None:
            numbers = np.array([row["metadata"]["number"] for row in rows(made.kept)], np.int64)
            doomed, self.classifier = bad_texts(
                reader,
                numbers,
                lambda: (row["text"] for row in rows(made.kept)),
                lambda some: self._beginnings(taken, some),
                settings.classifier,
                self.seed,
            )
            phase = without(made, "classifier", numbers[doomed], "the classifier's lowest scores")
            run_phase(phase, self.work, workers)

    def _beginnings(self, taken: list[Tokenised], numbers: NDArray[np.int64]) -> list[Any]:
        """The ids of these documents; slices of files on disk."""
        owners = np.searchsorted(self.shards.bases, numbers, side="right") - 1
        found = []
        for number, owner in zip(numbers, owners, strict=True):
            one, place = taken[owner], number - self.shards.bases[owner]
            start = int(one.starts[place])
            found.append(one.ids[start : start + int(one.lengths[place])])
        return found

    # --- what is left ---

    def _left(self, folder: Path) -> tuple[NDArray[np.bool_], set[int], Counter[str]]:
        kept = np.zeros(self.shards.documents, np.bool_)
        changed: set[int] = set()
        languages: Counter[str] = Counter()
        for row in rows(folder):
            number = row["metadata"]["number"]
            kept[number] = True
            languages[row["metadata"].get("language", "?")] += 1
            if was_changed(row):
                changed.add(number)
        return kept, changed, languages

    def _apply(
        self,
        folder: Path,
        taken: list[Tokenised],
        paths: list[Path],
        encoder: Encoder,
        kept: NDArray[np.bool_],
        changed: set[int],
    ) -> tuple[list[Tokenised], int]:
        """The kept documents of each source; changed ones are tokenised anew."""
        left, trimmed = [], 0
        for owner, (one, path) in enumerate(zip(taken, paths, strict=True)):
            base = self.shards.bases[owner]
            mine = kept[base : base + len(one)]
            places = [n - base for n in changed if base <= n < base + len(one)]
            if places:
                order = np.array(sorted(places), np.int64)
                texts = self._changed(folder, owner, changed)
                learn = one.learn is not None
                new = tokenise(texts, encoder, path, answers=learn, append=True)
                trimmed += int(one.lengths[order].sum() - new.lengths.sum())
                one = one.replaced(order, new)
            left.append(one.chosen(mine))
        return left, trimmed

    def _changed(self, folder: Path, owner: int, changed: set[int]) -> Iterator[Document]:
        # Shards and ranks are in the order of the numbers, so these are too.
        for row in rows(folder):
            if row["metadata"]["source"] == owner and row["metadata"]["number"] in changed:
                yield Document(row["text"])

    # --- what is told ---

    def _facts(
        self,
        made: Plan,
        taken: list[Tokenised],
        kept: NDArray[np.bool_],
        languages: Counter[str],
    ) -> dict[str, Any]:
        before = languages.copy()
        documents = int(kept.size)
        tokens = sum(int(one.lengths.sum()) for one in taken)
        facts: dict[str, Any] = {"documents_before": documents, "tokens_before": tokens}
        overlap: Counter[str] = Counter(dict.fromkeys(self.questions, 0))
        filters = []
        for name in made.filters:
            removed = _Removed(name, documents, tokens)
            for row in rows(removed_folder(self.work, name)):
                removed.add(row)
                before[row["metadata"].get("language", "?")] += 1
                overlap.update(row["metadata"].get("tasks", ()))
            filters.append(removed.facts())
            documents -= removed.documents
            tokens -= removed.tokens
        facts |= {
            "documents_after": documents,
            "filters": filters,
            "languages_before": dict(before.most_common(_MOST_LANGUAGES)),
            "languages_after": dict(languages.most_common(_MOST_LANGUAGES)),
            "lengths_before": lengths_of(taken),
        }
        if self.questions:
            facts["benchmarks"] = dict(overlap)
        if self.classifier is not None:
            facts["classifier"] = self.classifier
        return facts


class _Removed:
    """Counts what one filter took out, and keeps a few examples."""

    def __init__(self, name: str, documents_before: int, tokens_before: int) -> None:
        self.name = name
        self.before = documents_before, tokens_before
        self.documents = self.tokens = 0
        self.reasons: Counter[str] = Counter()
        self._samples: list[tuple[int, int, dict[str, Any]]] = []

    def add(self, row: dict[str, Any]) -> None:
        metadata = row["metadata"]
        self.documents += 1
        self.tokens += metadata["tokens"]
        reason = str(metadata.get("filter_reason", self.name))
        self.reasons[reason] += 1
        text = " ".join(row["text"][: 4 * _EXCERPT].split())[:_EXCERPT]
        sample = {"source": metadata["source"], "reason": reason, "text": text}
        # The lowest hashes: a choice that order and number of processes don't change.
        number = int(metadata["number"])
        entry = (-zlib.crc32(str(number).encode()), number, sample)
        push = heapq.heappush if len(self._samples) < _SAMPLES else heapq.heappushpop
        push(self._samples, entry)

    def facts(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "documents_before": self.before[0],
            "tokens_before": self.before[1],
            "documents_removed": self.documents,
            "tokens_removed": self.tokens,
            "reasons": dict(self.reasons.most_common(_MOST_LANGUAGES)),
            "samples": [sample for _, _, sample in sorted(self._samples, reverse=True)],
        }
