"""A recipe that runs the whole pipeline on the tiny Llama in seconds, without any download."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from shearling_process import Shearling, command, environment

from pipelines.cli import main


@pytest.fixture(scope="session")
def tiny_mirror(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A benchmark mirror with one stock task, COPA, on a few sentences."""
    folder = tmp_path_factory.mktemp("mirror")
    rows = [
        {
            "premise": f"The lamb sees {what}.",
            "choice1": "It follows the shepherd.",
            "choice2": "The gate counts the rain.",
            "question": "effect",
            "idx": index,
            "label": 0,
        }
        for index, what in enumerate(("the hill", "a river", "the gate", "some wool"))
    ]
    text = "".join(f"{json.dumps(row)}\n" for row in rows)
    (folder / "copa.jsonl").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def recipe_data(tiny_llama: Path, tiny_text: Path, tiny_mirror: Path) -> dict[str, Any]:
    """A valid recipe as raw data. Copy it before changing it."""
    return {
        "name": "tiny",
        "seed": 0,
        "device": "cpu",
        "teacher": {"model": str(tiny_llama)},
        "transfer_set": {
            "window": 32,
            "heldout_windows": 4,
            "sources": [{"name": "grammar", "path": str(tiny_text)}],
        },
        "benchmark": {
            "tasks": ["copa"],
            "mirror": str(tiny_mirror),
            "prompts": ["The shepherd"],
            "completion_tokens": 4,
            "speed": False,
        },
        "stages": [
            {
                "name": "prune",
                "kind": "prune",
                "shape": {"hidden_size": 24, "num_hidden_layers": 3, "intermediate_size": 48},
                "calibration_tokens": 512,
                "precision": "float32",
            },
            {
                "name": "distill",
                "kind": "distill",
                "tokens": 1024,
                "batch_tokens": 256,
                "precision": "float32",
                "evaluate_every": 0,
                "save_every_seconds": 0,
            },
        ],
    }


@pytest.fixture
def recipe_file(recipe_data: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe_data, sort_keys=False), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def finished(
    recipe_data: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """A finished run of ``recipe_data`` and what it printed. Copy the folder before changing it."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe_data), encoding="utf-8")
    done = subprocess.run(
        command("run", "tiny.yaml"),
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "runs" / "tiny", done.stdout


@pytest.fixture
def run(finished: tuple[Path, str], tmp_path: Path) -> Path:
    """A copy of the finished run where the commands of the test find it."""
    copied = tmp_path / "runs" / "tiny"
    shutil.copytree(finished[0], copied, symlinks=True)
    return copied


@pytest.fixture
def shearling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Shearling:
    """Run `shearling ...` in the test's folder; in this process, which has torch loaded."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        line = ["shearling", *map(str, arguments)]
        monkeypatch.setattr("sys.argv", line)
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        output = capsys.readouterr()
        code = ended.value.code or 0
        assert isinstance(code, int)
        return subprocess.CompletedProcess(line, code, output.out, output.err)

    return run


@pytest.fixture
def bare_gguf(tmp_path: Path) -> Callable[..., Path]:
    """Writes a Llama's GGUF of this shape that has a header, an embedding and nothing else."""
    import gguf
    import numpy as np

    def write(hidden: int, layers: int, neurons: int, context: int | None = None) -> Path:
        path = tmp_path / "model.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_embedding_length(hidden)
        writer.add_block_count(layers)
        writer.add_head_count(4)
        writer.add_feed_forward_length(neurons)
        writer.add_layer_norm_rms_eps(1e-5)
        if context is not None:
            writer.add_context_length(context)
        writer.add_tensor("token_embd.weight", np.zeros((384, hidden), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write
