"""Documents out of files of many kinds, one at a time, and errors that name file and line."""

from __future__ import annotations

import gzip
import importlib
import io
import itertools
import json
import operator
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

from shearling import ShearlingError
from teachers.conversations import Turn, read_turns
from teachers.settings import SourceSettings

FORMATS_BY_ENDING = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".raw": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}
_COMPRESSED = (".gz", ".zst")

# A plain text file says nothing of documents, so by default it is cut at blank lines into pieces of
# about a thousand tokens: enough context to learn from, and enough pieces to shuffle and hold out.
_PIECE_CHARACTERS = 4096
_LONGEST_PIECE = 1 << 16
_LONGEST_LINE = 1 << 26
_LAST_CHARACTER = re.compile(rb"[\xc0-\xff][\x80-\xbf]*\Z")
"""Of more than one byte, at the end of a part of a line, where it may be cut."""
_LARGEST_JSON = 1 << 30
"""Characters of what is read whole: a .json file, a line of JSONL, a text that is one document.
A small compressed one may hold endless spaces."""
_ROWS = 16
"""Rows of a table that become Python objects at a time: each may hold a whole book, many times."""


class Document(NamedTuple):
    """One text, and its title where the source has titles.

    Of a conversation ``text`` is what was said, without roles: what filters look at.
    """

    text: str
    title: str | None = None
    turns: tuple[Turn, ...] | None = None


def format_of(path: Path) -> str | None:
    """The format that a file's name ending stands for, compression left aside."""
    name = path.name.lower()
    for ending in _COMPRESSED:
        name = name.removesuffix(ending)
    return FORMATS_BY_ENDING.get(Path(name).suffix)


def saved_splits(folder: Path) -> Literal["one", "several"] | None:
    """What ``save_to_disk`` of ``datasets`` left in a folder; None if it left nothing."""
    if (folder / "dataset_dict.json").is_file():
        return "several"
    return "one" if (folder / "state.json").is_file() else None


def is_data_set(settings: SourceSettings) -> bool:
    """Whether a source is something for ``datasets``, and not files.

    Without a stated format, what is not on this disk is taken for a data set's name only if it
    does not look like a file's.
    """
    local = Path(settings.path).expanduser()
    if settings.format == "dataset" or saved_splits(local):
        return True
    plain = settings.format == "auto" and not settings.path.startswith(("pypi:", ".", "/", "~"))
    named = plain and format_of(Path(settings.path)) is None and settings.path.count("/") <= 1
    return named and not local.exists()


def local_files(settings: SourceSettings) -> list[Path]:
    """The files on this disk that make a source what it is; none if it isn't here.

    Raises:
        ShearlingError: as `source_files`.
    """
    path = Path(settings.path).expanduser()
    if not path.exists():
        return []
    if not is_data_set(settings):
        return [file for file, _ in source_files(path, settings)]
    # Which of its files `datasets` opens is its own affair.
    return [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]


def source_files(path: Path, settings: SourceSettings) -> list[tuple[Path, str]]:
    """The files of a source with their formats, in the order of their names.

    Raises:
        ShearlingError: a folder without readable files or of several splits, an ending that says no
            format, or files that can't be what the settings say.
    """
    files = _kinds_of_files(path, settings)
    plain = [file for file, kind in files if kind == "text"]
    if settings.messages is not None and len(plain) == len(files):
        raise ShearlingError(
            f"The source {settings.name!r} ({path}) is plain text, which has no field "
            f"{settings.messages!r}.",
            hint="Remove `messages` from the source, or name JSONL, JSON, Parquet or Arrow.",
        )
    if settings.documents == "files" and not plain:
        raise ShearlingError(
            f"The source {settings.name!r} ({path}) has no plain text, whose files could be "
            "documents.",
            hint="Remove `documents` from the source; in tables each row is a document.",
        )
    return [(f, kind) for f, kind in files if settings.messages is None or kind != "text"]


