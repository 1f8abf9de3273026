"""The training loop: it learns, it is exact, it keeps documents apart, it stops with a word."""

from __future__ import annotations

import json
import math
import re
import shutil
from functools import reduce
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from compress.answers import Taught
from compress.course import Course
from compress.data import StepData, make_batch
from compress.distill import _what_is_wrong, distill
from compress.hidden import open_matches
from compress.losses import IGNORED, cross_entropy, forward_kl, hidden_cosine
from compress.precision import PrecisionChoice, in_precision
from compress.settings import CorrectSettings, DistillSettings, HiddenLoss, deciding
from pipelines.stages.distill import in_order
from pipelines.tiny import make_tiny_llama
from shearling import ShearlingError
from teachers.tokenizer import copy_tokenizer
from teachers.transfer_set import TransferSet

BASE: dict[str, Any] = {
    "tokens": 32 * 8 * 6,
    "batch_tokens": 32 * 8,
    "learning_rate": 5e-3,
    "embedding_learning_rate": 1.0,  # both models are random: there is no embedding to preserve
    "forward_kl": 1.0,
    "cross_entropy": 0.0,
    "optimizer": "adamw",
    "precision": "float32",
    "evaluate_every": 3,
}


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def steps(out: Path) -> list[dict[str, Any]]:
    return [line for line in lines(out) if "loss" in line]


class Bench:
    """The same teacher, student and text for every run of a test."""

    def __init__(self, teacher: Path, student: Path, text: Path, tmp_path: Path) -> None:
        self.teacher, self.student, self.text, self.tmp_path = teacher, student, text, tmp_path

    def run(self, name: str = "out", **options: Any) -> tuple[Path, dict[str, Any]]:
        named = ("selection", "progress", "seed", "teachers")
        more = {k: options.pop(k) for k in named if k in options}
        out = self.tmp_path / name
        settings = options.get("settings") or DistillSettings(**{**BASE, **options})
        return out, distill(self.teacher, self.student, out, self.text, settings, **more)


@pytest.fixture
def bench(tiny_llama: Path, tiny_student: Path, tiny_transfer_set: Path, tmp_path: Path) -> Bench:
    return Bench(tiny_llama, tiny_student, tiny_transfer_set, tmp_path)


# --- what counts -----------------------------------------------------------------------------


def test_a_document_s_end_counts_at_a_window_s_end_only(bench: Bench) -> None:
    """A window doesn't show whether a document ends with it: the position counts, with no label."""
    text = TransferSet(bench.text)
    end = text.facts["eos_token_id"]
    data = StepData(text, DistillSettings(**BASE), seed=0, device=torch.device("cpu"))
    inside, at_end = 0, 0
    for (batch,) in (data.in_batches([window]) for window in range(len(text))):
        ended_T, counts_T = batch.input_BT[0] == end, batch.mask_BT[0]
        assert torch.equal(counts_T[:-1], ~ended_T[:-1])
        assert counts_T[-1]
        assert batch.labels_N[-1] == IGNORED
        assert (batch.labels_N[:-1] != IGNORED).all()
        inside, at_end = inside + int(ended_T[:-1].sum()), at_end + int(ended_T[-1])
    assert inside > at_end > 0, "the text must have both to be a test"


def test_where_the_text_says_what_is_learnt_a_window_s_end_may_not_count() -> None:
    ids, positions = torch.tensor([[5, 6, 0, 7, 0]]), torch.tensor([[0, 1, 2, 0, 1]])
    learnt = torch.tensor([[True, True, False, True, False]])
    device = torch.device("cpu")
    plain = make_batch(ids, positions, device)
    assert plain.mask_BT.tolist() == [[True, True, False, True, True]]
    assert plain.labels_N.tolist() == [6, 0, 0, IGNORED]
    told = make_batch(ids, positions, device, loss_mask_BT=learnt)
    assert told.mask_BT.tolist() == learnt.tolist()
    assert told.labels_N.tolist() == [6, 0, 0]
    assert told.labelled == told.positions == 3


# --- it works --------------------------------------------------------------------------------


