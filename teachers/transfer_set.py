"""The transfer set: text becomes packed windows of tokens in a memory map.

A source is read twice. The first time its documents are only counted, so that of a source larger
than its share a random part can be drawn from all of it, not from its head; this reads at disk
speed, a hundred times faster than tokenising. The second time the drawn documents are tokenised,
in batches, to a flat file. Then all documents of all sources are shuffled by the seed and written
one after the other, so the mix is even throughout, and memory holds a few numbers a document.

    tokens.npy                    [windows, window] uint16 or uint32
    document_starts.npy           [documents] int64, flat offsets into tokens, sorted, first is 0
    heldout_tokens.npy            [heldout windows, window]
    heldout_document_starts.npy
    transfer_set.json             facts
"""

from __future__ import annotations

import hashlib
import tempfile
from array import array
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from shearling import (
    Progress,
    ShearlingError,
    disk_errors,
    read_json,
    sha256_of_file,
    sha256_of_json,
    silent,
    write_json,
)
from teachers.fetch import fetch
from teachers.heldout import is_reserved
from teachers.readers import Document, dataset_documents, documents, format_of, source_files
from teachers.settings import SourceSettings, TransferSetSettings
from teachers.tokenizer import load_tokenizer, tokenizer_fingerprint

SCHEMA = 1
_BATCH_CHARACTERS = 1 << 21  # text tokenised at once; the tokenizer shares it among all cores
_MARGIN = 1.15  # documents drawn beyond the estimate, so that a second drawing is rare
_SAMPLE_DOCUMENTS = 256  # to estimate how many bytes make a token
_ARRAYS = ("tokens", "document_starts", "heldout_tokens", "heldout_document_starts")

Ids = NDArray[np.uint32]


# --- tokenising ---------------------------------------------------------------------------------


class Encoder:
    """Documents to ids: the tokenizer's own BOS where it adds one, and EOS at the end.

    Control tokens that a text happens to spell out (``<|im_end|>``) are encoded as the plain text
    they are: a web page must not end a document.
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
        self.vocabulary: int = len(tokenizer)
        self._backend: Any = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True

    def batch(self, texts: list[str]) -> list[Ids]:
        """Ids of each text; every one ends with EOS."""
        encoded = self._backend.encode_batch_fast(texts, add_special_tokens=True)
        return [self._ended(np.array(encoding.ids, np.uint32)) for encoding in encoded]

    def _ended(self, ids: Ids) -> Ids:
        if ids.size and ids[-1] == self.eos:
            return ids
        return np.append(ids, np.uint32(self.eos))


@dataclass(frozen=True)
class Tokenised:
    """One source's documents as ids: flat in a file, with where each begins and how long it is."""

    ids: Ids
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    bytes: NDArray[np.int64]

    def cut(self, order: NDArray[np.int64], tokens: int) -> Tokenised:
        """The first documents in ``order`` that make ``tokens`` tokens; the last one is cut."""
        ends = np.cumsum(self.lengths[order])
        count = int(np.searchsorted(ends, tokens)) + 1
        chosen = order[:count]
        lengths, sizes = self.lengths[chosen].copy(), self.bytes[chosen].copy()
        if (excess := int(lengths.sum()) - tokens) > 0:
            sizes[-1] = sizes[-1] * (lengths[-1] - excess) // lengths[-1]
            lengths[-1] -= excess
        return Tokenised(self.ids, self.starts[chosen], lengths, sizes)


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
    source: Iterable[Document], encoder: Encoder
) -> Iterator[tuple[list[Document], list[Ids]]]:
    """Batches with their ids; the next batch is read while the tokenizer works on this one."""
    with ThreadPoolExecutor(1) as pool:
        before: tuple[list[Document], Future[list[Ids]]] | None = None
        for batch in _batches(source):
            current = batch, pool.submit(encoder.batch, [document.text for document in batch])
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
    enough: int | None = None,
    progress: tuple[Progress, str, int] = (silent, "", 0),
) -> Tokenised:
    """Write the ids of documents to ``path``, stopping once ``enough`` tokens are there."""
    show, name, total = progress
    lengths, sizes, count = array("q"), array("q"), 0
    with disk_errors(path), path.open("wb") as file:
        for batch, encoded in _encoded(source, encoder):
            file.write(np.concatenate(encoded).data)  # tofile hides the errno of a full disk
            lengths.extend(ids.size for ids in encoded)
            sizes.extend(len(document.text.encode()) for document in batch)
            count = file.tell() // np.dtype(np.uint32).itemsize
            show(f"tokenise {name}", len(lengths), max(total, len(lengths)), tokens=float(count))
            if enough is not None and count >= enough:
                break
    ids = np.memmap(path, np.uint32, "r") if count else np.empty(0, np.uint32)
    length = np.array(lengths, np.int64)
    return Tokenised(ids, np.cumsum(length) - length, length, np.array(sizes, np.int64))


