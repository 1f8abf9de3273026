"""`shearling diff`: real scorecards of a real run, and the sense to refuse."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from shearling_process import Shearling

from pipelines.difference import Difference, find_scorecard, settings_like
from reports import words
from reports.pace import WRITES
from reports.run_folder import Data
from reports.settings import BenchmarkSettings
from shearling import ShearlingError, read_json, write_json


@pytest.fixture(scope="module")
def card(tiny_llama: Path, tiny_mirror: Path, tmp_path_factory: pytest.TempPathFactory) -> Data:
    """A real scorecard of the tiny Llama."""
    from reports.benchmark import benchmark

    asked = BenchmarkSettings(
        tasks=("copa",), mirror=str(tiny_mirror), prompts=(), completion_tokens=4, speed=False
    )
    return benchmark(tiny_llama, asked, name="teacher", cache=tmp_path_factory.mktemp("cache"))


@pytest.fixture
def measured_run(card: Data, tiny_llama: Path, tmp_path: Path) -> Path:
    """A run of two models, with what diff reads of one."""
    run = tmp_path / "runs" / "tiny"
    names = ("teacher", "distill")
    for name in names:
        (run / "stages" / name).mkdir(parents=True)
        (run / "stages" / name / "model").symlink_to(tiny_llama)
        write_json(run / "stages" / name / "scorecard.json", {**card, "model": name})
    rows = [{"name": name, "kind": name, "state": "done"} for name in names]
    write_json(run / "run.json", {"schema": 1, "recipe": "tiny", "state": "done", "stages": rows})
    return run


@pytest.fixture
def copas(tmp_path: Path, card: Data) -> tuple[Path, Path]:
    """Scorecards as if of 40 documents; the second model is clearly worse."""
    paths = []
    for name, right in (("teacher", 32), ("distill", 8)):
        made = copy.deepcopy(card)
        made["model"] = name
        made["samples"]["copa"]["acc"] = "1" * right + "0" * (40 - right)
        made["results"]["copa"]["acc"] = {"value": right / 40, "stderr": 0.07}
        paths.append(tmp_path / f"{name}.json")
        write_json(paths[-1], made)
    return paths[0], paths[1]


def test_speeds_on_other_terms_are_told(card: Data) -> None:
    def of(**terms: str) -> Data:
        return {**card, "speed": {WRITES: 4.0, "threads": 2, **terms}}

    here, there = of(device="cpu", precision="float32"), of(device="cuda", precision="bfloat16")
    alike, apart = (
        Difference(first=here, second=other, comparisons=[]).footnotes() for other in (here, there)
    )
    told = "speeds and memory were measured on other terms: "
    assert not any(note.startswith(told) for note in alike)
    assert told + "precision float32 and bfloat16, device cpu and cuda" in apart


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


def test_speeds_are_told_with_their_quartiles(
    copas: tuple[Path, Path], shearling: Shearling
) -> None:
    for path, middle in zip(copas, (400.0, 520.0), strict=True):
        around = [middle - 10, middle + 10]
        speed = {"decode_tokens_per_second": middle, "decode_tokens_per_second_quartiles": around}
        write_json(path, {**read_json(path), "speed": speed})
    said = shearling("diff", *copas).stdout
    assert "tokens written a second: 400 (390 to 410) and 520 (510 to 530)" in said


def test_a_run_stands_for_its_last_model_and_is_compared_with_its_teacher(
    measured_run: Path, shearling: Shearling
) -> None:
    last = find_scorecard(str(measured_run), tell=print)
    assert last is not None
    assert last["model"] == "distill"
    done = shearling("diff", measured_run / "stages" / "teacher", measured_run, "--all", "--json")
    assert done.returncode == 0, done.stderr
    assert {entry["task"] for entry in json.loads(done.stdout)["comparisons"]} == {"copa"}


def test_a_run_says_which_of_its_models_is_compared_and_hides_no_damage(
    measured_run: Path, shearling: Shearling
) -> None:
    teacher, last = (measured_run / "stages" / name for name in ("teacher", "distill"))
    done = shearling("diff", teacher, measured_run, "--json")
    assert f"{measured_run}: its last measured model is distill\n" in done.stderr
    (last / "scorecard.json").rename(last / "elsewhere.json")
    done = shearling("diff", teacher, measured_run, "--json")
    assert done.returncode == 0, done.stderr
    assert "last measured model is teacher; distill is not measured yet (done)" in done.stderr
    for damaged in ("{", "{}", "[]"):
        (last / "scorecard.json").write_text(damaged)
        for arguments in (("diff", teacher, measured_run), ("eval", measured_run)):
            done = shearling(*arguments)
            assert done.returncode == 2, (damaged, arguments)
            told = done.stderr.replace("\n", " ")
            assert "scorecard.json" in told
            assert f"shearling resume {measured_run}" in told


def test_a_model_is_measured_as_the_other_sides_scorecard_was(
    measured_run: Path, tiny_mirror: Path, shearling: Shearling
) -> None:
    teacher = measured_run / "stages" / "teacher"
    done = shearling("diff", teacher, teacher / "model", "--mirror", tiny_mirror, "--json")
    assert done.returncode == 0, done.stderr
    (entry,) = json.loads(done.stdout)["comparisons"]
    assert entry["verdict"] == "the same"
    assert entry["documents"] == 4


def test_a_gguf_is_as_large_as_its_file(
    tiny_llama: Path, tiny_mirror: Path, tmp_path: Path, shearling: Shearling
) -> None:
    """And not as the copy in 32-bit floats that is measured."""
    done = shearling("export", tiny_llama, "--to", "gguf", "--quantise", "q4_0", "--out", "small")
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "small").glob("*.gguf")
    size = file.stat().st_size
    weights = (tiny_llama / "model.safetensors").stat().st_size
    assert size < weights
    asked = ("--tasks", "copa", "--mirror", tiny_mirror, "--limit", "2")
    done = shearling("eval", file, *asked, "--out", "gguf.json", "--json")
    assert json.loads(done.stdout)["bytes"] == size
    found = json.loads(shearling("diff", "gguf.json", tiny_llama, *asked, "--json").stdout)
    assert (found["a"]["bytes"], found["b"]["bytes"]) == (size, weights)
    told = shearling("diff", tiny_llama, file, *asked, "--markdown").stdout
    assert f"on disk: {words.size(weights)} and {words.size(size)}" in told


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


def test_settings_follow_the_scorecard(measured_run: Path) -> None:
    card = find_scorecard(str(measured_run), tell=print)
    assert card is not None
    card["tasks"]["copa"]["limit"] = 3
    like = settings_like(card, {"limit": None, "mirror": "here"})
    assert like == {
        "tasks": ["copa"], "limits": {"copa": 3}, "speed": False, "mirror": "here",
    }  # fmt: skip
    assert settings_like(card, {"limit": 3})["limit"] == 3
    with pytest.raises(ShearlingError, match="measured on 3 examples a task, so 10 could not"):
        settings_like(card, {"limit": 10})
    card["num_fewshot"] = 2
    assert settings_like(card, {})["num_fewshot"] == 2
    card["tasks"]["copa"]["chat_template"] = True
    card["tasks"]["wikitext2"] = {"agreement_windows": 2, "chat_template": True}
    metrics = ("word_perplexity", "token_perplexity_64", "token_perplexity_256")
    card["results"]["wikitext2"] = {metric: {"value": 9.0, "stderr": None} for metric in metrics}
    like = settings_like(card, {})
    assert like["perplexity_lengths"] == [64, 256]
    assert like["chat_template"]
    assert like["agreement_windows"] == 2
    card["tasks"]["wikitext2"]["chat_template"] = False  # copa alone went through it
    assert "chat_template" not in settings_like(card, {})
    del card["num_fewshot"]  # of an earlier version: wikitext2 shows no examples
    card["tasks"]["copa"]["num_fewshot"] = 5
    card["tasks"]["wikitext2"]["num_fewshot"] = 0
    assert settings_like(card, {})["num_fewshot"] == 5
    with pytest.raises(ShearlingError, match="not measured on piqa"):
        settings_like(card, {"tasks": ["piqa"]})


def test_a_file_that_is_no_scorecard_is_a_clear_error(
    measured_run: Path, tmp_path: Path, shearling: Shearling
) -> None:
    done = shearling("diff", measured_run / "run.json", measured_run)
    assert done.returncode == 2
    assert "not a scorecard" in done.stderr
    with pytest.raises(ShearlingError, match=r"none\.json"):
        find_scorecard(str(tmp_path / "none.json"), tell=print)
