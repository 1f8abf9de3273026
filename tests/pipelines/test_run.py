"""The whole pipeline on a tiny Llama, run as a user runs it: by the command, in a process."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from shearling_process import Shearling, command, environment

from pipelines.machine import PeakMemory

Status = dict[str, Any]


def digest(folder: Path) -> dict[str, bytes]:
    """The content of every file below a folder, links followed."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def decisions(output: str) -> dict[str, str]:
    """Decision by step, out of what a run printed."""
    lines = [line.partition(": ") for line in output.splitlines() if not line.startswith(" ")]
    return {name: text for name, _, text in lines if text.startswith(("runs: ", "not run again: "))}


def test_a_cuda_device_has_a_peak_of_its_own() -> None:
    """Here none of it is used; on a CPU there is no such number."""
    with PeakMemory("cuda") as device, PeakMemory("cpu") as alone:
        pass
    assert device.device_bytes == torch.cuda.max_memory_allocated()
    assert alone.device_bytes is None
    assert min(device.bytes, alone.bytes) > 1e7


# --- a finished run -----------------------------------------------------------------------------


def test_a_run_holds_what_the_formats_say(finished: tuple[Path, str]) -> None:
    run, output = finished
    for name in ("recipe.yaml", "lock.json", "metrics.jsonl", "report.html", "run.json"):
        assert (run / name).is_file(), name
    for stage in ("teacher", "prune", "distill"):
        record = json.loads((run / "stages" / stage / "stage.json").read_text())
        assert record["schema"] == 1
        assert record["state"] == "done"
        assert record["name"] == record["kind"] == stage
        assert record["seconds"] >= 0
        assert record["peak_memory_bytes"] > 1e7
        assert "device_peak_bytes" not in record, "it ran on a CPU"
        scorecard = json.loads((run / "stages" / stage / "scorecard.json").read_text())
        assert scorecard["schema"] == 1
        assert scorecard["model"] == stage
        assert (run / "stages" / stage / "model" / "config.json").is_file()
    assert (run / "stages" / "prune" / "selection.json").is_file()
    assert (run / "stages" / "transfer_set" / "transfer_set.json").is_file()
    assert decisions(output) == dict.fromkeys(
        [
            "teacher",
            "transfer_set",
            "teacher/benchmark",
            "prune",
            "prune/benchmark",
            "distill",
            "distill/benchmark",
        ],
        "runs: first time",
    )
    assert "\x1b[" not in output