def test_the_student_comes_nearer_to_the_teacher(bench: Bench) -> None:
    out, summary = bench.run(tokens=32 * 8 * 20)
    assert summary["heldout_end"]["heldout_kl"] < 0.8 * summary["heldout_start"]["heldout_kl"]
    assert summary["steps"] == 20
    assert summary["tokens"] == 32 * 8 * 20
    assert summary["precision"]["name"] == "float32"
    assert {line["step"] for line in steps(out)} == set(range(1, 21))
    wanted = {"step", "steps", "tokens", "loss", "forward_kl", "cross_entropy", "learning_rate"}
    wanted |= {"gradient_norm", "tokens_per_second", "seconds"}
    assert all(wanted <= line.keys() for line in steps(out))
    evaluations = [line for line in lines(out) if "heldout_kl" in line]
    assert [line["step"] for line in evaluations] == [0, 3, 6, 9, 12, 15, 18, 20]


def test_the_output_is_a_stock_model_with_its_tokenizer(bench: Bench) -> None:
    out, summary = bench.run()
    model = LlamaForCausalLM.from_pretrained(out / "model")
    assert model.dtype == torch.float32
    assert sum(p.numel() for p in model.parameters()) == summary["parameters"]
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    text = "the sheep, shorn"
    assert tokenizer(text) == AutoTokenizer.from_pretrained(bench.student)(text)
    assert "shearling" not in (out / "model" / "config.json").read_text()


def test_the_student_s_dtype_is_kept(bench: Bench) -> None:
    narrow = bench.tmp_path / "narrow"
    LlamaForCausalLM.from_pretrained(bench.student, dtype=torch.bfloat16).save_pretrained(narrow)
    bench.student = narrow
    out, _ = bench.run()
    assert LlamaForCausalLM.from_pretrained(out / "model").dtype == torch.bfloat16


def test_the_first_step_s_loss_is_what_stock_models_and_dense_losses_say(bench: Bench) -> None:
    """The oracle computes each document alone, so this also proves that nothing leaks."""
    settings = DistillSettings(**BASE)
    text = TransferSet(bench.text)
    data = StepData(text, settings, seed=0, device=torch.device("cpu"))
    teacher = LlamaForCausalLM.from_pretrained(bench.teacher)
    student = LlamaForCausalLM.from_pretrained(bench.student)
    divergences, surprises, documents = [], [], 0
    for window in data.windows(0):
        batch = text.batch([window])
        ids, positions = batch["input_ids"][0], batch["position_ids"][0]
        begins = [0, *(np.flatnonzero(positions[1:] == 0) + 1).tolist(), len(ids)]
        for first, last in pairwise(begins):
            with torch.no_grad():
                taught, learnt = (m(ids[None, first:last]).logits[0] for m in (teacher, student))
            labels = torch.cat([ids[first + 1 : last], torch.tensor([IGNORED])])
            ends_inside = last < len(ids)
            divergences.append(forward_kl(learnt, taught)[: -1 if ends_inside else None])
            surprises.append(cross_entropy(learnt, labels)[:-1])
            documents += 1
    assert documents > data.step_windows, "the windows must hold documents' ends to be a test"
    out, _ = bench.run(forward_kl=0.75, cross_entropy=0.5)
    line = steps(out)[0]
    assert line["forward_kl"] == pytest.approx(torch.cat(divergences).mean().item(), rel=1e-5)
    assert line["cross_entropy"] == pytest.approx(torch.cat(surprises).mean().item(), rel=1e-5)
    expected = 0.75 * line["forward_kl"] + 0.5 * line["cross_entropy"]
    assert line["loss"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_documents_in_one_window_do_not_see_each_other(
    bench: Bench, precision: str, tiny_llama: Path
) -> None:
    """Change the first document: what the model says in the second stays the same to the bit."""
    from compress.answers import trunk
    from compress.attention import choose_attention
    from compress.precision import fast_dtype

    model = LlamaForCausalLM.from_pretrained(tiny_llama)
    choice = fast_dtype("cpu", precision)  # type: ignore[arg-type]
    model.set_attn_implementation(choose_attention(torch.device("cpu"), choice.dtype, 16))
    ids = torch.randint(0, 300, (2, 16), generator=torch.Generator().manual_seed(0))
    positions = torch.stack([torch.arange(16), torch.cat([torch.arange(7), torch.arange(9)])])
    other = ids.clone()
    other[1, :7] = (ids[1, :7] + 11) % 300
    first, second = (
        trunk(model, make_batch(x, positions, torch.device("cpu")), choice) for x in (ids, other)
    )
    # Row 0 has 16 positions that count, document one of row 1 has 6: its last one does not.
    assert torch.equal(first[:16], second[:16])
    assert not torch.equal(first[16:22], second[16:22])
    assert torch.equal(first[22:], second[22:])


@pytest.mark.parametrize("micro", [1, 3])
def test_micro_batches_change_nothing_but_rounding(bench: Bench, micro: int) -> None:
    options = {"cross_entropy": 0.5, "position_clip": 1.0}  # so that it has much to do
    whole, _ = bench.run("whole", micro_batch_windows=8, **options)
    parts, _ = bench.run("parts", micro_batch_windows=micro, **options)
    for one, other in zip(steps(whole), steps(parts), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=2e-5)
        assert one["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=2e-4)


def test_positions_are_clipped_in_training(bench: Bench) -> None:
    free, held = (steps(bench.run(f"{x:g}", position_clip=x)[0])[0] for x in (0.0, 0.5))
    assert held["loss"] == free["loss"]  # of the start
    assert held["gradient_norm"] < 0.9 * free["gradient_norm"]


def test_a_clip_that_is_off_decides_nothing() -> None:
    """What was trained before there was one goes on, and is not trained again."""
    corrected = CorrectSettings(tokens=1024).as_distillation()
    assert corrected.position_clip == 0
    assert "position_clip" not in deciding(corrected, DistillSettings)
    assert deciding(DistillSettings(**BASE), DistillSettings)["position_clip"] == 5


def test_gradient_checkpointing_changes_nothing_but_rounding(bench: Bench) -> None:
    hidden = {"hidden": {"weight": 0.5}, "selection": selection(bench, [0, 2])}
    plain, _ = bench.run("plain", position_clip=1.0, **hidden)
    frugal, _ = bench.run("frugal", position_clip=1.0, gradient_checkpointing=True, **hidden)
    for one, other in zip(steps(plain), steps(frugal), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)


def test_two_runs_are_the_same_to_the_bit_and_another_seed_is_not(bench: Bench) -> None:
    losses = [[line["loss"] for line in steps(bench.run(name)[0])] for name in ("a", "b")]
    other = [line["loss"] for line in steps(bench.run("c", seed=1)[0])]
    assert losses[0] == losses[1] != other


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "muon"},
        {"ema": 0.5},
        {"reverse_kl": 0.5, "skewed_kl": 0.2, "temperature": 2.0},
        {"forward_kl": 0.0, "cross_entropy": 1.0},
        {"precision": "bfloat16"},
    ],
    ids=str,
)
def test_every_option_learns(bench: Bench, options: dict[str, Any]) -> None:
    _, summary = bench.run(**{"tokens": 32 * 8 * 12, **options})
    start, end = summary["heldout_start"], summary["heldout_end"]
    name = "heldout_kl" if options.get("forward_kl", 1) else "heldout_perplexity"
    assert end[name] < 0.9 * start[name]


