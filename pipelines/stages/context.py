"""What a stage is given besides its slice of the recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reports.settings import BenchmarkSettings
from shearling import Progress


@dataclass(frozen=True, kw_only=True)
class Context:
    """Where a stage reads and writes, and whom it tells how far it is."""

    name: str
    """The stage's name in the recipe."""
    inputs: Mapping[str, Path]
    """Finished artefact folders by their role: teacher, model, transfer_set."""
    history: Sequence[str] = ()
    """Kinds of the stages that made the input ``model`` out of the teacher, in order."""
    tried: Sequence[str] = ()
    """Kinds of trainings on its way whose weights were thrown away."""
    out: Path
    """The folder to fill. It is empty unless the stage is resumable and was interrupted."""
    run: Path
    """The run folder; only for messages."""
    seed: int
    benchmark: BenchmarkSettings = field(default_factory=BenchmarkSettings)
    """What every model is measured on; the transfer set is cleared of its questions."""
    device: str
    """cpu, cuda or cuda:N; never auto."""
    cache: Path
    progress: Progress
    on_metrics: Callable[[dict[str, Any]], None]
    """Takes one line of training metrics as it happens."""
