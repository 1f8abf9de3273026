"""Faults on whole runs: kills at random moments, and what disks, clocks, files and memory do.

Here a small share is tried; `make soak` tries hundreds (see docs/RELIABILITY.md).
"""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from faults import try_fault
from killing import Killer
from shearling_process import Shearling

from pipelines.machine import LESS_MEMORY, memory_errors
from pipelines.steps import STAGES, build_steps, decide_all
from pipelines.store import FileHashes, Store
from shearling import ShearlingError, without_secrets

linux = pytest.mark.skipif(sys.platform != "linux", reason="forks and namespaces of Linux")


@pytest.fixture(scope="module")
def killer(tmp_path_factory: pytest.TempPathFactory) -> Killer:
    return Killer(tmp_path_factory.mktemp("killed"), seed=random.randrange(10**6))


@linux
@pytest.mark.slow
def test_killed_runs_end_in_the_same_bits(killer: Killer) -> None:
    tally = killer.run(4)
    assert tally.kills.total() == 4
    assert not tally.wrong, "\n".join(tally.wrong)


@linux
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "amount"),
    [
        ("full disk", 200),
        ("full disk", 600),
        ("read-only disk", 0),
        ("runs at the same time", 2),
    ],
)
def test_a_fault_is_told_and_costs_nothing(killer: Killer, name: str, amount: int) -> None:
    end, wrong = try_fault(killer, name, amount)
    if end == "not possible here":
        pytest.skip("this system gives no mounts of one's own")
    assert not wrong, "\n".join(wrong)
    assert end == "told"


# --- flipped bits -------------------------------------------------------------------------------


def flip(path: Path, *, keep_time: bool) -> None:
    """Turn one bit over in the middle of a file."""
    stat, content = path.stat(), bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    if keep_time:
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def artefact_files(run: Path) -> list[Path]:
    store = run / "store"
    return [p for p in sorted(store.rglob("*")) if p.is_file() and p.name != "stage.json"]


def step_of(run: Path, file: Path) -> str:
    """The name of the step whose artefact a file of the store is part of."""
    record = json.loads(
        (run / "store" / file.relative_to(run / "store").parts[0] / "stage.json").read_text()
    )
    return f"{record['name']}/benchmark" if record["kind"] == "benchmark" else str(record["name"])


def test_a_flipped_bit_in_any_artefact_is_noticed(run: Path, recipe_data: dict[str, Any]) -> None:
    from pipelines.recipe import check_recipe

    steps = build_steps(check_recipe(recipe_data), FileHashes(run).fingerprint)
    store, noticed = Store(run / "store"), set()
    for file in artefact_files(run):
        whole, stat = file.read_bytes(), file.stat()
        flip(file, keep_time=True)
        decided = decide_all(steps, store, lambda _: None)
        (damaged,) = {step.stage for step, decision in decided if decision.runs}
        (reason,) = {decision.reason for _, decision in decided if decision.runs}
        assert file.name in reason
        assert damaged == step_of(run, file).partition("/")[0] or file.name == "scorecard.json"
        noticed.add(file.name)
        file.write_bytes(whole)
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert {"model.safetensors", "selection.json", "scorecard.json"} <= noticed


