"""Machines to plan for: this one, measured, or an accelerator by name, from its data sheet."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from pipelines.machine import hardware
from shearling import ShearlingError, write_json

MEMORY_SHARE = 0.9
"""Of a device's memory, what a plan fills; the rest goes to its runtime and to fragments."""
_MEMORY = "memory"
"""Among the measured rates, the one in bytes a second."""
_COPIED = 1 << 27
"""Bytes that are copied to measure it: more than a processor's caches hold."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a plan needs to know of one process's device. Rates are FLOP/s by dtype."""

    name: str
    source: str
    rates: Mapping[str, float]
    memory_bytes: int
    share: Mapping[str, float]
    """Of those rates, what a kind of work is assumed to reach."""
    memory_rate: float
    """Bytes a second that the device's memory moves."""
    host_bytes: int | None = None
    disk_free_bytes: int | None = None
    device: str = "cuda"

    @property
    def on_cpu(self) -> bool:
        return self.device == "cpu"

    def precision(self, wanted: str) -> str:
        """The dtype of products, where a recipe says auto, as ``compress.precision`` chooses."""
        if wanted != "auto":
            return wanted
        faster = self.rates["bfloat16"] > 1.3 * self.rates["float32"]
        return "bfloat16" if faster else "float32"

    @property
    def writing_precision(self) -> str:
        """The dtype in which a teacher writes, as ``teachers.model`` chooses."""
        return "bfloat16" if self.device == "cuda" else "float32"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


_H100 = "https://resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet"
_A100 = "https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf"
_ADA = "https://images.nvidia.com/aem-dam/Solutions/Data-Center/l4/nvidia-ada-gpu-architecture-whitepaper-v2.1.pdf"

# Peak TFLOP/s without sparsity: bfloat16 (tensor cores, float32 sums), float32 and float64 as
# PyTorch multiplies them by default (no TF32); memory in GB, and in GB/s.
_SHEETS: dict[str, tuple[float, float, float, int, int, str]] = {
    "h100-sxm": (989.4, 66.9, 66.9, 80, 3350, _H100),
    "h100-pcie": (756.0, 51.2, 51.2, 80, 2000, _H100),
    "h200": (989.4, 66.9, 66.9, 141, 4800, "https://www.nvidia.com/en-us/data-center/h200/"),
    "a100-80gb": (312.0, 19.5, 19.5, 80, 2039, _A100),
    "a100-40gb": (312.0, 19.5, 19.5, 40, 1555, _A100),
    "l40s": (362.05, 91.6, 1.4, 48, 864, "https://www.nvidia.com/en-us/data-center/l40s/"),
    "l4": (121.0, 30.3, 0.47, 24, 300, "https://www.nvidia.com/en-us/data-center/l4/"),
    "a10": (
        125.0,
        31.2,
        0.98,
        24,
        600,
        "https://www.nvidia.com/en-us/data-center/products/a10-gpu/",
    ),
    "rtx-4090": (165.2, 82.6, 1.29, 24, 1008, _ADA),
    "rtx-3090": (71.0, 35.6, 0.56, 24, 936, _ADA),
    "mi300x": (
        1307.4,
        163.4,
        163.4,
        192,
        5300,
        "https://www.amd.com/en/products/accelerators/instinct/mi300/mi300x.html",
    ),
}

UTILISATION = {"distill": 0.4, "prune": 0.3, "benchmark": 0.15, "float32": 0.6, "float64": 0.3}
"""Assumed for accelerators. Llama 3's training reached 38 to 43% of the bfloat16 peak on 8,192 to
16,384 H100 (https://arxiv.org/abs/2407.21783, table 4); the others are guesses, none was measured
with this code."""

CPU_UTILISATION = {"distill": 0.45, "prune": 0.6, "benchmark": 0.35, "float32": 0.8, "float64": 0.6}
"""Of the measured rate of matrix products, what the stages reached on a two-core CPU."""


def accelerators() -> list[str]:
    """Names that ``named_machine`` knows."""
    return list(_SHEETS)


def named_machine(name: str) -> Machine:
    """An accelerator from its public data sheet.

    Raises:
        ShearlingError: an unknown name.
    """
    sheet = _SHEETS.get(name.lower())
    if sheet is None:
        raise ShearlingError(
            f"No accelerator named {name!r} is known.",
            hint=f"Known are: {', '.join(_SHEETS)}. Without --accelerator it is this machine.",
        )
    half, single, double, gigabytes, gigabytes_a_second, source = sheet
    return Machine(
        name=name.lower(),
        source=source,
        rates={"bfloat16": half * 1e12, "float32": single * 1e12, "float64": double * 1e12},
        memory_bytes=int(gigabytes * 1e9),
        share=UTILISATION,
        memory_rate=gigabytes_a_second * 1e9,
    )


def this_machine(cache: Path, device: str, disk: Path) -> Machine:
    """This machine, its matrix products measured once and remembered in the cache folder.

    ``disk`` is a path on the disk that the run will fill.
    """
    facts = hardware()
    memory, accelerator = int(psutil.virtual_memory().total), facts["processor"]
    if device.startswith("cuda"):
        import torch

        number = torch.device(device).index or 0
        memory = int(torch.cuda.get_device_properties(number).total_memory)
        accelerator = torch.cuda.get_device_name(number)
    rates = _measured_rates(cache / "product_rates.json", device, facts)
    return Machine(
        name=f"{accelerator or device}, {facts['threads']} threads"
        if device == "cpu"
        else str(accelerator),
        source="measured here",
        rates={name: rate for name, rate in rates.items() if name != _MEMORY},
        memory_rate=rates[_MEMORY],
        memory_bytes=memory,
        share=CPU_UTILISATION if device == "cpu" else UTILISATION,
        host_bytes=int(psutil.virtual_memory().total),
        disk_free_bytes=int(shutil.disk_usage(_existing(disk)).free),
        device=device.split(":")[0],
    )


def _existing(path: Path) -> Path:
    absolute = path.absolute()
    return next(p for p in (absolute, *absolute.parents) if p.exists())


def _measured_rates(path: Path, device: str, facts: Mapping[str, Any]) -> dict[str, float]:
    """FLOP/s by dtype and bytes/s of memory, from the cache if this machine was measured before."""
    import torch

    from compress.precision import undisturbed_rate

    names = [facts["processor"], *facts["accelerators"]]
    key = f"{device}|{facts['threads']} threads|torch {torch.__version__}|{'|'.join(names)}"
    known = _known_rates(path)
    if key not in known:
        dtypes = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
        rates = {
            name: undisturbed_rate(dtype, torch.device(device), 0.3)
            for name, dtype in dtypes.items()
        }
        rates[_MEMORY] = _memory_rate(torch.device(device))
        known[key] = {name: float(f"{rate:.3g}") for name, rate in rates.items()}
        write_json(path, {"schema": 1, "rates": known})
    return known[key]


def _memory_rate(device: Any) -> float:
    """Bytes a second that a copy reads and writes: the best of three, others only slow it down."""
    import torch

    source = torch.ones(_COPIED // 4, device=device)
    target = torch.empty_like(source)

    def copy() -> float:
        begun = time.perf_counter()
        target.copy_(source)
        target[-1].item()  # waits for the device
        return time.perf_counter() - begun

    copy()  # touches the memory
    return 2.0 * _COPIED / min(copy() for _ in range(3))


def _known_rates(path: Path) -> dict[str, dict[str, float]]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return {
            key: {name: float(rates[name]) for name in ("bfloat16", "float32", "float64", _MEMORY)}
            for key, rates in data["rates"].items()
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}  # not measured yet, or a file that is no use
