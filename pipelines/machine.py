"""Facts of this machine and of the software on it, and the memory that a stage took."""

from __future__ import annotations

import contextlib
import errno
import importlib.metadata
import os
import platform
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from shearling import ShearlingError

PACKAGES = ("torch", "transformers", "torch-pruning", "datasets", "lm-eval", "safetensors", "numpy")


class PeakMemory:
    """The largest resident memory of this process while the ``with`` block runs, in bytes.

    The operating system only keeps the peak of a process's whole life, which would give every
    stage the memory of the greediest one before it; so a thread looks twenty times a second. Of a
    CUDA ``device`` PyTorch itself keeps the most that tensors took, once it is in use.
    """

    def __init__(self, device: str = "cpu", seconds_between: float = 0.05) -> None:
        self.bytes = 0
        self.device_bytes: int | None = None
        """On the device, after the block; None where that is no CUDA device."""
        self._device, self._cuda = device, device.startswith("cuda")
        self._between = seconds_between
        self._stop = threading.Event()
        self._process = psutil.Process()
        self._thread = threading.Thread(target=self._watch, name="peak-memory", daemon=True)

    def _look(self) -> None:
        self.bytes = max(self.bytes, int(self._process.memory_info().rss))

    def _watch(self) -> None:
        while not self._stop.wait(self._between):
            self._look()

    def _own_device(self) -> Any:
        from compress.parallel import own_device

        return own_device(self._device)

    def __enter__(self) -> PeakMemory:
        if self._cuda:
            import torch

            if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
                torch.cuda.reset_peak_memory_stats(self._own_device())
        self._look()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._look()
        if self._cuda:
            import torch

            self.device_bytes = int(torch.cuda.max_memory_allocated(self._own_device()))


_OUT_OF_MEMORY = (
    "out of memory", "can't allocate memory", "Cannot allocate memory", "not enough memory",
    "alloc_cpu", "std::bad_alloc", "can't start new thread", "failed to map segment",
)  # fmt: skip
"""What libraries' errors say where they could not get memory; a thread needs some for its stack,
and the loader of shared libraries some for each of them."""
LESS_MEMORY = {
    "teacher": "Close other programs, or name a smaller teacher.",
    "transfer_set": "Give the sources fewer `tokens`, as in --set transfer_set.sources.0.tokens=N; "
    "where the teacher writes, lower transfer_set.written.batch.",
    "benchmark": "Lower benchmark.batch_size, as in --set benchmark.batch_size=1.",
    "prune": "Lower the stage's stream_memory_gb or calibration_tokens, as in --set "
    "{stage}.stream_memory_gb=0.5; or the transfer set's window, which passes a layer whole.",
    "correct": "Set {stage}.micro_batch_windows=1 or {stage}.gradient_checkpointing=true with "
    "--set.",
    "distill": "Set {stage}.micro_batch_windows=1 or {stage}.gradient_checkpointing=true with "
    "--set, or lower {stage}.chunk_tokens.",
    "export": "Close other programs; a Hugging Face folder needs less than a GGUF does.",
}
"""By kind of stage: what to lower."""


@contextlib.contextmanager
def memory_errors(stage: str, kind: str) -> Iterator[None]:
    """Turn running out of memory, on a CPU or an accelerator, into a ShearlingError."""
    try:
        yield
    except Exception as error:
        if not _lacks_memory(error):
            raise
        remedy = LESS_MEMORY.get(kind, "Close other programs.").format(stage=stage)
        raise ShearlingError(
            f"Out of memory in stage {stage} ({kind}).",
            hint=f"{remedy} Finished stages are kept; the same command goes on.",
        ) from error


def _lacks_memory(error: BaseException) -> bool:
    """Whether an error came of a lack of memory, be it told as a damaged file or otherwise."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    ours = isinstance(error, ShearlingError)
    if not ours and any(sign in str(error) for sign in _OUT_OF_MEMORY):
        return True
    return error.__cause__ is not None and _lacks_memory(error.__cause__)


def pick_device(wanted: str) -> str:
    """``auto`` to the accelerator there is, or cpu; anything else as it is.

    Raises:
        ShearlingError: if this machine has no such device.
    """
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    here = [*(["cuda"] if gpus else []), *(f"cuda:{i}" for i in range(gpus))]
    here.append("cpu")
    if wanted == "auto":
        return here[0]
    if wanted == "mps":
        raise ShearlingError(
            "Apple's GPUs have no float64, in which refits and losses are added up.",
            hint="Set device to cpu, as in --set device=cpu.",
        )
    if wanted not in here:
        raise ShearlingError(
            f"This machine has no device {wanted}: PyTorch finds {', '.join(here)}.",
            hint="Set device to auto or to one of those, as in --set device=auto.",
        )
    return wanted


def package_versions() -> dict[str, str]:
    """Versions of the packages that the numbers depend on."""
    found = {}
    for name in ("shearling", *PACKAGES):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # not installed: then it had no part in the numbers either
    return found


def hardware() -> dict[str, Any]:
    """Processor, cores, memory and accelerator."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": int(psutil.virtual_memory().total),
        "accelerators": [torch.cuda.get_device_name(i) for i in range(gpus)],
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def git_state() -> dict[str, Any] | None:
    """Commit and cleanness of the checkout that this code runs from; None outside of one."""
    here = Path(__file__).resolve().parents[1]
    commit = _git(here, "rev-parse", "HEAD")
    if commit is None or not (here / ".git").exists():
        return None
    return {"commit": commit, "clean": _git(here, "status", "--porcelain") == ""}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
