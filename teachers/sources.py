"""Sources of text: which documents are theirs, and a random part of them as ids.

A source is read twice. The first time its documents are only counted, so that of a source larger
than its share a random part can be drawn from all of it, not from its head; this reads at disk
speed, a hundred times faster than tokenising. The second time the drawn documents are tokenised.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from shearling import Progress, ShearlingError
from teachers.encoding import Aside, Encoder, Tokenised, tokenise
from teachers.fetch import fetch
from teachers.heldout import is_reserved
from teachers.readers import Document, dataset_documents, documents, is_data_set, source_files
from teachers.settings import SourceSettings

_MARGIN = 1.15  # documents drawn beyond the estimate, so that a second drawing is rare
_SAMPLE_DOCUMENTS = 256  # to estimate how many bytes make a token


class Source:
    """The usable documents of one source, in an order that does not change."""

    def __init__(self, settings: SourceSettings, cache: Path, seed: int) -> None:
        self.settings = settings
        self.seed = seed
        self.empty = self.reserved = 0
        self.rereadable = not is_data_set(settings)
        if self.rereadable:
            path = fetch(settings.path, sha256=settings.sha256, cache=cache)
            self.files = source_files(path, settings)
        elif settings.sha256 is not None or settings.documents == "files":
            raise ShearlingError(
                f"The source {settings.name!r} has `sha256` or `documents`, and {settings.path} is "
                "a data set, not files of text.",
                hint="Remove them from the source.",
            )

    def __iter__(self) -> Iterator[Document]:
        self.empty = self.reserved = 0
        for document in self._all():
            if self.settings.reserve and document.title is None and document.text.strip():
                raise ShearlingError(
                    f"The source {self.settings.name!r} has documents without a title, so none "
                    "can be kept for benchmarks.",
                    hint="Remove `reserve` from the source.",
                )
            if not document.text.strip():
                self.empty += 1
            elif self.settings.reserve and is_reserved(document.title or ""):
                self.reserved += 1
            else:
                yield document

    def _all(self) -> Iterator[Document]:
        if not self.rereadable:
            yield from dataset_documents(self.settings, self.seed)
            return
        for path, kind in self.files:
            yield from documents(path, kind, self.settings)


def tokenise_source(
    source: Source,
    encoder: Encoder,
    path: Path,
    draw: np.random.Generator,
    show: Progress,
    *,
    share: int | None,
    aside: Aside | None = None,
) -> Tokenised:
    """All documents of a source, or random ones that make at least ``share`` tokens."""
    settings = source.settings
    if share is None or not source.rereadable:
        total = 0
        if source.rereadable:
            total = sum(1 for _ in source)
        taken = tokenise(
            source,
            encoder,
            path,
            answers=settings.loss == "answers",
            enough=share,
            aside=aside,
            progress=(show, settings.name, total),
        )
    else:
        taken = _draw(source, encoder, path, share, draw, show, aside)
    if not taken.lengths.size:
        raise _no_text(source)
    if taken.learn is not None and not taken.learn.any():
        raise _no_answers(source)
    return taken


def _no_text(source: Source) -> ShearlingError:
    settings = source.settings
    what = "holds no text"
    if source.empty and settings.messages:
        what = (
            f"has {source.empty:,} conversations, and all are empty or lack a message's text "
            "(`content` is null, as of a call of a tool)"
        )
    return ShearlingError(
        f"The source {settings.name!r} ({settings.path}) {what}.",
        hint="Check its file, `field`, `messages` and `format`.",
    )


def _no_answers(source: Source) -> ShearlingError:
    some = islice(source, _SAMPLE_DOCUMENTS)
    roles = sorted({role for document in some for role, _ in document.turns or ()})
    return ShearlingError(
        f"The source {source.settings.name!r} ({source.settings.path}) has `loss: answers`, and "
        f"nothing in it is an answer: no message has the role assistant (roles: "
        f"{', '.join(roles)}).",
        hint="Rename the role of the answers to assistant, or set the source's `loss` to all.",
    )


def _draw(
    source: Source,
    encoder: Encoder,
    path: Path,
    share: int,
    draw: np.random.Generator,
    show: Progress,
    aside: Aside | None,
) -> Tokenised:
    """Tokenise random documents from all of a source until they make ``share`` tokens."""
    counted = array("q")
    sample: list[Document] = []
    for document in source:
        counted.append(len(document.text.encode()))
        if len(sample) < _SAMPLE_DOCUMENTS:
            sample.append(document)
    sizes = np.array(counted, np.int64)
    tokens = sum(one.ids.size for one in encoder.batch(sample))
    bytes_a_token = int(sizes[: len(sample)].sum()) / max(1, tokens)
    order, margin = draw.permutation(sizes.size), _MARGIN
    while True:
        ends = np.cumsum(sizes[order])
        count = int(np.searchsorted(ends, share * bytes_a_token * margin)) + 1
        drawn = np.zeros(sizes.size, bool)
        drawn[order[:count]] = True
        chosen = (d for d, wanted in zip(source, drawn, strict=True) if wanted)
        total = int(drawn.sum())
        taken = tokenise(
            chosen,
            encoder,
            path,
            answers=source.settings.loss == "answers",
            aside=aside,
            progress=(show, source.settings.name, total),
        )
        if count >= sizes.size or int(taken.lengths.sum()) >= share:
            return taken
        margin *= 2
