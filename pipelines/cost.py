"""What a stage costs, in the words that the formulas and the plan share.

The formulas are in ``pipelines.estimate``, ``.estimate_prune`` and ``.estimate_distill``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from students.shape import Shape

LIBRARIES = 0.5e9
"""A process with torch, transformers and lm-eval loaded, before any model (measured)."""
NARROW = "weights in the products' dtype"
HELDOUT, SAVED = "held-out answers", "a part of the checkpoint"
SHARDED = frozenset(
    {"weights", "gradients", "optimizer", "average", "teacher", NARROW, HELDOUT, SAVED}
)
"""What is divided among processes, most of it by FSDP; the rest each process has for itself, the
layers too that are gathered just now."""
GATHERED, ENDS = "gathered student", "gathered embeddings"
"""What only the first process has; and what each of several has whole, where a single one has it
among its weights."""

WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2}
Bytes = Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Moment:
    """What is in memory at one moment of a stage, in bytes: on the device, and beside it.

    On a CPU both are one memory.
    """

    what: str
    device: Bytes
    host: Bytes = field(default_factory=dict)
    split: bool | None = None
    """Whether it comes with several processes only, with one only, or (None) with any number."""

    def device_bytes(self, processes: int = 1) -> float:
        return sum(share_of(self.device, processes).values())

    def host_bytes(self, processes: int = 1) -> float:
        return sum(share_of(self.host, processes).values()) + LIBRARIES

    def together_bytes(self, processes: int) -> float:
        """Of all processes, where they and their devices have one memory."""
        return _of_all(self.device, processes) + self.host_together_bytes(processes)

    def host_together_bytes(self, processes: int) -> float:
        """Beside their devices, of all processes, where they are on one host."""
        return _of_all(self.host, processes) + processes * LIBRARIES


def _of_all(held: Bytes, processes: int) -> float:
    shares = share_of(held, processes)
    return sum(size if name == GATHERED else processes * size for name, size in shares.items())


def share_of(held: Bytes, processes: int) -> dict[str, float]:
    """What one of the processes has of it."""
    return {
        name: size / processes if name in SHARDED else size
        for name, size in held.items()
        if name != ENDS or processes > 1
    }


@dataclass(frozen=True, kw_only=True)
class Writing:
    """Text that a model writes, a token of each document a step.

    A step reads all weights and the keys and values so far, whatever it computes: mostly the
    memory decides how long it takes.
    """

    tokens: int
    layer_steps: float
    """Steps times layers: each is a few dozen calls of a library."""
    flops: float
    bytes: float
    """Read and written in the device's memory."""


@dataclass(frozen=True, kw_only=True)
class Saving:
    """What a training writes while it works, and waits for."""

    bytes: float
    """Of a checkpoint."""
    every: float
    """Seconds between two of them."""
    steps: int
    best: float
    """Bytes of the weights that are kept as the best so far, if each evaluation is better."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """A stage's needs. ``flops`` are by arithmetic: product (the fast dtype), float32, float64."""

    moments: tuple[Moment, ...]
    disk: float = 0.0
    """Bytes that stay."""
    cached: float = 0.0
    """Of these, what lies in the cache folder, for other runs too."""
    scratch: float = 0.0
    """Bytes on disk only while the stage runs."""
    flops: Mapping[str, float] = field(default_factory=dict)
    tokens: int = 0
    moved: float = 0.0
    """Bytes read from and written to disk."""
    writing: Writing | None = None
    """What a model writes besides; its operations are not among ``flops``."""
    product: str | None = None
    """The dtype of the products, where the stage says it."""
    most_processes: int = 1
    """That can share it."""
    saving: Saving | None = None
    """What it writes besides ``moved``."""

    def moments_of(self, processes: int) -> list[Moment]:
        """Those that come where so many share the stage."""
        return [m for m in self.moments if m.split is None or m.split == (processes > 1)]

    def worst(self, *, on_cpu: bool, processes: int = 1) -> Moment:
        """The moment that decides whether the stage fits."""
        return max(
            self.moments_of(processes),
            key=lambda m: m.device_bytes(processes) + (m.host_bytes(processes) if on_cpu else 0.0),
        )


def trunk_flops(shape: Shape, window: int) -> float:
    """Of one position's forward pass without the output head."""
    return shape.flops_per_token(window) - 2.0 * shape.vocab_size * shape.hidden_size
