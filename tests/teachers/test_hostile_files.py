"""Files made to fill the memory, to run code or to break out: a message, within a little memory."""

from __future__ import annotations

import gzip
import json
import shutil
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc as ipc
import pyarrow.parquet as pq
import pytest
from bounded import within
from hostile import at_worst_a_message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shearling import ShearlingError
from teachers.checkpoint import import_teacher, open_checkpoint
from teachers.gguf_header import read_gguf
from teachers.readers import documents, format_of
from teachers.settings import SourceSettings, TeacherSettings
from teachers.tokenizer import load_tokenizer

linux = pytest.mark.skipif(sys.platform != "linux", reason="limits of Linux")
few = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
MEMBER = 1 << 24


def read(path: Path) -> int:
    """Go through all documents of a file; gives their characters."""
    source = SourceSettings(name="hostile", path=str(path))
    kind = format_of(path)
    assert kind is not None
    return sum(len(document.text) for document in documents(path, kind, source))


def gzip_bomb(path: Path, megabytes: int, *, head: bytes = b"") -> Path:
    """So many MB of spaces behind ``head``, in a few MB: members of a .gz may repeat."""
    member = gzip.compress(b" " * MEMBER, 9)
    with path.open("wb") as file:
        file.write(gzip.compress(head))
        for _ in range(megabytes * 1_000_000 // MEMBER + 1):
            file.write(member)
    assert path.stat().st_size < megabytes * 10_000
    return path


# --- texts --------------------------------------------------------------------------------------


@linux
@pytest.mark.parametrize(
    ("name", "megabytes", "head", "told"),
    [
        ("a.json.gz", 200, b"[", "too much to read at once"),
        ("a.jsonl.gz", 600, b'{"text": "', "line 1 holds more than 67,108,864 characters"),
    ],
)
def test_a_compressed_bomb_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    megabytes: int,
    head: bytes,
    told: str,
) -> None:
    monkeypatch.setattr("teachers.readers._LARGEST_JSON", 1 << 26)
    path = gzip_bomb(tmp_path / name, megabytes, head=head)
    assert told in within(500, lambda: read(path))


@linux
def test_an_endless_line_of_text_comes_in_pieces(tmp_path: Path) -> None:
    path = gzip_bomb(tmp_path / "a.txt.gz", 600)
    assert within(400, lambda: read(path)) >= 600_000_000


@pytest.mark.parametrize("limit", range(5, 24))
def test_lines_longer_than_are_read_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    """They come in parts, which end in no character and are one line all the same."""
    texts = ["é🐑羊a" * 5, "short", "", "🐑" * 9]
    text, lines = tmp_path / "a.txt", tmp_path / "a.jsonl"
    text.write_text("\ufeff" + "\n".join(texts), encoding="utf-8")
    rows = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    lines.write_text("\ufeff" + "\n".join(rows), encoding="utf-8")
    monkeypatch.setattr("teachers.readers._LONGEST_LINE", limit)
    source = SourceSettings(name="long", path="a")
    assert "".join(d.text for d in documents(text, "text", source)) == "\n".join(texts)
    assert [d.text for d in documents(lines, "jsonl", source)] == texts
    wrong = tmp_path / "wrong.txt"
    wrong.write_bytes(f"{texts[0]}\n{texts[0]}".encode() + b"\xe9 and more")
    with pytest.raises(ShearlingError, match="line 2 is not UTF-8: byte 0xe9 at position 51"):
        list(documents(wrong, "text", source))
    lines.write_text("\n".join([*rows, "no JSON"]), encoding="utf-8")
    with pytest.raises(ShearlingError, match="line 5 is not JSON"):
        list(documents(lines, "jsonl", source))


def repeated(rows: int) -> Any:
    """A column of one text of 8 MB, again and again: kept once, as a dictionary."""
    return pa.table({"text": pa.DictionaryArray.from_arrays([0] * rows, ["x" * 8_000_000])})


@linux
@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_a_table_that_repeats_a_large_text_is_read_row_by_row(tmp_path: Path, form: str) -> None:
    path, table = tmp_path / f"a.{form}", repeated(200)
    if form == "parquet":
        pq.write_table(table, path)
    else:
        with ipc.new_file(path, table.schema) as file:
            file.write_table(table)
    assert path.stat().st_size < 10_000_000
    assert within(900, lambda: read(path)) == 200 * 8_000_000


