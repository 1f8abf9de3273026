"""Plan against reality: what plan.json expected of each stage, beside what the run took."""

from __future__ import annotations

from typing import Any

from reports import words
from reports.run_folder import Data, Run, Stage, as_dict, as_list, as_number
from reports.tables import Cell, Table, cell

_LOOKED_AT: tuple[tuple[str, tuple[str, ...], Any], ...] = (
    ("time", ("seconds",), words.duration),
    ("memory", ("peak_memory_bytes", "memory_bytes"), words.size),
    ("device memory", ("memory_bytes",), words.size),
    ("host memory", ("host_bytes",), words.size),
    ("parameters", ("parameters",), words.count),
    ("on disk", ("disk_bytes", "bytes"), words.size),
)


def reality_table(run: Run) -> Table | None:
    """One row a stage and thing that was planned; None without a plan."""
    rows = []
    for planned in map(as_dict, as_list(run.plan.get("stages"))):
        stage = next((s for s in run.stages if s.name == planned.get("name")), None)
        if stage is None:
            continue
        for label, names, show in _LOOKED_AT:
            wanted = _wanted(planned, label, names)
            unlike = stage.kind == "export" and label == "parameters"  # written, not measured
            if wanted is not None and not unlike:
                rows.append(_row(stage, label, wanted, _happened(stage, label), show))
    if not rows:
        return None
    return Table(
        name="plan",
        caption="Plan against reality: what was expected before the run, and what it took.",
        columns=["stage", "of", "planned", "was", "was / planned"],
        rows=rows,
    )


def _row(stage: Stage, label: str, wanted: float, was: float | None, show: Any) -> list[Cell]:
    share = words.ratio(was, wanted)
    return [
        Cell(text=stage.name, sort=stage.name),
        Cell(text=label, sort=label),
        cell(wanted, show),
        cell(was, show),
        cell(share, lambda value: f"{value:.2f}"),
    ]


def _wanted(planned: Data, label: str, names: tuple[str, ...]) -> float | None:
    """What was planned, of the same things as ``_happened`` tells of."""
    wanted = next((n for name in names if (n := _expected(planned, name)) is not None), None)
    # On a CPU the plan tells one memory; beside an accelerator its own, and what the host needs.
    if label in ("memory", "device memory"):
        on_device = _expected(planned, "host_bytes") is not None
        return wanted or None if on_device == (label == "device memory") else None
    if label != "on disk" or wanted is None:
        return wanted
    # A record lists the stage's own files: none in the cache folder; and nothing is planned for a
    # teacher that is only linked, so what it links to is no surprise.
    return wanted - (_expected(planned, "cache_bytes") or 0.0) or None


def _expected(planned: Data, name: str) -> float | None:
    """A number of the plan, which may stand with its bounds: {"value": 1, "low": ..., ...}."""
    value = planned.get(name)
    return as_number(as_dict(value).get("value") if isinstance(value, dict) else value)


def _happened(stage: Stage, label: str) -> float | None:
    if label == "time":
        return stage.seconds
    if label in ("memory", "host memory"):
        return stage.peak_memory_bytes
    if label == "device memory":
        return as_number(stage.record.get("device_peak_bytes"))
    if label == "parameters":
        return as_number((stage.scorecard or {}).get("parameters"))
    files = as_dict(stage.record.get("files")).values()
    return sum(as_number(as_dict(file).get("size")) or 0.0 for file in files) or None
