"""What run.json keeps of earlier sessions."""

from __future__ import annotations

from pathlib import Path

from pipelines.journal import Journal
from shearling import read_json

STAGES = [("prune", "prune"), ("distill", "distill")]


def session(run: Path) -> Journal:
    return Journal(run, recipe="tiny", stages=STAGES, again="shearling run tiny")


def test_time_spent_outlives_sessions_that_do_not_come_to_the_stage(tmp_path: Path) -> None:
    first, resumes = session(tmp_path), [{"step": 7, "at": "2026-01-01T10:00:00+00:00"}]
    first.set_row("distill", state="running", key="one", seconds=18000.0, resumes=resumes)
    first.end("interrupted")
    other = session(tmp_path)  # other settings, then stopped before distill
    other.set_row("prune", state="running", key="two", seconds=60.0)
    other.end("interrupted")
    last = session(tmp_path)
    assert (last.seconds_before("one"), last.resumes_before("one")) == (18000.0, resumes)
    assert last.seconds_before("two") == 60.0
    last.set_row("distill", state="running", key="one", seconds=19000.0)
    last.set_row("distill", state="done")
    last.end("done")
    assert list(read_json(tmp_path / "run.json")["unfinished"]) == ["two"]
    assert session(tmp_path).seconds_before("one") == 0.0


def test_a_damaged_journal_costs_no_more_than_the_times(tmp_path: Path) -> None:
    session(tmp_path).end("interrupted")
    (tmp_path / "run.json").write_text('{"unfinished": {"one": [], "two": {"seconds": "x"}}}')
    journal = session(tmp_path)
    assert (journal.seconds_before("one"), journal.resumes_before("two")) == (0.0, [])
