"""Packing: documents of all sources in one seeded order, cut into windows, some of them held out.

All documents are shuffled by the seed and written one after the other, so the mix is even
throughout, and memory holds a few numbers a document.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from teachers.encoding import Encoder, Tokenised


@dataclass(frozen=True)
class Piece:
    """Documents of all sources in their final order; ``source`` says whose each is."""

    source: NDArray[np.int64]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]

    def __getitem__(self, index: Any) -> Piece:
        return Piece(self.source[index], self.starts[index], self.lengths[index])


def shuffled(sources: list[Tokenised], seed: int) -> Piece:
    owner = np.concatenate([np.full(s.lengths.size, i, np.int64) for i, s in enumerate(sources)])
    piece = Piece(
        owner,
        np.concatenate([s.starts for s in sources]),
        np.concatenate([s.lengths for s in sources]),
    )
    return piece[np.random.default_rng([seed, 2]).permutation(owner.size)]


def _given(lengths: NDArray[np.int64], needed: int, window: int) -> NDArray[np.int64]:
    """How many tokens each document gives to the held-out text so that they make ``needed``.

    Text from many documents measures better than one long article, so each gives at most a
    window's worth, as long as that costs training no more than a twentieth of the documents.
    """
    if lengths.size < 2:  # a document is either held out or trained on
        return np.zeros_like(lengths)
    most = max(window, -(-needed // max(1, lengths.size // 20)))
    given = np.minimum(lengths, most)
    if given.sum() < needed:
        given = lengths.copy()
    given[int(np.searchsorted(np.cumsum(given), needed)) + 1 :] = 0
    return given


def hold_out(
    piece: Piece, sources: list[Tokenised], needed: int, window: int
) -> tuple[Piece, Piece]:
    """Split off documents that make ``needed`` held-out tokens; the others are for training.

    Each source gives in proportion to its tokens, so that both parts are the same mix. Of a text
    that is the beginning; of a conversation, whose beginning may be all prompt, the end.
    """
    total = int(piece.lengths.sum())
    given = np.zeros_like(piece.lengths)
    for owner in np.unique(piece.source):
        mine = np.flatnonzero(piece.source == owner)
        share = -(-needed * int(piece.lengths[mine].sum()) // total)
        given[mine] = _given(piece.lengths[mine], share, window)
    if given.sum() < needed:
        given = _given(piece.lengths, needed, window)
    at_end = np.array([source.learn is not None for source in sources])[piece.source]
    starts = piece.starts + np.where(at_end, piece.lengths - given, 0)
    held = given > 0
    return Piece(piece.source[held], starts[held], given[held]), piece[~held]


def _write_header(file: IO[bytes], kind: np.dtype[Any], shape: tuple[int, ...]) -> None:
    header = {"descr": kind.str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


def _write_array(path: Path, array: NDArray[Any]) -> None:
    with path.open("wb") as file:
        _write_header(file, array.dtype, array.shape)
        file.write(array.tobytes())


def write_windows(
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
    _write_array(out / f"{prefix}document_starts.npy", starts)
    _write_array(out / f"{prefix}document_sources.npy", piece.source[: len(starts)])


def write_loss_mask(
    out: Path,
    prefix: str,
    piece: Piece,
    sources: list[Tokenised],
    shape: tuple[int, int],
    encoder: Encoder,
) -> list[int]:
    """Write for each position of the windows whether the token after it is to be learnt.

    So a window's last position knows it too, although its next token lies outside. Returns how
    many are learnt of each source.
    """
    total, at, learnt = shape[0] * shape[1], 0, [0] * len(sources)
    with (out / f"{prefix}loss_mask.npy").open("wb") as file:
        _write_header(file, np.dtype(np.bool_), shape)
        for owner, start, length in zip(piece.source, piece.starts, piece.lengths, strict=True):
            ids, learn = sources[owner].ids, sources[owner].learn
            counts = np.ones(int(length), np.bool_)
            if learn is not None:
                counts[:-1] = learn[start + 1 : start + length].astype(np.bool_)
                if length > 1 and ids[start + length - 1] != encoder.eos:
                    counts[-2] = False  # an answer that was cut doesn't end there
            counts[-1] = False
            counts = counts[: total - at]
            file.write(counts.tobytes())
            learnt[owner] += int(counts.sum())
            at += int(length)
            if at >= total:
                break
    return learnt
