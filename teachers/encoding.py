"""Documents to ids: tokenised in batches on all cores, kept flat in a file.

NAME.ids    uint32, the ids of all documents, one after the other
NAME.learn  uint8 as long as that, 1 where the student learns the token; only if a source asks
"""

from __future__ import annotations

import contextlib
from array import array
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from shearling import Progress, ShearlingError, disk_errors, silent
from teachers.conversations import ChatTemplate
from teachers.readers import Document
from teachers.tokenizer import token_count

_BATCH_CHARACTERS = 1 << 21  # text tokenised at once; the tokenizer shares it among all cores

Ids = NDArray[np.uint32]
Learn = NDArray[np.uint8]


class Encoded(NamedTuple):
    """One document's ids, and which of them are to be learnt (None: all)."""

    ids: Ids
    learn: Learn | None = None


class Encoder:
    """Documents to ids: the tokenizer's own BOS where it adds one, and EOS at the end.

    Control tokens that a text happens to spell out (``<|im_end|>``) are encoded as the plain text
    they are: a web page must not end a document. Conversations go through the chat template,
    whose control tokens count.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
        if tokenizer.eos_token_id is None:
            raise ShearlingError(
                f"The tokenizer in {folder} has no EOS token to separate documents with.",
                hint="Set eos_token in its tokenizer_config.json.",
            )
        if not tokenizer.is_fast:
            raise ShearlingError(
                f"The tokenizer in {folder} has no fast version (tokenizer.json).",
                hint="Convert it to tokenizer.json; transformers does so on save_pretrained.",
            )
        self.eos: int = tokenizer.eos_token_id
        self.vocabulary: int = token_count(tokenizer)
        self._tokenizer, self._folder = tokenizer, folder
        self._backend: Any = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True

    def batch(self, documents: list[Document], *, answers: bool = False) -> list[Encoded]:
        """Each document's ids, ending with EOS; with ``answers``, what the assistant says."""
        if any(document.turns is not None for document in documents):
            return self._conversations(documents, answers)
        texts = [document.text for document in documents]
        encoded = self._backend.encode_batch_fast(texts, add_special_tokens=True)
        return [Encoded(self._ended(np.array(one.ids, np.uint32))) for one in encoded]

    def _conversations(self, documents: list[Document], answers: bool) -> list[Encoded]:
        template = ChatTemplate(self._tokenizer, self._folder)
        written = [template.write(d.turns or (), spans=answers) for d in documents]
        self._backend.encode_special_tokens = False
        try:
            encoded = self._backend.encode_batch(
                [text for text, _ in written], add_special_tokens=False
            )
        finally:
            self._backend.encode_special_tokens = True
        found = []
        for one, (_, spans) in zip(encoded, written, strict=True):
            ids = self._ended(np.array(one.ids, np.uint32))
            learn = _inside(one.offsets, spans, ids.size) if answers else None
            found.append(Encoded(ids, learn))
        return found

    def _ended(self, ids: Ids) -> Ids:
        if ids.size and ids[-1] == self.eos:
            return ids
        return np.append(ids, np.uint32(self.eos))


def _inside(offsets: list[tuple[int, int]], spans: list[tuple[int, int]], size: int) -> Learn:
    """1 for each token whose text begins inside a span; an EOS put at the end is no answer."""
    learn = np.zeros(size, np.uint8)
    begins = np.array([begin for begin, _ in offsets], np.int64)
    for start, end in spans:
        learn[: begins.size] |= ((begins >= start) & (begins < end)).astype(np.uint8)
    return learn


@dataclass(frozen=True)
class Tokenised:
    """One source's documents as ids: flat in a file, with where each begins and how long it is."""

    ids: Ids
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    bytes: NDArray[np.int64]
    learn: Learn | None = None
    """As long as ``ids``; None: every token is learnt."""

    def __len__(self) -> int:
        return int(self.lengths.size)

    def chosen(self, which: NDArray[Any]) -> Tokenised:
        """The documents at these indices, or where this mask is true."""
        return replace(
            self, starts=self.starts[which], lengths=self.lengths[which], bytes=self.bytes[which]
        )

    def replaced(self, which: NDArray[np.int64], new: Tokenised) -> Tokenised:
        """These documents exchanged for new ones, which stand in the same (longer) file."""
        starts, lengths, sizes = self.starts.copy(), self.lengths.copy(), self.bytes.copy()
        starts[which], lengths[which], sizes[which] = new.starts, new.lengths, new.bytes
        return Tokenised(new.ids, starts, lengths, sizes, new.learn)

    def cut(self, order: NDArray[np.int64], tokens: int) -> Tokenised:
        """The first documents in ``order`` that make ``tokens`` tokens; the last one is cut."""
        ends = np.cumsum(self.lengths[order])
        count = int(np.searchsorted(ends, tokens)) + 1
        chosen = order[:count]
        lengths, sizes = self.lengths[chosen].copy(), self.bytes[chosen].copy()
        if (excess := int(lengths.sum()) - tokens) > 0:
            sizes[-1] = sizes[-1] * (lengths[-1] - excess) // lengths[-1]
            lengths[-1] -= excess
        return replace(self, starts=self.starts[chosen], lengths=lengths, bytes=sizes)


