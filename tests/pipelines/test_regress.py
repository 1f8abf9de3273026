from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from shearling_process import Shearling

from pipelines import regress
from pipelines.locks import run_lock
from pipelines.regress import BASELINES, RECIPES, Number, baseline_of, compare
from pipelines.stages import distill
from pipelines.stages.context import Context
from reports.benchmark import NO_NUMBERS
from reports.compare import asked_as
from shearling import ShearlingError, write_json

MEASURED = {
    "distill/wikitext2/word_perplexity": Number(50.0, "lower"),
    "distill/copa/acc": Number(0.6, "higher", 20),
    "distill/parameters": Number(1000, "same"),
}


@pytest.fixture
def baseline() -> dict[str, Any]:
    return baseline_of("r", MEASURED, before=None)


def verdicts(baseline: dict[str, Any], **changed: Number) -> dict[str, str]:
    names = {"ppl": "distill/wikitext2/word_perplexity", "acc": "distill/copa/acc"}
    names["size"] = "distill/parameters"
    now = {**MEASURED, **{names[name]: number for name, number in changed.items()}}
    found = {finding.name: finding.verdict for finding in compare(baseline, now, set())}
    return {name: found[long] for name, long in names.items()}


def test_the_same_numbers_hold(baseline: dict[str, Any]) -> None:
    assert set(verdicts(baseline).values()) == {"ok"}


def test_worse_than_allowed_fails_in_each_direction(baseline: dict[str, Any]) -> None:
    assert verdicts(baseline, ppl=Number(50.9, "lower"))["ppl"] == "ok"
    assert verdicts(baseline, ppl=Number(51.1, "lower"))["ppl"] == "worse"
    assert verdicts(baseline, ppl=Number(47.0, "lower"))["ppl"] == "better"
    assert verdicts(baseline, ppl=Number(float("nan"), "lower"))["ppl"] == "worse"
    assert verdicts(baseline, acc=Number(0.46, "higher"))["acc"] == "ok"
    assert verdicts(baseline, acc=Number(0.44, "higher"))["acc"] == "worse"
    assert verdicts(baseline, acc=Number(0.8, "higher"))["acc"] == "better"
    assert verdicts(baseline, size=Number(999, "same"))["size"] == "worse"


def test_a_number_that_is_gone_fails_unless_its_task_was_skipped(baseline: dict[str, Any]) -> None:
    now = {name: number for name, number in MEASURED.items() if "copa" not in name}
    (gone,) = (f for f in compare(baseline, now, set()) if f.name == "distill/copa/acc")
    assert gone.verdict == "missing"
    assert gone.fails
    (gone,) = (f for f in compare(baseline, now, {"distill/copa"}) if "copa" in f.name)
    assert gone.verdict == "skipped"
    assert not gone.fails


def test_a_task_that_the_model_cannot_answer_is_not_skipped(tmp_path: Path) -> None:
    for stage in ("teacher", "distill"):
        skipped = {"copa": NO_NUMBERS, "piqa": "its data are on the Hugging Face hub"}
        card = {"parameters": 1, "results": {}, "tasks": {}, "skipped": skipped}
        (tmp_path / "stages" / stage).mkdir(parents=True)
        write_json(tmp_path / "stages" / stage / "scorecard.json", card)
    _, skipped_tasks = regress.numbers_of(tmp_path, ["distill"])
    assert skipped_tasks == {"teacher/piqa", "distill/piqa"}


def test_a_new_number_is_shown_and_does_not_fail(baseline: dict[str, Any]) -> None:
    now = {**MEASURED, "distill/piqa/acc": Number(0.5, "higher")}
    (new,) = (f for f in compare(baseline, now, set()) if "piqa" in f.name)
    assert new.verdict == "new"
    assert not new.fails


def test_numbers_of_other_questions_are_not_compared(baseline: dict[str, Any]) -> None:
    assert verdicts(baseline, acc=Number(0.6, "higher", 20, asked="a"))["acc"] == "ok"  # an old one
    kept = baseline_of("r", {"distill/copa/acc": Number(0.6, "higher", 20, asked="a")}, before=None)
    for asked, verdict in (("a", "ok"), ("b", "asked otherwise"), (None, "asked otherwise")):
        now = {"distill/copa/acc": Number(0.6, "higher", 20, asked=asked)}
        (found,) = compare(kept, now, set())
        assert found.verdict == verdict
        assert found.fails == (verdict != "ok")


@pytest.mark.parametrize("fact", ["hash", "limit", "num_fewshot", "version", "chat_template"])
def test_the_fingerprint_knows_what_changes_numbers(fact: str) -> None:
    facts = {"hash": "ab", "limit": 50, "num_fewshot": 0, "version": 1, "chat_template": False}
    assert asked_as(facts) == asked_as({**facts, "floor": {"acc": 0.3}})
    assert asked_as(facts) != asked_as({**facts, fact: 7})


def test_an_update_keeps_tolerances_set_by_hand(baseline: dict[str, Any]) -> None:
    baseline["numbers"]["distill/copa/acc"]["tolerance"] = {"absolute": 0.01}
    now = {**MEASURED, "distill/copa/acc": Number(0.7, "higher", 20)}
    updated = baseline_of("r", now, before=baseline)["numbers"]
    assert updated["distill/copa/acc"]["value"] == 0.7
    assert updated["distill/copa/acc"]["tolerance"] == {"absolute": 0.01}
    assert updated["distill/wikitext2/word_perplexity"]["tolerance"] == {"relative": 0.02}