def _kinds_of_files(path: Path, settings: SourceSettings) -> list[tuple[Path, str]]:
    forced = None if settings.format == "auto" else settings.format
    if path.is_dir():
        inside = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
        files = [(p, kind) for p in inside if (kind := format_of(p))]
        if forced is not None:
            base = "text" if forced == "wikitext" else forced
            files = [(p, forced) for p, kind in files if kind == base]
        if any(kind != "text" for _, kind in files):  # beside tables it tells of them
            files = [(p, kind) for p, kind in files if p.suffix.lower() != ".md"]
        _check_splits(path, [p for p, kind in files if kind != "text"], settings)
        if not files:
            raise ShearlingError(
                f"The folder {path} of the source {settings.name!r} has no file with text.",
                hint=f"Endings that are read: {', '.join(FORMATS_BY_ENDING)}, also .gz and .zst.",
            )
        return files
    kind = forced or format_of(path)
    if kind is None:
        raise ShearlingError(
            f"The name of {path} does not say its format.",
            hint=f"Set `format` of the source {settings.name!r} to text, jsonl, json, parquet "
            "or wikitext.",
        )
    return [(path, kind)]


_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""Words in a path by which ``datasets`` tells splits."""


def _check_splits(folder: Path, tables: list[Path], settings: SourceSettings) -> None:
    """A folder's tables are of one split: nobody is to be trained on what is kept for tests."""
    splits = set()
    for table in tables:
        words = re.split("[^a-z]+", table.relative_to(folder).as_posix().lower())
        named = {_SPLITS[word] for word in words if word in _SPLITS}
        splits |= named if len(named) == 1 else set()
    if len(splits) > 1:
        raise ShearlingError(
            f"The folder {folder} of the source {settings.name!r} holds several splits: "
            f"{', '.join(sorted(splits))}.",
            hint=f"Set its `format` to dataset, which reads the `split` {settings.split}, or name "
            "the folder or file of one split in `path`.",
        )


def documents(path: Path, kind: str, settings: SourceSettings) -> Iterator[Document]:
    """The documents of one file, in its order, empty ones included."""
    try:
        yield from READERS[kind](path, settings)
    except (OSError, zlib.error, EOFError) as error:
        if not path.name.lower().endswith(_COMPRESSED):
            raise
        raise ShearlingError(
            f"{path} is truncated or not well compressed: {error}",
            hint="Download or copy the file again.",
        ) from error


def _open(path: Path) -> IO[bytes]:
    """A file's bytes, decompressed by its ending."""
    try:
        ending = path.suffix.lower()
        if ending == ".gz":
            return io.BufferedReader(gzip.open(path, "rb"), 1 << 20)
        if ending == ".zst":
            return _open_zstd(path)
        return path.open("rb", 1 << 20)
    except FileNotFoundError as error:
        raise ShearlingError(f"{path} does not exist.", hint="Check the source's path.") from error
    except OSError as error:
        raise ShearlingError(
            f"{path} can't be opened: {error.strerror}", hint="Check the source's path."
        ) from error


