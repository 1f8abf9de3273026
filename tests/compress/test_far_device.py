"""Stages on a device that isn't the CPU: every tensor is moved, and hardly anything waits."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from far_device import FAR, HAS_ACCELERATOR, far_device
from lm_eval.api.instance import Instance
from safetensors.torch import load_file
from torch import Tensor

from compress.distill import distill
from compress.prune import prune
from compress.search import search
from compress.settings import DistillSettings, PruneSettings
from reports.agreement import agreement, confidences, read_windows
from reports.lm import PrefixLM
from reports.load import load_model
from reports.perplexity import position_losses
from shearling import Progress, silent
from students.shape import Shape
from teachers.checkpoint import Checkpoint
from teachers.judgement import Reader
from teachers.settings import WrittenSettings
from teachers.transfer_set import TransferSet
from teachers.written import Author

pytestmark = pytest.mark.skipif(
    HAS_ACCELERATOR, reason="PyTorch has one accelerator, and here is a real one"
)

CUT = PruneSettings(calibration_tokens=1024, precision="float32")
ALL_AXES: dict[str, Any] = {
    "num_hidden_layers": 3,
    "hidden_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "intermediate_size": 40,
    "tie_word_embeddings": True,
}
STEP: dict[str, Any] = {"batch_tokens": 32 * 8, "learning_rate": 5e-3, "precision": "float32"}


def smaller(teacher: Path, **axes: Any) -> Shape:
    return replace(Checkpoint(teacher).shape, **axes)


def weights(folder: Path) -> dict[str, Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


# --- the device itself


def test_what_lies_apart_does_not_mix() -> None:
    near = torch.arange(6.0).view(2, 3)
    assert not torch.accelerator.is_available()
    with far_device():
        assert torch.accelerator.is_available()
        far = near.to(FAR)
        assert far.device.type == FAR
        assert torch.equal((far @ far.T + 1).cpu(), near @ near.T + 1)
        assert far[torch.tensor([1])].tolist() == [[3, 4, 5]]
        with pytest.raises(RuntimeError, match="on far and on cpu"):
            far + near
        with pytest.raises(RuntimeError, match="on far and on cpu"):
            near[torch.tensor([1], device=FAR)]
        with pytest.raises(RuntimeError, match="on far and on cpu"):
            torch.nn.functional.linear(near, torch.nn.Linear(3, 2).to(FAR).weight)
        with pytest.raises(RuntimeError, match="on far and on cpu"):
            torch.stack([far[0, 0], near[0, 0]])  # numbers may differ in pointwise operations only
        assert (far + near[0, 1]).tolist() == (near + 1).tolist()
        with pytest.raises(RuntimeError, match="generator"):
            torch.rand(3, device=FAR, generator=torch.Generator())
        with pytest.raises(TypeError, match="no array"):
            np.asarray(far)


def test_it_learns_in_either_precision_and_counts_who_waits() -> None:
    layer, target = torch.nn.Linear(3, 1), torch.ones(4, 1)
    with far_device() as device:
        layer.to(FAR)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        losses = []
        for precision in (torch.float32, torch.bfloat16):
            with torch.autocast(FAR, precision, enabled=precision != torch.float32):
                answer = layer(target.expand(4, 3).to(FAR))
            assert answer.dtype == precision
            loss = (answer - target.to(FAR)).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss)
        assert not device.waits
        assert losses[1].item() < losses[0].item()
        assert device.waits == Counter({"_local_scalar_dense": 2})


# --- what runs on it


@pytest.mark.parametrize(
    ("teacher", "axes", "more"),
    [
        ("tiny_llama_untied", ALL_AXES, {}),
        ("tiny_llama", {"hidden_size": 24}, {"basis": "dims"}),
        ("tiny_llama", {"intermediate_size": 40}, {"importance": "taylor"}),
    ],
    ids=["all axes", "picked dims", "taylor"],
)
def test_a_cut_is_that_of_the_cpu(
    teacher: str,
    axes: dict[str, Any],
    more: dict[str, Any],
    tiny_transfer_set: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    source: Path = request.getfixturevalue(teacher)
    settings = CUT.model_copy(update=more)
    shape = smaller(source, **axes)
    prune(source, tmp_path / "near", shape, tiny_transfer_set, settings, seed=0)
    with far_device():
        prune(source, tmp_path / "far", shape, tiny_transfer_set, settings, seed=0, device=FAR)
    near, far = weights(tmp_path / "near" / "model"), weights(tmp_path / "far" / "model")
    assert near.keys() == far.keys()
    for name, weight in near.items():
        torch.testing.assert_close(far[name], weight, rtol=1e-2, atol=1e-3)


def test_shapes_are_scored_as_on_the_cpu(
    tiny_llama: Path, tiny_transfer_set: Path, tmp_path: Path
) -> None:
    shapes = [smaller(tiny_llama, intermediate_size=40), smaller(tiny_llama, num_hidden_layers=3)]
    more: dict[str, Any] = {"tokens": 512, "seed": 0}
    near = search(tiny_llama, tmp_path / "near", shapes, tiny_transfer_set, CUT, **more)
    with far_device():
        far = search(
            tiny_llama, tmp_path / "far", shapes, tiny_transfer_set, CUT, device=FAR, **more
        )
    assert [each["shape"] for each in far] == [each["shape"] for each in near]
    assert [each["kl"] for each in far] == pytest.approx([each["kl"] for each in near], rel=1e-3)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"micro_batch_windows": 3, "optimizer": "adamw", "gradient_checkpointing": True},
        {"targets": "sample", "ema": 0.5},
        {"targets": "top_k"},
        {"reverse_kl": 0.5, "temperature": 2.0},
        {"hidden": {"weight": 0.5}, "attention": {"weight": 0.5}},
        {"precision": "bfloat16"},
    ],
    ids=lambda more: " ".join(more) or "default",
)
def test_training_is_that_of_the_cpu(
    more: dict[str, Any], tiny_llama: Path, tiny_transfer_set: Path, tmp_path: Path
) -> None:
    shape = smaller(tiny_llama, num_hidden_layers=3, hidden_size=24)
    prune(tiny_llama, tmp_path / "cut", shape, tiny_transfer_set, CUT, seed=0)
    settings = DistillSettings(
        **{**STEP, "tokens": 32 * 8 * 3, "evaluate_every": 2, "save_every_seconds": 0, **more}
    )

    def trained(device: str, name: str, progress: Progress = silent) -> Path:
        distill(
            tiny_llama, tmp_path / "cut" / "model", tmp_path / name, tiny_transfer_set, settings,
            selection=tmp_path / "cut" / "selection.json", seed=0, device=device,
            cache=tmp_path / f"{device}-answers", progress=progress,
        )  # fmt: skip
        return tmp_path / name

    def learnt(out: Path) -> list[float]:
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        return [line[k] for line in lines for k in ("loss", "gradient_norm") if k in line]

    def interrupt(what: str, done: int, of: int, **_: Any) -> None:
        if what == "distill" and done == 2:
            raise InterruptedError

    near = trained("cpu", "near")
    with far_device():
        far = trained(FAR, "far")
        with pytest.raises(InterruptedError):
            trained(FAR, "again", interrupt)
        again = trained(FAR, "again")
    rel = 1e-2 if settings.precision == "bfloat16" else 1e-4
    assert len(learnt(far)) == 2 * 3
    assert learnt(far) == pytest.approx(learnt(near), rel=rel)
    for name, weight in weights(near / "model").items():
        apart = torch.dist(weights(far / "model")[name], weight)
        assert apart < rel * weight.norm()  # rounding, which Adam and Muon magnify
        assert torch.equal(weights(again / "model")[name], weights(far / "model")[name])


def test_a_student_writes_there_what_it_writes_on_the_cpu(
    tiny_llama: Path, tiny_student: Path, tiny_transfer_set: Path, tmp_path: Path
) -> None:
    settings = DistillSettings(**STEP, tokens=32 * 8 * 2, on_policy=0.5, evaluate_every=0)

    def ends(device: str) -> list[float]:
        summary = distill(
            tiny_llama, tiny_student, tmp_path / device, tiny_transfer_set, settings,
            seed=0, device=device,
        )  # fmt: skip
        return [summary[when]["heldout_kl"] for when in ("heldout_start", "heldout_end")]

    near = ends("cpu")
    with far_device():
        far = ends(FAR)
    assert far[1] < far[0]
    assert far == pytest.approx(near, rel=1e-3)  # one token drawn otherwise changes what follows


def test_a_step_waits_for_its_line_in_the_journal_alone(
    tiny_llama: Path, tiny_student: Path, tiny_transfer_set: Path, tmp_path: Path
) -> None:
    """And once for each pass of a model: transformers looks whether documents share a window."""

    def waits(steps: int, windows: int) -> Counter[str]:
        settings = DistillSettings(
            **STEP, tokens=32 * 8 * steps, micro_batch_windows=windows, evaluate_every=0
        )
        out = tmp_path / f"{steps}-{windows}"
        with far_device() as device:
            distill(tiny_llama, tiny_student, out, tiny_transfer_set, settings, device=FAR, seed=0)
        return device.waits

    whole, in_four = waits(4, 8) - waits(2, 8), waits(4, 2) - waits(2, 2)
    passes, micro_batches = 2, 4
    assert set(whole) == {"_local_scalar_dense"}
    a_step = whole.total() / 2
    assert a_step <= passes + 4
    assert in_four.total() / 2 == a_step + passes * (micro_batches - 1)


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_llama_untied"])
def test_measures_are_those_of_the_cpu(
    name: str, tiny_transfer_set: Path, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(name)
    ids_WT = torch.from_numpy(TransferSet(tiny_transfer_set).heldout.astype(np.int64))
    texts = [("The shepherd sees", " the hill"), ("The shepherd sees", " a lamb"), ("A", " b")]

    def measured(device: str) -> dict[str, Any]:
        model, tokenizer = load_model(folder, device)
        model.float()
        lm = PrefixLM(model, tokenizer, batch_size=2)
        asked = [
            Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=place)  # type: ignore[arg-type]
            for place, pair in enumerate(texts)
        ]
        reading = read_windows(model, ids_WT)
        return {
            "choices": [value for value, _ in lm.loglikelihood(asked)],
            "losses": position_losses(model, tokenizer, "A lamb. " * 40, length=16, windows=4),
            "confidences": confidences(reading),
            "agreement": agreement(reading, reading),
            "logprobs": reading.logprobs(0, 0).cpu(),
        }

    near = measured("cpu")
    with far_device():
        far = measured(FAR)
    assert far["choices"] == pytest.approx(near["choices"], abs=1e-4)
    np.testing.assert_allclose(far["losses"], near["losses"], atol=1e-4)
    torch.testing.assert_close(far["logprobs"], near["logprobs"], rtol=0, atol=1e-4)
    assert far["agreement"] == ([0.0] * len(ids_WT), [1.0] * len(ids_WT))
    np.testing.assert_allclose(far["confidences"], near["confidences"], atol=1e-4)


def test_a_teacher_writes_and_reads_there(tiny_llama: Path) -> None:
    settings = WrittenSettings(tokens=64, length=16, batch=4)

    def made(device: str) -> list[Any]:
        reader = Reader(tiny_llama, device, silent)
        documents = [[5, 9, 2, 33], [71, 8, 120, 4, 19, 200, 31]]
        written = Author(tiny_llama, settings, 16, seed=3, device=device).write(0)
        return [written, reader.meanings(documents), reader.losses(documents)]

    near = made("cpu")
    with far_device():
        far = made(FAR)
    for there, here in zip(far, near, strict=True):
        np.testing.assert_allclose(there, here, atol=1e-4)
