"""What the report says of a run's cuts: of one, and of several that follow one another."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from reports.page import write_report
from reports.run_folder import read_run
from reports.verdict import judge, verdict
from shearling import read_json, write_json


def searched(layers: int) -> list[dict[str, Any]]:
    return [{"shape": {"num_hidden_layers": layers}, "parameters": 7_000 + layers, "kl": 0.5}]


@pytest.fixture
def cut_twice(run: Path) -> Path:
    """The run, in which what was taught is cut and taught again."""
    stages = run / "stages"
    journal = read_json(run / "run.json")
    for old, new in (("prune", "prune2"), ("distill", "distill2")):
        shutil.copytree(stages / old, stages / new)
        row = next(row for row in journal["stages"] if row["name"] == old)
        journal["stages"].append({**row, "name": new})
        config = stages / new / "model" / "config.json"
        narrow = {"num_hidden_layers": 2, "intermediate_size": 46}
        write_json(config, {**read_json(config), **narrow})
    write_json(run / "run.json", journal)
    path = stages / "prune2" / "selection.json"
    selection = read_json(path)
    importance = {**selection["importance"], "layers": [0.5, 0.1, 0.3]}
    write_json(path, {**selection, "layers": [0, 2], "importance": importance})
    for name, layers in (("prune", 3), ("prune2", 2)):
        path = stages / name / "stage.json"
        write_json(path, {**read_json(path), "summary": {"search": searched(layers)}})
    return run


def add_a_second_teacher(run: Path) -> None:
    """One that is only learnt from, with twice the layers of the first."""
    shutil.copytree(run / "stages" / "teacher", run / "stages" / "other")
    config = run / "stages" / "other" / "model" / "config.json"
    write_json(config, {**read_json(config), "num_hidden_layers": 8})
    journal = read_json(run / "run.json")
    journal["stages"].insert(2, {**journal["stages"][0], "name": "other"})
    write_json(run / "run.json", journal)


def section(run: Path) -> str:
    """The page's section about what was cut."""
    html = write_report(run).read_text(encoding="utf-8")
    return html.partition('<section id="kept">')[2].partition("</section>")[0]


def test_each_cut_is_told_against_the_model_that_it_cut(cut_twice: Path) -> None:
    add_a_second_teacher(cut_twice)
    html = section(cut_twice)
    first, second = html.split("<h3>")[1:]
    assert first.startswith("prune, made from the teacher</h3>")
    assert "<dd>3 of 4 (75%)</dd>" in first
    assert "7,003" in first
    assert "7,002" not in first
    assert second.startswith("prune2, made from distill</h3>")
    assert "<dd>2 of 3 (67%)</dd>" in second
    assert "<dd>46 of 64 (72%)</dd>" in second
    assert "<dd>0, 2</dd>" in second
    assert "2 of 3 layers were kept; cut: 1." in second
    assert "Each point is a head of distill," in second
    assert "7,002" in second
    assert "7,003" not in second


def test_what_came_back_is_counted_from_the_last_cut(
    cut_twice: Path, cards: dict[str, dict[str, Any]]
) -> None:
    """Of a first cut that cost nothing, nothing could come back."""
    once = judge(read_run(cut_twice)).recoveries
    write_json(cut_twice / "stages" / "prune" / "scorecard.json", {**cards["teacher"], "speed": {}})
    found = read_run(cut_twice)
    assert once
    assert judge(found).recoveries == once
    assert "; of what was lost after prune2, " in verdict(found, judge(found))


def test_no_two_parts_of_the_page_have_one_name(cut_twice: Path) -> None:
    html = write_report(cut_twice).read_text(encoding="utf-8")
    names = re.findall(r' id="([^"]+)"', html.partition("<script")[0])
    assert {"chart-layers", "chart-layers-2", "table-search", "table-search-2"} <= set(names)
    assert len(names) == len(set(names))


def test_markdown_tells_each_cut(cut_twice: Path) -> None:
    write_report(cut_twice)
    text = (cut_twice / "report.md").read_text(encoding="utf-8")
    kept = text.partition("## What was kept\n")[2].partition("\n## ")[0]
    first, second = kept.split("\n### ")[1:]
    assert first.startswith("prune, made from the teacher\n")
    assert "- layers: 3 of 4 (75%)" in first
    assert second.startswith("prune2, made from distill\n")
    assert "- layers: 2 of 3 (67%)" in second
    assert "| 1 | 0.500 | 2 |" in second


def test_one_cut_needs_no_heading_of_its_own(run: Path) -> None:
    html = section(run)
    assert "made from" not in html
    assert "<h4>" not in html
    assert "<h3>Layers: importance, and what was kept</h3>" in html
    write_report(run)
    text = (run / "report.md").read_text(encoding="utf-8")
    assert "## What was kept\n\n- layers: 3 of 4 (75%)\n" in text


def with_summary(run: Path, **facts: Any) -> tuple[str, str]:
    """The page's section and report.md where the cut says so of itself."""
    path = run / "stages" / "prune" / "stage.json"
    write_json(path, {**read_json(path), "summary": facts})
    return section(run), (run / "report.md").read_text(encoding="utf-8")


def test_a_cut_tells_its_notes_and_what_it_kept_of_the_attention_sink(run: Path) -> None:
    said = "The first position of the teacher is 250 times as large as the others, an attention "
    said += "sink; the student's is 0.97 times that."
    for text in with_summary(run, sink=250.0, sink_kept=0.97, notes=["Mind the gap."]):
        assert "Mind the gap." in text
        assert said in text.replace("&#39;", "'")


def test_a_note_about_the_sink_is_not_told_twice(run: Path) -> None:
    note = "Behind layer 1 the first position is 250 times as large, an attention sink, and lost."
    for text in with_summary(run, sink=250.0, sink_kept=0.1, notes=[note]):
        assert text.count("attention sink") == 1


@pytest.mark.parametrize("facts", [{}, {"sink": 250.0}, {"sink": "x", "sink_kept": None}])
def test_without_a_sink_none_is_told(run: Path, facts: dict[str, Any]) -> None:
    for text in with_summary(run, **facts, notes=None):
        assert "first position" not in text


def test_a_hostile_note_is_no_markup(run: Path) -> None:
    html, markdown = with_summary(run, notes=["<b>x</b>", 3, None])
    assert "<b>" not in html
    assert "\n<b>" not in markdown