def test_an_average_of_few_steps_is_not_the_start(bench: Bench) -> None:
    """With 0.9999 from the first step on it would be 0.998 of it after twenty."""
    options = {"tokens": 32 * 8 * 20, "keep": "last"}
    _, plain = bench.run("plain", **options)
    _, averaged = bench.run("averaged", **options, ema=0.9999)
    start, end = averaged["heldout_start"]["heldout_kl"], averaged["heldout_end"]["heldout_kl"]
    assert start - end > 0.5 * (start - plain["heldout_end"]["heldout_kl"])


def test_the_learning_rate_rises_and_falls_to_its_share(bench: Bench) -> None:
    out, _ = bench.run(tokens=32 * 8 * 10, warmup=0.3, final_learning_rate=0.1)
    rates = [line["learning_rate"] for line in steps(out)]
    assert rates[:3] == pytest.approx([5e-3 / 3, 5e-3 * 2 / 3, 5e-3])
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[-1] == pytest.approx(5e-4)


def test_the_best_weights_are_kept_when_the_last_are_worse(bench: Bench) -> None:
    """Learning the labels leads away from a random teacher after a while."""
    options = {"tokens": 32 * 8 * 30, "forward_kl": 0.0, "cross_entropy": 1.0, "evaluate_every": 2}
    out, summary = bench.run("best", **options)
    best = min((x for x in lines(out) if "heldout_kl" in x), key=lambda x: x["heldout_kl"])
    assert best["step"] < 30, "or this tests nothing"
    assert summary["kept_step"] == summary["heldout_best"]["step"] == best["step"]
    (note,) = summary["notes"]
    assert f"The weights of step {best['step']} of 30 were kept" in note
    again = bench.tmp_path / "again"
    bench.student = out / "model"
    settings = DistillSettings(**{**BASE, "tokens": 256})
    start = distill(bench.teacher, bench.student, again, bench.text, settings)["heldout_start"]
    assert start["heldout_kl"] == pytest.approx(best["heldout_kl"], rel=1e-6)


