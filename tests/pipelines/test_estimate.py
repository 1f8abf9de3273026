"""The plan's formulas against what PyTorch itself counts."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from compress import fused
from compress.attention import LONGEST, NAME, choose_attention
from compress.fused import FusedLoss, Term
from compress.lean import make_lean
from compress.losses import DIVERGENCES, HIDDEN_LOSSES, LiveTargets, MixedTargets
from compress.optimizers import build_optimizers, optimizer_tensors
from compress.settings import DistillSettings, PruneSettings
from pipelines.cost import trunk_flops
from pipelines.estimate_distill import (
    activation_bytes,
    cache_bytes,
    compared_bytes,
    distill_cost,
    hidden_bytes,
    loss_bytes,
    optimizer_bytes,
    steps_of,
)
from pipelines.estimate_prune import (
    SURVEY_TOKENS,
    WALK_BATCH_TOKENS,
    prune_cost,
    search_cost,
)
from students.shape import Shape
from teachers.targets import HiddenCache, TargetFormat

WIDE = {
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 640,
    "vocab_size": 512,
    "tie_word_embeddings": True,
}


def llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(**{**WIDE, **changes}, max_position_embeddings=2048, dtype="float32")
    return LlamaForCausalLM(config)


def test_constants_are_those_of_the_code() -> None:
    from compress import (
        answers,
        attention,
        data,
        depth,
        distill,
        ends,
        layer,
        reconstruct,
        survey,
        taylor,
    )
    from pipelines import estimate_distill, estimate_prune, plan
    from students import build

    assert survey.SURVEY_TOKENS == SURVEY_TOKENS
    assert survey.GREEDY_TOKENS == estimate_prune.GREEDY_TOKENS
    assert layer.OPENING_EVERY == estimate_prune.OPENING_EVERY
    assert taylor.HEAD_POSITIONS == estimate_prune.HEAD_POSITIONS
    assert survey.FINAL_POSITIONS == estimate_prune.FINAL_POSITIONS
    assert depth.DEPTH_TOKENS == estimate_prune.DEPTH_TOKENS
    assert depth.CHUNK == estimate_prune.DEPTH_CHUNK
    assert taylor.TAYLOR_TOKENS == estimate_prune.TAYLOR_TOKENS
    assert ends._CHUNK == estimate_prune.METRIC_CHUNK
    assert reconstruct._SOLVED == estimate_prune.SOLVED_OUTPUTS
    assert build.SHARD_BYTES == estimate_prune.STUDENT_SHARD
    assert layer.BATCH_TOKENS == WALK_BATCH_TOKENS
    assert 512 <= estimate_prune.JUDGED_OUTPUTS < 2 * reconstruct.JUDGED_OUTPUTS
    assert data._MICRO_TOKENS == estimate_distill.MICRO_TOKENS
    assert answers._LOGIT_POSITIONS == estimate_distill.LOGIT_POSITIONS
    assert distill._SAVING_PART == plan.SAVES_APART
    assert fused._BLOCK_BYTES == estimate_distill.BLOCK_BYTES
    assert set(DIVERGENCES) == set(estimate_distill.DIFFERENTIATED)
    assert attention.LONGEST == estimate_distill.SHORT_WINDOW
    assert attention.BLOCK == estimate_distill.ATTENTION_BLOCK


@pytest.mark.parametrize("keys", [2, 4])
def test_flops_are_those_that_pytorch_counts(keys: int) -> None:
    model = llama(num_key_value_heads=keys)
    model.set_attn_implementation("eager")  # the counter passes over the fused kernel
    window = 128
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, window, dtype=torch.long), use_cache=False)
    # The counter counts attention in full, the formula the causal half of it.
    attention = 2 * 2 * WIDE["num_hidden_layers"] * 256 * window * window / 2
    expected = Shape.from_config(model.config).flops_per_token(window) * window + attention
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    ("product", "window"),
    [("float32", 64), ("bfloat16", 64), ("bfloat16", 256), ("float32", 2048), ("bfloat16", 4096)],
)
@pytest.mark.parametrize("own", [False, True], ids=["sdpa", "short"])
@pytest.mark.parametrize("changes", [{}, {"intermediate_size": 1024, "num_key_value_heads": 4}])
def test_activations_are_what_autograd_keeps(
    product: str, window: int, own: bool, changes: dict[str, int]
) -> None:
    """Of one layer: the difference between a model of three layers and one of one."""
    if own and (product == "float32" or window > LONGEST):
        pytest.skip("the attention for short windows serves bfloat16 only")

    def kept(layers: int) -> int:
        model = llama(num_hidden_layers=layers, **changes).train()
        make_lean(model)
        model.set_attn_implementation(NAME if own else "sdpa")
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        storages: dict[int, tuple[int, Any]] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                storages[storage.data_ptr()] = (storage.nbytes(), tensor)
            return tensor

        # Documents restart the positions, as in packed windows, so that a mask is needed.
        positions = torch.arange(window).repeat(2, 1) % (window // 2)
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=product == "bfloat16"),
        ):
            model.model(torch.zeros_like(positions), position_ids=positions, use_cache=False)
        return sum(size for size, _ in storages.values())

    shape = Shape.from_config(llama(**changes).config)
    # Autocast keeps the weights in bfloat16 too, planned as "weights in the products' dtype"; but
    # not those of the down projection, which are narrowed for each product.
    down = shape.hidden_size * shape.intermediate_size
    narrow = 2 * (shape.layer_parameters - down) if product == "bfloat16" else 0
    measured = ((kept(3) - kept(1)) / 2 - narrow) / (2 * window)
    assert activation_bytes(shape, window, product, on_cpu=own) == pytest.approx(measured, rel=0.01)


def test_the_short_attention_is_planned_where_it_is_used() -> None:
    cpu = torch.device("cpu")
    assert choose_attention(cpu, torch.bfloat16, 1024) == NAME
    assert choose_attention(cpu, torch.bfloat16, 1025) == "sdpa"
    assert choose_attention(cpu, torch.float32, 64) == "sdpa"


@pytest.mark.parametrize("product", ["bfloat16", "float32"])
@pytest.mark.parametrize("teachers", [1, 2])
@pytest.mark.parametrize(
    ("others", "temperature", "labels"),
    [
        ("", 1.0, 0.3),
        ("", 2.0, 0.0),
        ("", 2.0, 0.3),
        ("reverse_kl", 1.0, 0.3),
        ("jensen_shannon", 2.0, 0.0),
        ("skewed_kl", 1.0, 0.3),
        ("reverse_kl skewed_reverse_kl", 1.0, 0.3),
        ("reverse_kl jensen_shannon skewed_kl skewed_reverse_kl", 1.0, 0.3),
    ],
)
def test_the_loss_takes_the_memory_that_its_terms_need(
    others: str, temperature: float, labels: float, teachers: int, product: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Of a whole chunk, as on an accelerator; all but the logits in the products' dtype."""
    monkeypatch.setattr(fused, "_BLOCK_BYTES", 2**40)
    chunk, vocabulary, dtype = 8, 16384, getattr(torch, product)
    names = ["forward_kl", *others.split()]
    loss = FusedLoss(
        terms=tuple(Term(name, 0.5) for name in names),
        cross_entropy=labels,
        temperature=temperature,
        chunk=chunk,
        dtype=dtype,
    )
    said = LiveTargets(torch.randn(chunk, 8), torch.randn(vocabulary, 8).to(dtype))
    targets = said if teachers == 1 else MixedTargets((said, said), (0.5, 0.5))
    logits = torch.randn(chunk, vocabulary).to(dtype)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        labels_N = torch.arange(chunk)
        list(fused._chunk_losses(logits, targets, labels_N, torch.float32, loss, (1.0, labels)))
    assert profiled.profiler is not None
    events = profiled.profiler.kineto_results.events()
    told = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    peak = max(accumulate(size for _, size in told)) - logits.nbytes  # the teacher's
    settings = DistillSettings(
        tokens=1,
        temperature=temperature,
        cross_entropy=labels,
        **dict.fromkeys(names, 0.5),  # type: ignore[arg-type]
    )
    planned = loss_bytes(
        settings, teachers, chunk=chunk, vocabulary=vocabulary, product=product, on_cpu=False
    )
    assert peak <= 1.01 * planned
    assert planned <= 1.12 * peak


