"""Cleaning: the recipe's filters as datatrove pipelines, and what they removed.

    raw/SOURCE-SHARD.jsonl    documents with their numbers, as the sources gave them
    NAME/RANK.jsonl           what is left after each phase
    removed/NAME/RANK.jsonl   what a filter took out, with its reason

Shards, not processes, are what the work is divided by, so the result does not depend on how many
processes there are. A phase is a plain datatrove pipeline: `run_phase` gives it to datatrove's
local executor, and its Slurm or Ray executor takes the same steps (docs/TRANSFER_SETS.md).
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from datatrove.data import Document as TroveDocument
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.pipeline.dedup.exact_dedup import (
    ExactDedupConfig,
    ExactDedupFilter,
    ExactDedupSignature,
    ExactFindDedups,
)
from datatrove.pipeline.dedup.minhash import (
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.pipeline.filters import (
    C4BadWordsFilter,
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
    LanguageFilter,
)
from datatrove.pipeline.readers.jsonl import JsonlReader
from datatrove.pipeline.writers.jsonl import JsonlWriter
from datatrove.utils.hashing import HashConfig
from datatrove.utils.logging import logger
from numpy.typing import NDArray

from shearling import Progress, ShearlingError
from teachers.filters import (
    Decontaminate,
    NamedByNumber,
    Obscene,
    PlainLanguage,
    PlainWords,
    ProseOnly,
)
from teachers.readers import Document
from teachers.settings import CleanSettings

_SHARD_BYTES = 4 << 20
_ALONE_BELOW = 8 << 20
"""Bytes of text that one process has cleaned before others have started."""
_PRELOADED = ["teachers.cleaning"]

# SHA-1, for datatrove's wrapper of xxhash gives it strings, which xxhash 4 refuses.
_HASH = HashConfig(precision=64, hash_fc="sha1")
_MINHASH = MinhashConfig(hash_config=_HASH)


# --- in -----------------------------------------------------------------------------------------


class Shards:
    """Writes the documents of all sources to shards, numbered in the order in which they come."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "raw"
        self.folder.mkdir(parents=True)
        self.bases: list[int] = []
        self.documents = 0
        self.bytes = 0

    def source(self) -> _SourceShards:
        """Takes the next source's documents."""
        self.bases.append(self.documents)
        return _SourceShards(self, len(self.bases) - 1)

    @property
    def count(self) -> int:
        return sum(1 for _ in self.folder.iterdir())


class _SourceShards:
    """One source's shards: an `Aside` of `tokenise`."""

    def __init__(self, shards: Shards, source: int) -> None:
        self.shards, self.source = shards, source
        self._taken = self._bytes = 0
        self._shard, self._room = -1, 0

    def restart(self) -> None:
        for path in self.shards.folder.glob(f"{self.source:03d}-*.jsonl"):
            path.unlink()
        self.shards.documents -= self._taken
        self.shards.bytes -= self._bytes
        self._taken = self._bytes = 0
        self._shard, self._room = -1, 0

    def take(self, documents: list[Document], lengths: list[int]) -> None:
        lines: list[bytes] = []
        for document, tokens in zip(documents, lengths, strict=True):
            line = self._line(document, tokens)
            if self._room <= 0:
                self._flush(lines)
                self._shard, self._room = self._shard + 1, _SHARD_BYTES
            self._room -= len(line)
            lines.append(line)
        self._flush(lines)

    def _line(self, document: Document, tokens: int) -> bytes:
        text = document.text
        number = self.shards.documents
        self._taken += 1
        self._bytes += len(text)
        self.shards.documents += 1
        self.shards.bytes += len(text)
        metadata = {
            "number": number,
            "source": self.source,
            "tokens": tokens,
            "conversation": document.turns is not None,
            "crc": zlib.crc32(text.encode()),
        }
        return orjson.dumps(
            {"text": text, "id": str(number), "metadata": metadata},
            option=orjson.OPT_APPEND_NEWLINE,
        )

    def _flush(self, lines: list[bytes]) -> None:
        if lines:
            name = f"{self.source:03d}-{self._shard:06d}.jsonl"
            with (self.shards.folder / name).open("ab") as file:
                file.writelines(lines)
            lines.clear()


