"""The transfer set: text becomes packed windows of tokens in a memory map.

tokens.npy                    [windows, window] uint16 or uint32
document_starts.npy           [documents] int64, flat offsets into tokens, sorted, first is 0
document_sources.npy          [documents] int64, index into the facts' ``sources``
loss_mask.npy                 [windows, window] bool, whether the token after a position is to
                              be learnt; only where a source says `loss: answers`
heldout_tokens.npy            [heldout windows, window]
heldout_document_starts.npy
heldout_document_sources.npy
heldout_loss_mask.npy
transfer_set.json             facts
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

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
from teachers.encoding import Aside, Encoder, Tokenised, lengths_of
from teachers.packing import hold_out, shuffled, write_loss_mask, write_windows
from teachers.settings import CleanSettings, TransferSetSettings
from teachers.sources import Source, tokenise_source
from teachers.tokenizer import load_tokenizer, tokenizer_fingerprint
from teachers.written import WrittenSource

if TYPE_CHECKING:
    from teachers.cleaned import Cleaner, Questions

SCHEMA = 1
# What the text is; of which source a document is changes no answer of a teacher, so it isn't here.
_ARRAYS = ("tokens", "document_starts", "heldout_tokens", "heldout_document_starts")
_OPTIONAL = ("loss_mask", "heldout_loss_mask")
_FEW_LEARNT = 256
"""Held-out tokens of a source that are learnt, below which a note is made."""


# --- building -----------------------------------------------------------------------------------


def build_transfer_set(
    settings: TransferSetSettings,
    tokenizer_dir: Path,
    out: Path,
    *,
    seed: int,
    cache: Path,
    questions: Questions | None = None,
    device: str = "cpu",
    progress: Progress = silent,
) -> dict[str, Any]:
    """Read, tokenise, clean, shuffle and pack the recipe's text into ``out``; returns the facts.

    The result is a function of the settings, the texts, the tokenizer and the seed. ``questions``
    are the benchmarks' (task -> documents -> texts), which the text is cleared of. The weights
    beside the tokenizer are only opened for what ``clean`` or ``written`` wants a teacher for.

    Raises:
        ShearlingError: unreadable, empty or too little text; with file and line where it can.
    """
    out = Path(out)
    encoder = Encoder(load_tokenizer(Path(tokenizer_dir)), Path(tokenizer_dir))
    shares = _shares(settings)
    cleaning: dict[str, Any] = {}
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out, prefix=".tokenise-") as aside:
            # A source's draw must not change when another source is put before it.
            seeds = [_source_seed(seed, source.name) for source in settings.all_sources]
            sources = _open_sources(settings, seeds, Path(tokenizer_dir), cache, device)
            draws = [np.random.default_rng([own, 1]) for own in seeds]
            paths = [Path(aside) / f"{number}.ids" for number in range(len(sources))]
            cleaner = None
            if settings.clean is not None:
                cleaner = _open_cleaner(
                    settings.clean,
                    Path(aside),
                    questions=questions or {},
                    teacher=Path(tokenizer_dir),
                    device=device,
                    seed=seed,
                    progress=progress,
                )
            taken = [
                _tokenised(
                    source,
                    encoder,
                    path,
                    draw,
                    progress,
                    share=cleaner.share(share) if cleaner else share,
                    aside=cleaner.aside() if cleaner else None,
                )
                for source, path, draw, share in zip(sources, paths, draws, shares, strict=True)
            ]
            if cleaner:
                taken, cleaning = cleaner.clean(taken, paths, encoder)
            shares = _balanced(settings, shares, taken)
            taken = [_cut(*each) for each in zip(taken, shares, draws, strict=True)]
            told = [_source_facts(*each) for each in zip(sources, shares, taken, strict=True)]
            sizes, learnt = _pack(settings, taken, out, seed, encoder)
            told = [
                facts | _learnt_facts(facts, more) for facts, more in zip(told, learnt, strict=True)
            ]
    facts = {
        "schema": SCHEMA,
        "window": settings.window,
        "seed": seed,
        "eos_token_id": encoder.eos,
        "vocabulary": encoder.vocabulary,
        "tokenizer_sha256": tokenizer_fingerprint(Path(tokenizer_dir)),
        **sizes,
        "lengths": lengths_of(taken),
        "sources": told,
        "notes": [note for source in told for note in source["notes"]],
        **({"cleaning": cleaning} if cleaning else {}),
        "sha256": sha256_of_json([sha256_of_file(file) for file in array_files(out)]),
    }
    write_json(out / "transfer_set.json", facts)
    return facts


def _open_cleaner(settings: CleanSettings, work: Path, **more: Any) -> Cleaner:
    try:
        from teachers.cleaned import Cleaner
    except ModuleNotFoundError as error:
        raise ShearlingError(
            f"transfer_set.clean needs the package {error.name}, which is not installed.",
            hint="Run `pip install 'shearling[clean]'`, or remove transfer_set.clean.",
        ) from error
    return Cleaner(settings, work, **more)


def array_files(folder: Path) -> list[Path]:
    """The files that make a set what it is, those that it may lack among them."""
    names = [f"{name}.npy" for name in (*_ARRAYS, *_OPTIONAL)]
    return [folder / name for name in names if name[:-4] in _ARRAYS or (folder / name).is_file()]


def _source_seed(seed: int, name: str) -> int:
    digest = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


def _open_sources(
    settings: TransferSetSettings, seeds: list[int], teacher: Path, cache: Path, device: str
) -> list[Source | WrittenSource]:
    """The sources as ``settings.all_sources`` has them, what the teacher writes last."""
    found: list[Source | WrittenSource] = [
        Source(source, cache, own)
        for source, own in zip(settings.sources, seeds[: len(settings.sources)], strict=True)
    ]
    if settings.written:
        written = WrittenSource(
            settings.written,
            teacher,
            cache,
            window=settings.window,
            seed=seeds[-1],
            device=device,
        )
        found.append(written)
    return found


def _tokenised(
    source: Source | WrittenSource,
    encoder: Encoder,
    path: Path,
    draw: np.random.Generator,
    progress: Progress,
    *,
    share: int | None,
    aside: Aside | None,
) -> Tokenised:
    if isinstance(source, WrittenSource):
        # Not ``share``: more than it, for cleaning to choose from, would cost too much to write.
        return source.tokenise(path, progress, aside)
    return tokenise_source(source, encoder, path, draw, progress, share=share, aside=aside)


def _shares(settings: TransferSetSettings) -> list[int | None]:
    """How many tokens each source is asked for; None: all it has."""
    fixed = sum(source.tokens or 0 for source in settings.all_sources)
    weights = sum(source.weight or 0.0 for source in settings.all_sources)
    shares: list[int | None] = []
    for source in settings.all_sources:
        if source.weight is not None and settings.tokens is not None:
            left = settings.tokens - fixed
            shares.append(max(1, round(left * source.weight / weights)))
        else:
            shares.append(source.tokens)
    return shares


def _balanced(
    settings: TransferSetSettings, shares: list[int | None], taken: list[Tokenised]
) -> list[int | None]:
    """Without a total, the smallest source decides how much the weighted ones may give.

    Raises:
        ShearlingError: one of them has nothing left to give.
    """
    if settings.tokens is not None:
        return shares
    for source, tokenised in zip(settings.all_sources, taken, strict=True):
        if source.weight is not None and not len(tokenised):
            raise ShearlingError(
                f"Cleaning left nothing of the source {source.name!r}, and without "
                "transfer_set.tokens the smallest source decides how much the others give.",
                hint="Remove the source or parts of transfer_set.clean, or set "
                "transfer_set.tokens.",
            )
    weighted = [
        int(tokenised.lengths.sum()) / source.weight
        for source, tokenised in zip(settings.all_sources, taken, strict=True)
        if source.weight is not None
    ]
    return [
        share if source.weight is None else max(1, int(min(weighted) * source.weight))
        for source, share in zip(settings.all_sources, shares, strict=True)
    ]


def _cut(taken: Tokenised, share: int | None, draw: np.random.Generator) -> Tokenised:
    """Random documents that make exactly the share, where there are more."""
    if share is None or int(taken.lengths.sum()) <= share:
        return taken
    return taken.cut(draw.permutation(len(taken)), share)


def _pack(
    settings: TransferSetSettings, taken: list[Tokenised], out: Path, seed: int, encoder: Encoder
) -> tuple[dict[str, Any], list[dict[str, int]]]:
    """Write the arrays; returns their sizes, and of each source how much of them is learnt."""
    window = settings.window
    everything = shuffled(taken, seed)
    heldout, training = hold_out(everything, taken, settings.heldout_windows * window, window)
    total = int(training.lengths.sum())
    windows = total // window
    if windows < 1 or int(heldout.lengths.sum()) < settings.heldout_windows * window:
        found = int(everything.lengths.sum())
        raise ShearlingError(
            f"The transfer set's text is too little: {found:,} tokens in "
            f"{everything.lengths.size:,} documents don't make {settings.heldout_windows} held-out "
            f"windows of {window} tokens and one to train on, from different documents.",
            hint="Add text (for what the teacher writes, raise `written.tokens`), or lower "
            "`window` or `heldout_windows` in the recipe's transfer_set.",
        )
    masked = any(tokenised.learn is not None for tokenised in taken)
    parts = (("", training, windows), ("heldout_", heldout, settings.heldout_windows))
    learnt: dict[str, list[int]] = {}
    for prefix, piece, count in parts:
        write_windows(out, prefix, piece, taken, (count, window), encoder)
        if masked:
            name = f"{prefix}learnt_tokens"
            learnt[name] = write_loss_mask(out, prefix, piece, taken, (count, window), encoder)
            _check_learnt(settings, name, learnt[name], count)
    return {
        "windows": windows,
        "tokens": windows * window,
        "documents": int(training.lengths.size),
        "heldout_windows": settings.heldout_windows,
        "heldout_documents": int(heldout.lengths.size),
        **{name: sum(counts) for name, counts in learnt.items()},
    }, [{name: counts[number] for name, counts in learnt.items()} for number in range(len(taken))]


def _check_learnt(
    settings: TransferSetSettings, name: str, counts: Sequence[int], windows: int
) -> None:
    """There is something to learn in training and in held-out windows.

    Raises:
        ShearlingError: there is nothing.
    """
    if sum(counts):
        return
    if name == "learnt_tokens":
        raise ShearlingError(
            "Of the transfer set's text nothing would be learnt: its sources have `loss: answers`, "
            "and the windows to train on hold no answer.",
            hint="Add conversations, or set the sources' `loss` to all.",
        )
    raise ShearlingError(
        f"The {windows} held-out windows of {settings.window} tokens hold nothing that is learnt, "
        "so no evaluation could tell how training goes.",
        hint="Raise transfer_set.heldout_windows, or set the sources' `loss` to all.",
    )


def _learnt_facts(source: Mapping[str, Any], learnt: Mapping[str, int]) -> dict[str, Any]:
    """How much of a source is learnt, and a note where held-out text has little of it."""
    few = learnt.get("heldout_learnt_tokens", _FEW_LEARNT)
    if few >= _FEW_LEARNT:
        return dict(learnt)
    note = (
        f"{source['name']}: of its text only {few:,} held-out tokens are learnt, so what is "
        "measured on it says little; raise transfer_set.heldout_windows."
    )
    return {**learnt, "notes": [*source["notes"], note]}


def _source_facts(
    source: Source | WrittenSource, share: int | None, taken: Tokenised
) -> dict[str, Any]:
    settings, tokens = source.settings, int(taken.lengths.sum())
    notes = source.notes() if isinstance(source, WrittenSource) else []
    if share is not None and tokens < share:
        notes.append(
            f"{settings.name}: {share:,} tokens were asked for, all of the text makes {tokens:,}."
        )
    if not len(taken):
        notes.append(f"{settings.name}: cleaning left nothing of it.")
    if source.empty:
        what = "empty documents"
        if isinstance(source, Source) and source.settings.messages:
            what = "conversations that are empty or lack a message's text"
        notes.append(f"{settings.name}: {source.empty:,} {what} were left out.")
    return {
        "name": settings.name,
        **(
            {"written": source.identity}
            if isinstance(source, WrittenSource)
            else {"path": source.settings.path}
        ),
        "documents": len(taken),
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


def _windows(
    indices: NDArray[np.int64] | list[int],
    tokens: NDArray[Any],
    starts: NDArray[np.int64],
    mask: NDArray[np.bool_] | None,
) -> dict[str, Tensor]:
    chosen = np.asarray(indices, np.int64)
    batch = {
        "input_ids": torch.from_numpy(tokens[chosen].astype(np.int64)),
        "position_ids": _positions(chosen, starts, tokens.shape[1]),
    }
    if mask is not None:
        batch["loss_mask"] = torch.from_numpy(mask[chosen])
    return batch


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
            self.document_sources = np.load(self.folder / "document_sources.npy")
            self.heldout_document_sources = np.load(self.folder / "heldout_document_sources.npy")
            self.loss_mask, self.heldout_loss_mask = map(self._mask, _OPTIONAL)
        except (OSError, ValueError, EOFError) as error:
            raise ShearlingError(
                f"The transfer set in {self.folder} is damaged: {error}",
                hint="Delete the folder and run the recipe again.",
            ) from error
        self.window: int = int(self.tokens.shape[1])

    def __len__(self) -> int:
        return int(self.tokens.shape[0])

    @cached_property
    def taught(self) -> NDArray[np.int64]:
        """Numbers of the windows in which anything is learnt: of long prompts most have nothing."""
        if self.loss_mask is None:
            return np.arange(len(self))
        return np.flatnonzero(self.loss_mask.any(axis=1))

    def _mask(self, name: str) -> NDArray[np.bool_] | None:
        path = self.folder / f"{name}.npy"
        return np.load(path, "r") if path.is_file() else None

    def batch(self, indices: NDArray[np.int64] | list[int]) -> dict[str, Tensor]:
        """``input_ids`` and ``position_ids``, both [B, T] int64; positions restart at documents.

        ``loss_mask`` [B, T] bool is there if not every token is to be learnt: whether the token
        after a position is.
        """
        return _windows(indices, self.tokens, self.starts, self.loss_mask)

    def heldout_batch(self, indices: NDArray[np.int64] | list[int]) -> dict[str, Tensor]:
        """The same of held-out windows."""
        return _windows(indices, self.heldout, self.heldout_starts, self.heldout_loss_mask)

    @property
    def source_names(self) -> list[str]:
        """The sources, in the order in which their indices count."""
        return [source["name"] for source in self.facts["sources"]]

    def window_owners(self) -> NDArray[np.int64]:
        """The source that has most of each window's tokens, [W] (of equals the first)."""
        count, sources = len(self), len(self.source_names)
        cuts = np.union1d(self.starts, np.arange(count) * self.window)
        lengths = np.diff(cuts, append=count * self.window)
        owners = self.document_sources[np.searchsorted(self.starts, cuts, "right") - 1]
        places = cuts // self.window * sources + owners
        tokens_WS = np.bincount(places, lengths, count * sources).reshape(count, sources)
        most_W: NDArray[np.int64] = tokens_WS.argmax(axis=1)
        return most_W

    def heldout_owners(self, indices: NDArray[np.int64] | list[int]) -> Tensor:
        """The source of each token of held-out windows, [B, T] int64."""
        offsets_BT = np.asarray(indices)[:, None] * self.window + np.arange(self.window)
        document_BT = np.searchsorted(self.heldout_starts, offsets_BT, "right") - 1
        return torch.from_numpy(self.heldout_document_sources[document_BT])

    def order(self, seed: int, epoch: int) -> NDArray[np.int64]:
        """The order of ``taught`` in one epoch: a function of seed and epoch only."""
        return np.random.default_rng([seed, epoch, 3]).permutation(self.taught)

    def calibration(self, tokens: int, seed: int) -> Tensor:
        """Random windows that make at least ``tokens`` tokens, or all there are: [W, T] int64."""
        count = min(len(self), max(1, -(-tokens // self.window)))
        chosen = np.random.default_rng([seed, 4]).permutation(len(self))[:count]
        return self.batch(np.sort(chosen))["input_ids"]