def test_on_a_cpu_the_loss_takes_the_memory_of_a_block() -> None:
    settings = DistillSettings(tokens=1, reverse_kl=1.0)
    sizes: dict[str, Any] = {"chunk": 512, "vocabulary": 128_256, "product": "bfloat16"}
    on_device, on_cpu = (loss_bytes(settings, 1, **sizes, on_cpu=cpu) for cpu in (False, True))
    work = FusedLoss(terms=(), dtype=torch.bfloat16)
    rows = fused._rows_at_once(work, torch.device("cpu"), 128_256, torch.float32)
    assert on_cpu == on_device * rows / 512


@pytest.mark.parametrize("kind", HIDDEN_LOSSES)
def test_a_compared_layer_is_kept_as_its_loss_needs_it(kind: str) -> None:
    student_ND, teacher_ND = torch.randn(2, 64, 256, dtype=torch.bfloat16)
    student_ND.requires_grad_()
    saved: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        HIDDEN_LOSSES[kind](student_ND, teacher_ND).sum()
    saved.pop(student_ND.untyped_storage().data_ptr(), None)  # an activation
    kept = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    settings = DistillSettings(tokens=1, targets="live", hidden={"kind": kind, "weight": 1.0})
    shape = replace(STUDENT, hidden_size=256, num_hidden_layers=1)
    planned = 64 * compared_bytes(settings, shape, shape, "bfloat16")
    assert kept + teacher_ND.nbytes == pytest.approx(planned, rel=0.05)


