"""What commands make of a run, of its stages, and of paths that are nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from shearling_process import Shearling

from pipelines.named import find_model
from reports.run_folder import earlier_settings
from shearling import ShearlingError, read_json, write_json


def silent(_: str) -> None:
    """Nobody to tell."""


@pytest.fixture
def changed(run: Path) -> Path:
    """The run as after another prune.shape, the new prune and Ctrl-C in distill.

    lock.json and prune are the new recipe's then, distill is still the old one's.
    """
    lock = read_json(run / "lock.json")
    for name in ("distill", "distill/benchmark"):
        lock["keys"][name] = "0" * 64
    write_json(run / "lock.json", lock)
    return run


def test_a_stage_of_earlier_settings_is_refused_by_every_command(
    changed: Path, tiny_mirror: Path, shearling: Shearling, tmp_path: Path
) -> None:
    old, new = changed / "stages" / "distill", changed / "stages" / "prune"
    assert (earlier_settings(new), earlier_settings(old)) == (None, "made")
    for arguments in (
        ("diff", new, old),
        ("eval", old, "--tasks", "copa", "--mirror", tiny_mirror),
        ("export", old, "--to", "hf", "--out", tmp_path / "out"),
        ("init", "--teacher", old, "--out", "new.yaml"),
    ):
        done = shearling(*arguments)
        assert done.returncode == 2, arguments
        assert f"{old} was made with earlier settings" in done.stderr.replace("\n", " ")
    assert not (tmp_path / "out").exists()
    # What is named by itself is meant.
    assert shearling("diff", new, old / "scorecard.json").returncode == 0
    done = shearling("export", old / "model", "--to", "hf", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "gets no model card" in done.stderr
    assert not (tmp_path / "out" / "README.md").exists()


def test_a_scorecard_of_earlier_settings_is_refused_where_it_counts(
    run: Path, shearling: Shearling, tmp_path: Path
) -> None:
    lock = read_json(run / "lock.json")
    lock["keys"]["distill/benchmark"] = "0" * 64
    write_json(run / "lock.json", lock)
    stage = run / "stages" / "distill"
    assert find_model(str(stage), tell=silent) == str(stage / "model")
    for arguments in (
        ("diff", run / "stages" / "prune", stage),
        ("export", stage, "--to", "hf", "--out", tmp_path / "out"),
    ):
        done = shearling(*arguments)
        assert done.returncode == 2
        assert "was measured with earlier settings" in done.stderr


def test_a_stage_that_left_the_recipe_belongs_to_earlier_settings(run: Path) -> None:
    lock = read_json(run / "lock.json")
    del lock["keys"]["distill"]
    write_json(run / "lock.json", lock)
    assert earlier_settings(run / "stages" / "distill") == "made"


def test_a_run_stands_for_its_last_model(
    run: Path, tiny_mirror: Path, shearling: Shearling, tmp_path: Path
) -> None:
    done = shearling("eval", run, "--tasks", "copa", "--mirror", tiny_mirror, "--json")
    assert done.returncode == 0, done.stderr
    assert "last measured model is distill" in done.stderr
    parameters = read_json(run / "stages" / "distill" / "scorecard.json")["parameters"]
    assert json.loads(done.stdout)["parameters"] == parameters
    done = shearling("export", run, "--to", "gguf", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md",
        "distill-bf16.gguf",
    ]


def test_a_stage_is_a_teacher_for_init(run: Path, shearling: Shearling, tmp_path: Path) -> None:
    stage = run / "stages" / "distill"
    done = shearling("init", "--teacher", stage, "--out", "new.yaml")
    assert done.returncode == 0, done.stderr
    assert str(stage / "model") in (tmp_path / "new.yaml").read_text()


@pytest.mark.parametrize("file", ["config.json", "tiny-q8_0.gguf"])
def test_an_export_stands_for_what_is_in_it(tmp_path: Path, file: str) -> None:
    export = tmp_path / "small" / "export"
    export.mkdir(parents=True)
    (export / file).touch()
    found = find_model(str(tmp_path / "small"), tell=silent)
    assert found == str(export / file if file.endswith(".gguf") else export)


def test_messages_name_what_was_given_and_its_role(
    run: Path, shearling: Shearling, tmp_path: Path
) -> None:
    (tmp_path / "small").mkdir()
    out = ("--to", "hf", "--out", tmp_path / "out")
    done = shearling("export", "small", *out)
    assert "Error: small has no config.json" in done.stderr
    assert shearling("eval", "small").stderr.splitlines()[-2:] == done.stderr.splitlines()[-2:]
    done = shearling("eval", "[")
    assert "The model [ is neither a folder" in done.stderr
    assert "recipe" not in done.stderr
    done = shearling("eval", run, "--teacher", "nowhere")
    assert "The teacher nowhere is neither" in done.stderr
    assert "--teacher" in done.stderr
    done = shearling("export", run / "stages" / "nope", *out)
    assert "nope does not exist" in done.stderr
    assert "distill, prune, teacher" in done.stderr
    with pytest.raises(ShearlingError, match=r"The teacher .*nope does not exist"):
        find_model(str(run / "stages" / "nope"), role="teacher", tell=silent)
