"""Pruning a teacher of Llama 3.1 8B's shape: peak memory, and time beside plain forward passes.

    python tests/bench/bench_prune_large.py --layers 32 --student llama-3.2-3b --tokens 8192
    python tests/bench/bench_prune_large.py --grow

The checkpoint has random weights and the true widths, in bfloat16 (16 GB with 32 layers). The whole
prune stage runs on it in a process of its own; before it, transformers' own model passes over the
same windows in another one. ``anonymous`` is the peak of memory that is the process's own; pages of
mapped files, which the system may drop at any time, are in ``resident`` as well. ``--grow``
measures three sizes each of layers, width and windows beside what `shearling plan` foresees.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from compress.precision import fast_dtype
from compress.prune import prune
from compress.settings import PruneSettings
from pipelines.accelerators import this_machine
from pipelines.estimate_prune import prune_cost
from pipelines.plan import seconds
from shearling import read_json, write_json
from students.shape import Shape, resolve_shape
from teachers.families import FAMILIES
from teachers.fetch import default_cache
from teachers.layout import expected_tensors

FAMILY = FAMILIES["llama-3.1-8b"]
WINDOW = 256
SMALL = replace(FAMILY.shape, num_hidden_layers=4, hidden_size=2048, intermediate_size=7168,
                num_attention_heads=16, num_key_value_heads=4, vocab_size=32768)  # fmt: skip


# --- a teacher and a text -----------------------------------------------------------------------


def write_teacher(folder: Path, shape: Shape) -> None:
    """Random weights in shards of a layer each, drawn as transformers draws them."""
    folder.mkdir(parents=True)
    kind = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    write_json(folder / "config.json", FAMILY.config() | shape.to_dict() | kind)
    places: dict[str, str] = {}
    random = torch.Generator().manual_seed(0)
    shards: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, size in expected_tensors(shape).items():
        shard = name.split(".")[2] if ".layers." in name else name.split(".")[-2]
        shards.setdefault(f"model-{shard}.safetensors", {})[name] = size
    for file, sizes in shards.items():
        tensors = {
            name: torch.ones(size, dtype=torch.bfloat16)
            if len(size) == 1
            else torch.empty(size, dtype=torch.bfloat16).normal_(0, 0.02, generator=random)
            for name, size in sizes.items()
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(sizes, file)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": places})


def write_text(folder: Path, tokens: int, vocabulary: int) -> None:
    """A transfer set of random tokens, one document."""
    folder.mkdir(parents=True)
    drawn = np.random.default_rng(0).integers(0, vocabulary, (tokens // WINDOW, WINDOW), np.uint32)
    for part, windows in (("", drawn), ("heldout_", drawn[:1])):
        np.save(folder / f"{part}tokens.npy", windows)
        np.save(folder / f"{part}document_starts.npy", np.zeros(1, np.int64))
        np.save(folder / f"{part}document_sources.npy", np.zeros(1, np.int64))
    facts = {"sha256": "random", "sources": [{"name": "random"}], "vocabulary": vocabulary}
    write_json(folder / "transfer_set.json", facts)


# --- one measurement, in a process of its own -------------------------------------------------


@contextmanager
def anonymous_peak() -> Iterator[list[int]]:
    """The most anonymous memory (RssAnon) seen while the block runs, in bytes."""
    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            lines = Path("/proc/self/status").read_text().splitlines()
            now = next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
            peak[0] = max(peak[0], now * 1024)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    yield peak
    done.set()
    thread.join()


def forward(folder: Path, tokens: int) -> dict[str, Any]:
    """transformers' model over the calibration windows, without its output head.

    The weights stay in their mapped files but for the layer at work, in the dtype that multiplies
    fastest here: in memory as a whole they would fit on few machines on which the walk fits.
    """
    dtype = fast_dtype("cpu", "auto").dtype
    with init_empty_weights(include_buffers=False):
        model = LlamaForCausalLM(LlamaConfig.from_pretrained(folder / "teacher")).eval()
    for shard in sorted((folder / "teacher").glob("*.safetensors")):
        model.load_state_dict(load_file(shard), strict=False, assign=True)
    stored = [dict(layer.state_dict()) for layer in model.model.layers]
    for layer, mapped in zip(model.model.layers, stored, strict=True):
        layer.register_forward_pre_hook(lambda layer, _: layer.to(dtype) and None)
        layer.register_forward_hook(
            lambda layer, *_, mapped=mapped: layer.load_state_dict(mapped, assign=True) and None
        )
    windows = torch.from_numpy(np.load(folder / "text" / "tokens.npy").astype(np.int64))
    start = time.perf_counter()
    with torch.no_grad():
        for rows in torch.split(windows[: tokens // WINDOW], 16):
            embedded = model.model.embed_tokens(rows).to(dtype)
            model.model(inputs_embeds=embedded, use_cache=False)
    return {"forward_seconds": round(time.perf_counter() - start, 1), "dtype": str(dtype)}


def whole_stage(folder: Path, student: Shape, settings: PruneSettings) -> dict[str, Any]:
    """The prune stage, from the first file opened to the gate passed."""
    start = time.perf_counter()
    with anonymous_peak() as peak:
        found = prune(
            folder / "teacher", folder / "pruned", student, folder / "text", settings, seed=0
        )
    return {
        "prune_seconds": round(time.perf_counter() - start, 1),
        "anonymous_gb": round(peak[0] / 1e9, 2),
        "resident_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2),
        "parameters": found["parameters"],
        "reload_logit_error": found["reload_logit_error"],
    }


def measured(teacher: Shape, student: Shape, tokens: int, folder: Path | None) -> dict[str, Any]:
    """Both measurements of one pair of shapes, and what the plan says."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        root = Path(name)
        write_teacher(root / "teacher", teacher)
        write_text(root / "text", tokens, teacher.vocab_size)
        write_json(root / "student.json", student.to_dict())
        found: dict[str, Any] = {"tokens": tokens}
        for part in ("forward", "prune"):
            command = [sys.executable, __file__, "--part", part, "--root", name]
            command += ["--tokens", str(tokens)]
            said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            found |= json.loads(said.splitlines()[-1])
    return found | planned(teacher, student, tokens)