def test_compared_layers_are_planned_in_a_step_and_a_capture() -> None:
    plain, both = distilled(), distilled(hidden={"weight": 1.0}, attention={"weight": 1.0})
    step = both.moments[0].device
    assert "compared layers" not in plain.moments[0].device
    layers, places = STUDENT.num_hidden_layers, 2
    least = 1024 * layers * places * 4 * (TEACHER.hidden_size + STUDENT.hidden_size)
    assert least <= step["compared layers"] <= 2 * least
    cached = distilled(targets="sample", hidden={"weight": 1.0})
    once = distilled(targets="sample")
    assert cached.flops["product"] - once.flops["product"] == pytest.approx(
        20_000 * trunk_flops(TEACHER, 256)
    )
    wide = distilled(targets="sample", micro_batch_windows=16)
    captures = [
        next(moment.device for moment in cost.moments if moment.what == "capture")
        for cost in (once, wide)
    ]
    assert captures[1]["activations"] == 4 * captures[0]["activations"]


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("tied", [True, False])
def test_optimizer_state(kind: str, tied: bool) -> None:
    model = llama(tie_word_embeddings=tied)
    settings = DistillSettings(tokens=1, optimizer=kind)
    optimizers = build_optimizers(model, settings)
    model(torch.zeros(1, 8, dtype=torch.long)).logits.sum().backward()
    for optimizer in optimizers.values():
        optimizer.step()
    measured = sum(tensor.nbytes for tensor in optimizer_tensors(model, optimizers).values())
    shape = Shape.from_config(model.config)
    assert optimizer_bytes(shape, kind) == pytest.approx(measured, rel=0.001)


@pytest.mark.parametrize("slots", [14, 32])
def test_bytes_of_a_cached_token(slots: int) -> None:
    settings = DistillSettings(tokens=1, targets="sample", target_slots=slots)
    kept = TargetFormat(kind="sample", slots=slots, vocabulary=128_256)
    assert cache_bytes(settings) == kept.bytes_per_token
    assert slots != 14 or cache_bytes(settings) == 60


TEACHER = Shape(**{**WIDE, "num_hidden_layers": 4})
STUDENT = Shape(**{**WIDE, "hidden_size": 128, "intermediate_size": 320})


def distilled(**settings: Any) -> Any:
    return distill_cost(
        [TEACHER],
        STUDENT,
        DistillSettings(tokens=65536, batch_tokens=4096, **settings),
        window=256,
        heldout_windows=4,
        distinct_tokens=20_000,
        product="float32",
        dtype_bytes=4,
        on_cpu=True,
    )


def test_steps_are_the_loops() -> None:
    assert steps_of(DistillSettings(tokens=65536, batch_tokens=4096), 256) == (16, 4096)
    assert steps_of(DistillSettings(tokens=10, batch_tokens=10), 256) == (1, 256)


def test_what_costs_less_memory_or_time_is_planned_so() -> None:
    live = distilled(optimizer="adamw")
    parts = live.moments[0].device
    assert parts["weights"] == 4 * STUDENT.parameters
    assert parts["gradients"] == parts["weights"]
    assert parts["optimizer"] == 8 * STUDENT.parameters
    assert parts["teacher"] == 4 * TEACHER.parameters
    frugal = distilled(gradient_checkpointing=True).moments[0].device
    assert frugal["activations"] < 0.6 * parts["activations"]
    chunked = distilled(chunk_tokens=64).moments[0].device
    assert chunked["logits"] < parts["logits"]
    cached = distilled(targets="sample")
    assert "teacher" not in cached.moments[0].device
    assert cached.flops["product"] < live.flops["product"]
    assert cached.disk - live.disk == 60 * 20_000  # each token is kept once
    halves = live.worst(on_cpu=True, processes=2).device_bytes(2)
    assert halves < live.worst(on_cpu=True).device_bytes()


