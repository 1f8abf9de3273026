"""Opening a checkpoint of Llama 3.1 8B's shape and reading one layer: seconds and memory.

    python -m pytest tests/bench/bench_open.py -o python_files='bench_*.py' -s

The files are sparse: 16 GB long, nothing but headers on the disk. Each form is opened in a process
of its own. The goal is two seconds and 1 GB, whatever the format.
"""

from __future__ import annotations

import json
import resource
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from teachers.families import FAMILIES
from teachers.layout import expected_tensors
from teachers.meta_format import MetaRelease, hf_name, meta_config

FAMILY = FAMILIES["llama-3.1-8b"]
SECONDS, BYTES = 2.0, 1e9


def write_hf(folder: Path) -> None:
    """One safetensors file of zeros, and the configuration."""
    header, offset = {}, 0
    for name, shape in expected_tensors(FAMILY.shape).items():
        size = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **FAMILY.config()}
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))


def write_meta(folder: Path) -> None:
    """One consolidated file whose data were left out, and params.json."""
    names = {target: name for name, target in _meta_names().items()}
    weights = {
        names[name]: torch.empty(shape, dtype=torch.bfloat16, device="meta")
        for name, shape in expected_tensors(FAMILY.shape).items()
    }
    with torch.serialization.skip_data():
        torch.save(weights, folder / "consolidated.00.pth")
    shape = FAMILY.shape
    params = {
        "dim": shape.hidden_size,
        "n_layers": shape.num_hidden_layers,
        "n_heads": shape.num_attention_heads,
        "n_kv_heads": shape.num_key_value_heads,
        "norm_eps": FAMILY.norm_epsilon,
        "rope_theta": FAMILY.rope_base,
        "use_scaled_rope": True,
    }
    (folder / "params.json").write_text(json.dumps(params))


def _meta_names() -> dict[str, str]:
    layers = FAMILY.shape.num_hidden_layers
    inner = [
        *("attention_norm", "ffn_norm"),
        *(f"attention.{part}" for part in ("wq", "wk", "wv", "wo")),
        *(f"feed_forward.{part}" for part in ("w1", "w2", "w3")),
    ]
    names = [f"layers.{layer}.{part}.weight" for layer in range(layers) for part in inner]
    names += ["tok_embeddings.weight", "norm.weight", "output.weight"]
    return {name: target for name in names if (target := hf_name(name)) is not None}


def read_one_layer(folder: Path) -> int:
    """Open the checkpoint in ``folder`` and read layer 17; the parameters that were read."""
    if (folder / "params.json").is_file():
        release = MetaRelease(folder)
        assert meta_config(release).num_hidden_layers == 32
        names = [name for name in release.names() if name.startswith("layers.17.")]
        return sum(release.tensor(name).clone().numel() for name in names)
    from teachers.checkpoint import open_checkpoint

    source = open_checkpoint(folder, values=False)
    names = [name for name in source.names() if name.startswith("model.layers.17.")]
    return sum(source.tensor(name).clone().numel() for name in names)


@pytest.mark.parametrize("form", ["hf", "meta"])
def test_opening_and_reading_one_layer(form: str, tmp_path: Path) -> None:
    {"hf": write_hf, "meta": write_meta}[form](tmp_path)
    try:
        done = subprocess.run(
            [sys.executable, __file__, str(tmp_path)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        measured = json.loads(done.stdout)
        on_disk = sum(file.stat().st_blocks * 512 for file in tmp_path.iterdir())
        print(f"\n{form}: {measured} ({on_disk / 1e6:.0f} MB on disk)")
        assert measured["parameters"] == FAMILY.shape.layer_parameters
        assert measured["cpu_seconds"] < SECONDS
        assert measured["peak_bytes"] < BYTES
    finally:
        shutil.rmtree(tmp_path)


def main() -> None:
    start, cpu = time.perf_counter(), time.process_time()
    parameters = read_one_layer(Path(sys.argv[1]))
    measured = {
        "parameters": parameters,
        "seconds": round(time.perf_counter() - start, 3),
        "cpu_seconds": round(time.process_time() - cpu, 3),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