def test_weights_are_hashed_before_hours_are_spent_on_them(
    run: Path, recipe_data: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flipped bit in a large file with its old time is found because the file will be read."""
    import pipelines.steps
    import pipelines.store
    from pipelines.recipe import check_recipe

    monkeypatch.setattr(pipelines.store, "SMALL_BYTES", 0)  # every file counts as large
    flip((run / "stages" / "prune" / "model" / "model.safetensors").resolve(), keep_time=True)
    fingerprint, store = FileHashes(run).fingerprint, Store(run / "store")
    same = build_steps(check_recipe(recipe_data), fingerprint)
    assert not any(d.runs for _, d in decide_all(same, store, lambda _: None, verify_inputs=True))
    stages = [dict(stage) for stage in recipe_data["stages"]]
    stages[1]["tokens"] = 2048
    longer = build_steps(check_recipe({**recipe_data, "stages": stages}), fingerprint)
    monkeypatch.setattr(pipelines.steps, "TELL_HASHING", 0)
    told: list[str] = []
    decided = decide_all(longer, store, lambda _: None, verify_inputs=True, tell=told.append)
    assert any(line.startswith("prune: reading its ") for line in told)
    assert {step.name for step, decision in decided if decision.runs} == {
        "prune",
        "distill",
        "distill/benchmark",
    }


def test_a_flipped_bit_is_mended_by_the_same_command(
    run: Path, recipe_file: Path, shearling: Shearling
) -> None:
    weights = (run / "stages" / "prune" / "model" / "model.safetensors").resolve()
    whole = weights.read_bytes()
    flip(weights, keep_time=False)
    done = shearling("run", recipe_file, "--out", run)
    assert done.returncode == 0, done.stderr
    assert "has other content than when it was made" in done.stdout
    assert weights.read_bytes() == whole


# --- lost files ---------------------------------------------------------------------------------


def recipe_with(recipe_data: dict[str, Any], path: Path, **teacher: str) -> Path:
    data = {**recipe_data, "teacher": {**recipe_data["teacher"], **teacher}}
    path.write_text(yaml.safe_dump(data))
    return path


def test_a_teacher_that_vanished(
    run: Path, recipe_data: dict[str, Any], tiny_llama: Path, shearling: Shearling, tmp_path: Path
) -> None:
    """Before a run, and in the middle of one; then it is back, at another place."""
    teacher = shutil.copytree(tiny_llama, tmp_path / "teacher")
    recipe = recipe_with(recipe_data, tmp_path / "moved.yaml", model=str(teacher))
    done = shearling("run", recipe, "--out", run)
    # The same files at another place: nothing depends on where they lie, but the link to them.
    assert "prune: not run again" in done.stdout, done.stdout + done.stderr
    shutil.rmtree(teacher)
    before = {path: path.read_bytes() for path in artefact_files(run)}
    done = shearling("run", recipe, "--out", run, "--set", "distill.tokens=2048")
    assert done.returncode == 2
    assert "does not exist" in done.stderr
    assert {path: path.read_bytes() for path in artefact_files(run)} == before


def test_a_teacher_that_vanishes_in_the_middle(
    run: Path,
    recipe_data: dict[str, Any],
    tiny_llama: Path,
    shearling: Shearling,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    teacher = shutil.copytree(tiny_llama, tmp_path / "teacher")
    recipe = recipe_with(recipe_data, tmp_path / "moved.yaml", model=str(teacher))
    prune = STAGES["prune"].run

    def rob(settings: Any, context: Any) -> Any:
        shutil.rmtree(teacher, ignore_errors=True)
        return prune(settings, context)

    monkeypatch.setattr(STAGES["prune"], "run", rob)
    changed = ("--set", "prune.calibration_tokens=1024")
    done = shearling("run", recipe, "--out", tmp_path / "new", *changed)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_llama, teacher)
    done = shearling("run", recipe, "--out", tmp_path / "new", *changed)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "transfer_set: not run again" in done.stdout


def test_a_removed_shard_of_the_teachers_answers(
    run: Path,
    recipe_file: Path,
    shearling: Shearling,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SHEARLING_CACHE", str(tmp_path / "cache"))
    kept = ("--set", "distill.targets=sample")
    assert shearling("run", recipe_file, "--out", run, *kept).returncode == 0
    weights = (run / "stages" / "distill" / "model" / "model.safetensors").read_bytes()
    (shard,) = (tmp_path / "cache").rglob("shard-*.bin")
    shard.unlink()
    other = (*kept, "--set", "distill.learning_rate=2.0e-3")
    done = shearling("run", recipe_file, "--out", run, *other)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "checksum" in done.stderr
    assert "Start the same command again" in done.stderr
    assert shearling("run", recipe_file, "--out", run, *other).returncode == 0
    done = shearling("run", recipe_file, "--out", run, *kept)
    assert "distill: not run again: done before" in done.stdout
    assert (run / "stages" / "distill" / "model" / "model.safetensors").read_bytes() == weights


# --- clocks, memory -----------------------------------------------------------------------------


def test_a_clock_that_jumps_changes_nothing(
    run: Path, recipe_file: Path, shearling: Shearling, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = (run / "stages" / "distill" / "model" / "model.safetensors").resolve()
    whole = weights.read_bytes()
    for years in (-30, 30):
        for path in run.rglob("*"):
            if path.is_file() and not path.is_symlink():
                os.utime(path, (time.time() + years * 3e7,) * 2)
        done = shearling("run", recipe_file, "--out", run)
        assert done.returncode == 0, done.stderr
        assert "runs: " not in done.stdout
    shutil.rmtree(weights.parent.parent)
    steady, jumps = time.time(), random.Random(0)
    monkeypatch.setattr(time, "time", lambda: steady + jumps.uniform(-1e8, 1e8))
    done = shearling("run", recipe_file, "--out", run)
    assert done.returncode == 0, done.stdout + done.stderr
    assert weights.read_bytes() == whole
    record = json.loads((run / "stages" / "distill" / "stage.json").read_text())
    assert 0 <= record["seconds"] < 600


def no_memory() -> None:
    torch.empty(2**55)


def no_memory_python() -> None:
    raise MemoryError


def no_memory_system() -> None:
    raise OSError(errno.ENOMEM, "Cannot allocate memory")


def no_memory_for_a_thread() -> None:
    raise RuntimeError("can't start new thread")


def no_memory_for_a_library() -> None:
    raise ImportError("_mio5_utils.so: failed to map segment from shared object")


def no_memory_to_read_a_file() -> None:
    try:
        no_memory()
    except RuntimeError as error:
        raise ShearlingError("The file can't be read.", hint="Copy it again.") from error


LACKS = [
    no_memory, no_memory_python, no_memory_system, no_memory_for_a_thread,
    no_memory_for_a_library, no_memory_to_read_a_file,
]  # fmt: skip


@pytest.mark.parametrize("kind", STAGES)
@pytest.mark.parametrize("lack", LACKS)
def test_running_out_of_memory_says_what_to_lower(kind: str, lack: Any) -> None:
    with (
        pytest.raises(ShearlingError, match="Out of memory in stage mine") as caught,
        memory_errors("mine", kind),
    ):
        lack()
    assert "the same command goes on" in caught.value.hint
    assert kind in LESS_MEMORY


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    with pytest.raises(RuntimeError, match="shape"), memory_errors("mine", "distill"):
        raise RuntimeError("a shape does not fit")
    with pytest.raises(ShearlingError, match="damaged"), memory_errors("mine", "distill"):
        raise ShearlingError("It is damaged.", hint="Copy it again.") from ValueError("x")


# --- mistakes inside a stage --------------------------------------------------------------------


def test_a_stage_that_failed_shows_nothing_of_earlier_settings(
    run: Path, recipe_file: Path, shearling: Shearling
) -> None:
    """What it learnt before is another model's, and what is resumed is what failed."""
    bad = ("--set", "distill.embedding_learning_rate=1.0e9")
    done = shearling("run", recipe_file, "--out", run, *bad, "--set", "distill.tokens=8192")
    assert done.returncode == 2, done.stdout
    assert "No checkpoint had been written yet" not in done.stderr  # it saves at each step
    status = json.loads(shearling("status", run, "--json").stdout)
    assert status["state"] == "failed"
    assert "embedding_learning_rate=1.0e9" in status["command"]
    page = json.loads((run / "report.json").read_text())
    assert [stage["scorecard"] is not None for stage in page["stages"]] == [True, True, False]
    assert "distill: what was made with earlier settings is not shown." in page["problems"]
    assert "embedding_learning_rate: 1000000000.0" in (run / "recipe.yaml").read_text()
    again = shearling("resume", run)
    assert again.returncode == 2
    assert "distill: runs: goes on where it was interrupted" in again.stdout
    # The command of before brings its results back.
    done = shearling("run", recipe_file, "--out", run)
    assert done.returncode == 0, done.stderr
    assert "distill: not run again" in done.stdout
    page = json.loads((run / "report.json").read_text())
    assert [stage["scorecard"] is not None for stage in page["stages"]] == [True, True, True]


def test_a_text_without_words_is_told_and_stays_the_runs(
    run: Path, recipe_file: Path, shearling: Shearling, tmp_path: Path
) -> None:
    blank = tmp_path / "blank.txt"
    blank.write_text("\n\n  \n")
    bad = f"transfer_set.sources.0.path={blank}"
    done = shearling("run", recipe_file, "--out", run, "--set", bad)
    assert done.returncode == 2
    status = json.loads(shearling("status", run, "--json").stdout)
    assert status["state"] == "failed"
    assert "blank.txt" in status["error"]["what"]
    assert str(blank) in (run / "recipe.yaml").read_text()
    page = json.loads((run / "report.json").read_text())
    assert [stage["scorecard"] is not None for stage in page["stages"]] == [True, False, False]


def test_a_stage_that_failed_before_its_first_checkpoint_begins_again(
    run: Path, recipe_file: Path, shearling: Shearling
) -> None:
    bad = ["distill.embedding_learning_rate=1.0e9", "distill.tokens=8192"]
    bad += ["distill.save_every_seconds=1000"]
    options = [part for setting in bad for part in ("--set", setting)]
    done = shearling("run", recipe_file, "--out", run, *options)
    assert "No checkpoint had been written yet" in done.stderr, done.stdout + done.stderr
    again = shearling("run", recipe_file, "--out", run, *options)
    assert "distill: runs: it was not finished" in again.stdout
    assert "goes on" not in again.stdout


# --- secrets ------------------------------------------------------------------------------------

TOKEN = "hf_" + "aBcDeFgHiJkLmNoPqRsTaBcDeFgHiJkLmN"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (f"token {TOKEN}.", "token hf_***."),
        (f"https://hub/x?token={TOKEN}", "https://hub/x?token=hf_***"),
        ("https://hub/x?api_key=12345678", "https://hub/x?api_key=***"),
        (f"Authorization: Bearer {TOKEN[3:]}", "Authorization: Bearer ***"),
        ("https://me:word@hub/x", "https://***@hub/x"),
        ("model: /data/hf_checkpoints/final", None),
        (f"model: /cache/{TOKEN}/final", None),
        ("path: hf_texts2024/a.jsonl, /texts/bearer_of_news/wool.txt", None),
        ("prompts: [The bearer understands]", None),
    ],
)
def test_secrets_are_cut_out_and_nothing_else(text: str, told: str | None) -> None:
    """What else looks like one must stay: `resume` reads the recipe that was written so."""
    assert without_secrets(text) == (told or text)


