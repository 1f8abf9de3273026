"""Pruning against oracles: what carries nothing can be cut without changing a logit."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from shapes import llama3_rope
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from compress import greedy
from compress.basis import principal_basis
from compress.coupling import derive_coupling
from compress.depth import layers_by_divergence
from compress.importance import channel_energy
from compress.layer import OPENING_EVERY, LayerMath, openings, read_layer
from compress.merging import MERGES, BothEnds, joint_ends
from compress.prune import prune
from compress.reconstruct import (
    RIDGES,
    Moments,
    RidgeFit,
    SplitMoments,
    final_norm_refit,
    judging,
)
from compress.saving import save_student
from compress.selection import (
    LayerSelection,
    Plan,
    check_rotary,
    choose_heads,
    choose_layers,
    read_map,
    rotary_channels,
    top,
)
from compress.settings import PruneSettings
from compress.slicing import Slicer
from compress.streams import Streams
from compress.walk import GAUGE_EVERY
from pipelines.recipe import PruneStage
from pipelines.tiny import make_tiny_llama
from shearling import Progress, ShearlingError, read_json, silent
from students.build import StudentWriter
from students.shape import Shape
from teachers.checkpoint import Checkpoint
from teachers.tokenizer import copy_tokenizer
from teachers.transfer_set import TransferSet

PROBE = torch.tensor([[5, 9, 2, 33, 71, 8, 120, 4, 19, 200, 31, 77, 6, 90, 41, 3]])
Edit = Callable[[LlamaForCausalLM], None]


def load(folder: Path) -> LlamaForCausalLM:
    model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


@torch.no_grad()
def logits(folder: Path) -> Tensor:
    answer: Tensor = load(folder)(PROBE).logits
    return answer


def edited(source: Path, folder: Path, edit: Edit, dtype: torch.dtype = torch.float32) -> Path:
    """A copy of a model with its weights changed by ``edit``, stored in ``dtype``."""
    model = load(source)
    with torch.no_grad():
        edit(model)
    model.to(dtype).save_pretrained(folder)
    copy_tokenizer(source, folder)
    return folder


def cut(
    teacher: Path,
    out: Path,
    transfer_set: Path,
    axes: dict[str, Any],
    *,
    seed: int = 0,
    progress: Progress = silent,
    **settings: Any,
) -> dict[str, Any]:
    shape = replace(Checkpoint(teacher).shape, **axes)
    chosen = PruneSettings(calibration_tokens=2048, precision="float32", **settings)
    return prune(teacher, out, shape, transfer_set, chosen, seed=seed, progress=progress)


# --- parts


@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("bias", [False, True])
def test_the_graph_tells_what_is_coupled(tiny_llama: Path, kv_heads: int, bias: bool) -> None:
    config = LlamaConfig.from_pretrained(tiny_llama)
    config.update({"num_key_value_heads": kv_heads, "attention_bias": bias, "mlp_bias": bias})
    axes = derive_coupling(config).axes
    key_value = "key_value" if kv_heads < 4 else "query"
    assert axes["model.embed_tokens.weight"] == ("whole", "hidden")
    assert axes["lm_head.weight"] == ("whole", "hidden")
    assert axes["self_attn.q_proj.weight"] == ("query", "hidden")
    assert axes["self_attn.k_proj.weight"] == (key_value, "hidden")
    assert axes["self_attn.v_proj.weight"] == (key_value, "hidden")
    assert axes["self_attn.o_proj.weight"] == ("hidden", "query")
    assert axes["mlp.up_proj.weight"] == ("neurons", "hidden")
    assert axes["mlp.down_proj.weight"] == ("hidden", "neurons")
    assert axes["input_layernorm.weight"] == ("hidden",)
    assert ("mlp.down_proj.bias" in axes) is bias
    if bias:
        assert axes["mlp.down_proj.bias"] == ("hidden",)
        assert axes["self_attn.q_proj.bias"] == ("query",)


@pytest.mark.parametrize("repeated", [False, True])
def test_a_layer_walked_by_hand_is_the_stock_layer(tiny_llama: Path, repeated: bool) -> None:
    source, model = Checkpoint(tiny_llama), load(tiny_llama)
    maths = LayerMath(source.config, PROBE.shape[1], torch.device("cpu"), torch.float32)
    assert not maths.repeats_heads
    maths.repeats_heads = repeated  # as on an accelerator
    with torch.no_grad():
        states = model.model(PROBE, output_hidden_states=True).hidden_states
        for number in range(2):
            walked = maths.layer(states[number], read_layer(source, number, torch.device("cpu")))
            torch.testing.assert_close(walked, states[number + 1], rtol=1e-5, atol=1e-6)


def test_ridge_refit_finds_the_weights_that_made_the_targets() -> None:
    torch.manual_seed(0)
    inputs, weight = torch.randn(400, 12), torch.randn(5, 12)
    moments = Moments.zeros(12, 5, torch.device("cpu"))
    for part in inputs.split(100):
        moments.add(part, part @ weight.T, torch.rand(len(part)) + 0.1)
    start = torch.zeros(5, 12)
    fit = RidgeFit(moments, start)
    assert moments.relative_error(start) == pytest.approx(1)
    found = fit.solve(1e-9)
    torch.testing.assert_close(found.weight_OI, weight, rtol=1e-4, atol=1e-4)
    assert moments.relative_error(found.weight_OI) < 1e-6
    assert found.error < 1e-6
    # A strong pull leaves the sliced weights as they are.
    torch.testing.assert_close(fit.solve(1e9).weight_OI, start, atol=1e-6, rtol=0)


@pytest.mark.parametrize("at_once", [2, 2048])
def test_a_fit_knows_its_errors_without_another_product(
    monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr("compress.reconstruct._SOLVED", at_once)
    moments = Moments.zeros(12, 5, torch.device("cpu"))
    read, wanted, weight = torch.randn(90, 12), torch.randn(90, 5), torch.rand(90)
    moments.add(read, wanted, weight)
    start = 0.1 * torch.randn(5, 12)
    wrong = weight @ (read @ start.T - wanted).square().sum(1)
    sliced_error = float(wrong / (weight @ wanted.square().sum(1)))
    assert moments.relative_error(start) == pytest.approx(sliced_error, rel=1e-5)
    everything = SplitMoments(12, 5, torch.device("cpu"))
    everything.add(read, wanted, weight, torch.arange(90) % 8 == 0)
    assert everything.refit(start, 0.1).sliced_error == pytest.approx(sliced_error, rel=1e-5)
    fit = RidgeFit(moments, start)
    inputs = torch.eye(12, dtype=torch.float64)
    for ridge in (1.0, 0.01):
        found = fit.solve(ridge)
        assert found.error == pytest.approx(moments.relative_error(found.weight_OI), rel=1e-5)
        gram = moments.gram_II.double()
        shift = ridge * gram.diagonal().mean() * inputs
        wanted = torch.linalg.solve(gram + shift, moments.cross_IO + shift @ start.T.double())
        torch.testing.assert_close(found.weight_OI, wanted.T.float(), rtol=1e-5, atol=1e-6)


def test_moments_of_rounded_factors_are_added_up_in_float32() -> None:
    """More columns than are multiplied at one time; many positions, of very different size."""
    torch.manual_seed(0)
    read, wanted = torch.randn(3000, 1030) * torch.rand(1030).exp(), torch.randn(3000, 7)
    weight = torch.rand(3000).mul(8).exp()
    before = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    rounded, exact = (
        Moments.zeros(1030, 7, torch.device("cpu"), dtype)
        for dtype in (torch.bfloat16, torch.float32)
    )
    for some in torch.arange(3000).split(100):
        for moments in (rounded, exact):
            moments.add(read[some], wanted[some], weight[some])
    assert torch.backends.mkldnn.matmul.fp32_precision == before  # type: ignore[attr-defined]
    torch.testing.assert_close(rounded.gram_II, rounded.gram_II.T, rtol=1e-6, atol=1e-3)
    size_I = exact.gram_II.diagonal().sqrt()
    for ours, theirs, size_O in (
        (rounded.gram_II, exact.gram_II, size_I),
        (rounded.cross_IO, exact.cross_IO, exact.target_energy.sqrt() / 7**0.5),
    ):
        wrong = (ours - theirs) / (size_I[:, None] * size_O)
        assert float(wrong.abs().max()) < 1e-3  # one part in 2^9, the mean of 3,000
    assert torch.linalg.cholesky_ex(rounded.gram_II).info == 0


def test_inputs_are_scaled_toward_what_a_map_makes_of_the_targets() -> None:
    torch.manual_seed(0)
    read, wanted, through = torch.randn(90, 6), torch.randn(90, 4), torch.randn(6, 4)
    moments = SplitMoments(6, 4, torch.device("cpu"))
    assert moments.scale_toward(through) == 1
    moments.add(read, wanted, None, torch.arange(90) % 8 == 7)
    best = float((read * (wanted @ through.T)).sum() / read.square().sum())
    assert moments.scale_toward(through) == pytest.approx(best, rel=1e-4)


def test_ridge_refit_survives_a_singular_gram() -> None:
    moments = Moments.zeros(6, 2, torch.device("cpu"))
    one = torch.ones(8, 6)  # rank one
    moments.add(one, torch.ones(8, 2), torch.ones(8))
    moments.gram_II.diagonal().sub_(1e-4)  # by rounding, five eigenvalues below zero
    found = RidgeFit(moments, torch.zeros(2, 6)).solve(1e-30)
    fitted = one @ found.weight_OI.T
    torch.testing.assert_close(fitted, torch.ones(8, 2), rtol=1e-3, atol=1e-3)
    assert found.ridge > 1e-30  # the one that was needed, not the one asked for


@pytest.mark.parametrize("near", [0.001, 0.002, 0.1, 10.0, 1e4])
def test_the_search_for_a_ridge_begins_anywhere(near: float) -> None:
    torch.manual_seed(0)
    read = torch.randn(64, 6)
    moments = SplitMoments(6, 2, torch.device("cpu"))
    target = read @ torch.randn(6, 2) + 0.1 * torch.randn(64, 2)
    moments.add(read, target, None, torch.arange(64) % 8 == 7)
    assert moments.refit(torch.zeros(2, 6), None, near=near).ridge == RIDGES[0]


def test_the_ridge_is_chosen_by_what_held_out_positions_say() -> None:
    """Few noisy positions want a strong pull; many clean ones hardly any."""
    torch.manual_seed(0)
    truth, start = torch.randn(4, 30), torch.zeros(4, 30)
    chosen = {}
    for positions, noise in ((40, 20.0), (4000, 0.01)):
        moments = SplitMoments(30, 4, torch.device("cpu"))
        inputs = torch.randn(positions, 30)
        targets = inputs @ truth.T + noise * torch.randn(positions, 4)
        held = torch.arange(positions) % 8 == 7
        moments.add(inputs, targets, torch.ones(positions), held)
        chosen[positions] = moments.refit(start, None).ridge
    assert chosen[40] > 10 * chosen[4000]


def test_final_norm_refit_minimises_the_logits_distance() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(200, 4), torch.randn(200, 6)
    head, hidden = torch.randn(9, 6), torch.tensor([0, 2, 3, 5])

    def distance(norm: Tensor) -> Tensor:
        return ((student * norm) @ head[:, hidden].T - teacher @ head.T).square().sum()

    start, metric = torch.ones(4), (head.T @ head)[hidden]
    found = final_norm_refit(
        student.T @ student, student.T @ teacher, metric[:, hidden], metric, start, 1e-12
    ).requires_grad_()
    (slope,) = torch.autograd.grad(distance(found), found)
    assert float(slope.abs().max()) < 1e-3 * float(distance(start))
    assert float(distance(found)) < float(distance(start))


def test_channel_energy_is_the_mean_over_positions_and_l2_over_windows() -> None:
    activations = torch.tensor([[[1.0, -2.0], [3.0, 0.0]], [[0.0, 4.0], [0.0, 4.0]]])
    torch.testing.assert_close(
        channel_energy(activations), torch.tensor([4.0, 1.0 + 16.0], dtype=torch.float64)
    )


def test_heads_stay_inside_their_groups() -> None:
    scores = torch.tensor([1.0, 9.0, 2.0, 8.0, 3.0, 3.0, 0.5, 0.1])
    heads, groups = choose_heads(scores, teacher_kv=4, kv_heads=2, heads=2)
    assert groups.tolist() == [0, 1]
    assert heads.tolist() == [1, 3]


def test_depth_by_cosine_contiguous_and_list() -> None:
    distances = [0.9, 0.1, 0.5, 0.2, 0.3, 0.8]
    assert choose_layers(distances, 4, "cosine") == [0, 2, 4, 5]
    assert choose_layers(distances, 4, "contiguous") == [0, 1, 2, 5]
    assert choose_layers(distances, 2, [1, 4]) == [1, 4]


def test_equal_scores_keep_the_earlier() -> None:
    assert top(torch.tensor([1.0, 1.0, 1.0, 2.0]), 2).tolist() == [0, 3]


@pytest.mark.parametrize("scaled", [False, True])
def test_every_second_rotary_pair_turns_as_a_stock_head_of_half_the_width(scaled: bool) -> None:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 500000.0}
    if scaled:
        rope = llama3_rope()
    wide, narrow = (
        LlamaRotaryEmbedding(LlamaConfig(head_dim=dim, rope_parameters=rope)).inv_freq
        for dim in (128, 64)
    )
    kept = rotary_channels(128, 64)[:32]
    torch.testing.assert_close(wide[kept], narrow, rtol=0, atol=0)
    with pytest.raises(ShearlingError, match="does not divide"):
        rotary_channels(128, 48)


def test_all_that_cuts_a_layer_lies_where_the_layer_does(tiny_llama: Path) -> None:
    """``meta`` stands for an accelerator: nothing of the CPU's may be mixed with what is there."""
    source, place = Checkpoint(tiny_llama), torch.device("meta")
    whole = source.shape
    axes = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4}
    student = replace(whole, **axes, hidden_size=24, intermediate_size=40)
    kept = LayerSelection(
        heads=torch.arange(2), key_value_heads=torch.arange(1), neurons=torch.arange(40)
    )
    plan = Plan(
        layers=[0],
        hidden=torch.arange(24),
        basis_DE=torch.eye(24, whole.hidden_size),
        chosen=[kept],
        value_basis_KCc=[torch.eye(whole.head_dim)[None, :, :4]],
    )
    coupling = derive_coupling(source.config)
    slicer = Slicer(teacher=whole, student=student, plan=plan.to(place), coupling=coupling)
    teacher = read_layer(source, 0, place)
    cut_layer = slicer.layer(0, teacher)
    said_NO = torch.empty(7, whole.query_size, device=place)
    assert {weight.device for weight in cut_layer.values()} == {place}
    assert cut_layer["self_attn.q_proj.weight"].shape == (8, 24)
    assert slicer.target(0, "self_attn.q_proj", said_NO).shape == (7, 8)
    assert slicer.kept(torch.empty(1, 7, whole.hidden_size, device=place)).shape == (1, 7, 24)


