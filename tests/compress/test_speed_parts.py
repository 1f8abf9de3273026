"""The parts that are there for speed: short-window attention, measured precision, the schedule."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from compress.attention import BLOCK, LONGEST, NAME, choose_attention
from compress.lean import LeanEmbedding, make_lean
from compress.memory import give_back_freed_memory, reuse_freed_memory
from compress.optimizers import build_optimizers, set_learning_rate
from compress.precision import fast_dtype, product_rate
from compress.schedule import warmup_then_cosine
from compress.settings import DistillSettings
from compress.workspace import _MOMENTARY, Workspace

CPU = torch.device("cpu")


def packed(length: int = 40) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 300, (3, length), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(length).repeat(3, 1)
    positions[1, 17:] -= 17
    return {"input_ids": ids, "position_ids": positions}


@pytest.mark.parametrize("length", [40, BLOCK, 2 * BLOCK + 40])
@pytest.mark.parametrize("documents", [True, False])
def test_short_window_attention_is_attention(
    tiny_llama: Path, documents: bool, length: int
) -> None:
    """Against transformers' eager attention, values and all gradients, with grouped heads."""
    results = []
    for name in ("eager", NAME):
        model = LlamaForCausalLM.from_pretrained(tiny_llama, attn_implementation=name)
        batch = packed(length)
        if not documents:
            del batch["position_ids"]
        logits = model(**batch, use_cache=False).logits
        logits.square().mean().backward()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
        results.append((logits, gradients))
    (logits, gradients), (fast_logits, fast_gradients) = results
    torch.testing.assert_close(fast_logits, logits, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(fast_gradients, gradients, atol=1e-6, rtol=1e-3)


def test_short_window_attention_in_bfloat16_is_as_exact_as_pytorch_s(tiny_llama: Path) -> None:
    def trunk(name: str, narrow: bool) -> torch.Tensor:
        model = LlamaForCausalLM.from_pretrained(tiny_llama, attn_implementation=name)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            return model.model(**packed(), use_cache=False).last_hidden_state

    exact = trunk("sdpa", narrow=False)
    errors = {name: (trunk(name, narrow=True) - exact).norm() for name in ("sdpa", NAME)}
    assert errors[NAME] < 1.3 * errors["sdpa"] < 0.05 * exact.norm()


def test_attention_is_chosen_by_device_dtype_and_length() -> None:
    assert choose_attention(CPU, torch.bfloat16, 256) == NAME
    assert choose_attention(CPU, torch.bfloat16, LONGEST + 1) == "sdpa"
    assert choose_attention(CPU, torch.float32, 256) == "sdpa"
    assert choose_attention(torch.device("cuda"), torch.bfloat16, 256) == "sdpa"


def passed(model: LlamaForCausalLM, narrow: bool) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Hidden states, all gradients, and the bytes that backward waited for."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            hidden = model.model(**packed(), use_cache=False).last_hidden_state
        hidden.float().square().mean().backward()
    inside = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    for p in model.parameters():
        kept.pop(p.untyped_storage().data_ptr(), None)
    return hidden.detach(), torch.cat(inside), sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_lean_layers_are_layers(tiny_llama: Path, dtype: torch.dtype) -> None:
    stock = LlamaForCausalLM.from_pretrained(tiny_llama, dtype=dtype)
    lean = LlamaForCausalLM.from_pretrained(tiny_llama, dtype=dtype)
    make_lean(lean)
    (hidden, gradients, kept), (ours, our_gradients, our_kept) = (
        passed(model, narrow=False) for model in (stock, lean)
    )
    assert torch.equal(ours, hidden)
    # Inside the norms transformers has float32 at most, so a float64 model is no more exact.
    error = (our_gradients - gradients).norm() / gradients.norm()
    assert error < (0.02 if dtype == torch.bfloat16 else 1e-5)
    assert our_kept < 0.9 * kept


def test_lean_layers_under_autocast_are_as_exact_and_keep_less(tiny_llama: Path) -> None:
    models = [LlamaForCausalLM.from_pretrained(tiny_llama) for _ in range(3)]
    make_lean(models[2])
    wanted, stock, lean = (passed(model, model is not models[0]) for model in models)
    for place in (0, 1):
        errors = [(found[place] - wanted[place]).norm() for found in (stock, lean)]
        assert errors[1] < 1.3 * errors[0] < 0.1 * wanted[place].norm()
    assert lean[2] < 0.75 * stock[2]


@pytest.mark.parametrize("padding", [None, 5])
@pytest.mark.parametrize("tied", [False, True])
def test_a_lean_lookup_s_gradients_add_up_over_micro_batches(
    tiny_llama: Path, tied: bool, padding: int | None
) -> None:
    """Of tokens that come several times, the one that pads among them."""
    config = LlamaConfig.from_pretrained(tiny_llama)
    config.tie_word_embeddings, config.pad_token_id = tied, padding
    models = [LlamaForCausalLM(config).double()]
    models.append(copy.deepcopy(models[0]))
    make_lean(models[1])
    assert isinstance(models[1].model.embed_tokens, LeanEmbedding)
    for model in models:
        for micro in range(3):
            input_ids = torch.tensor([[5, 7, 7, 5, 9, 11 + micro]])
            model(input_ids=input_ids).logits.square().mean().backward()
    stock, lean = (dict(model.named_parameters()) for model in models)
    assert stock.keys() == lean.keys()
    assert ("lm_head.weight" in stock) != tied
    name = "model.embed_tokens.weight"
    assert stock[name].grad.abs().max() > 1e-3
    torch.testing.assert_close(lean[name].grad, stock[name].grad, rtol=1e-4, atol=1e-6)
    assert tied or bool(lean[name].grad[5].any()) == (padding is None)


def test_lean_layers_share_their_code_for_the_compiler(tiny_llama: Path) -> None:
    """A forward of a module's own would be compiled for each layer anew, and hold the module."""
    model = LlamaForCausalLM.from_pretrained(tiny_llama)
    make_lean(model)
    for module in model.model.layers.modules():
        assert "forward" not in vars(module)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("narrow", [False, True])
def test_nothing_that_a_layer_gives_or_keeps_lies_in_a_buffer(
    tiny_llama: Path, narrow: bool, dtype: torch.dtype
) -> None:
    """Else the next layer would write over it."""
    model = LlamaForCausalLM.from_pretrained(tiny_llama, dtype=dtype)
    make_lean(model)
    model.set_attn_implementation(NAME)
    kept: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.untyped_storage().data_ptr())
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=narrow),
    ):
        given = model.model(**packed(), use_cache=False).last_hidden_state
    buffers = {held.untyped_storage().data_ptr() for held in _MOMENTARY._buffers.values()}
    assert {name for name, *_ in _MOMENTARY._buffers} >= {"norm", "scores"}
    assert not buffers & {given.untyped_storage().data_ptr(), *kept}