def test_the_student_is_a_stock_model(finished: tuple[Path, str]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = finished[0] / "stages" / "distill" / "model"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert (model.config.hidden_size, model.config.num_hidden_layers) == (24, 3)
    ids = AutoTokenizer.from_pretrained(folder)("The lamb sees", return_tensors="pt").input_ids
    assert torch.isfinite(model(ids).logits).all()


def test_a_budget_is_searched_taught_and_reported(
    recipe_data: dict[str, Any], tmp_path: Path, shearling: Shearling
) -> None:
    data = copy.deepcopy(recipe_data)
    data["stages"][0]["shape"] = {"params": 0.6, "candidates": 2, "tokens": 128}
    (tmp_path / "searched.yaml").write_text(yaml.safe_dump(data), encoding="utf-8")
    done = shearling("run", "searched.yaml", "--out", "searched")
    assert done.returncode == 0, done.stderr
    stages = tmp_path / "searched" / "stages"
    found = json.loads((stages / "prune" / "stage.json").read_text())["summary"]
    assert [score["kl"] for score in found["search"]] == sorted(s["kl"] for s in found["search"])
    assert len(found["search"]) == 2
    assert found["shape"] == found["search"][0]["shape"]
    assert 0.97 * 0.6 <= found["parameters"] / found["teacher_parameters"] <= 0.6
    taught = json.loads((stages / "distill" / "model" / "config.json").read_text())
    assert taught["intermediate_size"] == found["shape"]["intermediate_size"]
    assert "table-search" in (tmp_path / "searched" / "report.html").read_text()
    planned = json.loads((tmp_path / "searched" / "plan.json").read_text())["stages"]
    assert {row["name"] for row in planned} >= {"prune", "distill"}
    again = shearling("run", "searched.yaml", "--out", "searched")
    assert set(decisions(again.stdout).values()) == {"not run again: nothing changed"}


def test_a_recipe_without_text_runs_on_what_the_teacher_writes(
    recipe_data: dict[str, Any], tmp_path: Path, shearling: Shearling
) -> None:
    data = copy.deepcopy(recipe_data)
    del data["transfer_set"]
    data["stages"].append({"name": "small", "kind": "export", "to": "hf"})
    (tmp_path / "free.yaml").write_text(yaml.safe_dump(data), encoding="utf-8")
    short = ("--set", "transfer_set.written={tokens: 4000, length: 64}")
    short += ("--set", "transfer_set.window=32", "--set", "transfer_set.heldout_windows=4")
    done = shearling("run", "free.yaml", "--out", "free", *short)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "free"
    facts = json.loads((run / "stages" / "transfer_set" / "transfer_set.json").read_text())
    assert [source["name"] for source in facts["sources"]] == ["written by the teacher"]
    assert "The teacher wrote this itself" in (run / "report.html").read_text()
    card = (run / "stages" / "small" / "export" / "README.md").read_text()
    assert "No text of others was used" in card
    planned = json.loads((run / "plan.json").read_text())
    assert any("the teacher writes 4,000 tokens" in told for told in planned["assumptions"])
    again = shearling("run", "free.yaml", "--out", "free", *short)
    assert set(decisions(again.stdout).values()) == {"not run again: nothing changed"}


def test_metrics_name_their_stage(finished: tuple[Path, str]) -> None:
    lines = [json.loads(x) for x in (finished[0] / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == [1, 2, 3, 4]
    assert {line["stage"] for line in lines} == {"distill"}


def test_the_lock_file_tells_with_what_it_was_made(finished: tuple[Path, str]) -> None:
    lock = json.loads((finished[0] / "lock.json").read_text())
    assert lock["packages"]["torch"].startswith("2.")
    assert len(lock["recipe_sha256"]) == 64
    assert lock["hardware"]["memory_bytes"] > 1e8
    assert "files of teacher.model" in lock["inputs"]
    assert lock["command"] == "shearling run tiny.yaml"


def test_nothing_is_run_again(run: Path, recipe_file: Path, shearling: Shearling) -> None:
    before = digest(run / "store")
    done = shearling("run", recipe_file, "--out", run)
    assert done.returncode == 0, done.stderr
    assert set(decisions(done.stdout).values()) == {"not run again: nothing changed"}
    assert digest(run / "store") == before


def test_only_what_changed_is_run_again(run: Path, recipe_file: Path, shearling: Shearling) -> None:
    model = digest(run / "stages" / "distill" / "model")
    done = shearling("run", recipe_file, "--out", run, "--set", "benchmark.limit=2")
    assert done.returncode == 0, done.stderr
    found = decisions(done.stdout)
    assert found["distill"] == "not run again: nothing changed"
    assert found["distill/benchmark"] == "runs: recipe.benchmark.limit null -> 2"
    assert digest(run / "stages" / "distill" / "model") == model
    scorecard = json.loads((run / "stages" / "distill" / "scorecard.json").read_text())
    assert scorecard["tasks"]["copa"]["samples"] == 2


def test_a_dry_run_says_what_it_would_do_and_does_nothing(
    run: Path, recipe_file: Path, shearling: Shearling
) -> None:
    before = digest(run)
    done = shearling("run", recipe_file, "--out", run, "--set", "distill.tokens=2048", "--dry-run")
    assert done.returncode == 0, done.stderr
    found = decisions(done.stdout)
    assert found["distill"] == "runs: recipe.distill.tokens 1024 -> 2048"
    assert found["distill/benchmark"] == "runs: its input distill changed"
    assert digest(run) == before


def test_a_truncated_artefact_is_noticed_and_made_again(
    run: Path, recipe_file: Path, shearling: Shearling
) -> None:
    weights = (run / "stages" / "prune" / "model" / "model.safetensors").resolve()
    whole = weights.read_bytes()
    weights.write_bytes(whole[:20])
    done = shearling("run", recipe_file, "--out", run)
    assert done.returncode == 0, done.stderr
    reason = decisions(done.stdout)["prune"]
    assert reason == (
        f"runs: artefact damaged: model/model.safetensors has 20 of {len(whole):,} bytes"
    )
    assert weights.read_bytes() == whole


def test_status_and_report_of_a_finished_run(run: Path, shearling: Shearling) -> None:
    status = json.loads(shearling("status", run, "--json").stdout)
    assert (status["schema"], status["recipe"], status["state"]) == (1, "tiny", "done")
    assert [row["name"] for row in status["stages"]] == ["teacher", "prune", "distill"]
    for row in status["stages"]:
        assert set(row) >= {
            "name",
            "kind",
            "state",
            "reason",
            "seconds",
            "peak_memory_bytes",
            "scorecard",
        }
        assert row["state"] == "done"
        assert row["scorecard"]["results"]["copa"]["acc"]["value"] is not None
    shown = shearling("status", run)
    assert shown.returncode == 0
    assert "distill" in shown.stdout
    (run / "report.html").unlink()
    assert shearling("report", run).returncode == 0
    assert (run / "report.html").is_file()


def test_a_mistyped_mirror_is_told_where_the_user_looks(
    run: Path, recipe_file: Path, shearling: Shearling
) -> None:
    done = shearling("run", recipe_file, "--out", run, "--set", "benchmark.mirror=./taks")
    assert done.returncode == 0, done.stderr
    assert "benchmark.mirror: ./taks does not exist" in done.stdout
    # Three models skip it for the same reason, which is one line.
    assert done.stdout.count("skipped copa: no file of it in benchmark.mirror (./taks)") == 1


def test_too_little_text_is_told_where_the_user_looks(
    run: Path, recipe_file: Path, shearling: Shearling
) -> None:
    asked = "transfer_set.sources.grammar.tokens=100_000_000"
    done = shearling("run", recipe_file, "--out", run, "--set", asked)
    assert done.returncode == 0, done.stderr
    note = "grammar: 100,000,000 tokens were asked for, all of the text makes"
    assert f"  {note}" in done.stdout
    assert note in (run / "report.md").read_text()


def test_stages_that_left_the_recipe_are_not_shown(
    run: Path, recipe_data: dict[str, Any], tmp_path: Path, shearling: Shearling
) -> None:
    data = copy.deepcopy(recipe_data)
    del data["stages"][1]
    (tmp_path / "short.yaml").write_text(yaml.safe_dump(data))
    assert shearling("run", "short.yaml", "--out", run).returncode == 0
    assert sorted(p.name for p in (run / "stages").iterdir()) == [
        "prune",
        "teacher",
        "transfer_set",
    ]
    # The store still has it, so taking the stage back costs nothing.
    (tmp_path / "long.yaml").write_text(yaml.safe_dump(recipe_data))
    done = shearling("run", "long.yaml", "--out", run)
    assert decisions(done.stdout)["distill"] == "not run again: nothing changed"


# --- interruptions ------------------------------------------------------------------------------


def start(recipe: Path, run: Path, *extra: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command("run", recipe, "--out", run, *extra),
        cwd=recipe.parent,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(run: Path, condition: Callable[[Status], bool], seconds: float = 600) -> Status:
    """Poll the status of a run, as a program beside it would, until it is as wanted."""
    from pipelines.journal import read_status

    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if (run / "run.json").is_file():
            status = read_status(run)
            if condition(status):
                return status
        time.sleep(0.1)
    raise AssertionError("the run never came to where the test wants it")


def distilling(status: Status) -> bool:
    current = status["current"] or {}
    return current.get("step") == "distill" and current.get("done", 0) >= 2


LONG = ("--set", "distill.tokens=400000", "--set", "distill.batch_tokens=64")
SHORT = ("--set", "distill.tokens=16384", "--set", "distill.batch_tokens=64")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_runs_end_cleanly_and_go_on(
    recipe_file: Path, tmp_path: Path, number: signal.Signals, shearling: Shearling
) -> None:
    run = tmp_path / "run"
    process = start(recipe_file, run, *LONG)
    status = wait_for(run, distilling)
    assert status["state"] == "running"
    assert [row["state"] for row in status["stages"]] == ["done", "done", "running"]
    assert status["stages"][1]["scorecard"]["model"] == "prune"
    process.send_signal(number)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 130, output
    assert "Go on with: shearling run" in output
    after = json.loads(shearling("status", run, "--json").stdout)
    assert after["state"] == "interrupted"
    assert after["stages"][2]["state"] == "interrupted"

    process = start(recipe_file, run, *LONG)
    wait_for(run, distilling)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=300)
    found = decisions(output)
    assert found["prune"] == found["teacher/benchmark"] == "not run again: nothing changed"
    assert found["distill"] == "runs: goes on where it was interrupted"


def test_a_killed_run_repeats_no_finished_stage(
    recipe_file: Path, tmp_path: Path, shearling: Shearling
) -> None:
    run = tmp_path / "run"
    process = start(recipe_file, run, *SHORT)
    wait_for(run, distilling)
    process.kill()
    process.communicate()
    before = digest(run / "store")
    status = json.loads(shearling("status", run, "--json").stdout)
    assert status["state"] == status["stages"][2]["state"] == "interrupted"

    done = shearling("run", recipe_file, "--out", run, *SHORT)
    assert done.returncode == 0, done.stdout + done.stderr
    found = decisions(done.stdout)
    assert {found[n] for n in ("teacher", "transfer_set", "prune", "prune/benchmark")} == {
        "not run again: nothing changed"
    }
    assert found["distill"] == "runs: goes on where it was interrupted"
    after = digest(run / "store")
    finished = [name for name in before if not name.startswith(".")]
    assert {name: after[name] for name in finished} == {name: before[name] for name in finished}
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if "loss" in line] == list(range(1, 257))

    # One thread: the student is the same to the last bit as that of an undisturbed run.
    undisturbed = tmp_path / "undisturbed"
    assert shearling("run", recipe_file, "--out", undisturbed, *SHORT).returncode == 0
    weights = Path("stages/distill/model/model.safetensors")
    assert (run / weights).read_bytes() == (undisturbed / weights).read_bytes()


def test_two_runs_on_one_folder(recipe_file: Path, tmp_path: Path, shearling: Shearling) -> None:
    run = tmp_path / "run"
    process = start(recipe_file, run, *LONG)
    try:
        wait_for(run, distilling)
        second = shearling("run", recipe_file, "--out", run)
        assert second.returncode == 2
        assert f"process {process.pid}" in second.stderr
    finally:
        process.kill()
        process.communicate()


# --- bad input ----------------------------------------------------------------------------------


def unchanged_after(
    run: Path, shearling: Shearling, *arguments: str | Path
) -> subprocess.CompletedProcess[str]:
    """Run a command that must fail with 2, and leave the results of the run as they were."""
    before = digest(run / "stages"), digest(run / "store"), (run / "run.json").read_bytes()
    done = shearling(*arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("Error: ")
    assert len(done.stderr.strip().splitlines()) >= 2, "an error has a remedy"
    after = digest(run / "stages"), digest(run / "store"), (run / "run.json").read_bytes()
    assert after == before
    return done


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("distill.tokns=5", "did you mean 'tokens'?"),
        ("prune.shape.hidden_size=64", "hidden_size 64 is larger than the teacher's 32"),
        ("prune.shape.num_attention_heads=3", "not a multiple of num_key_value_heads"),
        ("prune.shape=like-3c", "did you mean 'like-3b'?"),
        ("teacher.model=/nowhere/model", "/nowhere/model does not exist"),
        ("teacher.model=nowhere", "nowhere does not exist"),
        ("device=cuda:77", "no device cuda:77"),
        ("benchmark.limits.lambada_openai=0", "greater than 0"),
        ("transfer_set.sources.0.path=./nothing.txt", "./nothing.txt does not exist"),
        ("benchmark.tasks=[copaa]", "copaa"),
        ("teacher.revision=main", "teacher.revision: main is of a hub id"),
        ("benchmark.mirror=tiny.yaml", "tiny.yaml is a file, not a folder"),
        ("transfer_set.window=4096", "transfer_set.window is 4096, and the teacher was made for 5"),
        ("transfer_set.written.length=9000", "written.length is 9000, and the teacher was made"),
        ("teacher.model=./tiny.yaml", "teacher.model: ./tiny.yaml is a single file, but no .gguf"),
    ],
)
def test_mistakes_end_a_run_before_it_touches_anything(
    run: Path, recipe_file: Path, shearling: Shearling, override: str, message: str
) -> None:
    asked = ("run", recipe_file, "--out", run, "--set", override)
    for done in (
        unchanged_after(run, shearling, *asked),
        unchanged_after(run, shearling, *asked, "--dry-run"),
    ):
        assert message in done.stderr


def test_a_second_teacher_of_unknown_shape_needs_no_plan(
    run: Path, recipe_file: Path, shearling: Shearling
) -> None:
    """What can't be planned is no mistake: the run gets as far as that teacher, and says why."""
    recipe = yaml.safe_load(recipe_file.read_text(encoding="utf-8"))
    recipe["stages"].insert(0, {"name": "big", "kind": "teacher", "model": "nobody/their-finetune"})
    recipe_file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    done = shearling("run", recipe_file, "--out", run)
    assert done.returncode == 2
    assert "nobody/their-finetune" in done.stderr
    assert "shape" not in done.stderr
    status = json.loads(shearling("status", run, "--json").stdout)
    assert status["state"] == "failed"
    assert not (run / "plan.json").exists()


def test_all_mistakes_of_a_recipe_at_once(
    run: Path, recipe_file: Path, shearling: Shearling
) -> None:
    overrides = ["distill.tokens=few", "seed=-1", "wrong.key=1"]
    arguments = [part for override in overrides for part in ("--set", override)]
    done = unchanged_after(run, shearling, "run", recipe_file, "--out", run, *arguments)
    assert "has 3 mistakes" in done.stderr


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "safetensors"),
        (
            lambda folder: (folder / "model.safetensors").write_bytes(
                (folder / "model.safetensors").read_bytes()[:-100]
            ),
            "model.safetensors",
        ),
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer"),
    ],
    ids=["no weights", "cut off", "no config", "broken config", "no tokenizer"],
)
def test_a_broken_teacher(
    run: Path,
    recipe_file: Path,
    shearling: Shearling,
    tiny_llama: Path,
    tmp_path: Path,
    damage: Callable[[Path], Any],
    message: str,
) -> None:
    teacher = shutil.copytree(tiny_llama, tmp_path / "teacher")
    damage(teacher)
    override = f"teacher.model={teacher}"
    done = unchanged_after(run, shearling, "run", recipe_file, "--out", run, "--set", override)
    assert message in done.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b"caf\xe9 \xff\xfe" * 50, "UTF-8"), (b"\n\n  \n", "corpus.txt")],
    ids=["empty", "not UTF-8", "blank"],
)
def test_a_corpus_that_is_no_text(
    run: Path,
    recipe_file: Path,
    shearling: Shearling,
    tmp_path: Path,
    content: bytes,
    message: str,
) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_bytes(content)
    stages = digest(run / "stages")
    override = f"transfer_set.sources.0.path={corpus}"
    done = shearling("run", recipe_file, "--out", run, "--set", override)
    assert done.returncode == 2, done.stdout + done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert digest(run / "stages") == stages