def test_heads_that_would_turn_otherwise_are_refused() -> None:
    """YaRN scales by a pair's number, longrope by a list of as many factors as there are pairs."""
    yarn = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}
    long = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0}
    long |= {name: [1.0 + 0.01 * i for i in range(64)] for name in ("short_factor", "long_factor")}
    linear = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}

    def config(head_dim: int, rope: dict[str, Any]) -> LlamaConfig:
        original = {"original_max_position_embeddings": 32768}
        return LlamaConfig(head_dim=head_dim, rope_parameters={**rope, **original})

    check_rotary(config(128, linear), config(64, linear))
    for rope in (yarn, long, dynamic):
        check_rotary(config(128, rope), config(128, rope))
        with pytest.raises(ShearlingError, match=f"{rope['rope_type']}.* no heads"):
            check_rotary(config(128, rope), config(64, rope))


def test_inputs_that_never_spoke_leave_the_weights_alone() -> None:
    moments = SplitMoments(6, 2, torch.device("cpu"))
    held = torch.arange(16) % 8 == 7
    moments.add(torch.zeros(16, 6), torch.zeros(16, 2), torch.ones(16), held)
    start = torch.randn(2, 6)
    assert torch.equal(moments.refit(start, None).weight_OI, start)


# --- the whole stage


