"""The report's part about cleaning: right numbers, harmless whatever stands in the file."""

from __future__ import annotations

from typing import Any

import pytest
from hostile import HOSTILE, hostile_cleaning

from reports.cleaning import cleaning_tables
from reports.page import render_html
from reports.view import View

TRANSFER: dict[str, Any] = {
    "sources": [{"name": "web"}],
    "lengths": {"64": 3, "128": 4},
    "cleaning": hostile_cleaning(),
}


def texts(table: Any) -> list[list[tuple[str, str]]]:
    return [[(cell.text, cell.note) for cell in row] for row in table.rows]


def test_numbers_are_told_filter_by_filter() -> None:
    tables = {table.name: table for table in cleaning_tables(TRANSFER)}
    assert list(tables) == ["cleaning", "overlap", "removed", "languages", "lengths"]
    first, left = texts(tables["cleaning"])
    assert first[1:] == [("10", ""), ("3", "30.0%"), ("1,000", ""), ("360", "36.0%")]
    assert left[0] == ("left", "40 tokens in single lines gone")
    assert [left[1][0], left[3][0]] == ["7", "600"]
    assert texts(tables["overlap"])[-1] == [("piqa", ""), ("not looked for", HOSTILE)]
    assert texts(tables["lengths"]) == [
        [("64 to 127", ""), ("4", ""), ("3", "")],
        [("128 to 255", ""), ("6", ""), ("4", "")],
    ]


def test_hostile_text_stays_text() -> None:
    view = View(name="x", description="", state="", verdict="", transfer_facts=[("a", "b")])
    view.cleaning = cleaning_tables(TRANSFER)
    page = render_html(view)
    assert "Examples of what was removed" in page
    assert HOSTILE not in page


@pytest.mark.parametrize("wrong", [None, "text", 7, [None], [[1]], {"x": None}, {"x": {"y": 1}}])
@pytest.mark.parametrize("key", [None, *hostile_cleaning()])
def test_every_value_may_be_wrong(key: str | None, wrong: Any) -> None:
    cleaning = {**hostile_cleaning(), key: wrong} if key else wrong
    cleaning_tables({**TRANSFER, "cleaning": cleaning})
    cleaning_tables({"cleaning": cleaning, "sources": wrong, "lengths": wrong})


def test_a_set_that_was_not_cleaned_tells_its_lengths_only() -> None:
    assert [t.name for t in cleaning_tables({"lengths": {"8": 1}})] == ["lengths"]
    assert cleaning_tables({}) == []
