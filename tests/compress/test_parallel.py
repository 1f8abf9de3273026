"""Two processes that talk over gloo do what one process does, and go on where it stopped."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from padding import padded
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from compress import course
from compress.checkpointing import load_checkpoint, names_in
from compress.distill import distill
from compress.settings import DistillSettings
from pipelines.tiny import make_tiny_llama

ROOT = Path(__file__).resolve().parents[2]
BASE: dict[str, Any] = {
    "tokens": 32 * 7 * 5,
    "batch_tokens": 32 * 7,  # an odd number of windows, so one process has a blank one
    "micro_batch_windows": 2,
    "learning_rate": 1e-3,
    "position_clip": 1.0,  # so that it has much to do
    "optimizer": "adamw",
    "precision": "float32",
    "evaluate_every": 2,
    "save_every_seconds": 100,
}
AFTER = 3
"""The step after which an interrupted run stops."""
RUNS: dict[str, dict[str, Any]] = {
    "all": {
        "hidden": {"weight": 0.5},
        "cross_entropy": 0.5,
        "ema": 0.5,
        "gradient_checkpointing": True,
    },
    "untied": {"reverse_kl": 0.3},
    "muon": {"optimizer": "muon", "ema": 0.5},
    "wide": {"optimizer": "muon"},
    "sample": {"targets": "sample", "target_slots": 8},
    "narrow": {"precision": "bfloat16"},
    "mix": {"adaptive_mix": 1.0},
    "padded": {"cross_entropy": 0.5},
    "harmed": {"forward_kl": 0.0, "cross_entropy": 1.0},  # the student is the teacher
}
MODELS = {"padded": "padded", "harmed": "same"}
UNTIED = ("untied", "muon", "wide")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def start_processes(jobs: Path, count: int = 2) -> None:
    """What torchrun does, without its own output."""
    command = [sys.executable, str(Path(__file__).with_name("gloo_process.py")), str(jobs)]
    told = {"WORLD_SIZE": count, "MASTER_PORT": free_port(), "OMP_NUM_THREADS": 1}
    words = {name: str(value) for name, value in told.items()}
    words |= {"MASTER_ADDR": "127.0.0.1", "PYTHONPATH": str(ROOT)}
    started = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **words, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    heard = [process.communicate(timeout=600)[1] for process in started]
    assert not any(process.returncode for process in started), "\n\n".join(heard)


class Runs:
    """The same runs with one process, here, and with two."""

    def __init__(
        self, folder: Path, models: dict[str, tuple[Path, Path]], text: Path, sources: Path
    ) -> None:
        self.folder, self.models, self.text, self.sources = folder, models, text, sources
        selection = folder / "selection.json"
        selection.write_text(json.dumps({"layers": [0, 2], "hidden": list(range(3, 27))}))

    def job(self, kind: str, out: str) -> dict[str, Any]:
        models = MODELS.get(kind, "untied" if kind in UNTIED else "tied")
        teacher, student = self.models[models]
        named = {
            "teacher": teacher,
            "student": student,
            "out": self.folder / out,
            "transfer_set": self.sources if kind == "mix" else self.text,
            "selection": self.folder / "selection.json",
            "cache": self.folder / f"cache-{out}",
        }
        settings = {**BASE, **RUNS[kind]}
        job = {name: str(path) for name, path in named.items()}
        return {**job, "settings": settings, "wide": kind == "wide"}

    def here(
        self, kind: str, out: str, cache: str = "", tokens: int = BASE["tokens"], **more: Any
    ) -> None:
        job = self.job(kind, out)
        job["cache"] = cache or job["cache"]
        settings = DistillSettings(**{**job.pop("settings"), "tokens": tokens})
        wide = job.pop("wide")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(course, "wide_products", lambda *_: wide)
            distill(settings=settings, **{k: Path(v) for k, v in job.items()}, **more)


def stop(line: dict[str, Any]) -> None:
    if line["step"] == AFTER and "loss" in line:
        signal.raise_signal(signal.SIGTERM)


@pytest.fixture(scope="module")
def runs(
    tiny_llama: Path,
    tiny_llama_untied: Path,
    tiny_student: Path,
    tiny_transfer_set: Path,
    two_sources: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Runs:
    """Every run in one process as NAME-1, in two as NAME-2; and broken off as FIRST-SECOND.

    The cache of sample-1-2 was begun by one process that needed less, and filled up by two.
    """
    folder = tmp_path_factory.mktemp("runs")
    untied_student = make_tiny_llama(
        folder / "student",
        seed=6,
        num_hidden_layers=3,  # an odd number of matrices for Muon
        hidden_size=24,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=41,  # rows that two processes can't halve
        tie_word_embeddings=False,
    )
    models = {
        "tied": (tiny_llama, tiny_student),
        "same": (tiny_llama, tiny_llama),
        "untied": (tiny_llama_untied, untied_student),
        "padded": (
            padded(tiny_llama, folder / "wide teacher", 41),
            padded(tiny_student, folder / "wide student", 40),
        ),
    }
    found = Runs(folder, models, tiny_transfer_set, two_sources)
    jobs = []
    for kind in RUNS:
        found.here(kind, f"{kind}-1")
        jobs.append(found.job(kind, f"{kind}-2"))
    for kind in ("all", "muon"):
        with pytest.raises(KeyboardInterrupt):
            found.here(kind, f"{kind}-1-2", on_metrics=stop)
        jobs.append(found.job(kind, f"{kind}-1-2"))
        jobs.append({**found.job(kind, f"{kind}-2-1"), "stop_after": AFTER})
    begun = found.job("sample", "sample-1-2")
    found.here("sample", "begun", cache=begun["cache"], tokens=32 * 7 * 2)
    jobs.append(begun)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    start_processes(folder / "jobs.json")
    return found


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def alike(runs: Runs, one: str, other: str, tolerance: float = 1e-5) -> None:
    """The same lines but for the clocks, within rounding; and the same student."""
    mine, theirs = (lines(runs.folder / name) for name in (one, other))
    assert [line["step"] for line in mine] == [line["step"] for line in theirs]
    for line, wanted in zip(theirs, mine, strict=True):
        assert line.keys() == wanted.keys()
        for name in line.keys() - {"seconds", "tokens_per_second"}:
            # A first choice flips where two tokens are equally likely.
            near = 1e-2 if "agreement" in name else tolerance
            near = 20 * tolerance if name == "gradient_norm" else near
            assert line[name] == pytest.approx(wanted[name], rel=near), (line["step"], name)
    weights = [
        load_file(runs.folder / name / "model" / "model.safetensors") for name in (one, other)
    ]
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], rtol=0, atol=30 * tolerance)


@pytest.mark.parametrize("kind", ["all", "untied", "wide", "sample", "mix", "padded"])
def test_two_processes_learn_what_one_does(runs: Runs, kind: str) -> None:
    alike(runs, f"{kind}-1", f"{kind}-2")


# Newton-Schulz rounds to bfloat16, which makes a larger difference of a last bit.
ROUNDED = 1e-4


def test_muon_s_matrices_are_orthogonalised_whole(runs: Runs) -> None:
    alike(runs, "muon-1", "muon-2", ROUNDED)


def test_narrow_products_differ_by_their_rounding(runs: Runs) -> None:
    alike(runs, "narrow-1", "narrow-2", 1e-2)


def test_what_comes_out_is_a_stock_model_with_its_tie(runs: Runs) -> None:
    model = LlamaForCausalLM.from_pretrained(runs.folder / "all-2" / "model")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    summary = json.loads((runs.folder / "all-2" / "summary.json").read_text())
    assert summary["processes"] == 2
    assert summary["parameters"] == sum(p.numel() for p in model.parameters())


def test_a_split_training_that_only_harms_gives_back_its_start(
    runs: Runs, tiny_llama: Path
) -> None:
    weights, same = (
        load_file(folder / "model.safetensors")
        for folder in (runs.folder / "harmed-2" / "model", tiny_llama)
    )
    assert weights.keys() == same.keys()
    assert all(torch.equal(weights[name], same[name]) for name in same)


def test_the_cache_is_the_same_whoever_filled_it(runs: Runs) -> None:
    names = ("sample-1", "sample-2", "sample-1-2")
    folders = [next((runs.folder / f"cache-{name}").glob("targets/*")) for name in names]
    for file in ("shard-00000.bin", "checksums.bin", "heldout.safetensors"):
        contents = [(folder / file).read_bytes() for folder in folders]
        assert any(contents[0])
        assert contents[0] == contents[1] == contents[2]
    told = [
        json.loads((runs.folder / name / "summary.json").read_text())["targets"]
        for name in ("sample-2", "sample-1-2")
    ]
    assert 0 < told[1]["captured_windows"] < told[0]["captured_windows"] == 35
    measured = [json.loads((folder / "measured.json").read_text()) for folder in folders]
    assert measured[0]["positions"] == 35 * 32
    assert measured[1]["positions"] == 18 * 32, "one of two processes measures"
    assert measured[2]["positions"] > measured[1]["positions"], "to what one had measured"
    for facts, kept in zip(told, measured[1:], strict=True):
        assert facts["kl_to_live"] == kept["kl_to_live"] > 0


@pytest.mark.parametrize(("kind", "tolerance"), [("all", 1e-5), ("muon", ROUNDED)])
def test_stopped_with_one_it_goes_on_with_two(runs: Runs, kind: str, tolerance: float) -> None:
    alike(runs, f"{kind}-1", f"{kind}-1-2", tolerance)


@pytest.mark.parametrize(("kind", "tolerance"), [("all", 1e-5), ("muon", ROUNDED)])
def test_stopped_with_two_it_goes_on_with_one(runs: Runs, kind: str, tolerance: float) -> None:
    out = runs.folder / f"{kind}-2-1"
    checkpoint = load_checkpoint(out / "resume")
    assert checkpoint is not None
    assert checkpoint.step == AFTER
    parts = checkpoint.tensors["optimizer"]
    assert isinstance(parts, Path)
    assert len(list(parts.glob("*.safetensors"))) == 2
    assert any("momentum_buffer" in name for name in names_in(parts)) == (kind == "muon")
    runs.here(kind, f"{kind}-2-1")
    alike(runs, f"{kind}-1", f"{kind}-2-1", tolerance)