def _open_zstd(path: Path) -> IO[bytes]:
    """With pyarrow, which datasets needs anyway; it reads files of several frames too."""
    arrow = importlib.import_module("pyarrow")
    return io.BufferedReader(arrow.input_stream(str(path), compression="zstd"), 1 << 20)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines with their ends; one longer than `_LONGEST_LINE` bytes comes in parts.

    What is not UTF-8 is an error with the line's number.
    """
    number, begun, rest = 1, 0, b""
    with _open(path) as file:
        while part := rest + file.readline(_LONGEST_LINE):
            rest = b""
            if len(part) >= _LONGEST_LINE and (last := _LAST_CHARACTER.search(part, len(part) - 4)):
                part, rest = part[: last.start()], last[0]
            try:
                yield number, part.decode("utf-8" if begun or number > 1 else "utf-8-sig")
            except UnicodeDecodeError as error:
                raise ShearlingError(
                    f"{path}, line {number} is not UTF-8: byte "
                    f"0x{part[error.start]:02x} at position {begun + error.start + 1}.",
                    hint="Convert it, for example: iconv -f latin1 -t utf-8 OLD > NEW.",
                ) from error
            number, begun = (number + 1, 0) if part.endswith(b"\n") else (number, begun + len(part))


def _text(path: Path, settings: SourceSettings) -> Iterator[Document]:
    if settings.documents == "files":
        hint = f"Set `documents` of the source {settings.name!r} to pieces."
        yield _joined([_whole((line for _, line in _lines(path)), str(path), hint)], None, settings)
        return
    piece: list[str] = []
    size = 0
    for _, line in _lines(path):
        for start in range(0, len(line), _LONGEST_PIECE):
            part = line[start : start + _LONGEST_PIECE]
            piece.append(part)
            size += len(part)
            blank = not part.strip()
            if size >= _LONGEST_PIECE or (blank and size >= _PIECE_CHARACTERS):
                yield _joined(piece, None, settings)
                piece, size = [], 0
    yield _joined(piece, None, settings)


def _joined(lines: list[str], title: str | None, settings: SourceSettings) -> Document:
    text = "".join(lines)
    return Document(detokenize(text) if settings.detokenize else text.strip("\n"), title)


def _field(item: Any, settings: SourceSettings, where: str) -> str:
    """The text of a record; a missing or wrong field is named with what there is."""
    if isinstance(item, str):
        return item
    if not isinstance(item, Mapping):
        raise ShearlingError(
            f"{where} is not an object with a field {settings.field!r}, but a value of type "
            f"{type(item).__name__}.",
            hint=f"Check `format` of the source {settings.name!r}.",
        )
    if settings.field not in item:
        raise ShearlingError(
            f"{where} has no field {settings.field!r}.",
            hint=f"Set `field` of the source {settings.name!r}; there is: "
            f"{', '.join(map(str, item))}.",
        )
    text = item[settings.field]
    if text is None:
        return ""  # an empty document, which is counted and told as such
    if not isinstance(text, str):
        raise ShearlingError(
            f"{where}: the field {settings.field!r} holds a value of type {type(text).__name__}, "
            "not text.",
            hint=f"Set `field` of the source {settings.name!r} to one that holds text.",
        )
    return text


def _title(item: Any) -> str | None:
    title = item.get("title") if isinstance(item, Mapping) else None
    return title if isinstance(title, str) else None


def _whole_characters(text: str) -> str:
    """``text`` with U+FFFD for each half of a surrogate pair.

    JSON can spell one out (an emoji that was cut in two), and nothing can be done with it.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _document(
    item: Any, settings: SourceSettings, where: str, title: str | None = None
) -> Document:
    """A record as a document: its text, or the conversation that it holds."""
    title = title or _title(item)
    title = _whole_characters(title) if title else title
    if settings.messages is None:
        text = _whole_characters(_field(item, settings, where))
        return Document(detokenize(text) if settings.detokenize else text, title)
    if not isinstance(item, Mapping) or settings.messages not in item:
        there = f"; there is: {', '.join(map(str, item))}" if isinstance(item, Mapping) else ""
        raise ShearlingError(
            f"{where} has no field {settings.messages!r}.",
            hint=f"Set `messages` of the source {settings.name!r}{there}.",
        )
    said = read_turns(item[settings.messages], where)
    turns = tuple((_whole_characters(role), _whole_characters(text)) for role, text in said)
    return Document("\n\n".join(content for _, content in turns), title, turns)


def _jsonl(path: Path, settings: SourceSettings) -> Iterator[Document]:
    for number, parts in itertools.groupby(_lines(path), operator.itemgetter(0)):
        where = f"{path}, line {number}"
        hint = "Each line of a .jsonl file holds one JSON object."
        line = _whole((text for _, text in parts), where, hint)
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ShearlingError(
                f"{where} is not JSON: {error}",
                hint=hint,
            ) from error
        yield _document(item, settings, where)