def test_a_training_that_only_harms_is_told(bench: Bench) -> None:
    """Nothing is nearer to the teacher than the teacher itself."""
    bench.student = bench.teacher
    out, summary = bench.run("harmed", tokens=32 * 8 * 4, forward_kl=0.0, cross_entropy=1.0)
    assert summary["kept_step"] == 0
    (note,) = summary["notes"]
    assert note.startswith("No evaluation found a lower held-out KL than at the start")
    weights, same = (
        load_file(folder / "model.safetensors") for folder in (out / "model", bench.teacher)
    )
    assert all(torch.equal(weights[name], same[name]) for name in same)


# --- hidden states ---------------------------------------------------------------------------


def selection(bench: Bench, layers: list[int], dims: int = 24) -> Path:
    path = bench.tmp_path / "selection.json"
    path.write_text(json.dumps({"layers": layers, "hidden": list(range(3, 3 + dims))}))
    return path


def test_hidden_states_meet_as_the_selection_says(bench: Bench) -> None:
    chosen = selection(bench, [1, 3])
    out, _ = bench.run(hidden={"weight": 0.5}, selection=chosen, tokens=32)
    text = TransferSet(bench.text)
    data = StepData(text, DistillSettings(**{**BASE, "tokens": 32}), seed=0, device="cpu")  # type: ignore[arg-type]
    batch = text.batch(data.windows(0))
    taught, learnt = {}, {}
    for folder, layers, found in ((bench.teacher, [1, 3], taught), (bench.student, [0, 1], learnt)):
        model = LlamaForCausalLM.from_pretrained(folder)
        for number in layers:
            model.model.layers[number].register_forward_hook(
                lambda *event, number=number, found=found: found.__setitem__(number, event[2])
            )
        with torch.no_grad():
            model(**batch, use_cache=False)
    mask = make_batch(
        **{"input_BT": batch["input_ids"], "positions_BT": batch["position_ids"]},
        device=torch.device("cpu"),
    ).mask_BT
    expected = [
        hidden_cosine(learnt[mine][mask], taught[theirs][mask][:, 3:27]).mean()
        for mine, theirs in ((0, 1), (1, 3))
    ]
    line = steps(out)[0]
    assert line["hidden"] == pytest.approx(torch.stack(expected).mean().item(), rel=1e-5)
    assert line["loss"] == pytest.approx(line["forward_kl"] + 0.5 * line["hidden"], rel=1e-5)


def test_layers_that_turn_the_stream_have_no_part(bench: Bench) -> None:
    """The last of a student with a merged head: its stream has no map of the teacher's."""
    chosen = selection(bench, [1, 3])
    alone = {"layers": [1, 3], "hidden": list(range(3, 27)), "turned": [1]}
    turned = bench.tmp_path / "turned.json"
    turned.write_text(json.dumps(alone))
    options = {"hidden": {"weight": 0.5}, "tokens": 32}
    both, first = (
        steps(bench.run(name, selection=path, **options)[0])[0]["hidden"]
        for name, path in (("both", chosen), ("first", turned))
    )
    matches = [
        open_matches(
            LlamaConfig.from_pretrained(bench.teacher),
            LlamaForCausalLM.from_pretrained(bench.student),
            path,
            DistillSettings(tokens=32, hidden=HiddenLoss(weight=0.5)),
        )[0]
        for path in (chosen, turned)
    ]
    assert [match.student_layers for match in matches] == [(0, 1), (0,)]
    assert [match.teacher_layers for match in matches] == [(1, 3), (1,)]
    assert first != both
    turned.write_text(json.dumps(alone | {"turned": [0, 1]}))
    with pytest.raises(ShearlingError, match="no layer to compare"):
        bench.run("none", selection=turned, **options)