def lengths_of(taken: list[Tokenised]) -> dict[str, int]:
    """Documents by length: lower bounds in tokens, each twice the one before -> how many."""
    lengths = np.concatenate([one.lengths for one in taken])
    lengths = lengths[lengths > 0]
    bounds, counts = np.unique(np.floor(np.log2(lengths)).astype(np.int64), return_counts=True)
    return {str(1 << int(b)): int(c) for b, c in zip(bounds, counts, strict=True)}


class Aside(Protocol):
    """Takes the texts of documents while they are tokenised, for what looks at them later."""

    def restart(self) -> None:
        """Forget what was given: the source is tokenised anew."""
        ...

    def take(self, documents: list[Document], lengths: list[int]) -> None:
        """Keep documents, with how many tokens each has."""
        ...


def _batches(source: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in source:
        batch.append(document)
        size += len(document.text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encoded(
    source: Iterable[Document], encoder: Encoder, answers: bool
) -> Iterator[tuple[list[Document], list[Encoded]]]:
    """Batches with their ids; the next batch is read while the tokenizer works on this one."""
    with ThreadPoolExecutor(1) as pool:
        before: tuple[list[Document], Future[list[Encoded]]] | None = None
        for batch in _batches(source):
            current = batch, pool.submit(encoder.batch, batch, answers=answers)
            if before is not None:
                yield before[0], before[1].result()
            before = current
        if before is not None:
            yield before[0], before[1].result()


def tokenise(
    source: Iterable[Document],
    encoder: Encoder,
    path: Path,
    *,
    answers: bool = False,
    enough: int | None = None,
    aside: Aside | None = None,
    append: bool = False,
    progress: tuple[Progress, str, int] = (silent, "", 0),
) -> Tokenised:
    """Write the ids of documents to ``path``, stopping once ``enough`` tokens are there.

    With ``append`` they come after what the file holds.
    """
    show, name, total = progress
    lengths, sizes, count = array("q"), array("q"), 0
    mode = "ab" if append else "wb"
    learn_path = path.with_suffix(".learn")
    if aside is not None:
        aside.restart()
    with contextlib.ExitStack() as stack:
        stack.enter_context(disk_errors(path))
        file = stack.enter_context(path.open(mode))
        first = file.tell() // np.dtype(np.uint32).itemsize
        learn_file: IO[bytes] | None = None
        if answers:
            learn_file = stack.enter_context(learn_path.open(mode))
        for batch, encoded in _encoded(source, encoder, answers):
            # Plain writes: tofile hides the errno of a full disk.
            file.write(np.concatenate([one.ids for one in encoded]).data)
            if learn_file is not None:
                learn_file.write(b"".join(_learn(one).tobytes() for one in encoded))
            now = [one.ids.size for one in encoded]
            if aside is not None:
                aside.take(batch, now)
            lengths.extend(now)
            sizes.extend(len(document.text.encode()) for document in batch)
            count = file.tell() // np.dtype(np.uint32).itemsize
            show(f"tokenise {name}", len(lengths), max(total, len(lengths)), tokens=float(count))
            if enough is not None and count >= enough:
                break
    ids = np.memmap(path, np.uint32, "r") if count else np.empty(0, np.uint32)
    learn = np.memmap(learn_path, np.uint8, "r") if count and answers else None
    length = np.array(lengths, np.int64)
    starts = first + np.cumsum(length) - length
    return Tokenised(ids, starts, length, np.array(sizes, np.int64), learn)


def _learn(encoded: Encoded) -> Learn:
    return np.ones(encoded.ids.size, np.uint8) if encoded.learn is None else encoded.learn