def test_a_workspace_grows_keeps_kinds_apart_and_serves_training_after_inference() -> None:
    space, like = Workspace(), torch.zeros(1)
    with torch.inference_mode():
        first = space.take("a", (2, 3), torch.float32, like)
    torch.ones(2, 3, out=first)
    other = space.take("a", (2, 3), torch.float64, like)
    assert other.data_ptr() != first.data_ptr()
    assert space.take("a", (3,), torch.float32, like).data_ptr() == first.data_ptr()
    assert space.take("a", (5, 4), torch.float32, like).shape == (5, 4)
    assert first.sum() == 6, "who still holds the smaller one keeps it"


def test_a_lean_model_is_saved_as_any_other(tiny_llama: Path, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(tiny_llama)
    names = list(model.state_dict())
    make_lean(model)
    assert list(model.state_dict()) == names
    model.save_pretrained(tmp_path)
    assert list(LlamaForCausalLM.from_pretrained(tmp_path).state_dict()) == names


def test_auto_takes_what_was_measured_faster_and_says_the_numbers() -> None:
    choice = fast_dtype(CPU, "auto")
    faster = choice.bfloat16_flops > 1.3 * choice.float32_flops
    assert choice.dtype == (torch.bfloat16 if faster else torch.float32)
    assert f"{choice.bfloat16_flops / 1e9:.0f} GFLOP/s" in choice.reason
    assert product_rate(torch.float32, CPU, seconds=0.01) > 1e8


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_what_the_recipe_sets_is_not_measured(name: str) -> None:
    choice = fast_dtype(CPU, name)  # type: ignore[arg-type]
    assert (choice.name, choice.float32_flops) == (name, 0.0)


def test_memory_is_kept_where_glibc_is() -> None:
    assert reuse_freed_memory() is give_back_freed_memory()
    assert torch.ones(3_000_000).sum() == 3_000_000


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0.0), (1, 1.0), (7, 0.1), (100, 0.1), (5, 1.0)])
def test_the_schedule_never_leaves_its_bounds(steps: int, warmup: float) -> None:
    rates = [
        warmup_then_cosine(step, steps, peak=2.0, warmup=warmup, final=0.1) for step in range(steps)
    ]
    assert all(0 < rate <= 2.0 for rate in rates)
    assert rates[-1] == pytest.approx(0.2) or warmup == 1.0


def test_muon_takes_the_layers_matrices_only_and_no_weight_twice(tiny_llama: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(tiny_llama)
    optimizers = build_optimizers(model, DistillSettings(tokens=1, optimizer="muon"))
    names = {p: name for name, p in model.named_parameters()}
    held = {
        kind: [names[p] for group in optimizer.param_groups for p in group["params"]]
        for kind, optimizer in optimizers.items()
    }
    assert sorted(held["muon"] + held["adamw"]) == sorted(names.values())
    assert all("_proj" in name for name in held["muon"])
    assert "model.embed_tokens.weight" in held["adamw"]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_embeddings_learn_at_a_share_of_the_rate(tiny_llama: Path, optimizer: str) -> None:
    model = LlamaForCausalLM.from_pretrained(tiny_llama)
    settings = DistillSettings(tokens=1, optimizer=optimizer, embedding_learning_rate=0.25)
    optimizers = build_optimizers(model, settings)
    set_learning_rate(optimizers, 0.008)
    groups = [group for built in optimizers.values() for group in built.param_groups]
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    for name, p in model.named_parameters():
        assert rates[id(p)] == (0.002 if "embed" in name else 0.008), name


def test_norms_have_no_weight_decay(tiny_llama: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(tiny_llama)
    optimizers = build_optimizers(model, DistillSettings(tokens=1)).values()
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for name, p in model.named_parameters():
        assert decays[id(p)] == (0.0 if "norm" in name else 0.1)