def test_what_attention_adds_is_compared_with_a_weight_that_changes(bench: Bench) -> None:
    options = {
        "attention": {"kind": "mse", "weight": {"start": 1.0, "end": 0.0}},
        "selection": selection(bench, [1, 3]),
        "tokens": 32 * 8 * 3,
    }
    out, _ = bench.run(**options)
    frugal, _ = bench.run("frugal", gradient_checkpointing=True, **options)
    text = TransferSet(bench.text)
    data = StepData(text, DistillSettings(**BASE), seed=0, device=torch.device("cpu"))
    batch = text.batch(data.windows(0))
    found: list[list[torch.Tensor]] = []
    for folder, layers in ((bench.student, [0, 1]), (bench.teacher, [1, 3])):
        model, added = LlamaForCausalLM.from_pretrained(folder), []
        for number in layers:
            model.model.layers[number].self_attn.o_proj.register_forward_hook(
                lambda *event, added=added: added.append(event[2])
            )
        with torch.no_grad():
            model(**batch, use_cache=False)
        found.append(added)
    mask = make_batch(batch["input_ids"], batch["position_ids"], torch.device("cpu")).mask_BT
    expected = [
        (learnt[mask] - taught[mask][:, 3:27]).square().mean()
        for learnt, taught in zip(*found, strict=True)
    ]
    first, middle, last = steps(out)
    assert first["attention"] == pytest.approx(torch.stack(expected).mean().item(), rel=1e-5)
    for line, weight in ((first, 1.0), (middle, 0.5), (last, 0.0)):
        wanted = line["forward_kl"] + weight * line["attention"]
        assert line["loss"] == pytest.approx(wanted, rel=1e-5)
    for one, other in zip(steps(out), steps(frugal), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)


def test_a_map_beside_the_selection_replaces_picking(bench: Bench) -> None:
    chosen = selection(bench, [1, 3])
    picked, _ = bench.run("picked", hidden={"weight": 0.5}, selection=chosen, tokens=256)
    save_file({"hidden": torch.eye(32)[:, 3:27].contiguous()}, chosen.with_suffix(".safetensors"))
    mapped, _ = bench.run("mapped", hidden={"weight": 0.5}, selection=chosen, tokens=256)
    assert steps(mapped)[0]["hidden"] == pytest.approx(steps(picked)[0]["hidden"], rel=1e-5)


def test_a_selection_that_does_not_fit_is_refused_with_a_word(bench: Bench) -> None:
    with pytest.raises(ShearlingError, match="loss of hidden"):
        bench.run(hidden={"weight": 0.5}, selection=selection(bench, [1, 3, 2]))
    with pytest.raises(ShearlingError, match="without the pruner's selection"):
        bench.run(hidden={"weight": 0.5})


# --- text that the student writes ------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_student_s_own_text_counts_up_to_its_end_and_has_no_labels(
    bench: Bench, dtype: str
) -> None:
    from compress.on_policy import continued

    student = LlamaForCausalLM.from_pretrained(bench.student)
    data = StepData(
        TransferSet(bench.text), DistillSettings(**BASE), seed=0, device=torch.device("cpu")
    )
    (batch,) = data.step(0)
    precision = PrecisionChoice(name=dtype, reason="the test's")
    options: dict[str, Any] = {"share": 1.0, "temperature": 1.0, "seed": [0, 3]}
    options["precision"] = precision
    found = continued(student, batch, **options)
    half = 16
    assert torch.equal(found.input_BT[:, :half], batch.input_BT[:, :half])
    assert torch.equal(found.mask_BT[:, : half - 1], batch.mask_BT[:, : half - 1])
    rows = torch.nonzero((found.input_BT != batch.input_BT).any(-1)).flatten().tolist()
    assert len(rows) > 4
    for row in rows:
        own = found.input_BT[row, half:].tolist()
        written = own.index(0) + 1 if 0 in own else len(own) + 1  # 0 is the end of text
        assert found.mask_BT[row, half - 1 :].sum() == written
        begin = int(found.positions_BT[row, half - 1])
        assert found.positions_BT[row, half:].tolist() == list(range(begin + 1, begin + 17))
    labels = torch.full_like(found.input_BT, IGNORED)
    labels[found.mask_BT] = found.labels_N
    assert (labels[rows, half - 1 :] == IGNORED).all()
    assert found.positions == found.mask_BT.sum() > found.labelled
    again = continued(student, batch, **options)
    assert torch.equal(again.input_BT, found.input_BT)
    other = continued(student, batch, **{**options, "seed": [0, 4]})
    assert not torch.equal(other.input_BT, found.input_BT)
    # Each token was drawn from what the student says of the document alone, as it is packed.
    with torch.no_grad(), in_precision(student, precision):
        said = student(found.input_BT, position_ids=found.positions_BT, use_cache=False).logits
    said = said.float()
    taken = said[:, half - 1 : -1].log_softmax(-1).gather(-1, found.input_BT[:, half:, None])
    counted = found.mask_BT[rows, half - 1 : -1]
    surprise = -taken[rows, :, 0][counted].mean()
    entropy = torch.distributions.Categorical(logits=said[rows, half - 1 : -1][counted]).entropy()
    assert surprise == pytest.approx(entropy.mean().item(), rel=0.15)