def test_secrets_reach_no_file_of_a_run(
    run: Path, recipe_file: Path, shearling: Shearling, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token in an error, an option and the environment: in no log, lock, report or message."""
    monkeypatch.setenv("HF_TOKEN", "a token of another form")

    def fail(settings: Any, context: Any) -> Any:
        raise RuntimeError(f"https://me:secret-word@hub/x: {TOKEN}; a token of another form")

    monkeypatch.setattr(STAGES["distill"], "run", fail)
    secrets = (TOKEN, "secret-word", "a token of another form")
    refused = shearling("run", recipe_file, "--out", run, "--set", f"teacher.revision={TOKEN}")
    assert refused.returncode == 2, "a local teacher has no revisions"
    assert TOKEN not in refused.stdout + refused.stderr
    options = ("--set", f"description={TOKEN}", "--set", "distill.tokens=2048")
    done = shearling("run", recipe_file, "--out", run, *options)
    assert done.returncode == 1
    assert "hf_***" in done.stderr
    assert not any(secret in done.stdout + done.stderr for secret in secrets)
    texts = {
        path: path.read_text(encoding="utf-8")
        for path in run.rglob("*")
        if path.is_file() and path.suffix in (".json", ".yaml", ".log", ".html", ".md", ".jsonl")
    }
    assert run / "error.log" in texts
    told = [
        str(path.relative_to(run))
        for path, text in texts.items()
        if any(secret in text for secret in secrets)
    ]
    assert told == []