def _whole(parts: Iterable[str], where: str, hint: str) -> str:
    """All of a text, if it isn't too large for that."""
    found, size = [], 0
    for part in parts:
        found.append(part)
        size += len(part)
        if size > _LARGEST_JSON:
            raise ShearlingError(
                f"{where} holds more than {_LARGEST_JSON:,} characters, too much to read at once.",
                hint=hint,
            )
    return "".join(found)


def _json(path: Path, settings: SourceSettings) -> Iterator[Document]:
    """A list of objects, or an object whose keys are titles."""
    by_line = (
        "Write one object a line: the format jsonl is read line by line "
        f"(`format` of the source {settings.name!r})."
    )
    try:
        data = json.loads(_whole((line for _, line in _lines(path)), str(path), by_line))
    except (ValueError, RecursionError) as error:
        raise ShearlingError(
            f"{path} is not JSON: {error}",
            hint="One object a line is the format jsonl: set `format` of the source "
            f"{settings.name!r}.",
        ) from error
    if isinstance(data, dict):
        for title, item in data.items():
            yield _document(item, settings, f"{path}, entry {title!r}", title)
        return
    if not isinstance(data, list):
        raise ShearlingError(
            f"{path} holds neither a list nor an object.",
            hint='A .json source is [{"text": ...}, ...] or {"title": {"text": ...}, ...}.',
        )
    for number, item in enumerate(data, 1):
        yield _document(item, settings, f"{path}, entry {number}")


def _columns(names: list[str], settings: SourceSettings, path: Path) -> list[str]:
    """The columns to read; a wanted one that is missing is told with those there are."""
    wanted = settings.messages or settings.field
    if wanted not in names:
        _document(dict.fromkeys(names), settings, str(path))
    return [name for name in dict.fromkeys((wanted, "title")) if name in names]


def _rows(batches: Iterator[Any], path: Path, settings: SourceSettings) -> Iterator[Document]:
    row = 0
    for batch in batches:
        for item in batch.to_pylist():
            row += 1
            yield _document(item, settings, f"{path}, row {row}")


def _parquet(path: Path, settings: SourceSettings) -> Iterator[Document]:
    arrow = importlib.import_module("pyarrow")  # a dependency of datasets, without types
    parquet = importlib.import_module("pyarrow.parquet")
    try:
        with parquet.ParquetFile(path) as file:
            columns = _columns(file.schema_arrow.names, settings, path)
            yield from _rows(file.iter_batches(batch_size=_ROWS, columns=columns), path, settings)
    except (arrow.ArrowException, OSError) as error:
        raise ShearlingError(
            f"{path} is no readable Parquet file: {error}",
            hint="Download or copy the file again.",
        ) from error


def _arrow(path: Path, settings: SourceSettings) -> Iterator[Document]:
    """Arrow's file form (also Feather 2), or its stream form, which ``datasets`` keeps."""
    arrow = importlib.import_module("pyarrow")
    ipc = importlib.import_module("pyarrow.ipc")
    try:
        with _open(path) as file:
            framed = file.read(6) == b"ARROW1"
        with arrow.memory_map(str(path)) as source:
            reader = ipc.open_file(source) if framed else ipc.open_stream(source)
            batches = (
                (reader.get_batch(n) for n in range(reader.num_record_batches))
                if framed
                else iter(reader)
            )
            columns = _columns(reader.schema.names, settings, path)
            pieces = (
                batch.select(columns).slice(start, _ROWS)
                for batch in batches
                for start in range(0, batch.num_rows, _ROWS)
            )
            yield from _rows(pieces, path, settings)
    except (arrow.ArrowException, OSError) as error:
        raise ShearlingError(
            f"{path} is no readable Arrow file: {error}",
            hint="Download or copy the file again.",
        ) from error


_ARTICLE = re.compile(r" = ([^=\s](?:.*[^=\s])?) = \n?")


