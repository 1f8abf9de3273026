"""Speeds with their spread: measured, read, pooled over models of one shape, and told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reports.pace import WRITES, faster, measured_pace, pace
from reports.page import write_report
from reports.run_folder import read_run
from reports.speed import median_interval, speeds
from reports.verdict import headline_facts, judge, verdict
from reports.view import make_view
from shearling import read_json, write_json


def measured(run: Path, **told: tuple[float, float, float] | float) -> None:
    """Give stages a speed of writing: (low, middle, high), or as old scorecards have it."""
    for stage, speed in told.items():
        path = run / "stages" / stage / "scorecard.json"
        new: dict[str, object] = {WRITES: speed}
        if isinstance(speed, tuple):
            new = {WRITES: speed[1], f"{WRITES}_quartiles": [speed[0], speed[2]]}
        write_json(path, {**read_json(path), "speed": new})


def said(run: Path) -> tuple[str, str]:
    """What the verdict says of the speed, and what stands under the large number."""
    found = read_run(run)
    judgement = judge(found)
    facts = {what: of for _, what, of in headline_facts(found, judgement)}
    return verdict(found, judgement), facts["as fast at writing"]


def test_quartiles_of_times_are_quartiles_of_speeds() -> None:
    told = speeds("decode", 10, [1.0, 2.0, 4.0, 5.0, 10.0])
    assert told["decode_tokens_per_second"] == 2.5
    assert told["decode_tokens_per_second_quartiles"] == [2.0, 5.0]


def test_a_ratio_stands_in_the_verdict_where_it_is_more_than_noise(run: Path) -> None:
    measured(run, teacher=(90, 100, 110), prune=(140, 150, 160), distill=(150, 170, 180))
    sentence, fact = said(run)
    assert "the model writes 1.60 times as fast (1.27 to 2.00), " in sentence
    assert fact == "1.27 to 2.00"


def test_a_student_as_fast_as_its_twin_was_slow_is_not_called_faster(run: Path) -> None:
    """Prune and distill are one shape: between them the machine alone made the difference."""
    measured(run, teacher=(780, 800, 810), prune=(1050, 1077, 1090), distill=(600, 607, 615))
    sentence, fact = said(run)
    assert "the model writes about as fast as the teacher, within the noise" in sentence
    assert "times as fast" not in sentence
    assert fact == "0.74 to 1.40, within noise"


def test_only_models_of_one_shape_on_the_same_terms_are_pooled(run: Path) -> None:
    measured(run, teacher=800.0, prune=1077.0, distill=607.0)
    found = read_run(run)
    stages = {stage.name: stage for stage in found.measured}
    both = pace(found, stages["distill"], WRITES)
    assert both is not None
    assert (both.low, both.middle, both.high) == (607, 842, 1077)
    config = run / "stages" / "prune" / "model" / "config.json"
    whole = read_json(config)
    write_json(config, {**whole, "intermediate_size": 46})
    alone = pace(read_run(run), stages["distill"], WRITES)
    assert alone is not None
    assert (alone.low, alone.high) == (607, 607)
    write_json(config, whole)
    path = run / "stages" / "prune" / "scorecard.json"
    card = read_json(path)
    write_json(path, {**card, "speed": {**card["speed"], "threads": 8}})
    assert pace(read_run(run), stages["distill"], WRITES) == alone


def test_speeds_on_other_terms_have_no_ratio(run: Path) -> None:
    """A teacher that was measured elsewhere before is not measured again for its speed."""
    measured(run, teacher=(90, 100, 110), prune=(140, 150, 160), distill=(150, 170, 180))
    path = run / "stages" / "teacher" / "scorecard.json"
    card = read_json(path)
    write_json(path, {**card, "speed": {**card["speed"], "threads": 8}})
    found = read_run(run)
    view = make_view(found, judge(found), [found])
    assert faster(found, found.measured[-1]) is None
    assert "as fast" not in view.verdict
    assert "as fast at writing" not in [what for _, what, _ in view.facts]
    told = "were measured on other terms (threads 8 and unknown), so there is no ratio of them."
    assert f"The speeds of teacher and distill {told}" in view.details


def in_turns(run: Path, stage: str, *told: object) -> None:
    """Give a stage a ratio measured in turns with the teacher: its median, its interval."""
    path = run / "stages" / stage / "scorecard.json"
    card = read_json(path)
    new = dict(zip(("decode_times_teacher", "decode_times_teacher_interval"), told, strict=True))
    write_json(path, {**card, "speed": {**card["speed"], **new}})


def test_a_ratio_in_turns_knows_nothing_of_the_machine_a_minute_ago(run: Path) -> None:
    measured(run, teacher=(780, 800, 810), prune=(1050, 1077, 1090), distill=(600, 607, 615))
    in_turns(run, "distill", 1.31, [1.27, 1.36])
    sentence, fact = said(run)
    assert "the model writes 1.31 times as fast (1.27 to 1.36), " in sentence
    assert fact == "1.27 to 1.36"
    found = read_run(run)
    view = make_view(found, judge(found), [found])
    assert view.stages is not None
    assert [row[5].note for row in view.stages.rows if row[5].note] == [
        "780 to 810", "1,050 to 1,090", "600 to 615,\n1.31× (1.27 to 1.36)"
    ]  # fmt: skip
    in_turns(run, "distill", 1.02, [0.97, 1.08])
    assert said(run)[1] == "0.97 to 1.08, within noise"


def test_ratios_of_models_of_one_shape_are_measurements_of_one(run: Path) -> None:
    measured(run, teacher=800.0, prune=1077.0, distill=607.0)
    in_turns(run, "prune", 1.24, [1.15, 1.28])
    in_turns(run, "distill", 1.26, [1.20, 1.29])
    sentence, fact = said(run)
    assert "the model writes 1.25 times as fast (1.15 to 1.29), " in sentence
    assert fact == "1.15 to 1.29"


def test_a_student_of_the_teachers_shape_is_never_called_faster(run: Path) -> None:
    """As a corrected teacher is one."""
    measured(run, teacher=(780, 800, 810), prune=(1050, 1077, 1090), distill=(600, 607, 615))
    whole = read_json(run / "stages" / "teacher" / "model" / "config.json")
    write_json(run / "stages" / "distill" / "model" / "config.json", whole)
    in_turns(run, "distill", 1.03, [1.02, 1.04])
    assert said(run)[1].endswith(", within noise")


def test_a_ratio_in_turns_was_measured_on_the_same_terms(run: Path) -> None:
    """Whatever those of the teacher's own scorecard are, which may be of another day."""
    measured(run, teacher=(90, 100, 110), prune=(140, 150, 160), distill=(150, 170, 180))
    path = run / "stages" / "teacher" / "scorecard.json"
    card = read_json(path)
    write_json(path, {**card, "speed": {**card["speed"], "threads": 8}})
    in_turns(run, "distill", 1.5, [1.4, 1.6])
    found = read_run(run)
    ratio = faster(found, found.measured[-1])
    assert ratio is not None
    assert (ratio.low, ratio.middle, ratio.high) == (1.4, 1.5, 1.6)
    assert not any("other terms" in told for told in make_view(found, judge(found)).details)