def test_pruning_does_not_need_the_teacher_in_memory() -> None:
    """Twice the layers of the teacher change the time, not the memory."""
    settings = PruneSettings(calibration_tokens=8192)

    def cost(layers: int) -> Any:
        teacher = Shape(**{**WIDE, "num_hidden_layers": layers, "vocab_size": 128_000})
        student = Shape(**{**STUDENT.to_dict(), "vocab_size": 128_000})
        return prune_cost(teacher, student, settings, window=256, product="float32", dtype_bytes=2)

    few, many, most = cost(4), cost(8), cost(12)
    assert few.worst(on_cpu=True) == many.worst(on_cpu=True)
    grown = many.flops["product"] - few.flops["product"]
    assert most.flops["product"] - many.flops["product"] == pytest.approx(grown)
    assert grown > 0
    assert settings.calibration_tokens == few.tokens
    sliced = prune_cost(
        TEACHER,
        STUDENT,
        PruneSettings(refit=False, importance="activation", basis="dims"),
        window=256,
        product="float32",
        dtype_bytes=2,
    )
    assert sliced.flops["float64"] < 0.05 * few.flops["float64"]  # the output head's map alone


def test_dear_choices_and_streams_on_the_disk_are_foreseen() -> None:
    def cost(**settings: Any) -> Any:
        chosen = PruneSettings(calibration_tokens=65536, importance="activation")
        chosen = chosen.model_copy(update=settings)
        return prune_cost(TEACHER, STUDENT, chosen, window=256, product="float32", dtype_bytes=2)

    plain = cost()
    for dear in (cost(depth="divergence"), cost(importance="taylor")):
        assert dear.flops["product"] > 1.05 * plain.flops["product"]
        assert dear.moved > plain.moved
        assert len(dear.moments) > len(plain.moments)
    files = cost(stream_memory_gb=0.0)
    streams = 4.0 * 65536 * (TEACHER.hidden_size + STUDENT.hidden_size)
    assert files.scratch - plain.scratch > streams
    assert plain.worst(on_cpu=True).host_bytes() - files.worst(on_cpu=True).host_bytes() > streams
    narrow = cost(stream_dtype="bfloat16")
    assert plain.scratch == 2 * narrow.scratch


def test_a_long_window_passes_whole() -> None:
    """However few positions are asked for, and through whatever looks at them."""
    few = PruneSettings(calibration_tokens=1000, importance="taylor", depth="divergence")

    def cost(window: int, settings: PruneSettings = few) -> Any:
        return prune_cost(
            TEACHER, STUDENT, settings, window=window, product="float32", dtype_bytes=2
        )

    def held(cost: Any, what: str, name: str) -> float:
        moment = next(moment for moment in cost.moments if moment.what == what)
        return {**moment.device, **moment.host}[name]

    short, long = cost(500), cost(16384)
    assert short.tokens == 1000
    assert long.tokens == 16384
    for what, name, times in (
        ("survey", "activations", 16.3),
        ("gradients", "streams", 16.3),
        ("depth", "a stream for each layer", 16.3),
    ):
        grown = held(long, what, name) / held(short, what, name)
        assert grown == pytest.approx(times, rel=0.05), what
    assert long.flops["product"] > 16 * short.flops["product"]


def test_scratch_is_the_largest_of_what_comes_after_each_other() -> None:
    streams = PruneSettings(calibration_tokens=8192, stream_memory_gb=0.0)
    sizes: dict[str, Any] = {"window": 256, "product": "float32", "dtype_bytes": 2}
    plain = prune_cost(TEACHER, STUDENT, streams, **sizes)
    deep = replace(TEACHER, num_hidden_layers=64)
    taylor = streams.model_copy(update={"importance": "taylor"})
    gradients = 4.0 * 8192 * (64 + 2) * TEACHER.hidden_size
    assert prune_cost(deep, STUDENT, taylor, **sizes).scratch == pytest.approx(gradients, rel=0.05)
    searched = search_cost(
        TEACHER, [STUDENT, STUDENT], streams, tokens=8192, heldout_windows=4, **sizes
    )
    assert searched.scratch == plain.disk + plain.scratch
    assert searched.product == "float32"


@pytest.mark.parametrize("hidden", [64, 100])
def test_a_kept_layer_takes_what_the_cache_writes(tmp_path: Path, hidden: int) -> None:
    shape = replace(TEACHER, hidden_size=hidden)
    cache = HiddenCache(tmp_path, {}, [0, 2, 3], hidden, windows=1, window=8)
    assert 3 * hidden_bytes(shape) == cache.record.itemsize


def test_greedy_choice_and_a_basis_are_foreseen() -> None:
    def cost(**settings: Any) -> Any:
        chosen = PruneSettings(importance="activation", basis="dims").model_copy(update=settings)
        return prune_cost(TEACHER, STUDENT, chosen, window=256, product="float32", dtype_bytes=2)

    plain, greedy, turned = cost(), cost(importance="greedy"), cost(basis="principal")
    for dearer in (greedy, turned):
        assert sum(dearer.flops.values()) > sum(plain.flops.values())
        assert dearer.flops["float32"] > plain.flops["float32"]
    removal = next(moment for moment in greedy.moments if moment.what == "greedy choice")
    assert removal.device["removal"] > 8 * TEACHER.intermediate_size**2
