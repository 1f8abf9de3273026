"""One command, two processes: the same files, exit codes and messages as with one."""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from shearling_process import Shearling, command, environment
from torch.distributed.run import config_from_args, parse_args

from pipelines import crew

pytestmark = pytest.mark.slow


def start(recipe: Path, run: Path, *more: str) -> subprocess.Popen[str]:
    line = command("run", recipe, "--out", run, "--processes", "2", *more)
    return subprocess.Popen(
        line, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def distillation(run: Path) -> dict[str, float]:
    """The summary of a finished run's stage."""
    record = json.loads((run / "stages" / "distill" / "stage.json").read_text())
    return dict(record["summary"])


def test_it_distils_together_and_does_the_rest_once(
    recipe_file: Path, run: Path, shearling: Shearling, tmp_path: Path
) -> None:
    more = ("--set", "distill.tokens=1536")
    process = start(recipe_file, run, *more)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    assert output.count("prune: not run again: nothing changed") == 1
    assert output.count("distill: runs:") == 1
    assert not (run / "error.log").exists()
    assert distillation(run)["processes"] == 2
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2, 3, 4, 5, 6, 6]

    alone = tmp_path / "alone"
    assert shearling("run", recipe_file, "--out", alone, *more).returncode == 0
    both, one = (
        load_file(folder / "stages" / "distill" / "model" / "model.safetensors")
        for folder in (run, alone)
    )
    assert both.keys() == one.keys()
    assert max((both[name] - one[name]).abs().max().item() for name in one) < 1e-3
    keys = [
        json.loads((folder / "stages" / "distill" / "stage.json").read_text())["key"]
        for folder in (run, alone)
    ]
    assert keys[0] == keys[1], "a run may go on with another number of processes"


def test_ctrl_c_reaches_all_and_one_process_goes_on(
    recipe_file: Path, run: Path, shearling: Shearling
) -> None:
    more = ("--set", "distill.tokens=16384", "--set", "distill.batch_tokens=64")
    process = start(recipe_file, run, *more)
    end = time.monotonic() + 300
    partial = run / "store"
    while time.monotonic() < end and process.poll() is None:
        if any(partial.glob("*partial*/resume/step-*/state.json")):
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 130, output
    assert output.count("Interrupted.") == 1
    assert "--processes 2" in output
    status = json.loads(shearling("status", run, "--json").stdout)
    assert status["state"] == "interrupted"
    parts = list(run.glob("store/*partial*/resume/step-*/student/*.safetensors"))
    assert len(parts) == 2
    done = shearling("run", recipe_file, "--out", run, *more)
    assert done.returncode == 0, done.stderr
    assert "goes on where it was interrupted" in done.stdout


def test_a_mistake_of_one_process_is_told_and_ends_all() -> None:
    script = Path(__file__).with_name("crew_process.py")
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(crew._free_port()), "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script)],
            env={**environment(), **where, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=100)[1] for process in processes]
    assert processes[1].returncode == 1
    assert "Process 1: The shard is damaged." in outputs[1]
    assert "Delete it." in outputs[1]
    assert processes[0].returncode not in (0, None), "it doesn't wait for one who has gone"


def test_a_mistake_is_told_once_and_exits_with_2(recipe_file: Path, run: Path) -> None:
    process = start(recipe_file, run, "--set", "distill.batch_tokens=32")
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 2, output
    assert output.count("fewer than the 2 processes") == 1
    assert "batch_tokens to 64" in output
    assert "Traceback" not in output


def test_slurms_grace_is_torchruns_too() -> None:
    """What Slurm leaves between the signal and the end is nearly all for the step and its save."""
    script = (Path(__file__).parents[2] / "docs" / "shearling.slurm").read_text()
    (grace,) = re.findall(r"--signal=TERM@(\d+)", script)
    _, _, started = script.replace("\\\n", " ").partition("srun torchrun ")
    filled = re.sub(r"\$(SLURM_NNODES|SLURM_GPUS_PER_NODE)", "2", started)
    config, _, _ = config_from_args(parse_args(shlex.split(filled)))
    assert 0.8 * int(grace) < config.shutdown_timeout < int(grace)