def test_the_teachers_own_shape_gives_the_teacher(
    tiny_llama: Path, tiny_transfer_set: Path, tmp_path: Path
) -> None:
    for refit in (False, True):
        cut(tiny_llama, tmp_path / str(refit), tiny_transfer_set, {}, refit=refit)
        torch.testing.assert_close(
            logits(tmp_path / str(refit) / "model"), logits(tiny_llama), rtol=1e-3, atol=1e-4
        )


LLAMA_3 = llama3_rope(original=64)
FAMILIES: dict[str, tuple[dict[str, Any], torch.dtype]] = {
    "Llama 1": ({"num_key_value_heads": 4, "tie_word_embeddings": False}, torch.float16),
    "Llama 2 70B": ({"tie_word_embeddings": False}, torch.bfloat16),
    "CodeLlama": (
        {"num_key_value_heads": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        torch.bfloat16,
    ),
    "Llama 3.1": ({"tie_word_embeddings": False, "rope_parameters": LLAMA_3}, torch.bfloat16),
    "Llama 3.2": ({"rope_parameters": LLAMA_3}, torch.bfloat16),
    "one key/value head": ({"num_key_value_heads": 1}, torch.float32),
    "biases": ({"attention_bias": True, "mlp_bias": True}, torch.float32),
    "in float64": ({"tie_word_embeddings": False, "attention_bias": True}, torch.float64),
    "biases, ungrouped": (
        {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True},
        torch.float32,
    ),
}


def draw_biases(model: LlamaForCausalLM) -> None:
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.normal_(0, 0.3)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_llama_keeps_its_answers_and_can_be_cut_on_every_axis(
    tiny_transfer_set: Path, tmp_path: Path, family: str
) -> None:
    axes, dtype = FAMILIES[family]
    source = make_tiny_llama(tmp_path / "source", **axes)
    teacher = edited(source, tmp_path / "teacher", draw_biases, dtype)
    cut(teacher, tmp_path / "same", tiny_transfer_set, {})
    wanted = logits(teacher)
    rounding = max(1e-5, 4 * torch.finfo(dtype).eps)
    error = (logits(tmp_path / "same/model") - wanted).abs().max() / wanted.abs().max()
    assert float(error) < rounding
    heads = Checkpoint(teacher).shape.num_key_value_heads
    narrow = {"hidden_size": 24, "num_hidden_layers": 3, "head_dim": 4, "intermediate_size": 40}
    narrow |= {"num_attention_heads": 2, "num_key_value_heads": min(2, heads)}
    cut(teacher, tmp_path / "narrow", tiny_transfer_set, narrow)
    student = Checkpoint(tmp_path / "narrow/model")
    assert student.shape == replace(Checkpoint(teacher).shape, **narrow)
    assert student.torch_dtype is dtype


def halve_heads(model: LlamaForCausalLM) -> None:
    """Of every head half of the rotary pairs and half of the values' space say nothing."""
    torch.manual_seed(1)
    wide, narrow = 8, 4
    silent = [c for c in range(wide) if c not in rotary_channels(wide, narrow).tolist()]
    basis = torch.linalg.qr(torch.randn(wide, narrow))[0]
    projection = basis @ basis.T
    for layer in model.model.layers:
        attention = layer.self_attn
        for rows in (attention.q_proj.weight, attention.q_proj.bias):
            if rows is not None:
                rows.view(-1, wide, *rows.shape[1:])[:, silent] = 0
        for rows in (attention.v_proj.weight, attention.v_proj.bias):
            if rows is not None:
                heads = rows.view(-1, wide, *rows.shape[1:])
                heads.copy_(torch.einsum("ac,kc...->ka...", projection, heads))


@pytest.mark.parametrize("family", FAMILIES)
def test_half_a_head_that_says_nothing_is_cut_without_a_trace(
    tiny_transfer_set: Path, tmp_path: Path, family: str
) -> None:
    source = make_tiny_llama(tmp_path / "source", **FAMILIES[family][0])

    def edit(model: LlamaForCausalLM) -> None:
        draw_biases(model)
        halve_heads(model)

    teacher = edited(source, tmp_path / "teacher", edit)
    for refit in (False, True):
        out = tmp_path / str(refit)
        cut(teacher, out, tiny_transfer_set, {"head_dim": 4}, refit=refit)
        torch.testing.assert_close(logits(out / "model"), logits(teacher), rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("kept", [[0, 1, 3], [0, 1, 2], [1, 2, 3], [2]])
def test_the_teachers_stream_is_the_teachers_whatever_layers_go(
    tiny_llama: Path, tiny_transfer_set: Path, tmp_path: Path, kept: list[int]
) -> None:
    """The student's layers are refitted, so its error behind the last one is small only if what
    they are held against is the whole teacher's stream."""
    windows = TransferSet(tiny_transfer_set).calibration(2048, 0)
    axes = {"num_hidden_layers": len(kept)}
    found = cut(tiny_llama, tmp_path / "cut", tiny_transfer_set, axes, depth=kept)

    def last_stream(folder: Path) -> Tensor:
        seen: list[Tensor] = []
        model = load(folder)
        model.model.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        with torch.no_grad():
            model(windows, use_cache=False)
        return seen[0]

    ours, theirs = last_stream(tmp_path / "cut/model"), last_stream(tiny_llama)
    larger_BT = torch.maximum(ours.square().sum(-1), theirs.square().sum(-1))
    wrong_BT = (ours - theirs).square().sum(-1) / larger_BT
    gauged = float(wrong_BT[::GAUGE_EVERY].mean())
    assert found["stream_error"] == pytest.approx(gauged, rel=1e-3)


def test_layers_that_say_nothing_on_the_text_are_kept_as_they_are(
    tiny_llama: Path, tiny_transfer_set: Path, tmp_path: Path
) -> None:
    """As in a teacher whose attention or FFN was pruned away: their maps read zeros."""

    def silence(model: LlamaForCausalLM) -> None:
        model.model.layers[1].self_attn.v_proj.weight.zero_()
        model.model.layers[2].mlp.up_proj.weight.zero_()

    teacher = edited(tiny_llama, tmp_path / "teacher", silence)
    cut(teacher, tmp_path / "out", tiny_transfer_set, {})
    torch.testing.assert_close(
        logits(tmp_path / "out/model"), logits(teacher), rtol=1e-3, atol=1e-4
    )


def test_the_student_is_stored_as_most_of_the_teacher_is(
    tiny_llama: Path, tiny_transfer_set: Path, tmp_path: Path
) -> None:
    """Conversions often leave the norms in float32."""
    teacher = edited(tiny_llama, tmp_path / "teacher", lambda _: None, torch.bfloat16)
    file = teacher / "model.safetensors"
    weights = {n: t.float() if "norm" in n else t for n, t in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    cut(teacher, tmp_path / "out", tiny_transfer_set, AXES)
    assert Checkpoint(tmp_path / "out/model").dtype == "BF16"


def silence_neurons(model: LlamaForCausalLM) -> None:
    for layer in model.model.layers:
        layer.mlp.down_proj.weight[:, 3::4] = 0


def silence_heads(model: LlamaForCausalLM) -> None:
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[:, 8:16] = 0  # head 1 of group 0
        layer.self_attn.o_proj.weight[:, 16:24] = 0  # head 2, of group 1


def silence_group(model: LlamaForCausalLM) -> None:
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[:, :16] = 0


def silence_layer(model: LlamaForCausalLM) -> None:
    model.model.layers[2].self_attn.o_proj.weight.zero_()
    model.model.layers[2].mlp.down_proj.weight.zero_()


SILENT = {
    "neurons": (silence_neurons, {"intermediate_size": 48}),
    "heads": (silence_heads, {"num_attention_heads": 2}),
    "groups": (silence_group, {"num_attention_heads": 2, "num_key_value_heads": 1}),
    "layers": (silence_layer, {"num_hidden_layers": 3}),
}


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize("part", SILENT)
def test_a_part_that_says_nothing_is_cut_without_a_trace(
    tiny_llama: Path, tiny_transfer_set: Path, tmp_path: Path, part: str, refit: bool
) -> None:
    edit, axes = SILENT[part]
    teacher = edited(tiny_llama, tmp_path / "teacher", edit)
    cut(teacher, tmp_path / "out", tiny_transfer_set, axes, refit=refit)
    torch.testing.assert_close(
        logits(tmp_path / "out" / "model"), logits(teacher), rtol=2e-3, atol=2e-4
    )


def test_unused_hidden_dims_are_cut_and_the_norms_take_the_change_of_scale(
    tiny_llama: Path, tiny_transfer_set: Path, tmp_path: Path
) -> None:
    def silence(model: LlamaForCausalLM) -> None:
        dead = torch.arange(0, 32, 4)
        model.model.embed_tokens.weight[:, dead] = 0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[dead] = 0
            layer.mlp.down_proj.weight[dead] = 0

    teacher = edited(tiny_llama, tmp_path / "teacher", silence)
    cut(teacher, tmp_path / "out", tiny_transfer_set, {"hidden_size": 24}, ridge=1e-6, basis="dims")
    kept = read_json(tmp_path / "out" / "selection.json")["hidden"]
    assert all(dim % 4 for dim in kept)
    torch.testing.assert_close(
        logits(tmp_path / "out" / "model"), logits(teacher), rtol=1e-2, atol=1e-3
    )


@pytest.mark.parametrize("tied", [True, False])
def test_a_stream_in_a_subspace_is_cut_to_it_without_a_trace(
    tiny_llama: Path, tiny_llama_untied: Path, tiny_transfer_set: Path, tmp_path: Path, tied: bool
) -> None:
    """24 directions of 32 dims carry all there is; no dim of them is silent."""
    basis_DE = torch.linalg.qr(torch.randn(32, 24))[0].T

    def embed_in_subspace(model: LlamaForCausalLM) -> None:
        if tied:
            model.model.norm.weight.fill_(1.5)  # else the head would look out of the subspace
        embedding = model.model.embed_tokens.weight
        embedding.copy_(embedding[:, :24] @ basis_DE)
        for layer in model.model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight.uniform_(0.5, 2.0)
            for output in (layer.self_attn.o_proj, layer.mlp.down_proj):
                output.weight.copy_(basis_DE.T @ output.weight[:24])

    source = tiny_llama if tied else tiny_llama_untied
    teacher = edited(source, tmp_path / "teacher", embed_in_subspace)
    cut(teacher, tmp_path / "out", tiny_transfer_set, {"hidden_size": 24}, ridge=1e-6)
    torch.testing.assert_close(
        logits(tmp_path / "out" / "model"), logits(teacher), rtol=1e-2, atol=5e-3
    )
    map_ED = read_map(tmp_path / "out" / "selection.json")
    assert map_ED is not None
    torch.testing.assert_close(map_ED.T @ map_ED, torch.eye(24), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(basis_DE @ map_ED @ map_ED.T, basis_DE, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("basis", ["principal", "dims"])
def test_what_only_the_head_reads_stays(
    tiny_llama: Path, tiny_transfer_set: Path, tmp_path: Path, basis: str
) -> None:
    """The last layer writes where the stream was hardly anything before."""

    def shout(model: LlamaForCausalLM) -> None:
        model.model.embed_tokens.weight[:, 5] = 0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[5] = 0
            layer.mlp.down_proj.weight[5] = 0
        model.model.layers[-1].mlp.down_proj.weight[5] = 30.0

    teacher = edited(tiny_llama, tmp_path / "teacher", shout)
    cut(teacher, tmp_path / "out", tiny_transfer_set, {"hidden_size": 8}, basis=basis)
    selection = tmp_path / "out" / "selection.json"
    assert 5 in read_json(selection)["hidden"]
    map_ED = read_map(selection)
    assert (map_ED is None) == (basis == "dims")
    assert map_ED is None or map_ED[5].norm() > 0.95


def test_the_basis_lies_near_the_dims_that_it_is_turned_toward() -> None:
    sizes_E = torch.linspace(3, 0.1, 16)
    mixing_EE = torch.linalg.qr(torch.eye(16) + 0.05 * torch.randn(16, 16))[0]
    gram_EE = mixing_EE @ torch.diag(sizes_E) @ mixing_EE.T
    dims_D = torch.tensor([1, 3, 4, 6, 7, 9])
    basis_DE = principal_basis(gram_EE, dims_D)
    turned = torch.linalg.qr(torch.randn(6, 6))[0] @ basis_DE
    assert basis_DE[:, dims_D].trace() > turned[:, dims_D].trace()
    leading = torch.linalg.eigvalsh(gram_EE)[-6:].sum()
    torch.testing.assert_close((basis_DE @ gram_EE @ basis_DE.T).trace(), leading)


def test_half_the_head_dim_is_exact_where_the_other_half_is_silent(
    tiny_llama: Path, tiny_transfer_set: Path, tmp_path: Path
) -> None:
    """Odd rotary pairs without queries, and values in a subspace of half the width."""
    wide, half = 8, 4

    def silence(model: LlamaForCausalLM) -> None:
        odd = torch.tensor([c for c in range(wide) if c not in rotary_channels(wide, half)])
        subspace = torch.linalg.qr(torch.randn(wide, half))[0]
        for layer in model.model.layers:
            query = layer.self_attn.q_proj.weight.view(-1, wide, 32)
            query[:, odd] = 0
            value = layer.self_attn.v_proj.weight.view(-1, wide, 32)
            value.copy_(torch.einsum("ab,cb,kci->kai", subspace, subspace, value))

    teacher = edited(tiny_llama, tmp_path / "teacher", silence)
    for refit in (False, True):
        out = tmp_path / str(refit)
        cut(teacher, out, tiny_transfer_set, {"head_dim": half}, refit=refit)
        torch.testing.assert_close(logits(out / "model"), logits(teacher), rtol=2e-3, atol=2e-4)


def test_all_axes_at_once_give_a_stock_model_with_the_teachers_tokenizer(
    tiny_llama: Path, tiny_transfer_set: Path, tmp_path: Path
) -> None:
    axes = {
        "hidden_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 40,
    }
    summary = cut(tiny_llama, tmp_path, tiny_transfer_set, axes)
    model = load(tmp_path / "model")
    shape = Shape.from_config(model.config)
    assert {name: getattr(shape, name) for name in axes} == axes
    assert sum(p.numel() for p in model.parameters()) == shape.parameters == summary["parameters"]
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "auto_map" not in config
    text = "Numbers 123 and words."
    ours, theirs = (AutoTokenizer.from_pretrained(f) for f in (tmp_path / "model", tiny_llama))
    assert ours(text).input_ids == theirs(text).input_ids
    selection = read_json(tmp_path / "selection.json")
    assert len(selection["layers"]) == len(selection["heads"]) == 3
    assert len(selection["hidden"]) == 24
    assert all(len(neurons) == 40 for neurons in selection["neurons"])
    assert all(heads[0] < 2 <= heads[1] for heads in selection["heads"])
    assert all(0 <= line["down_proj"] <= 2 for line in selection["reconstruction"])


def test_an_untied_teacher_keeps_its_own_head(
    tiny_llama_untied: Path, tiny_transfer_set: Path, tmp_path: Path
) -> None:
    cut(tiny_llama_untied, tmp_path, tiny_transfer_set, {"hidden_size": 24}, basis="dims")
    model = load(tmp_path / "model")
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    kept = read_json(tmp_path / "selection.json")["hidden"]
    torch.testing.assert_close(
        model.lm_head.weight, load(tiny_llama_untied).lm_head.weight[:, kept]
    )


@pytest.mark.parametrize("way", ["least_squares", "split"])
def test_an_untied_teacher_makes_a_tied_student(
    tiny_llama_untied: Path, tiny_transfer_set: Path, tmp_path: Path, way: str
) -> None:
    axes = AXES | {"tie_word_embeddings": True}
    cut(tiny_llama_untied, tmp_path, tiny_transfer_set, axes, merge=way)  # through the gate
    student = load(tmp_path / "model")
    assert student.config.tie_word_embeddings
    assert student.lm_head.weight is student.model.embed_tokens.weight


def test_others_may_read_what_is_written(
    tiny_llama: Path, tiny_transfer_set: Path, tmp_path: Path
) -> None:
    """safetensors makes files that only their owner reads: no server would find them."""
    out = tmp_path / "cut"
    cut(tiny_llama, out, tiny_transfer_set, AXES, basis="principal")
    save_student(load(out / "model"), out / "model", tmp_path / "saved")
    written = [*out.glob("*.safetensors"), *tmp_path.glob("*/*.safetensors")]
    written += (out / "model").glob("*.safetensors")
    assert {path.parent.name for path in written} == {"cut", "model", "saved"}
    assert {path.stat().st_mode & 0o777 for path in written} == {0o644}


def test_two_equal_matrices_merge_into_that_one(
    tiny_llama: Path, tiny_transfer_set: Path, tmp_path: Path
) -> None:
    def untie(model: LlamaForCausalLM) -> None:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.model.embed_tokens.weight.clone())

    teacher = edited(tiny_llama, tmp_path / "teacher", untie)
    cut(teacher, tmp_path / "out", tiny_transfer_set, {"tie_word_embeddings": True})
    ours, theirs = logits(tmp_path / "out/model"), logits(teacher)
    assert float((ours - theirs).norm() / theirs.norm()) < 0.02


def test_the_same_seed_gives_the_same_bits(
    tiny_llama: Path, tiny_transfer_set: Path, tmp_path: Path
) -> None:
    for name in ("first", "second"):
        cut(tiny_llama, tmp_path / name, tiny_transfer_set, {"hidden_size": 24})
    first, second = (tmp_path / name / "model/model.safetensors" for name in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()


def test_a_shape_larger_than_the_teacher_is_refused(
    tiny_llama: Path, tiny_transfer_set: Path, tmp_path: Path
) -> None:
    with pytest.raises(ShearlingError, match="hidden_size 64 is larger"):
        cut(tiny_llama, tmp_path, tiny_transfer_set, {"hidden_size": 64})
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("axes", "settings", "said"),
    [
        ({"head_dim": 6}, {}, "head_dim 6 does not divide"),
        ({"num_hidden_layers": 2}, {"depth": [3, 1]}, "the shape wants 2"),
        ({"num_hidden_layers": 2}, {"depth": [1, 4]}, "out of 0 to 3"),
        ({"attention_bias": True}, {}, "biases that the teacher lacks"),
    ],
)
def test_what_can_t_be_cut_is_refused_before_any_work(
    tiny_llama: Path,
    tiny_transfer_set: Path,
    tmp_path: Path,
    axes: dict[str, Any],
    settings: dict[str, Any],
    said: str,
) -> None:
    seen: list[str] = []

    def told(task: str, *_: Any, **__: Any) -> None:
        seen.append(task)

    with pytest.raises(ShearlingError, match=said):
        cut(tiny_llama, tmp_path / "out", tiny_transfer_set, axes, progress=told, **settings)
    assert not seen
    assert not (tmp_path / "out").exists()


def test_a_teacher_that_overflows_is_told_by_its_layer(
    tiny_llama: Path, tiny_transfer_set: Path, tmp_path: Path
) -> None:
    def swell(model: LlamaForCausalLM) -> None:
        model.model.layers[1].mlp.down_proj.weight.mul_(1e38)

    teacher = edited(tiny_llama, tmp_path / "teacher", swell)
    for settings in ({}, {"importance": "greedy"}, {"refit": False}):
        with pytest.raises(ShearlingError, match="overflows in its layer 1"):
            cut(teacher, tmp_path / "out", tiny_transfer_set, AXES, **settings)


def test_refit_beats_slicing_on_a_trained_model(shared_data: Path, tmp_path: Path) -> None:
    """stories260K, a real tiny Llama with grouped attention, cut to three quarters each way."""
    from teachers.settings import SourceSettings, TransferSetSettings
    from teachers.transfer_set import build_transfer_set

    teacher = shared_data / "models/stories260K/hf"
    stories = str(shared_data / "text/stories/part-000.jsonl")
    source = SourceSettings(name="stories", path=stories, tokens=40000)
    settings = TransferSetSettings(sources=(source,), window=128, heldout_windows=16)
    text = tmp_path / "set"
    build_transfer_set(settings, teacher, text, seed=0, cache=tmp_path)
    axes = {"hidden_size": 48, "intermediate_size": 128, "num_attention_heads": 4}
    heldout = torch.from_numpy(TransferSet(text).heldout.astype("int64"))
    loss = {}
    for refit in (False, True):
        chosen = PruneSettings(calibration_tokens=16384, precision="float32", refit=refit)
        shape = replace(Checkpoint(teacher).shape, **axes)
        prune(teacher, tmp_path / str(refit), shape, text, chosen, seed=0)
        with torch.no_grad():
            model = load(tmp_path / str(refit) / "model")
            loss[refit] = float(model(heldout, labels=heldout).loss)
    assert loss[True] < loss[False] - 0.5


# --- the walk, interrupted and in files


AXES: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 3, "intermediate_size": 40}


SAVING = {"save_every_seconds": 0}


class Killed(Exception):
    """Stands for the end of the process."""


def kill(task: str, done: int, *_: Any, **__: Any) -> None:
    """Ends the process when two layers are walked."""
    if (task, done) == ("walk", 2):
        raise Killed


def assert_same_weights(one: Path, other: Path) -> None:
    """Of the students of two cuts, to the bit."""
    whole, resumed = load(one / "model"), load(other / "model")
    for (name, ours), theirs in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_killed_walk_goes_on_to_the_same_bits(
    tiny_llama: Path, tiny_transfer_set: Path, tmp_path: Path
) -> None:
    cut(tiny_llama, tmp_path / "whole", tiny_transfer_set, AXES)
    seen: list[tuple[str, int]] = []

    def told(task: str, done: int, *_: Any, **__: Any) -> None:
        seen.append((task, done))

    def told_and_killed(task: str, done: int, *_: Any, **__: Any) -> None:
        told(task, done)
        kill(task, done)

    arguments = (tiny_llama, tmp_path / "killed", tiny_transfer_set, AXES)
    with pytest.raises(Killed):
        cut(*arguments, progress=told_and_killed, **SAVING)
    assert [done for task, done in seen if task == "walk"] == [0, 1, 2]
    seen.clear()
    cut(*arguments, progress=told, **SAVING)
    assert seen == [("walk", 2), ("walk", 3)]  # no second survey, no layer twice
    assert (
        files_of(tmp_path / "killed/model").items()
        >= {
            name: content
            for name, content in files_of(tmp_path / "whole/model").items()
            if not name.startswith("model")  # one shard there, several here
        }.items()
    )
    assert_same_weights(tmp_path / "whole", tmp_path / "killed")
    selections = [read_json(tmp_path / run / "selection.json") for run in ("whole", "killed")]
    assert selections[0] == selections[1]


@pytest.mark.parametrize(
    "more", [{}, {"importance": "taylor", "depth": "divergence"}, {"basis": "dims"}]
)
def test_a_killed_survey_goes_on_to_the_same_bits(
    tiny_llama: Path, tiny_transfer_set: Path, tmp_path: Path, more: dict[str, Any]
) -> None:
    seen: list[tuple[str, int]] = []

    def told(task: str, done: int, *_: Any, **__: Any) -> None:
        seen.append((task, done))

    def killed(task: str, done: int, *_: Any, **__: Any) -> None:
        if (task, done) == ("survey", 3):
            raise Killed

    arguments = (tiny_llama, tmp_path / "killed", tiny_transfer_set, AXES)
    cut(tiny_llama, tmp_path / "whole", tiny_transfer_set, AXES, **more)
    with pytest.raises(Killed):
        cut(*arguments, progress=killed, **SAVING, **more)
    cut(*arguments, progress=told, **SAVING, **more)
    assert seen == [("survey", 3), *(("walk", layer) for layer in range(4))]
    assert_same_weights(tmp_path / "whole", tmp_path / "killed")
    selections = [read_json(tmp_path / run / "selection.json") for run in ("whole", "killed")]
    assert selections[0] == selections[1]


@pytest.mark.parametrize(("task", "layer"), [("survey", 1), ("walk", 1)])
def test_a_cut_that_is_asked_to_stop_saves_what_is_done(
    tiny_llama: Path, tiny_transfer_set: Path, tmp_path: Path, task: str, layer: int
) -> None:
    """Long before it would have saved by itself; what it was at is finished first."""
    seen: list[tuple[str, int]] = []

    def asked(what: str, done: int, *_: Any, **__: Any) -> None:
        seen.append((what, done))
        if (what, done) == (task, layer):
            signal.raise_signal(signal.SIGTERM)

    arguments = (tiny_llama, tmp_path / "asked", tiny_transfer_set, AXES)
    with pytest.raises(KeyboardInterrupt):
        cut(*arguments, progress=asked)
    assert seen[-1] == (task, layer)
    count = len(seen)
    cut(*arguments, progress=lambda what, done, *_, **__: seen.append((what, done)))
    assert seen[count] == (task, layer + 1)
    cut(tiny_llama, tmp_path / "whole", tiny_transfer_set, AXES)
    assert_same_weights(tmp_path / "whole", tmp_path / "asked")


@pytest.mark.parametrize("tied", [True, False])
def test_a_killed_walk_keeps_its_ends(
    tiny_llama_untied: Path,
    tiny_transfer_set: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tied: bool,
) -> None:
    """Two matrices made one with other arithmetic (another number of threads) are another one: the
    layers that are written would not go with it."""
    axes = AXES | {"tie_word_embeddings": tied}
    cut(tiny_llama_untied, tmp_path / "whole", tiny_transfer_set, axes)
    arguments = (tiny_llama_untied, tmp_path / "killed", tiny_transfer_set, axes)
    with pytest.raises(Killed):
        cut(*arguments, progress=kill, **SAVING)

    def turned(both: BothEnds, stream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        matrix_VD, norm_D = joint_ends(both, stream)
        return matrix_VD.flip(1), norm_D

    monkeypatch.setitem(MERGES, "least_squares", turned)
    cut(*arguments, **SAVING)  # through the gate
    assert_same_weights(tmp_path / "whole", tmp_path / "killed")


def test_a_survey_that_is_done_is_not_made_again(
    tiny_llama: Path, tiny_transfer_set: Path, tmp_path: Path
) -> None:
    whole = cut(tiny_llama, tmp_path / "whole", tiny_transfer_set, AXES)
    shape = replace(Checkpoint(tiny_llama).shape, **AXES)
    seen: list[str] = []

    def told(task: str, *_: Any, **__: Any) -> None:
        seen.append(task)
        if seen == ["survey"] * 4 + ["walk"]:
            raise Killed

    def go_on(name: str, **more: Any) -> dict[str, Any]:
        settings = {"calibration_tokens": 2048, "precision": "float32", **SAVING, **more}
        stage = PruneStage(kind="prune", name=name, shape=AXES, **settings)
        out = tmp_path / "killed"
        return prune(tiny_llama, out, shape, tiny_transfer_set, stage, seed=0, progress=told)

    with pytest.raises(Killed):
        go_on("one")
    seen.clear()
    # What a recipe calls the stage, and where its streams lie, changes nothing of what was done.
    assert go_on("two", stream_memory_gb=0.0)["stream_error"] == whole["stream_error"]
    assert "walk" in seen
    assert "survey" not in seen


def test_a_damaged_part_of_the_student_is_told(
    tiny_llama: Path, tiny_transfer_set: Path, tmp_path: Path
) -> None:
    arguments = (tiny_llama, tmp_path, tiny_transfer_set, AXES)
    with pytest.raises(Killed):
        cut(*arguments, progress=kill, **SAVING)
    shard = max((tmp_path / "model").glob(".shard-*"))
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(ShearlingError, match="damaged") as told:
        cut(*arguments, progress=kill, **SAVING)
    assert f"Delete {tmp_path}" in str(told.value.hint)


@pytest.mark.parametrize("name", ["survey.safetensors", "streams.safetensors", "state.json"])
def test_a_checkpoint_without_a_file_is_told(
    tiny_llama: Path, tiny_transfer_set: Path, tmp_path: Path, name: str
) -> None:
    arguments = (tiny_llama, tmp_path, tiny_transfer_set, AXES)
    with pytest.raises(Killed):
        cut(*arguments, progress=kill, **SAVING)
    next((tmp_path / "resume").glob(f"step-*/{name}")).unlink()
    with pytest.raises(ShearlingError, match="damaged") as told:
        cut(*arguments)
    assert "Delete" in str(told.value.hint)


def test_a_student_with_a_number_that_is_none_is_refused(
    tiny_llama_untied: Path,
    tiny_transfer_set: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the embedding of a token of which the probe has no position."""
    finish = StudentWriter.finish

    def damaged(writer: StudentWriter) -> None:
        finish(writer)
        file = writer.folder / "model.safetensors"
        weights = load_file(file)
        weights["model.embed_tokens.weight"][-1, 0] = torch.nan
        save_file(weights, file, metadata={"format": "pt"})

    monkeypatch.setattr(StudentWriter, "finish", damaged)
    axes = {"intermediate_size": 40}
    with pytest.raises(ShearlingError, match=r"NaN or infinity: model\.embed_tokens"):
        cut(tiny_llama_untied, tmp_path, tiny_transfer_set, axes)


def test_layers_that_turn_the_stream_are_told(
    tiny_llama_untied: Path, tiny_transfer_set: Path, tmp_path: Path
) -> None:
    for tied, turned in ((True, [3]), (False, [])):
        axes = {"hidden_size": 24, "tie_word_embeddings": tied}
        cut(tiny_llama_untied, tmp_path / str(tied), tiny_transfer_set, axes)
        assert read_json(tmp_path / str(tied) / "selection.json")["turned"] == turned


def test_a_checkpoint_of_another_cut_is_refused(
    tiny_llama: Path, tiny_transfer_set: Path, tmp_path: Path
) -> None:
    cut(tiny_llama, tmp_path, tiny_transfer_set, AXES, **SAVING)
    with pytest.raises(ShearlingError, match="another cut"):
        cut(tiny_llama, tmp_path, tiny_transfer_set, AXES, seed=1, **SAVING)


def test_streams_in_files_change_no_bit(
    tiny_llama: Path, tiny_transfer_set: Path, tmp_path: Path
) -> None:
    cut(tiny_llama, tmp_path / "memory", tiny_transfer_set, AXES)
    cut(tiny_llama, tmp_path / "files", tiny_transfer_set, AXES, stream_memory_gb=0)
    assert files_of(tmp_path / "memory/model") == files_of(tmp_path / "files/model")
    assert not (tmp_path / "files/streams").exists()


def test_narrow_streams_are_nearly_as_good(
    tiny_llama: Path, tiny_transfer_set: Path, tmp_path: Path
) -> None:
    wide = cut(tiny_llama, tmp_path / "wide", tiny_transfer_set, AXES)
    narrow = cut(tiny_llama, tmp_path / "narrow", tiny_transfer_set, AXES, stream_dtype="bfloat16")
    assert narrow["stream_error"] == pytest.approx(wide["stream_error"], rel=0.05)
    assert narrow["stream_error"] != wide["stream_error"]


def test_depth_by_divergence_drops_the_layer_that_says_nothing(
    tiny_llama: Path, tiny_transfer_set: Path, tmp_path: Path
) -> None:
    """By cosine it would stay: it moves the stream a lot, where the head can't see it."""

    def blind(model: LlamaForCausalLM) -> None:
        model.model.embed_tokens.weight[:, 7] = 0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[7] = 0
            layer.mlp.down_proj.weight[7] = 0
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight[7] = 0
        model.model.norm.weight[7] = 0
        silent = model.model.layers[1]
        silent.self_attn.o_proj.weight[:] = 0
        silent.mlp.down_proj.weight[:] = 0
        silent.mlp.down_proj.weight[7] = 0.02

    teacher = edited(tiny_llama, tmp_path / "teacher", blind)
    axes = {"num_hidden_layers": 3}
    summary = cut(teacher, tmp_path / "cut", tiny_transfer_set, axes, depth="divergence")
    assert summary["dropped_layers"] == [1]


def test_depth_by_divergence_goes_on_after_the_first_layer(
    tiny_llama: Path, tiny_transfer_set: Path
) -> None:
    source = Checkpoint(tiny_llama)
    windows = TransferSet(tiny_transfer_set).calibration(512, 0)
    arguments = (torch.device("cpu"), torch.float32, source.shape.vocab_size)
    three = layers_by_divergence(source, windows, 3, *arguments)
    two = layers_by_divergence(source, windows, 2, *arguments)
    assert len(three) == 3
    assert set(two) < set(three)

    def divergence(kept: list[int]) -> float:
        """By transformers' own model, its layers taken out."""
        whole, cut_one = load(tiny_llama), load(tiny_llama)
        layers = [cut_one.model.layers[number] for number in kept]
        cut_one.model.layers = torch.nn.ModuleList(layers)
        with torch.no_grad():
            ours = cut_one(windows, use_cache=False).logits.log_softmax(-1)
            theirs = whole(windows, use_cache=False).logits.log_softmax(-1)
        return float((theirs.exp() * (theirs - ours)).sum(-1).mean())

    every = [[a, b, c] for a in range(4) for b in range(a + 1, 4) for c in range(b + 1, 4)]
    assert min(every, key=divergence) == three


def test_parts_are_removed_greedily_where_refits_make_up_for_it() -> None:
    assert PruneSettings().chosen_by == "greedy"
    assert PruneSettings(refit=False).chosen_by == "activation"
    assert PruneSettings(refit=False, importance="greedy").chosen_by == "greedy"


@pytest.mark.parametrize("importance", ["greedy", "activation", "taylor", "magnitude"])
def test_a_part_that_does_nothing_goes_by_every_importance(
    tiny_llama: Path, tiny_transfer_set: Path, tmp_path: Path, importance: str
) -> None:
    dead_heads, dead_neurons = [1, 2], [3, 17, 40]

    def silence(model: LlamaForCausalLM) -> None:
        width = model.config.head_dim
        for layer in model.model.layers:
            for head in dead_heads:
                rows = slice(head * width, (head + 1) * width)
                layer.self_attn.q_proj.weight[rows] = 0
                layer.self_attn.o_proj.weight[:, rows] = 0
            for name in ("gate_proj", "up_proj"):
                getattr(layer.mlp, name).weight[dead_neurons] = 0
            layer.mlp.down_proj.weight[:, dead_neurons] = 0

    teacher = edited(tiny_llama, tmp_path / "teacher", silence)
    whole = Checkpoint(teacher).shape
    axes = {"num_attention_heads": 2, "intermediate_size": whole.intermediate_size - 3}
    cut(teacher, tmp_path / "cut", tiny_transfer_set, axes, importance=importance, refit=False)
    selection = read_json(tmp_path / "cut/selection.json")
    for heads, neurons in zip(selection["heads"], selection["neurons"], strict=True):
        assert heads == [0, 3]
        assert not set(neurons) & set(dead_neurons)
    torch.testing.assert_close(
        logits(tmp_path / "cut/model"), logits(teacher), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ("windows", "judges"), [(1, []), (2, [1]), (5, [4]), (8, [7]), (20, [7, 15])]
)
def test_some_windows_judge_the_ridge(windows: int, judges: list[int]) -> None:
    judging_BT = judging(windows, 16)
    assert judging_BT.shape == (windows, 16)
    assert judging_BT.all(1).nonzero().flatten().tolist() == judges
    assert bool((judging_BT.any(1) == judging_BT.all(1)).all()) or windows == 1


def test_the_end_of_a_single_window_judges_the_ridge() -> None:
    assert judging(1, 17).tolist() == [[False] * 15 + [True] * 2]


def test_nothing_is_removed_greedily_where_all_stays(
    tiny_llama: Path, tiny_transfer_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    removal = greedy.Removal

    def told(gram_II: Tensor, *more: Any) -> greedy.Removal:
        seen.append(len(gram_II))
        return removal(gram_II, *more)

    monkeypatch.setattr(greedy, "Removal", told)
    cut(tiny_llama, tmp_path / "depth", tiny_transfer_set, {"num_hidden_layers": 3})
    assert not seen
    axes = {"num_hidden_layers": 2, "intermediate_size": 40}
    cut(tiny_llama, tmp_path / "both", tiny_transfer_set, axes, depth=[0, 3])
    assert seen == [64, 64]  # the two layers that stay


# --- the attention sink


@pytest.mark.parametrize("window", [1, 31, 32, 512])
@pytest.mark.parametrize("begin", [None, 3, 10_000])
def test_openings_are_tokens_of_the_windows_and_the_first_of_texts(
    window: int, begin: int | None
) -> None:
    """A begin token for which there is no embedding is none."""
    windows_BT = torch.arange(4, 4 + 6 * window).view(6, window)
    tokens_N1 = openings(windows_BT, LlamaConfig(vocab_size=10_000, bos_token_id=begin))
    assert tokens_N1.shape == (6 * -(-window // OPENING_EVERY), 1)
    drawn = tokens_N1[tokens_N1 != 3]
    assert drawn.unique().numel() == drawn.numel()  # every place of the windows at most once
    assert (tokens_N1[::4] == 3).all() == (begin == 3)
    assert torch.isin(drawn, windows_BT).all()
    assert windows_BT.min() == 4  # the windows are as they were


@pytest.fixture
def sink(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A teacher with an attention sink: one neuron swells the stream of every window's first token,
    whose place in the stream no other token and no layer uses."""
    first = 2

    def swell(model: LlamaForCausalLM) -> None:
        embedding = model.model.embed_tokens.weight
        embedding[:, 0] = 0
        embedding[first] = 0
        embedding[first, 0] = 10 * embedding[5].norm()
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = 0
            layer.mlp.down_proj.weight[0] = 0
        mlp = model.model.layers[0].mlp
        for weight in (mlp.gate_proj.weight, mlp.up_proj.weight):
            weight[9] = 0
            weight[9, 0] = 4.0
        mlp.down_proj.weight[1, 9] = 4.0

    calibration = TransferSet.calibration

    def with_first(*arguments: Any) -> Tensor:
        windows_BT = calibration(*arguments).clone()
        windows_BT[windows_BT == first] = first + 1
        windows_BT[:, 0] = first
        return windows_BT

    monkeypatch.setattr(TransferSet, "calibration", with_first)
    return edited(tiny_llama, tmp_path / "sink", swell)


def first_position(folder: Path, windows_BT: Tensor) -> float:
    """How large the first position's stream is behind the second layer."""
    with torch.no_grad():
        streams = load(folder)(windows_BT, output_hidden_states=True).hidden_states
    return float(streams[2][:, 0].norm(dim=-1).mean())


@pytest.mark.parametrize("importance", ["greedy", "activation"])
def test_an_attention_sink_survives_the_cut(
    sink: Path, tiny_transfer_set: Path, tmp_path: Path, importance: str
) -> None:
    axes = {"intermediate_size": 24, "num_attention_heads": 2}
    found = cut(sink, tmp_path / "cut", tiny_transfer_set, axes, importance=importance)
    windows_BT = TransferSet(tiny_transfer_set).calibration(2048, 0)
    theirs = first_position(sink, windows_BT)
    assert theirs > 500  # the teacher has one
    assert first_position(tmp_path / "cut/model", windows_BT) == pytest.approx(theirs, rel=0.02)
    assert found["sink"] > 10
    assert found["sink_kept"] == pytest.approx(1, abs=0.02)
    assert not found["notes"]


def test_a_lost_attention_sink_is_told(sink: Path, tiny_transfer_set: Path, tmp_path: Path) -> None:
    """Here what the neuron reads is one dim of the stream, used by one token: the cut drops it."""
    found = cut(sink, tmp_path / "cut", tiny_transfer_set, {"hidden_size": 24})
    assert found["sink_kept"] < 0.1
    assert ["an attention sink" in note for note in found["notes"]] == [True]


def test_a_teacher_without_a_sink_is_told_of_none(
    tiny_llama: Path, tiny_transfer_set: Path, tmp_path: Path
) -> None:
    assert "sink" not in cut(tiny_llama, tmp_path / "cut", tiny_transfer_set, {"hidden_size": 24})


def test_one_false_sink_does_not_cost_the_true_one(
    sink: Path, tiny_transfer_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A student's stream is never quite its teacher's. Where it happens to look like that of a
    first position it swells as well, a thousand times what is wanted there."""
    embedded = Streams.embedded

    def with_a_double(streams: Streams, name: str, embedding: Tensor, tokens: Tensor) -> Tensor:
        stream_BTD = embedded(streams, name, embedding, tokens)
        if name == "windows-student":
            stream_BTD[0, 5] = stream_BTD[0, 0]
        return stream_BTD

    monkeypatch.setattr(Streams, "embedded", with_a_double)
    found = cut(sink, tmp_path / "cut", tiny_transfer_set, {"intermediate_size": 24})
    assert found["sink_kept"] == pytest.approx(1, abs=0.1)