# --- sources ------------------------------------------------------------------------------------


class Source:
    """The usable documents of one source, in an order that does not change."""

    def __init__(self, settings: SourceSettings, cache: Path, seed: int) -> None:
        self.settings = settings
        self.seed = seed
        self.empty = self.reserved = 0
        self.kind = _kind(settings)
        if self.kind == "files":
            path = fetch(settings.path, sha256=settings.sha256, cache=cache)
            self.files = source_files(path, settings)

    @property
    def rereadable(self) -> bool:
        return self.kind == "files"

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
        if self.kind == "dataset":
            yield from dataset_documents(self.settings, self.seed)
            return
        for path, kind in self.files:
            yield from documents(path, kind, self.settings)


def _kind(settings: SourceSettings) -> str:
    """Whether a source is files, or something for ``datasets.load_dataset``.

    Without a stated format, what is not on this disk is taken for a data set's name only if it
    does not look like a file's.
    """
    local = Path(settings.path).expanduser()
    if settings.format == "dataset" or (local / "state.json").is_file():
        return "dataset"
    plain = settings.format == "auto" and not settings.path.startswith(("pypi:", ".", "/", "~"))
    named = plain and format_of(Path(settings.path)) is None and settings.path.count("/") <= 1
    return "dataset" if named and not local.exists() else "files"


def _tokenise_source(source: Source, encoder: Encoder, path: Path, show: Progress) -> Tokenised:
    """All documents of a source, or a random part that makes its share of tokens."""
    settings, share = source.settings, source.settings.tokens
    draw = np.random.default_rng([source.seed, 1])
    if share is None or not source.rereadable:
        total = 0
        if source.rereadable:
            total = sum(1 for _ in source)
        taken = tokenise(source, encoder, path, enough=share, progress=(show, settings.name, total))
    else:
        taken = _draw(source, encoder, path, share, draw, show)
    if not taken.lengths.size:
        raise ShearlingError(
            f"The source {settings.name!r} ({settings.path}) holds no text.",
            hint="Check its file, `field` and `format`.",
        )
    if share is not None and int(taken.lengths.sum()) > share:
        taken = taken.cut(draw.permutation(taken.lengths.size), share)
    return taken


def _draw(
    source: Source,
    encoder: Encoder,
    path: Path,
    share: int,
    draw: np.random.Generator,
    show: Progress,
) -> Tokenised:
    """Tokenise random documents from all of a source until they make ``share`` tokens."""
    counted = array("q")
    sample: list[str] = []
    for document in source:
        counted.append(len(document.text.encode()))
        if len(sample) < _SAMPLE_DOCUMENTS:
            sample.append(document.text)
    sizes = np.array(counted, np.int64)
    tokens = sum(ids.size for ids in encoder.batch(sample))
    bytes_a_token = int(sizes[: len(sample)].sum()) / max(1, tokens)
    order, margin = draw.permutation(sizes.size), _MARGIN
    while True:
        ends = np.cumsum(sizes[order])
        count = int(np.searchsorted(ends, share * bytes_a_token * margin)) + 1
        drawn = np.zeros(sizes.size, bool)
        drawn[order[:count]] = True
        chosen = (d for d, wanted in zip(source, drawn, strict=True) if wanted)
        total = int(drawn.sum())
        taken = tokenise(chosen, encoder, path, progress=(show, source.settings.name, total))
        if count >= sizes.size or int(taken.lengths.sum()) >= share:
            return taken
        margin *= 2


# --- packing ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """Documents of all sources in their final order; ``source`` says whose each is."""

    source: NDArray[np.int64]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]

    def __getitem__(self, index: Any) -> Piece:
        return Piece(self.source[index], self.starts[index], self.lengths[index])


def _shuffled(sources: list[Tokenised], seed: int) -> Piece:
    owner = np.concatenate([np.full(s.lengths.size, i, np.int64) for i, s in enumerate(sources)])
    piece = Piece(
        owner,
        np.concatenate([s.starts for s in sources]),
        np.concatenate([s.lengths for s in sources]),
    )
    return piece[np.random.default_rng([seed, 2]).permutation(owner.size)]