def planned(teacher: Shape, student: Shape, tokens: int) -> dict[str, Any]:
    """What `shearling plan` foresees of this machine."""
    settings = PruneSettings(calibration_tokens=tokens)
    machine = this_machine(default_cache(), "cpu", Path.cwd())
    product = machine.precision("auto")
    cost = prune_cost(teacher, student, settings, window=WINDOW, product=product, dtype_bytes=2)
    worst = cost.worst(on_cpu=True)
    return {
        "planned_seconds": round(seconds("prune", cost, machine, 1), 1),
        "planned_gb": round((worst.device_bytes() + worst.host_bytes()) / 1e9, 2),
        "planned_moment": worst.what,
    }


def show(what: str, row: dict[str, Any]) -> None:
    row["times_forward"] = round(row["prune_seconds"] / row["forward_seconds"], 2)
    print(what, json.dumps(row), flush=True)


def grow(folder: Path | None) -> None:
    """Three sizes each of layers, width and windows."""
    for layers in (2, 4, 8):
        shape = replace(SMALL, num_hidden_layers=layers)
        show(f"layers {layers}", measured(shape, halved(shape), 4096, folder))
    for hidden in (1024, 2048, 4096):
        heads = hidden // 128
        shape = replace(SMALL, hidden_size=hidden, intermediate_size=hidden * 7 // 2,
                        num_attention_heads=heads, num_key_value_heads=heads // 4)  # fmt: skip
        show(f"hidden {hidden}", measured(shape, halved(shape), 4096, folder))
    for tokens in (2048, 8192, 32768):
        show(f"tokens {tokens}", measured(SMALL, halved(SMALL), tokens, folder))


def halved(shape: Shape) -> Shape:
    """Half of the heads and neurons, three quarters of the stream."""
    return replace(
        shape,
        hidden_size=shape.hidden_size * 3 // 4,
        num_attention_heads=shape.num_attention_heads // 2,
        num_key_value_heads=max(1, shape.num_key_value_heads // 2),
        intermediate_size=shape.intermediate_size // 2,
    )


def test_four_layers_of_an_8b_stay_under_8_gb() -> None:
    teacher = replace(FAMILY.shape, num_hidden_layers=4)
    student = replace(resolve_shape("llama-3.2-3b", FAMILY.shape), num_hidden_layers=4)
    row = measured(teacher, student, 4096, None)
    show("\n4 layers of 8B to 4 layers of 3B", row)
    assert row["anonymous_gb"] < 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--student", default="llama-3.2-3b")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--folder", type=Path, help="where the checkpoint is made")
    parser.add_argument("--grow", action="store_true")
    parser.add_argument("--part", choices=["forward", "prune"])
    parser.add_argument("--root", type=Path)
    arguments = parser.parse_args()
    if arguments.part == "forward":
        print(json.dumps(forward(arguments.root, arguments.tokens)))
    elif arguments.part == "prune":
        student = Shape.from_config(read_json(arguments.root / "student.json"))
        settings = PruneSettings(calibration_tokens=arguments.tokens)
        print(json.dumps(whole_stage(arguments.root, student, settings)))
    elif arguments.grow:
        grow(arguments.folder)
    else:
        teacher = replace(FAMILY.shape, num_hidden_layers=arguments.layers)
        student = resolve_shape(arguments.student, FAMILY.shape)
        kept = min(arguments.layers, student.num_hidden_layers)
        student = replace(student, num_hidden_layers=kept)
        row = measured(teacher, student, arguments.tokens, arguments.folder)
        show(f"{arguments.layers} layers to {arguments.student}", row)


if __name__ == "__main__":
    main()
