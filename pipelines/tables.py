"""Tables that commands print: the families of Llamas, and the plan of a recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from pipelines.display import format_bytes, format_seconds


def _table(columns: Mapping[str, str], title: str = "") -> Table:
    """A plain table; ``columns`` maps headings to ``left`` or ``right``."""
    table = Table(title=Text(title) if title else None, title_justify="left", box=None)
    for name, side in columns.items():
        table.add_column(name, justify="right" if side == "right" else "left", no_wrap=True)
    return table


# --- families -----------------------------------------------------------------------------------


def families_summary(rows: Sequence[Mapping[str, Any]]) -> Table:
    """One line a model: what a person compares."""
    table = _table(
        {
            "name": "left",
            **dict.fromkeys(
                ("parameters", "layers", "hidden", "heads", "FFN", "vocabulary"), "right"
            ),
            **dict.fromkeys(("context", "RoPE"), "right"),
            "embeddings": "left",
            "tokenizer": "left",
        }
    )
    for row in rows:
        table.add_row(
            row["name"],
            f"{row['parameters']:,}",
            str(row["layers"]),
            str(row["hidden"]),
            f"{row['heads']}/{row['key_value_heads']}x{row['head_dim']}",
            str(row["intermediate"]),
            f"{row['vocabulary']:,}",
            f"{row['context']:,}",
            _rope(row),
            "tied" if row["tied"] else "untied",
            row["tokenizer"].split(",")[0],
        )
    return table


def _rope(row: Mapping[str, Any]) -> str:
    scaling = f" x{row['rope_scaling']:g}" if row["rope_scaling"] else ""
    return f"{row['rope_base']:,.0f}{scaling}"


def families_lines(row: Mapping[str, Any], recipes: Sequence[Mapping[str, Any]]) -> Text:
    """All facts of one model, with the recipe that trained it and the sources."""
    facts = {name: value for name, value in row.items() if name not in ("name", "sources")}
    recipe = next((r for r in recipes if r["name"] == row["training"]), None)
    if recipe is not None:
        facts |= {f"training.{name}": value for name, value in recipe.items() if name != "name"}
    width = max(map(len, facts))
    lines = [f"{name:<{width}}  {_shown(name, value)}" for name, value in facts.items()]
    lines += [f"{'source':<{width}}  {source}" for source in row["sources"]]
    return Text("\n".join([str(row["name"]), *lines]))


def _shown(name: str, value: Any) -> str:
    if value is None:
        return "none" if name == "rope_scaling" else "not published"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)


# --- plan ---------------------------------------------------------------------------------------


def plan_table(plan: Mapping[str, Any]) -> list[Table | Text]:
    """A plan as printed: the table, what decides the memory, totals, warnings."""
    teacher, total, machine = plan["teacher"], plan["total"], plan["machine"]
    head = (
        f"{plan['recipe']}: {teacher['model']}, {teacher['parameters']:,} parameters "
        f"(by {teacher['told_by']}), on {plan['processes']} x {machine['name']}"
    )
    columns = ("parameters", "memory", "disk", "tokens", "FLOPs", "time", "processes")
    table = _table({"stage": "left", **dict.fromkeys(columns, "right"), "peak": "left"})
    for row in plan["stages"]:
        table.add_row(
            Text(row["name"]),
            f"{row['parameters']:,}" if row["parameters"] else "",
            format_bytes(row["memory_bytes"]),
            format_bytes(row["disk_bytes"]) if row["disk_bytes"] else "",
            f"{row['tokens']:,}" if row["tokens"] else "",
            f"{row['flops']:.2g}" if row["flops"] else "",
            _duration(row["seconds"]),
            _processes(row),
            _peak(row),
        )
    lines = [
        f"In all: {_duration(total['seconds'])}, {total['flops']:.2g} FLOPs, at most "
        f"{format_bytes(total['memory_bytes'])} of memory in a process and "
        f"{format_bytes(total['disk_bytes'])} of disk.",
        "Assumed: " + "; ".join(plan["assumptions"]) + ".",
    ]
    parts: list[Table | Text] = [Text(head, style="bold"), table, Text("\n".join(lines))]
    parts += [Text(f"Warning: {warning}.", style="yellow") for warning in plan["warnings"]]
    return parts


def _duration(seconds: float) -> str:
    return f"{seconds / 86400:,.1f} days" if seconds > 2 * 86400 else format_seconds(seconds)


def _processes(row: Mapping[str, Any]) -> str:
    """How many fit: ``1-4`` on a CPU, ``8+`` on accelerators, which each bring memory."""
    least, most = row["least_processes"], row["most_processes"]
    if least is None:
        return "too big"
    if most is None:
        return f"{least}+" if row["kind"] in ("distill", "correct") else "1"
    return f"{least}-{most}" if most > least else str(least)


def _peak(row: Mapping[str, Any]) -> str:
    """The moment of the peak and what fills it most."""
    largest = sorted(row["memory"].items(), key=lambda part: -part[1])[:2]
    return f"{row['moment']}: " + ", ".join(
        f"{name} {format_bytes(size)}" for name, size in largest
    )
