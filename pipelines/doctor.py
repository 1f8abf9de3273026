"""`shearling doctor`: is this machine fit for a run, and what to do if not."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
from packaging.requirements import Requirement

from pipelines.display import format_bytes
from pipelines.machine import hardware
from reports.hub import hub_answers, hub_is_off, through_proxy
from shearling import __version__

SCHEMA = 1
QUICKSTART_MEMORY = 4e9
QUICKSTART_DISK = 5e9
"""Bytes that the quickstart needs, rounded up: the teacher in 32 bits, its students, packages."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at."""

    name: str
    state: Literal["ok", "notice", "error"]
    found: str
    advice: str = ""


def examine(folder: Path, cache: Path) -> dict[str, Any]:
    """All findings as JSON. ``folder``: where runs will lie; ``cache``: where downloads go."""
    findings = [
        _python(),
        *_packages(),
        _memory(),
        _disk("disk for runs", folder, QUICKSTART_DISK),
        _disk("disk for downloads", cache, 1e9),
        *_processor(),
        *_accelerators(),
        _hub(),
    ]
    return {
        "schema": SCHEMA,
        "shearling": __version__,
        "fit": all(finding.state != "error" for finding in findings),
        "findings": [asdict(finding) for finding in findings],
    }


def _python() -> Finding:
    # An older Python than the package asks for gets no further than its installation.
    found = f"Python {platform.python_version()} at {sys.executable}"
    return Finding(name="python", state="ok", found=found)


def _packages() -> Iterator[Finding]:
    """Every required package, there and new enough."""
    lacking = []
    for text in importlib.metadata.requires("shearling") or []:
        needed = Requirement(text)
        if needed.marker and not needed.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(needed.name)
        except importlib.metadata.PackageNotFoundError:
            lacking.append(f"{needed.name} is missing")
            continue
        if not needed.specifier.contains(version, prereleases=True):
            lacking.append(f"{needed.name} {version} is not {needed.specifier}")
    if lacking:
        yield Finding(
            name="packages",
            state="error",
            found="; ".join(lacking),
            advice="Install again, in the checkout: "
            f"`{sys.executable} -m pip install -e . -c constraints.txt`.",
        )
        return
    shown = ("torch", "transformers", "lm-eval")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in shown)
    yield Finding(name="packages", state="ok", found=f"shearling {__version__}, {versions}")


def _memory() -> Finding:
    memory = psutil.virtual_memory()
    found = f"{format_bytes(memory.available)} of {format_bytes(memory.total)} free"
    if memory.available < QUICKSTART_MEMORY:
        advice = (
            f"The quickstart wants {format_bytes(QUICKSTART_MEMORY)}: close other programs, or "
            "lower prune.calibration_tokens and distill.micro_batch_windows with --set."
        )
        return Finding(name="memory", state="notice", found=found, advice=advice)
    return Finding(name="memory", state="ok", found=found)


def _disk(name: str, folder: Path, wanted: float) -> Finding:
    folder = folder.expanduser().absolute()
    here = next(path for path in (folder, *folder.parents) if path.exists())
    elsewhere = "work in another folder"
    if name == "disk for downloads":
        elsewhere = "name another folder in SHEARLING_CACHE"
    if not here.is_dir():
        advice = f"Move it away, or {elsewhere}."
        return Finding(name=name, state="error", found=f"{here} is no folder", advice=advice)
    if not _can_be_written(here):
        advice = f"Change its permissions, or {elsewhere}."
        return Finding(name=name, state="error", found=f"{here} can't be written", advice=advice)
    free = shutil.disk_usage(here).free
    found = f"{format_bytes(free)} free at {here}"
    if free < wanted:
        advice = f"Free some space: {format_bytes(wanted)} are wanted for the quickstart."
        return Finding(name=name, state="notice", found=found, advice=advice)
    return Finding(name=name, state="ok", found=found)


def _can_be_written(folder: Path) -> bool:
    """By trying, for permissions don't tell: root has all of them, and no file can be in /proc."""
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".shearling-"):
            return True
    except OSError:
        return False


def _processor() -> Iterator[Finding]:
    facts = hardware()
    found = f"{facts['processor']}, {facts['cores']} cores, {facts['threads']} threads in use"
    busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if busy > 1.5 * (facts["cores"] or 1):
        yield Finding(
            name="cores",
            state="notice",
            found=f"{found}, {busy:.1f} programs at work",
            advice="Others use this machine now; measured speeds will be too low.",
        )
    else:
        yield Finding(name="cores", state="ok", found=found)
    yield _bfloat16("cpu")


def _bfloat16(device: str) -> Finding:
    """What `precision: auto` would measure and take."""
    from compress.precision import fast_dtype

    choice = fast_dtype(device, "auto")
    rates = f"{choice.bfloat16_flops / 1e9:.0f} GFLOP/s, float32 {choice.float32_flops / 1e9:.0f}"
    taken = f"bfloat16 {rates}: `precision: auto` takes {choice.name}"
    return Finding(name=f"bf16 on {device}", state="ok", found=taken)


def _accelerators() -> Iterator[Finding]:
    import torch

    names = hardware()["accelerators"]
    if names:
        yield Finding(name="accelerator", state="ok", found=", ".join(names))
        yield _bfloat16("cuda")
    elif torch.backends.mps.is_available():
        yield Finding(
            name="accelerator",
            state="notice",
            found="Apple's (mps), which has no float64 and is not used",
        )
    else:
        yield Finding(
            name="accelerator",
            state="notice",
            found="none that PyTorch can use",
            advice="Runs take the CPU: fine up to some 100M parameters. With an NVIDIA card, "
            "install the PyTorch build for its CUDA version (pytorch.org).",
        )


def _hub() -> Finding:
    if hub_is_off():
        return Finding(name="hub", state="ok", found="off: HF_HUB_OFFLINE is set")
    if hub_answers():
        found = "asked through a proxy" if through_proxy() else "huggingface.co answers"
        return Finding(name="hub", state="ok", found=found)
    return Finding(
        name="hub",
        state="notice",
        found="the Hugging Face hub doesn't answer",
        advice="The quickstart doesn't need it. For tasks and teachers from there, check the "
        "network, or set benchmark.mirror and a local teacher.model.",
    )
