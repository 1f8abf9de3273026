"""What commands print: the families of Llamas, a recipe's keys, its plan, regressions.

A terminal may be 80 columns wide. A number that is cut there says nothing, or something wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from pipelines.display import format_bytes, format_seconds
from reports import words

if TYPE_CHECKING:
    from pipelines.keys import Section

Cell = str | int
"""A text, or a count, which is written short where the table is too wide."""
_GAP = 2
_FOLDED = 20
"""To how narrow a column a text may be folded."""


def tables(
    columns: Mapping[str, str],
    rows: Sequence[Sequence[Cell]],
    *,
    width: int,
    styles: Sequence[str] = (),
) -> list[Table]:
    """The rows as a table in which every number is whole.

    Where it is wider than ``width``, texts are folded and counts written short; what is too wide
    even then comes in a further table below, which begins with the first column again. ``columns``
    maps headings to ``left``, for text, or ``right``, for numbers; ``styles`` has one for each row.
    """
    names = list(columns)
    written = _written(names, rows, lambda count: f"{count:,}")
    if sum(map(_width, written)) + _GAP * (len(names) - 1) > width:
        written = _written(names, rows, words.count)
    least = [
        min(_width(column), _FOLDED) if columns[name] == "left" else _width(column)
        for name, column in zip(names, written, strict=True)
    ]
    least[0] = min(_width(written[0]), width // 2)  # a folded name is hard to read
    parts = _parts(least, width)
    return [_table(columns, [written[index] for index in part], styles) for part in parts]


def _written(
    names: Sequence[str], rows: Sequence[Sequence[Cell]], count: Callable[[int], str]
) -> list[list[str]]:
    """Each column as text, its heading first."""
    texts = [[count(cell) if isinstance(cell, int) else cell for cell in row] for row in rows]
    return [list(column) for column in zip(names, *texts, strict=True)]


def _width(column: Sequence[str]) -> int:
    return max(map(cell_len, column))


def _parts(widths: Sequence[int], width: int) -> list[list[int]]:
    """Which columns stand in which table; the first stands in all."""
    parts = [[0]]
    for index in range(1, len(widths)):
        needed = sum(widths[i] + _GAP for i in parts[-1]) + widths[index]
        if needed > width and len(parts[-1]) > 1:
            parts.append([0])
        parts[-1].append(index)
    return parts


def _table(
    columns: Mapping[str, str], written: Sequence[Sequence[str]], styles: Sequence[str]
) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0))
    for heading, *_ in written:
        if columns[heading] == "right":
            table.add_column(heading, justify="right", no_wrap=True)
        else:
            table.add_column(heading, overflow="fold")
    for index, row in enumerate(zip(*(column[1:] for column in written), strict=True)):
        table.add_row(*map(Text, row), style=styles[index] if styles else None)
    return table


# --- families -----------------------------------------------------------------------------------


def families_summary(rows: Sequence[Mapping[str, Any]], *, width: int) -> list[Table]:
    """One line a model: what a person compares."""
    numbers = ("parameters", "layers", "hidden", "heads", "FFN", "vocabulary", "context", "RoPE")
    columns = {"name": "left", **dict.fromkeys(numbers, "right")}
    columns |= {"embeddings": "left", "tokenizer": "left"}
    found = [
        (
            row["name"],
            row["parameters"],
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
        for row in rows
    ]
    return tables(columns, found, width=width)


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


def plan_table(plan: Mapping[str, Any], *, width: int) -> list[Table | Text]:
    """A plan as printed: the table, what decides the memory, totals, warnings."""
    teacher, total, machine = plan["teacher"], plan["total"], plan["machine"]
    head = (
        f"{plan['recipe']}: {teacher['model']}, {teacher['parameters']:,} parameters "
        f"(by {teacher['told_by']}), on {plan['processes']} x {machine['name']}"
    )
    numbers = ("parameters", "memory", "disk", "tokens", "FLOPs", "time", "processes")
    columns = {"stage": "left", **dict.fromkeys(numbers, "right"), "peak": "left"}
    rows = [
        (
            row["name"],
            row["parameters"] or "",
            format_bytes(row["memory_bytes"]),
            format_bytes(row["disk_bytes"]) if row["disk_bytes"] else "",
            row["tokens"] or "",
            f"{row['flops']:.2g}" if row["flops"] else "",
            _duration(row["seconds"]),
            _processes(row),
            _peak(row),
        )
        for row in plan["stages"]
    ]
    lines = [
        f"In all: {_duration(total['seconds'])}, {total['flops']:.2g} FLOPs, at most "
        f"{format_bytes(total['memory_bytes'])} of memory in a process{_beside(total)} and "
        f"{format_bytes(total['disk_bytes'])} of disk.",
        "Assumed: " + "; ".join(plan["assumptions"]) + ".",
    ]
    parts: list[Table | Text] = [
        Text(head, style="bold"),
        *tables(columns, rows, width=width),
        Text("\n".join(lines)),
    ]
    parts += [Text(f"Warning: {warning}.", style="yellow") for warning in plan["warnings"]]
    return parts


def _beside(total: Mapping[str, Any]) -> str:
    """What a process needs of the host's memory, where its device has one of its own."""
    return f", {format_bytes(total['host_bytes'])} beside its device" if total["host_bytes"] else ""


def _duration(seconds: float) -> str:
    return f"{seconds / 86400:,.1f} days" if seconds > 2 * 86400 else format_seconds(seconds)


def _processes(row: Mapping[str, Any]) -> str:
    """How many fit and can share it, as ``2-256``."""
    least, most = row["least_processes"], row["most_processes"]
    if least is None:
        return "too big"
    return f"{least}-{most}" if most > least else str(least)


def _peak(row: Mapping[str, Any]) -> str:
    """The moment of the peak and what fills it most."""
    largest = sorted(row["memory"].items(), key=lambda part: -part[1])[:2]
    filled = ", ".join(f"{name} {format_bytes(size)}" for name, size in largest)
    return f"{row['moment']}: {filled}" if filled else str(row["moment"])


def keys_lines(found: Sequence[Section]) -> Iterator[Padding]:
    """A recipe's keys, place by place: what each takes and its default, below it what it does."""
    for section in found:
        heading = Text(f"{section.path}: ", style="bold").append(section.about, style="")
        yield Padding(heading, (1, 0, 0, 0), expand=False)
        for key in section.keys:
            default = f"default {key.default}" if key.default else "must be given"
            line = Text(key.name, style="cyan").append(f"  {key.takes}; {default}", style="dim")
            yield Padding(line, (0, 0, 0, 2), expand=False)
            yield Padding(Text(key.description), (0, 0, 0, 6), expand=False)