def test_an_update_keeps_what_could_not_be_measured_here(baseline: dict[str, Any]) -> None:
    here = {"distill/parameters": Number(7, "same")}
    updated = baseline_of("r", here, before=baseline, skipped=["distill/copa"])["numbers"]
    assert updated["distill/copa/acc"] == baseline["numbers"]["distill/copa/acc"]
    assert sorted(updated) == ["distill/copa/acc", "distill/parameters"]


def test_tolerances_are_never_wider_than_a_standard_error() -> None:
    def tolerance(*fields: Any, **named: Any) -> dict[str, float]:
        return Number(*fields, **named).default_tolerance()

    assert tolerance(50.0, "lower", stderr=0.5) == {"absolute": 0.5}
    assert tolerance(50.0, "lower", stderr=4.0) == {"relative": 0.02}
    assert tolerance(0.6, "higher", 20, stderr=0.1) == {"absolute": 0.1}
    assert tolerance(0.6, "higher", 80, stderr=0.055) == {"absolute": 0.0375}
    assert tolerance(1.0, "higher", 20, stderr=0.0) == {"absolute": 0.15}


def test_counts_are_kept_exactly() -> None:
    exact = {"teacher/parameters": Number(134_515_008.0, "same")}
    baseline = baseline_of("r", exact, before=None)
    assert baseline["numbers"]["teacher/parameters"]["value"] == 134_515_008
    assert [finding.verdict for finding in compare(baseline, exact, set())] == ["ok"]


@pytest.mark.parametrize("name", RECIPES)
def test_every_baseline_can_fail(name: str) -> None:
    """Each shipped number has a tolerance that a clearly worse model would break."""
    numbers = json.loads((BASELINES / f"{name}.json").read_text())["numbers"]
    assert "distill/heldout_kl" in numbers
    assert "distill/start_heldout_perplexity" in numbers  # of the cut alone
    for key, known in numbers.items():
        assert known["better"] in ("lower", "higher", "same"), key
        assert known["tolerance"].get("relative", 0) <= 0.25, key
        assert known["tolerance"].get("absolute", 0) <= 0.25, key


def test_the_summary_of_a_ci_run(
    baseline: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    now = {**MEASURED, "distill/wikitext2/word_perplexity": Number(75.0, "lower")}
    out = StringIO()
    regress.show("r", compare(baseline, now, set()), Console(file=out))
    summary = (tmp_path / "summary.md").read_text()
    row = "| distill/wikitext2/word_perplexity | 50 | 75 | +25 (+50.0%) | 1 | worse |"
    assert row in summary
    assert "1 of 3 numbers got worse than allowed" in out.getvalue()
    assert "distill/wikitext2/word_perplexity: 50 -> 75" in out.getvalue()


def test_a_regression_is_whole_on_a_narrow_terminal() -> None:
    baseline = json.loads((BASELINES / "regress-smollm2.json").read_text())
    now = {
        name: Number(1.01 * known["value"], known["better"])
        for name, known in baseline["numbers"].items()
    }
    out = StringIO()
    findings = compare(baseline, now, set())
    regress.show("regress-smollm2", findings, Console(file=out, width=80))
    printed = out.getvalue()
    assert "…" not in printed
    for name, *told in (finding.row() for finding in findings):
        lines = [line for line in printed.splitlines() if line.startswith(f"{name} ")]
        assert all(len(line) <= 80 for line in lines)
        assert " ".join(line.removeprefix(name) for line in lines).split() == " ".join(told).split()


def test_only_known_recipes(shearling: Shearling) -> None:
    done = shearling("regress", "--only", "regress-huge")
    assert done.returncode == 2
    assert "regress-tiny" in done.stderr


def test_a_folder_of_something_else_is_not_wiped(tmp_path: Path) -> None:
    precious = tmp_path / "regress-tiny"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    with pytest.raises(ShearlingError, match="is not a run"):
        regress.run_fresh("regress-tiny", precious, cache=tmp_path, console=Console())
    assert (precious / "thesis.txt").is_file()


def test_a_run_at_work_is_not_wiped(tmp_path: Path) -> None:
    run = tmp_path / "regress-tiny"
    run.mkdir()
    with run_lock(run), pytest.raises(ShearlingError, match="Another run is at work"):
        regress.run_fresh("regress-tiny", run, cache=tmp_path, console=Console())
    assert (run / "run.lock").is_file()


def break_a_weight(settings: Any, context: Context) -> dict[str, Any]:
    """The real stage, after which one matrix of the student is wrong."""
    from safetensors.torch import load_file, save_file

    summary = REAL_DISTILL(settings, context)
    path = context.out / "model" / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.1.mlp.down_proj.weight"] *= -2
    save_file(weights, path, metadata={"format": "pt"})
    return summary


REAL_DISTILL = distill.run


def test_a_broken_weight_is_caught(shearling: Shearling, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the shipped baselines: the code as it is passes, with one broken matrix it fails."""
    done = shearling("regress", "--only", "regress-tiny", "--out", "whole", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "numbers hold" in done.stderr
    (findings,) = json.loads(done.stdout)["recipes"].values()
    assert {finding["verdict"] for finding in findings} <= {"ok", "better"}

    monkeypatch.setattr(distill, "run", break_a_weight)
    done = shearling("regress", "--only", "regress-tiny", "--out", "broken")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "worse than allowed" in done.stdout
    worse = [line.split()[0] for line in done.stdout.splitlines() if line.split()[-1:] == ["worse"]]
    assert "distill/lambada_openai/perplexity" in worse
    assert not [name for name in worse if not name.startswith("distill/")]