def _wikitext(path: Path, settings: SourceSettings) -> Iterator[Document]:
    """Raw WikiText is one text; an article begins at a heading of the first level.

    A heading stands between blank lines; the dumps also have a table row that looks like one.
    """
    title: str | None = None
    lines: list[str] = []
    pending: str | None = None  # a heading that counts if a blank line follows
    before = ""
    for _, line in _lines(path):
        if pending is not None:
            if not line.strip():
                if "".join(lines).strip():
                    yield _joined(lines, title, settings)
                lines, title = [], pending.strip(" =\n")
            lines.append(pending)
            pending = None
        if _ARTICLE.fullmatch(line) and not before.strip():
            pending = line
        else:
            lines.append(line)
        before = line
    if pending is not None:
        lines.append(pending)
    yield _joined(lines, title, settings)


_UNSPACED = (
    (re.compile(r" @([-,.])@ "), r"\1"),
    (re.compile(r"=(?: =)+"), lambda match: match.group().replace(" ", "")),
    (re.compile(r" ([,.;:!?%)\]}])(?=\s|\Z)"), r"\1"),
    (re.compile(r"([(\[{$£€]) "), r"\1"),
    (re.compile(r'" ([^"\n]*?) "'), r'"\1"'),
    (re.compile(r" ('(?:s|t|m|d|re|ve|ll)|n't)\b"), r"\1"),
    (re.compile(r"s ' "), "s' "),
    (re.compile(r" ° "), "° "),
    (re.compile(r"^ +| +$", re.MULTILINE), ""),
    (re.compile(r"\n{3,}"), "\n\n"),
)


def detokenize(text: str) -> str:
    """WikiText as one would write it: no spaces before commas, no ``@-@``.

    The idea is lm-eval's ``wikitext_detokenizer``: headings stay (``== Career ==``), so that
    training text looks like the benchmark's.
    """
    for pattern, replacement in _UNSPACED:
        text = pattern.sub(replacement, text)
    return text.strip("\n")


READERS: dict[str, Callable[[Path, SourceSettings], Iterator[Document]]] = {
    "text": _text,
    "jsonl": _jsonl,
    "json": _json,
    "parquet": _parquet,
    "arrow": _arrow,
    "wikitext": _wikitext,
}

_SHUFFLE_BUFFER = 10_000


def _split(saved: Any, settings: SourceSettings) -> Any:
    """The split that is asked for, where several were saved."""
    if not isinstance(saved, dict):
        return saved
    if settings.split not in saved:
        raise ShearlingError(
            f"{settings.path} has no split {settings.split!r}.",
            hint=f"Set `split` of the source {settings.name!r}; there is: {', '.join(saved)}.",
        )
    return saved[settings.split]


def dataset_documents(settings: SourceSettings, seed: int) -> Iterator[Document]:
    """The rows of what ``datasets.load_dataset`` opens, streamed.

    A hub's data set can be far larger than what is asked for, so it isn't read whole to draw
    from: shards are shuffled, and rows inside a buffer, by the seed.
    """
    import datasets

    local = Path(settings.path).expanduser()
    try:
        if saved_splits(local):
            rows = _split(datasets.load_from_disk(str(local)), settings).to_iterable_dataset()
        else:
            rows = datasets.load_dataset(
                settings.path, settings.config, split=settings.split, streaming=True
            )
        for number, row in enumerate(rows.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER), 1):
            where = f"{settings.path}, split {settings.split}, row {number}"
            yield _document(row, settings, where)
    except ShearlingError:
        raise
    except Exception as error:  # datasets raises types of a dozen libraries
        raise ShearlingError(
            f"datasets can't open {settings.path!r} for the source {settings.name!r}: "
            f"{str(error).strip() or type(error).__name__}",
            hint="If a file was meant, it does not exist. For a data set check `path`, `config` "
            "and `split`; without network only local data and the cache work.",
        ) from error