def test_nobody_writes_another_s_turn(bench: Bench) -> None:
    """Where only answers are learnt, a window that has a question there is left as it is."""
    from compress.on_policy import continued

    student = LlamaForCausalLM.from_pretrained(bench.student)
    ids_BT = torch.randint(3, 300, (4, 16), generator=torch.Generator().manual_seed(0))
    places_BT = torch.arange(16).expand(4, 16)
    learnt_BT = torch.ones(4, 16, dtype=torch.bool)
    learnt_BT[1, 6:12] = learnt_BT[2, 8] = False
    batch = make_batch(ids_BT, places_BT, torch.device("cpu"), [0, 1, 2, 3], learnt_BT)
    precision = PrecisionChoice(name="float32", reason="the test's")
    found = continued(student, batch, share=1.0, temperature=1.0, seed=[0], precision=precision)
    asked_for = batch.mask_BT[:, 7]
    assert asked_for.tolist().count(False) > 0
    assert torch.equal((found.input_BT != ids_BT).any(-1), asked_for)
    assert torch.equal(found.mask_BT[~asked_for], batch.mask_BT[~asked_for])


def test_a_run_on_the_student_s_own_text_learns(bench: Bench) -> None:
    _, summary = bench.run(on_policy=0.5, reverse_kl=0.5, tokens=32 * 8 * 10)
    assert summary["heldout_end"]["heldout_kl"] < 0.95 * summary["heldout_start"]["heldout_kl"]


def test_the_teacher_may_write_instead(bench: Bench) -> None:
    run = {"on_policy": 1.0, "keep": "last", "tokens": 512, "reverse_kl": 0.5}
    by_student, _ = bench.run("student", **run)
    by_teacher, _ = bench.run("teacher", **run, on_policy_writer="teacher")
    again, _ = bench.run("again", **run, on_policy_writer="teacher")
    losses = [[line["loss"] for line in steps(out)] for out in (by_student, by_teacher, again)]
    assert losses[1] == losses[2] != losses[0]


def test_nobody_writes_without_on_policy() -> None:
    with pytest.raises(ValidationError, match="set on_policy above 0"):
        DistillSettings(tokens=1, on_policy_writer="teacher")
    assert "on_policy_writer" not in DistillSettings(tokens=1).model_dump()
    written = DistillSettings(tokens=1, on_policy=0.5, on_policy_writer="teacher").model_dump()
    assert written["on_policy_writer"] == "teacher"


# --- several teachers, or none ---------------------------------------------------------------


@pytest.mark.parametrize("targets", ["live", "sample"])
def test_two_teachers_are_mixed_by_weight(bench: Bench, targets: str) -> None:
    other = make_tiny_llama(bench.tmp_path / "other", seed=9, hidden_size=40)
    options = {"targets": targets, "target_slots": 256, "tokens": 512, "keep": "last"}

    def first(name: str, *teachers: Taught) -> float:
        return float(steps(bench.run(name, teachers=teachers, **options)[0])[0]["forward_kl"])

    one, two = Taught(bench.teacher, 1.0), Taught(other, 3.0)
    apart, mixed = [first("one", one), first("two", two)], first("mixed", one, two)
    weighted = 0.25 * apart[0] + 0.75 * apart[1]
    if targets == "live":  # the mixture is flatter, and so nearer, than its parts
        assert 0 < mixed < weighted
    else:
        assert mixed == pytest.approx(weighted, rel=2e-2)


def test_teachers_may_differ_in_their_chat_templates(bench: Bench) -> None:
    assert bench.teacher is not None
    other = bench.tmp_path / "instruct"
    shutil.copytree(bench.teacher, other)
    (other / "chat_template.jinja").write_text("{{ messages[0].content }}", encoding="utf-8")
    bench.run(teachers=[Taught(bench.teacher), Taught(other)])