@pytest.mark.parametrize("wrong", [None, "fast", -1.0, 0, []])
def test_without_a_ratio_in_turns_two_speeds_must_do(run: Path, wrong: object) -> None:
    measured(run, teacher=(90, 100, 110), prune=(140, 150, 160), distill=(150, 170, 180))
    in_turns(run, "distill", wrong, [1.4, 1.6])
    assert said(run)[1] == "1.27 to 2.00"


@pytest.mark.parametrize("reason", ["it was killed", None, ["a"]])
def test_the_report_says_why_there_is_no_ratio_in_turns(run: Path, reason: object) -> None:
    path = run / "stages" / "distill" / "scorecard.json"
    card = read_json(path)
    speed = {**card["speed"], "decode_times_teacher_left_out": reason}
    write_json(path, {**card, "speed": speed})
    found = read_run(run)
    told = "distill was not measured in turns with its teacher: it was killed."
    assert (told in make_view(found, judge(found)).details) == (reason == "it was killed")


def test_an_interval_of_the_median_is_that_of_the_sign_test() -> None:
    """The ranks are those of any table of the binomial at one half."""
    ranks = {6: (1, 6), 8: (1, 8), 9: (2, 8), 16: (4, 13), 25: (8, 18), 100: (40, 61)}
    for count, ends in ranks.items():
        assert median_interval(range(count, 0, -1)) == list(ends)