def test_a_folder_of_something_else_is_not_written_into(
    recipe_file: Path, tmp_path: Path, shearling: Shearling
) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    done = shearling("run", recipe_file, "--out", precious)
    assert done.returncode == 2
    assert "--out" in done.stderr
    assert [path.name for path in precious.iterdir()] == ["thesis.txt"]


def test_a_full_disk_is_said_so_and_keeps_what_was_done(
    run: Path, recipe_file: Path, tmp_path: Path
) -> None:
    """A limit on the size of files stands in for a full disk: both end in a failed write."""
    before = digest(run / "stages" / "prune" / "model")
    program = (
        "import errno, sys\n"
        "from pipelines.stages import distill\n"
        "from pipelines import cli\n"
        "def full(settings, context):\n"
        "    (context.out / 'half').write_text('x')\n"
        "    raise OSError(errno.ENOSPC, 'No space left on device')\n"
        "distill.run = full\n"
        "cli.main()\n"
    )
    done = subprocess.run(
        [
            *command()[:1],
            "-c",
            program,
            "run",
            str(recipe_file),
            *("--out", str(run), "--set", "distill.tokens=2048"),
        ],
        env=environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert "The disk is full" in done.stderr
    assert digest(run / "stages" / "prune" / "model") == before


def test_an_unexpected_error_leaves_its_traceback_in_the_run(
    run: Path, recipe_file: Path, tmp_path: Path
) -> None:
    program = (
        "from pipelines.stages import distill\n"
        "from pipelines import cli\n"
        "distill.run = lambda settings, context: 1 // 0\n"
        "cli.main()\n"
    )
    done = subprocess.run(
        [
            *command()[:1],
            "-c",
            program,
            "run",
            str(recipe_file),
            *("--out", str(run), "--set", "distill.tokens=2048"),
        ],
        env=environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert str(run / "error.log") in done.stderr
    assert "ZeroDivisionError" in (run / "error.log").read_text()
    assert json.loads((run / "run.json").read_text())["state"] == "failed"


def test_a_run_folder_that_may_not_be_written(
    recipe_file: Path, tmp_path: Path, shearling: Shearling
) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    done = shearling("run", recipe_file, "--out", locked / "run")
    assert done.returncode == 2
    assert "Not allowed to use" in done.stderr