# --- the pipelines ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Phase:
    """One datatrove pipeline; what it needs of earlier phases lies in their folders."""

    name: str
    steps: list[Any]
    tasks: int


@dataclass
class Plan:
    """Phases in order, the filters' names as they come, and where what is left lies."""

    work: Path
    tasks: int
    kept: Path
    phases: list[Phase] = field(default_factory=list)
    filters: list[str] = field(default_factory=list)

    def removed(self, name: str) -> Any:
        """A writer for what the filter of this name takes out."""
        self.filters.append(name)
        return JsonlWriter(str(removed_folder(self.work, name)), compression=None)

    def reader(self) -> Any:
        return JsonlReader(str(self.kept), compression=None, add_file_path=False)

    def writer(self, name: str) -> Any:
        """Where a phase's documents go, which the next phase reads."""
        self.kept = self.work / name
        return EveryRank(str(self.kept), compression=None)


def removed_folder(work: Path, name: str) -> Path:
    return work / "removed" / name


class EveryRank(JsonlWriter):  # type: ignore[misc]
    """Leaves a file for every rank, an empty one if need be.

    datatrove deals files to ranks by their order, so one that is missing would shift the others,
    and duplicates would be looked up in a neighbour's list.
    """

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[TroveDocument]:
        self.output_mg.get_file(f"{rank:05d}.jsonl")
        yield from super().run(data, rank, world_size)


def plan(settings: CleanSettings, work: Path, tasks: int, index: Path | None) -> Plan:
    """The phases that need no teacher. ``index`` holds the benchmarks' n-grams."""
    made = Plan(work, tasks, work / "raw")
    made.phases.append(Phase("filters", _filters(settings, made, index), tasks))
    if settings.exact_duplicates:
        _exact_duplicates(made)
    if settings.near_duplicates:
        _near_duplicates(made)
    return made


def _filters(settings: CleanSettings, made: Plan, index: Path | None) -> list[Any]:
    """Reader, filters that look at one document at a time, writer."""
    words = PlainWords()
    steps = [made.reader(), _language(settings, made)]
    if index is not None:
        steps.append(Decontaminate(index, made.removed("benchmarks")))
    if settings.repetition:
        steps.append(ProseOnly(GopherRepetitionFilter(language=words), made.removed("repetition")))
    stop_words = 2 if not settings.languages or "en" in settings.languages else None
    rules = {
        "gopher": lambda: GopherQualityFilter(language=words, min_stop_words=stop_words),
        "c4": lambda: C4QualityFilter(language=words),
        "fineweb": lambda: FineWebQualityFilter(language=words),
    }
    for name in dict.fromkeys(settings.quality):
        steps.append(ProseOnly(rules[name](), made.removed(name)))
    if settings.unsafe == "words":
        steps.append(Obscene(made.removed("unsafe")))
    elif settings.unsafe == "c4":
        _downloads("unsafe: c4", "transfer_set.clean.unsafe to words")
        steps.append(
            C4BadWordsFilter(
                fail_on_missing_language=False, seed=0, exclusion_writer=made.removed("unsafe")
            )
        )
    return [*steps, made.writer("filtered")]


def _language(settings: CleanSettings, made: Plan) -> Any:
    removed = made.removed("languages") if settings.languages else None
    if settings.language_model == "fasttext":
        _downloads("language_model: fasttext", "transfer_set.clean.language_model to py3langid")
        return LanguageFilter(
            list(settings.languages) or None,
            settings.language_threshold,
            removed,
            label_only=not settings.languages,
        )
    return PlainLanguage(settings.languages, settings.language_threshold, removed)


def _downloads(what: str, instead: str) -> None:
    """Parts of datatrove that fetch a model or a list, with packages of their own."""
    needed = ["fasteners", *(["fasttext"] if "fasttext" in what else [])]
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise ShearlingError(
            f"{what} needs {' and '.join(missing)}, and downloads when it first runs.",
            hint=f"Run `pip install fasteners fasttext-numpy2-wheel`, or set {instead}.",
        )