def test_the_order_of_further_teachers_says_nothing() -> None:
    assert in_order(["b", "teacher", "a"]) == in_order(["a", "b", "teacher"])
    assert in_order(["b", "teacher", "a"])[0] == "teacher"


def test_teachers_with_other_tokenizers_are_refused(bench: Bench) -> None:
    other = make_tiny_llama(bench.tmp_path / "other", vocabulary=300)
    with pytest.raises(ShearlingError, match="another tokenizer"):
        bench.run(teachers=[Taught(bench.teacher), Taught(other)])


def test_a_teacher_is_corrected_by_labels_alone(bench: Bench) -> None:
    bench.student, bench.teacher = bench.teacher, None  # type: ignore[assignment]
    settings = CorrectSettings(
        tokens=32 * 8 * 12, batch_tokens=32 * 8, learning_rate=5e-3, precision="float32"
    ).as_distillation()
    out, summary = bench.run(settings=settings)
    start, end = summary["heldout_start"], summary["heldout_end"]
    assert end["heldout_perplexity"] < 0.5 * start["heldout_perplexity"]
    assert "heldout_kl" not in end
    assert not {"forward_kl", "hidden"} & steps(out)[0].keys()
    assert steps(out)[0]["loss"] == pytest.approx(steps(out)[0]["cross_entropy"], rel=1e-6)
    assert LlamaForCausalLM.from_pretrained(out / "model").config.num_hidden_layers == 4


# --- it stops with a word --------------------------------------------------------------------


def test_an_exploding_loss_stops_with_the_step_and_keeps_the_last_checkpoint(bench: Bench) -> None:
    with pytest.raises(ShearlingError, match=r"step \d+") as caught:
        bench.run(
            tokens=32 * 8 * 60, learning_rate=50.0, warmup=0.5, clip=1e9, save_every_seconds=0
        )
    assert "Lower learning_rate (now 50) or clip (now 1e+09), or" in caught.value.hint
    kept = sorted((bench.tmp_path / "out" / "resume").glob("step-*"))
    assert len(kept) == 1
    weights = load_file(kept[0] / "student.safetensors")
    assert all(weight.isfinite().all() for weight in weights.values())


def test_a_held_out_loss_that_explodes_stops_and_names_the_best_weights(bench: Bench) -> None:
    """Slow enough growth is never a jump of the loss above its running mean."""
    with pytest.raises(
        ShearlingError, match=r"the KL on held-out text is .*, after step \d+ it"
    ) as c:
        bench.run(tokens=32 * 8 * 400, learning_rate=2.0, warmup=1.0, evaluate_every=1, clip=1e9)
    best = re.search(r"step (\d+), the best on held-out text, .* as (\S+)\.$", c.value.hint)
    assert best, c.value.hint
    kept = load_file(bench.tmp_path / "out" / best[2])
    assert all(weight.isfinite().all() for weight in kept.values())
    assert best[2] == f"resume/best-{int(best[1]):08d}.safetensors"


@pytest.mark.parametrize("cause", [{"weight_decay": 1e8}, {"embedding_learning_rate": 1e8}])
def test_a_divergence_names_first_what_is_unusual(bench: Bench, cause: dict[str, float]) -> None:
    with pytest.raises(ShearlingError) as caught:
        bench.run(tokens=32 * 8 * 20, warmup=0.0, evaluate_every=0, **cause)
    (name,) = cause
    assert f"ower {name} (now 1e+08), learning_rate (now " in caught.value.hint


def test_an_exploding_loss_says_that_nothing_was_kept_where_nothing_was(bench: Bench) -> None:
    options = {"tokens": 32 * 8 * 60, "learning_rate": 50.0, "warmup": 0.5, "clip": 1e9}
    with pytest.raises(ShearlingError) as caught:
        bench.run(evaluate_every=0, save_every_seconds=3600, **options)
    assert "No checkpoint had been written" in caught.value.hint
    assert not list((bench.tmp_path / "out" / "resume").glob("step-*"))
    with pytest.raises(ShearlingError) as caught:
        bench.run(evaluate_every=0, save_every_seconds=0, **options)
    (kept,) = (bench.tmp_path / "out" / "resume").glob("step-*")
    assert f"behind step {int(kept.name.removeprefix('step-'))}," in caught.value.hint


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_layers_learn_the_same_and_the_student_is_saved(bench: Bench) -> None:
    options = {"tokens": 32 * 8 * 2, "position_clip": 1.0}
    plain, _ = bench.run("plain", **options)
    compiled, summary = bench.run("compiled", compile=True, **options)
    assert summary["heldout_end"]["step"] == 2
    for one, other in zip(steps(plain), steps(compiled), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-3)