def _given(lengths: NDArray[np.int64], needed: int, window: int) -> NDArray[np.int64]:
    """How many tokens each document gives to the held-out text so that they make ``needed``.

    Text from many documents measures better than one long article, so each gives at most its
    first window's worth, as long as that costs training no more than a twentieth of the documents.
    """
    if lengths.size < 2:  # a document is either held out or trained on
        return np.zeros_like(lengths)
    most = max(window, -(-needed // max(1, lengths.size // 20)))
    given = np.minimum(lengths, most)
    if given.sum() < needed:
        given = lengths.copy()
    given[int(np.searchsorted(np.cumsum(given), needed)) + 1 :] = 0
    return given


def _hold_out(piece: Piece, needed: int, window: int) -> tuple[Piece, Piece]:
    """Split off documents that make ``needed`` held-out tokens; the others are for training.

    Each source gives in proportion to its tokens, so that both parts are the same mix.
    """
    total = int(piece.lengths.sum())
    given = np.zeros_like(piece.lengths)
    for owner in np.unique(piece.source):
        mine = np.flatnonzero(piece.source == owner)
        share = -(-needed * int(piece.lengths[mine].sum()) // total)
        given[mine] = _given(piece.lengths[mine], share, window)
    if given.sum() < needed:
        given = _given(piece.lengths, needed, window)
    held = piece[given > 0]
    return Piece(held.source, held.starts, given[given > 0]), piece[given == 0]


def _write_header(file: IO[bytes], kind: np.dtype[Any], shape: tuple[int, ...]) -> None:
    header = {"descr": kind.str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


def _write_windows(
    out: Path,
    prefix: str,
    piece: Piece,
    sources: list[Tokenised],
    shape: tuple[int, int],
    encoder: Encoder,
) -> None:
    """Write documents one after the other as windows; what fills no window is left out.

    A document that was cut ends with EOS like all others.
    """
    total, at = shape[0] * shape[1], 0
    kind = np.dtype(np.uint16 if encoder.vocabulary <= 1 << 16 else np.uint32)
    # Plain writes, not a memory map: on a full disk a map ends the process with a bus error.
    with (out / f"{prefix}tokens.npy").open("wb") as file:
        _write_header(file, kind, shape)
        for owner, start, length in zip(piece.source, piece.starts, piece.lengths, strict=True):
            end = min(at + int(length), total)
            ids = sources[owner].ids[start : start + end - at].astype(kind)
            if end == at + length:
                ids[-1] = encoder.eos
            file.write(ids.tobytes())
            at = end
            if at >= total:
                break
    starts = np.cumsum(piece.lengths) - piece.lengths
    starts = starts[starts < total]
    with (out / f"{prefix}document_starts.npy").open("wb") as file:
        _write_header(file, starts.dtype, starts.shape)
        file.write(starts.tobytes())


def build_transfer_set(
    settings: TransferSetSettings,
    tokenizer_dir: Path,
    out: Path,
    *,
    seed: int,
    cache: Path,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Read, tokenise, shuffle and pack the recipe's text into ``out``; returns the facts.

    The result is a function of the settings, the texts, the tokenizer and the seed.

    Raises:
        ShearlingError: unreadable, empty or too little text; with file and line where it can.
    """
    out = Path(out)
    encoder = Encoder(load_tokenizer(Path(tokenizer_dir)), Path(tokenizer_dir))
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out, prefix=".tokenise-") as aside:
            sources, taken = [], []
            for number, source_settings in enumerate(settings.sources):
                # A source's draw must not change when another source is put before it.
                source = Source(source_settings, cache, _source_seed(seed, source_settings))
                path = Path(aside) / f"{number}.ids"
                taken.append(_tokenise_source(source, encoder, path, progress))
                sources.append(_source_facts(source, taken[-1]))
            sizes = _pack(settings, taken, out, seed, encoder)
    facts = {
        "schema": SCHEMA,
        "window": settings.window,
        "seed": seed,
        "eos_token_id": encoder.eos,
        "vocabulary": encoder.vocabulary,
        "tokenizer_sha256": tokenizer_fingerprint(Path(tokenizer_dir)),
        **sizes,
        "sources": sources,
        "notes": [note for source in sources for note in source["notes"]],
        "sha256": sha256_of_json([sha256_of_file(out / f"{name}.npy") for name in _ARRAYS]),
    }
    write_json(out / "transfer_set.json", facts)
    return facts


def _source_seed(seed: int, settings: SourceSettings) -> int:
    digest = hashlib.sha256(f"{seed}\0{settings.name}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


def _pack(
    settings: TransferSetSettings, taken: list[Tokenised], out: Path, seed: int, encoder: Encoder
) -> dict[str, Any]:
    """Write the four arrays; returns their sizes."""
    window = settings.window
    everything = _shuffled(taken, seed)
    heldout, training = _hold_out(everything, settings.heldout_windows * window, window)
    total = int(training.lengths.sum())
    windows = total // window
    if windows < 1 or int(heldout.lengths.sum()) < settings.heldout_windows * window:
        found = int(everything.lengths.sum())
        raise ShearlingError(
            f"The transfer set's text is too little: {found:,} tokens in "
            f"{everything.lengths.size:,} documents don't make {settings.heldout_windows} held-out "
            f"windows of {window} tokens and one to train on, from different documents.",
            hint="Add text, or lower `window` or `heldout_windows` in the recipe's transfer_set.",
        )
    _write_windows(out, "", training, taken, (windows, window), encoder)
    _write_windows(out, "heldout_", heldout, taken, (settings.heldout_windows, window), encoder)
    return {
        "windows": windows,
        "tokens": windows * window,
        "documents": int(training.lengths.size),
        "heldout_windows": settings.heldout_windows,
        "heldout_documents": int(heldout.lengths.size),
    }


def _source_facts(source: Source, taken: Tokenised) -> dict[str, Any]:
    settings, tokens = source.settings, int(taken.lengths.sum())
    notes = []
    if settings.tokens is not None and tokens < settings.tokens:
        notes.append(
            f"{settings.name}: {settings.tokens:,} tokens were asked for, all of the text makes "
            f"{tokens:,}."
        )
    if source.empty:
        notes.append(f"{settings.name}: {source.empty:,} empty documents were left out.")
    return {
        "name": settings.name,
        "path": settings.path,
        "documents": int(taken.lengths.size),
        "tokens": tokens,
        "bytes": int(taken.bytes.sum()),
        "empty": source.empty,
        "reserved": source.reserved,
        "notes": notes,
    }


# --- reading ------------------------------------------------------------------------------------


def _positions(indices: NDArray[np.int64], starts: NDArray[np.int64], window: int) -> Tensor:
    """Position of each token inside its document, [B, T]; a window's first token has 0."""
    position_BT = np.tile(np.arange(window, dtype=np.int64), (indices.size, 1))
    begin_BT = np.zeros_like(position_BT)
    for row, index in enumerate(indices):
        low, high = np.searchsorted(starts, (index * window, (index + 1) * window))
        inside = starts[low:high] - index * window
        begin_BT[row, inside] = inside
    return torch.from_numpy(position_BT - np.maximum.accumulate(begin_BT, axis=1))


class TransferSet:
    """Reads what ``build_transfer_set`` wrote; windows stay on disk until they are asked for."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.facts: dict[str, Any] = read_json(self.folder / "transfer_set.json")
        try:
            self.tokens: NDArray[Any] = np.load(self.folder / "tokens.npy", "r")
            self.heldout: NDArray[Any] = np.load(self.folder / "heldout_tokens.npy", "r")
            self.starts = np.load(self.folder / "document_starts.npy")
            self.heldout_starts = np.load(self.folder / "heldout_document_starts.npy")
        except (OSError, ValueError, EOFError) as error:
            raise ShearlingError(
                f"The transfer set in {self.folder} is damaged: {error}",
                hint="Delete the folder and run the recipe again.",
            ) from error
        self.window: int = int(self.tokens.shape[1])

    def __len__(self) -> int:
        return int(self.tokens.shape[0])

    def batch(self, indices: NDArray[np.int64] | list[int]) -> dict[str, Tensor]:
        """``input_ids`` and ``position_ids``, both [B, T] int64; positions restart at documents."""
        chosen = np.asarray(indices, np.int64)
        return {
            "input_ids": torch.from_numpy(self.tokens[chosen].astype(np.int64)),
            "position_ids": _positions(chosen, self.starts, self.window),
        }

    def heldout_batch(self, indices: NDArray[np.int64] | list[int]) -> dict[str, Tensor]:
        """The same of held-out windows."""
        chosen = np.asarray(indices, np.int64)
        return {
            "input_ids": torch.from_numpy(self.heldout[chosen].astype(np.int64)),
            "position_ids": _positions(chosen, self.heldout_starts, self.window),
        }

    def order(self, seed: int, epoch: int) -> NDArray[np.int64]:
        """The order of all windows in one epoch: a function of seed and epoch only."""
        return np.random.default_rng([seed, epoch, 3]).permutation(len(self))

    def calibration(self, tokens: int, seed: int) -> Tensor:
        """Random windows that make at least ``tokens`` tokens, or all there are: [W, T] int64."""
        count = min(len(self), max(1, -(-tokens // self.window)))
        chosen = np.random.default_rng([seed, 4]).permutation(len(self))[:count]
        return self.batch(np.sort(chosen))["input_ids"]