def test_the_interval_holds_the_median_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    within = 0
    for _ in range(1000):
        low, high = median_interval(random.lognormal(size=16).tolist())
        within += low <= 1 <= high
    assert 0.95 <= within / 1000 <= 1  # 97.9% by the binomial


def test_scorecards_without_quartiles_are_read_and_say_so(run: Path) -> None:
    measured(run, teacher=100.0, prune=200.0, distill=200.0)
    sentence, fact = said(run)
    assert "the model writes 2.00 times as fast (measured once), " in sentence
    assert fact == "measured once"


@pytest.mark.parametrize("wrong", [None, 3, ["x", None], [-1, 0], {"low": 1}])
def test_quartiles_that_are_none_are_left_out(run: Path, wrong: object) -> None:
    for name in ("teacher", "prune", "distill"):
        path = run / "stages" / name / "scorecard.json"
        write_json(path, {**read_json(path), "speed": {WRITES: 9.0, f"{WRITES}_quartiles": wrong}})
    found = read_run(run)
    last = found.measured[-1]
    assert last.scorecard is not None
    told = measured_pace(last.scorecard, WRITES)
    assert told is not None
    assert not told.known
    assert faster(found, last) is not None
    write_report(run)


def test_tables_and_chart_show_the_quartiles(run: Path) -> None:
    measured(run, teacher=(90, 100, 110), prune=(140, 150, 160), distill=(150, 170, 180))
    found = read_run(run)
    view = make_view(found, judge(found), [found])
    assert view.stages is not None
    assert view.rivals is not None
    assert view.stages.rows[-1][5].note == "150 to 180"
    assert view.rivals.rows[0][-2].note == "150 to 180"
    (chart,) = [chart for chart in view.charts if chart.name == "quality-by-speed"]
    row = chart.spec["data"]["values"][0]
    assert (row["slow"], row["x"], row["fast"]) == (90, 100, 110)


def across(run: Path) -> tuple[str, list[tuple[float, float, float]]]:
    """What the chart of quality against speed has on its x axis, and where the models stand."""
    found = read_run(run)
    charts = make_view(found, judge(found)).charts
    (chart,) = [chart for chart in charts if chart.name == "quality-by-speed"]
    rows = chart.spec["data"]["values"]
    return chart.text, [(row["slow"], row["x"], row["fast"]) for row in rows]


def test_the_chart_shows_speeds_beside_the_teacher_where_all_students_have_one(run: Path) -> None:
    measured(run, teacher=(780, 800, 810), prune=(1050, 1077, 1090), distill=(600, 607, 615))
    in_turns(run, "prune", 1.3, [1.2, 1.4])
    caption, places = across(run)
    assert "tokens written a second" in caption
    assert places[-1] == (600, 607, 615)
    in_turns(run, "distill", 1.31, [1.27, 1.36])
    caption, places = across(run)
    assert "speed beside the teacher's" in caption
    assert places == [(1, 1, 1), (1.2, 1.3, 1.4), (1.27, 1.31, 1.36)]


@pytest.mark.parametrize("unlike", [{"teacher_sha256": "of another"}, {"speed": {"threads": 8}}])
def test_speeds_beside_several_teachers_or_on_other_terms_are_not_in_one_chart(
    run: Path, unlike: dict[str, Any]
) -> None:
    measured(run, teacher=800.0, prune=1077.0, distill=607.0)
    for stage in ("prune", "distill"):
        in_turns(run, stage, 1.3, [1.2, 1.4])
    assert "speed beside the teacher's" in across(run)[0]
    path = run / "stages" / "distill" / "scorecard.json"
    card = read_json(path)
    speed = {**card["speed"], **unlike.get("speed", {})}
    write_json(path, {**card, **unlike, "speed": speed})
    assert "tokens written a second" in across(run)[0]


def test_a_further_teacher_without_a_ratio_has_no_place_beside_the_first(run: Path) -> None:
    measured(run, teacher=800.0, prune=1077.0, distill=607.0)
    in_turns(run, "distill", 1.3, [1.2, 1.4])
    path = run / "stages" / "prune" / "stage.json"
    write_json(path, {**read_json(path), "kind": "teacher"})
    assert "tokens written a second" in across(run)[0]
