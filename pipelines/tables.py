"""Tables that commands print: the families of Llamas, and the plan of a recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text


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