def test_a_spike_is_left_out_where_the_recipe_says_so(bench: Bench) -> None:
    """Steps that jump leave the weights alone; five in a row are taken for divergence."""
    options = {"tokens": 32 * 8 * 60, "learning_rate": 50.0, "warmup": 0.5, "clip": 1e9}
    with pytest.raises(ShearlingError, match="6 steps in a row"):
        bench.run(spikes="skip", evaluate_every=0, **options)
    out = bench.tmp_path / "out"
    skipped = [line for line in steps(out) if line.get("skipped")]
    assert len(skipped) >= 5
    assert skipped == steps(out)[-len(skipped) :] or len(skipped) > 5


def test_a_weight_that_grows_is_no_divergence(bench: Bench) -> None:
    grows = {"start": 0.0, "end": 1.0, "shape": "cosine"}
    options = {"tokens": 32 * 8 * 40, "evaluate_every": 0, "learning_rate": 1e-4}
    out, summary = bench.run(forward_kl=grows, **options)
    assert summary["steps"] == 40
    losses = [line["loss"] for line in steps(out)]
    usual = reduce(lambda mean, loss: 0.9 * mean + 0.1 * loss, losses[:10])
    assert losses[10] > 4 * usual, "the weighted sum alone does jump"


@pytest.mark.parametrize(("positions", "jump"), [(4096, 4.1), (64, 4.1), (16, 8.1), (1, 32.1)])
def test_a_mean_of_few_positions_may_lie_further_off(positions: int, jump: float) -> None:
    """A step of long prompts may hold one answer of a few words."""
    course = SimpleNamespace(running_loss=0.5, step=20)
    line = {"loss": 1.0, "gradient_norm": 1.0, "step": 21}
    told = _what_is_wrong(cast(Course, course), line, 0.5 * jump, positions)
    assert told is not None
    assert "jumped from about 0.5" in told
    below = 0.5 * (jump - 0.2)
    assert _what_is_wrong(cast(Course, course), line, below, positions) is None


def test_a_checkpoint_of_other_models_or_text_is_refused(
    bench: Bench, tiny_llama: Path, tmp_path: Path
) -> None:
    """It would go on with the wrong teacher without a word."""
    options = {"tokens": 32 * 8 * 60, "learning_rate": 50.0, "warmup": 0.5, "clip": 1e9}
    options |= {"evaluate_every": 0, "save_every_seconds": 0}
    with pytest.raises(ShearlingError, match="jumped"):
        bench.run(**options)
    before, other = bench.teacher, tmp_path / "other"
    model = LlamaForCausalLM.from_pretrained(tiny_llama)
    with torch.no_grad():
        model.model.norm.weight.mul_(1.01)
    model.save_pretrained(other)
    copy_tokenizer(tiny_llama, other)
    bench.teacher = other
    with pytest.raises(ShearlingError, match="other settings, models or text"):
        bench.run(**options)
    bench.teacher = before
    with pytest.raises(ShearlingError, match="jumped"):
        bench.run(**options)


def test_a_nan_in_the_weights_is_named_at_once(bench: Bench) -> None:
    broken = bench.tmp_path / "broken"
    model = LlamaForCausalLM.from_pretrained(bench.student)
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    model.save_pretrained(broken)
    bench.student = broken
    with pytest.raises(ShearlingError, match="nan"):
        bench.run()
    assert not (bench.tmp_path / "out" / "model").exists()


@pytest.mark.parametrize("nothing", [0.0, {"start": 0.0, "end": 0.0}])
def test_a_loss_of_nothing_is_refused(nothing: Any) -> None:
    with pytest.raises(ValidationError, match="every weight is 0"):
        DistillSettings(tokens=1, forward_kl=nothing, cross_entropy=0.0)
    DistillSettings(tokens=1, forward_kl=nothing, cross_entropy=0.0, hidden={"weight": 1.0})


def test_a_missing_model_is_named(bench: Bench) -> None:
    bench.student = bench.tmp_path / "nowhere"
    with pytest.raises(ShearlingError, match="nowhere"):
        bench.run()
