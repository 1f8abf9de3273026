"""`shearling diff`: real scorecards of a real run, and the sense to refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from shearling_process import Shearling

from pipelines.difference import find_scorecard, settings_like
from shearling import ShearlingError, read_json, write_json


@pytest.fixture
def copas(tmp_path: Path, finished: tuple[Path, str]) -> tuple[Path, Path]:
    """Two scorecards on 40 documents: the run's own, stretched; the second is clearly worse."""
    paths = []
    for name, right in (("teacher", 32), ("distill", 8)):
        card = read_json(finished[0] / "stages" / name / "scorecard.json")
        card["samples"]["copa"]["acc"] = "1" * right + "0" * (40 - right)
        card["results"]["copa"]["acc"] = {"value": right / 40, "stderr": 0.07}
        paths.append(tmp_path / f"{name}.json")
        write_json(paths[-1], card)
    return paths[0], paths[1]


def test_a_clear_difference_is_called_worse(copas: tuple[Path, Path], shearling: Shearling) -> None:
    done = shearling("diff", *copas)
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("copa"))
    assert "−60.0" in line
    assert line.rstrip().endswith("worse")
    found = json.loads(shearling("diff", *copas, "--json").stdout)
    assert found["schema"] == 1
    assert (found["a"]["model"], found["b"]["model"]) == ("teacher", "distill")
    (entry,) = found["comparisons"]
    assert entry["difference"] == pytest.approx(-0.6)
    assert entry["p_adjusted"] < 1e-6
    markdown = shearling("diff", *copas, "--markdown").stdout
    assert "| copa | accuracy | 80.0% | 20.0% |" in markdown
    assert "within noise" in shearling("diff", copas[0], copas[0]).stdout


def test_a_run_stands_for_its_last_model_and_is_compared_with_its_teacher(
    run: Path, shearling: Shearling
) -> None:
    card = find_scorecard(str(run))
    assert card is not None
    assert card["model"] == "distill"
    done = shearling("diff", run / "stages" / "teacher", run, "--all", "--json")
    assert done.returncode == 0, done.stderr
    assert {entry["task"] for entry in json.loads(done.stdout)["comparisons"]} == {"copa"}


def test_a_model_is_measured_as_the_other_sides_scorecard_was(
    run: Path, tiny_mirror: Path, shearling: Shearling
) -> None:
    teacher = run / "stages" / "teacher"
    done = shearling("diff", teacher, teacher / "model", "--mirror", tiny_mirror, "--json")
    assert done.returncode == 0, done.stderr
    (entry,) = json.loads(done.stdout)["comparisons"]
    assert entry["verdict"] == "the same"
    assert entry["documents"] == 4


@pytest.mark.parametrize("fact", ["hash", "limit", "num_fewshot"])
def test_what_was_measured_differently_is_refused(
    fact: str, copas: tuple[Path, Path], shearling: Shearling
) -> None:
    card = read_json(copas[1])
    card["tasks"]["copa"][fact] = 7
    write_json(copas[1], card)
    done = shearling("diff", *copas)
    assert done.returncode == 2
    assert "measured differently" in done.stderr
    assert fact.replace("_", " ") in done.stderr


def test_settings_follow_the_scorecard(run: Path) -> None:
    card = find_scorecard(str(run))
    assert card is not None
    card["tasks"]["copa"]["limit"] = 3
    like = settings_like(card, {"limit": None, "mirror": "here"})
    assert like == {
        "tasks": ["copa"], "limits": {"copa": 3}, "num_fewshot": 0, "speed": False,
        "mirror": "here",
    }  # fmt: skip


def test_a_file_that_is_no_scorecard_is_a_clear_error(
    run: Path, tmp_path: Path, shearling: Shearling
) -> None:
    done = shearling("diff", run / "run.json", run)
    assert done.returncode == 2
    assert "not a scorecard" in done.stderr
    with pytest.raises(ShearlingError, match=r"none\.json"):
        find_scorecard(str(tmp_path / "none.json"))