@few
@given(
    name=st.sampled_from(
        ["a.txt", "a.jsonl", "a.json", "a.parquet", "a.arrow", "a.txt.gz", "a.jsonl.zst"]
    ),
    content=st.binary(max_size=400) | st.text(max_size=100).map(str.encode),
    head=st.sampled_from([b"", b"PAR1", b"ARROW1\0\0", b"\x1f\x8b\x08\0", b"\x28\xb5\x2f\xfd"]),
)
def test_any_bytes_as_a_text(
    tmp_path_factory: pytest.TempPathFactory, name: str, content: bytes, head: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(head + content)
    with at_worst_a_message():
        read(path)


# --- weights ------------------------------------------------------------------------------------


def with_header(folder: Path, header: bytes, *, length: int | None = None) -> Path:
    size = len(header) if length is None else length
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", size) + header + bytes(64))
    return folder


def huge_header() -> bytes:
    """20 MB that name 300,000 tensors of nothing."""
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    return json.dumps({f"tensor.{n:08}": entry for n in range(300_000)}).encode()


@linux
@pytest.mark.parametrize(
    ("header", "length"),
    [
        (lambda: b"{}", 1 << 40),
        (lambda: b"{}", (1 << 64) - 1),
        (lambda: b'{"a":' * 200_000, None),
        (huge_header, None),
        (lambda: b'{"a":{"dtype":"F32","shape":[4611686018427387904],"data_offsets":[0,8]}}', None),
    ],
    ids=["a terabyte", "all bytes there are", "deep", "endless tensors", "a shape of exabytes"],
)
def test_a_huge_header_of_safetensors_is_refused(
    tiny_llama: Path, tmp_path: Path, header: Callable[[], bytes], length: int | None
) -> None:
    folder = with_header(shutil.copytree(tiny_llama, tmp_path / "m"), header(), length=length)
    told = within(1000, lambda: str(open_checkpoint(folder)))
    assert "safetensors" in told or "lacks" in told
    assert "\n" in told, "it has a remedy"


@linux
@pytest.mark.parametrize("offset", [8, 16, 24])
def test_a_huge_count_in_a_gguf_is_refused(tmp_path: Path, offset: int) -> None:
    head = bytearray(b"GGUF" + struct.pack("<IQQQ", 3, 1, 1, 1) + bytes(200))
    head[offset : offset + 8] = struct.pack("<Q", 2**61)
    path = tmp_path / "huge.gguf"
    path.write_bytes(head)
    assert "truncated or damaged" in within(100, lambda: read_gguf(path))


# --- tokenizers ---------------------------------------------------------------------------------


def with_tokenizer(teacher: Path, folder: Path, name: str, content: bytes) -> Path:
    if not folder.exists():
        shutil.copytree(teacher, folder)
    (folder / name).write_bytes(content)
    return folder


@few
@given(draw=st.data())
def test_any_damage_to_a_tokenizer(
    tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory, draw: st.DataObject
) -> None:
    """Bytes of its files exchanged, cut off, or replaced: it's read, or told."""
    name = draw.draw(st.sampled_from(["tokenizer.json", "tokenizer_config.json"]))
    whole = (tiny_llama / name).read_bytes()
    content = bytearray(whole)
    for _ in range(draw.draw(st.integers(0, 3))):
        content[draw.draw(st.integers(0, len(content) - 1))] = draw.draw(st.integers(0, 255))
    content = (
        content[: draw.draw(st.integers(0, len(content)))] if draw.draw(st.booleans()) else content
    )
    folder = tmp_path_factory.getbasetemp() / "damaged-tokenizer"
    with_tokenizer(tiny_llama, folder, name, bytes(content))
    try:
        with at_worst_a_message():
            load_tokenizer(folder)("The shepherd sees the hill.")
    finally:
        (folder / name).write_bytes(whole)


@linux
@pytest.mark.parametrize(
    "content",
    [b"[" * 200_000, b'{"version":"1.0","model":{"type":"BPE","vocab":' + b'{"a":' * 100_000, b""],
    ids=["deep", "deep vocabulary", "empty"],
)
def test_a_hostile_tokenizer_is_refused(tiny_llama: Path, tmp_path: Path, content: bytes) -> None:
    folder = with_tokenizer(tiny_llama, tmp_path / "m", "tokenizer.json", content)
    assert "can't be read" in within(500, lambda: str(load_tokenizer(folder)))


def test_a_tokenizer_runs_no_code_of_its_own(tiny_llama: Path, tmp_path: Path) -> None:
    """A class of its own, in a file beside it: not loaded, whatever its config asks for."""
    config = json.loads((tiny_llama / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
    folder = with_tokenizer(
        tiny_llama, tmp_path / "m", "tokenizer_config.json", json.dumps(config).encode()
    )
    evil = f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\nclass Evil: ...\n"
    (folder / "evil.py").write_text(evil)
    with at_worst_a_message():
        load_tokenizer(folder)
    assert not (tmp_path / "ran").exists()


def test_a_token_beyond_the_models_vocabulary_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    data = json.loads((tiny_llama / "tokenizer.json").read_text())
    vocabulary = data["model"]["vocab"]
    vocabulary[max(vocabulary, key=vocabulary.get)] = 4_000_000
    folder = with_tokenizer(tiny_llama, tmp_path / "m", "tokenizer.json", json.dumps(data).encode())
    with pytest.raises(ShearlingError, match="tokens up to number 4,000,000"):
        import_teacher(TeacherSettings(model=str(folder)), tmp_path / "out", cache=tmp_path)


def test_a_chat_template_is_kept_in_its_sandbox(tiny_llama: Path, tmp_path: Path) -> None:
    """Templates come with the model; they may neither reach Python nor count without end."""
    begun = time.monotonic()
    for template in (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{{ cycler.__init__.__globals__.os.system('touch RAN') }}",
    ):
        tokenizer = load_tokenizer(tiny_llama)
        tokenizer.chat_template = template
        with pytest.raises(Exception, match=r"unsafe|Range too big|undefined|access"):
            tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    assert time.monotonic() - begun < 60