def _folded(document: TroveDocument) -> str:
    """What must be equal for two texts to be the same: all but case and white space."""
    return " ".join(document.text.lower().split())


def _exact_duplicates(made: Plan) -> None:
    config = ExactDedupConfig(content_getter=_folded, hash_config=_HASH)
    # The annotation itself, not its text: datatrove looks at it to choose the hash.
    _folded.__annotations__["return"] = str
    signatures, found = _folders(made.work, "exact-signatures", "exact-duplicates")
    reader = made.reader()
    made.phases += [
        Phase("exact-1", [reader, ExactDedupSignature(signatures, config)], made.tasks),
        Phase("exact-2", [ExactFindDedups(signatures, found, config)], 1),
        Phase(
            "exact-3",
            [
                made.reader(),
                ExactDedupFilter(found, config, made.removed("exact duplicates")),
                made.writer("distinct"),
            ],
            made.tasks,
        ),
    ]


def _near_duplicates(made: Plan) -> None:
    signatures, buckets, found = _folders(
        made.work, "near-signatures", "near-buckets", "near-duplicates"
    )
    signing = MinhashDedupSignature(signatures, _MINHASH, language=PlainWords())
    made.phases += [
        Phase("near-1", [made.reader(), signing], made.tasks),
        Phase(
            "near-2",
            [MinhashDedupBuckets(signatures, buckets, config=_MINHASH)],
            _MINHASH.num_buckets,
        ),
        Phase("near-3", [MinhashDedupCluster(buckets, found, _MINHASH)], 1),
        Phase(
            "near-4",
            [
                made.reader(),
                MinhashDedupFilter(found, made.removed("near duplicates")),
                made.writer("unalike"),
            ],
            made.tasks,
        ),
    ]


def without(made: Plan, name: str, numbers: NDArray[np.int64], reason: str) -> Phase:
    """A phase that takes out the documents of these numbers, for what the teacher decides."""
    path = made.work / f"{name.replace(' ', '-')}.npy"
    np.save(path, numbers)
    reader = made.reader()
    removing = NamedByNumber(name, path, reason, made.removed(name))
    phase = Phase(name, [reader, removing, made.writer(path.stem)], made.tasks)
    made.phases.append(phase)
    return phase


def _folders(work: Path, *names: str) -> list[str]:
    for name in names:
        (work / name).mkdir()
    return [str(work / name) for name in names]


# --- running them -------------------------------------------------------------------------------


class _Quiet(LocalPipelineExecutor):  # type: ignore[misc]
    """The local executor without its lines and bars; errors come back as exceptions."""

    def _launch_run_for_rank(self, *arguments: Any, **named: Any) -> Any:
        logger.disable("datatrove")
        with contextlib.redirect_stderr(io.StringIO()):
            return super()._launch_run_for_rank(*arguments, **named)


def processes(size: int) -> int:
    """How many processes clean so many bytes of text."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return 1 if size < _ALONE_BELOW else cores or 1


def run_phase(phase: Phase, work: Path, workers: int) -> None:
    """Run one phase on this machine."""
    import multiprocess

    multiprocess.get_context("forkserver").set_forkserver_preload(_PRELOADED)
    logger.disable("datatrove")
    folder = work / "logs" / phase.name
    try:
        _Quiet(
            pipeline=phase.steps,
            tasks=phase.tasks,
            workers=min(workers, phase.tasks),
            logging_dir=str(folder),
        ).run()
    finally:
        logger.enable("datatrove")


def run_plan(made: Plan, workers: int, progress: Progress) -> None:
    for number, phase in enumerate(made.phases):
        progress(f"clean: {phase.name}", number, len(made.phases))
        run_phase(phase, made.work, workers)


# --- out ----------------------------------------------------------------------------------------


def rows(folder: Path) -> Iterator[dict[str, Any]]:
    """The documents in a phase's folder, in the order of ranks."""
    for path in sorted(folder.glob("*.jsonl")):
        with path.open("rb") as file:
            for line in file:
                yield orjson.loads(line)


def was_changed(row: dict[str, Any]) -> bool:
    """Whether a filter took lines out of the document."""
    return bool(zlib.crc32(row["text"].encode()) != row["metadata"]["crc"])
