"""Other ways to cut a Llama to a shape, each in a few lines and as its paper says.

All give a stock folder of exactly the shape that they are asked for. That is more than their
papers do, so where a paper leaves something open all of them do the same: layers go by cosine
distance, whole key/value groups go before single heads, every layer keeps the same widths. The
project's own coupling and writer do the cutting; scores and updates are the rivals' own, and the
teacher is observed through hooks on transformers' model.

Legend: B windows, T positions, N positions of all windows, E teacher hidden, I inputs, O outputs,
H query heads, C head dim, F neurons, L layers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch_pruning.dependency import Dependency, Group, Node
from transformers import LlamaForCausalLM

from compress.coupling import HIDDEN, KEY_VALUE, NEURONS, QUERY, derive_coupling
from compress.greedy import DAMPING, keep_heads, keep_inputs
from compress.importance import cosine_distance
from compress.layer import (
    ATTENTION,
    BLOCKS,
    LayerMath,
    LayerWeights,
    batches,
    linear,
    read_layer,
)
from compress.selection import LayerSelection, Plan, choose_heads, choose_layers, top
from compress.slicing import Slicer
from students.build import StudentWriter, student_config
from students.shape import Shape
from teachers.checkpoint import Checkpoint, open_checkpoint
from teachers.tokenizer import copy_tokenizer

READERS, WRITERS = ("self_attn.q_proj", "mlp.gate_proj"), ("self_attn.o_proj", "mlp.down_proj")
"""Maps whose inputs are the two norms' outputs, and maps whose inputs are heads and neurons."""
BATCH_TOKENS = 2048
CPU = torch.device("cpu")

Change = Callable[[int, LayerWeights], LayerWeights]
"""From a kept layer's number in the student and its whole weights to other weights."""


# --- what is seen of the teacher ----------------------------------------------------------------


class Inputs:
    """Sums over the inputs of one linear map, float64."""

    def __init__(self, width: int, heads: int) -> None:
        self.count = 0
        self.sum_I, self.square_I, self.pooled_I = torch.zeros(3, width, dtype=torch.float64)
        self.heads_H = torch.zeros(heads, dtype=torch.float64)

    def add(self, input_BTI: Tensor) -> None:
        flat_NI = input_BTI.flatten(0, 1).double()
        self.count += len(flat_NI)
        self.sum_I += flat_NI.sum(0)
        self.square_I += flat_NI.square().sum(0)
        self.pooled_I += input_BTI.abs().mean(1).double().square().sum(0)
        size_BTH = input_BTI.unflatten(-1, (len(self.heads_H), -1)).norm(dim=-1)
        self.heads_H += size_BTH.mean(1).double().square().sum(0)

    @property
    def mean_I(self) -> Tensor:
        return self.sum_I / self.count

    @property
    def variance_I(self) -> Tensor:
        return (self.square_I / self.count - self.mean_I.square()).clamp_min(0)


@dataclass
class Observation:
    """For each layer the inputs of its maps by name, and how much it turns the stream."""

    inputs: list[dict[str, Inputs]]
    distances: list[float]


@torch.no_grad()
def observe(model: LlamaForCausalLM, windows_BT: Tensor) -> Observation:
    """Let the model read the windows and look at the inputs of its linear maps."""
    heads = model.config.num_attention_heads
    found = Observation([], [0.0] * len(model.model.layers))
    hooks = []
    for number, layer in enumerate(model.model.layers):
        found.inputs.append({})
        for name in (*READERS, *WRITERS):
            module = layer.get_submodule(name)
            seen = Inputs(module.in_features, heads if name == WRITERS[0] else 1)
            found.inputs[number][name] = seen
            hooks.append(module.register_forward_pre_hook(partial(_look, seen)))
        hooks.append(layer.register_forward_hook(partial(_turned, found, number)))
    for rows_BT in torch.split(windows_BT, max(1, BATCH_TOKENS // windows_BT.shape[1])):
        model.model(rows_BT, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


def _look(seen: Inputs, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
    seen.add(arguments[0])


def _turned(
    found: Observation, number: int, layer: nn.Module, arguments: tuple[Tensor, ...], after: Any
) -> None:
    after_BTE = after if isinstance(after, Tensor) else after[0]
    found.distances[number] += float(cosine_distance(arguments[0], after_BTE))


# --- cutting ------------------------------------------------------------------------------------


def planned(
    teacher: Shape,
    shape: Shape,
    distances: Sequence[float],
    hidden_E: Tensor,
    heads_LH: Sequence[Tensor],
    neurons_LF: Sequence[Tensor],
) -> Plan:
    """The selection of a shape by scores; layers by cosine (ShortGPT, arXiv:2403.03853)."""
    layers = choose_layers(distances, shape.num_hidden_layers, "cosine")
    sizes = (teacher.num_key_value_heads, shape.num_key_value_heads, shape.num_attention_heads)
    chosen = []
    for layer in layers:
        heads, groups = choose_heads(heads_LH[layer], *sizes)
        neurons = top(neurons_LF[layer], shape.intermediate_size)
        chosen.append(LayerSelection(heads=heads, key_value_heads=groups, neurons=neurons))
    return as_plan(layers, top(hidden_E, shape.hidden_size), chosen)


def as_plan(layers: list[int], hidden: Tensor, chosen: list[LayerSelection]) -> Plan:
    return Plan(
        layers=layers,
        hidden=hidden,
        basis_DE=None,
        chosen=chosen,
        value_basis_KCc=[None] * len(layers),
    )


def write(
    source: Checkpoint, shape: Shape, plan: Plan, out: Path, change: Change | None = None
) -> Path:
    """Slice the teacher, whose layers ``change`` may have changed, into the folder ``out``."""
    assert shape.head_dim == source.shape.head_dim, "no rival narrows heads"
    config = copy.deepcopy(source.config)  # with the biases that ``change`` may add
    config.update({"attention_bias": shape.attention_bias, "mlp_bias": shape.mlp_bias})
    coupling = derive_coupling(config)
    slicer = Slicer(teacher=source.shape, student=shape, plan=plan, coupling=coupling)
    embedding = source.tensor("model.embed_tokens.weight")
    writer = StudentWriter(out, student_config(source.config, shape), embedding.dtype)
    ends = ["model.embed_tokens.weight"]
    ends += [] if shape.tie_word_embeddings else ["lm_head.weight"]
    for name in ends:
        writer.add(name, slicer.outside_layers(name, source.tensor(name)))
    for number, layer in enumerate(plan.layers):
        weights = read_layer(source, layer, CPU)
        weights = change(number, weights) if change else weights
        for name, weight in slicer.layer(number, weights).items():
            writer.add(f"model.layers.{number}.{name}", weight)
    writer.add("model.norm.weight", slicer.norm(source.tensor("model.norm.weight")))
    copy_tokenizer(source.folder, out)
    writer.finish()
    return out


# --- the rivals ---------------------------------------------------------------------------------


def minitron(teacher: Path, shape: Shape, windows_BT: Tensor, out: Path) -> Path:
    """Plain slicing by activations: no weight is changed.

    A hidden dim counts by the outputs of all layers' norms, a head by the L2 norm of what it hands
    to the output projection, a neuron by its activation; all as means of absolute values over a
    window's positions, then the L2 norm over windows (the paper's best aggregation). A gated FFN's
    activation is what goes into its last map, as NVIDIA's own code has it for Llama.

    Source: Muralidharan et al., "Compact Language Models via Pruning and Knowledge Distillation",
    2024 (arXiv:2407.14679), section 2.2.
    """
    source = open_checkpoint(teacher)
    seen = observe(source.model(torch.float32), windows_BT)
    norms = [layer[name].pooled_I.sqrt() for layer in seen.inputs for name in READERS]
    plan = planned(
        source.shape,
        shape,
        seen.distances,
        torch.stack(norms).sum(0),
        [layer["self_attn.o_proj"].heads_H.sqrt() for layer in seen.inputs],
        [layer["mlp.down_proj"].pooled_I.sqrt() for layer in seen.inputs],
    )
    return write(source, shape, plan, out)


def magnitude(teacher: Path, shape: Shape, windows_BT: Tensor, out: Path) -> Path:
    """torch-pruning's `MagnitudeImportance` on its own groups, heads whole as its pruner does it.

    `BasePruner` itself does not get through this model: tracking every index through attention's
    reshapes takes more than a quarter of an hour for the graph alone. So the library's graph of a
    two-layer replica says which weights are coupled, and the library's importance scores those
    groups of the teacher's own weights. Layers go by cosine, of which magnitude knows nothing.

    Source: Fang et al., "DepGraph: Towards Any Structural Pruning", 2023 (arXiv:2301.12900).
    """
    source = open_checkpoint(teacher)
    model = source.model(torch.float32)
    axes = derive_coupling(source.config).axes
    distances = observe(model, windows_BT).distances
    layers = range(source.shape.num_hidden_layers)
    hidden = [end for layer in layers for end in layer_ends(model, axes, HIDDEN, layer)]
    hidden.append(End(model.lm_head, "in"))
    dim, size = source.shape.head_dim, source.shape.group_size
    heads_LH, neurons_LF = [], []
    for layer in layers:
        shared = layer_ends(model, axes, KEY_VALUE, layer)
        heads = layer_ends(model, axes, QUERY, layer)
        for member in range(size):
            heads += [replace(end, roots=_query_rows(end, dim, size, member)) for end in shared]
        heads_LH.append(group_magnitude(heads).view(-1, dim).mean(1))
        neurons_LF.append(group_magnitude(layer_ends(model, axes, NEURONS, layer)))
    plan = planned(source.shape, shape, distances, group_magnitude(hidden), heads_LH, neurons_LF)
    return write(source, shape, plan, out)


def flap(teacher: Path, shape: Shape, windows_BT: Tensor, out: Path) -> Path:
    """By fluctuation, what is removed replaced by its mean, which becomes a bias.

    An input of a linear map counts by its variance times the squared norm of its column; a head by
    its channels' sum. The layers' widths are uniform (the paper's UL-UM). The paper leaves the
    hidden size alone: where the shape narrows it, a dim counts by the fluctuation in all maps that
    read it, each standardised as the paper does it between layers, and its mean goes into those
    maps' biases too. A tied head has no bias, so what removed dims say there is lost.

    The student has biases everywhere (attention_bias, mlp_bias): a few parameters above the shape.

    Source: An et al., "Fluctuation-based Adaptive Structured Pruning for Large Language Models",
    2023 (arXiv:2312.11983), equations 5 to 9.
    """
    source = open_checkpoint(teacher)
    seen = observe(source.model(torch.float32), windows_BT)
    wholes = [read_layer(source, layer, CPU) for layer in range(source.shape.num_hidden_layers)]
    hidden_E = torch.zeros(source.shape.hidden_size, dtype=torch.float64)
    heads_LH, neurons_LF = [], []
    for inputs, weights in zip(seen.inputs, wholes, strict=True):
        for block, name in zip(BLOCKS, READERS, strict=True):
            read_OI = torch.cat([weights[f"{reader}.weight"] for reader in block.inputs])
            hidden_E += standardised(fluctuation(inputs[name], read_OI))
        channels = fluctuation(inputs[WRITERS[0]], weights[f"{WRITERS[0]}.weight"])
        heads_LH.append(channels.view(-1, source.shape.head_dim).sum(1))
        neurons_LF.append(fluctuation(inputs[WRITERS[1]], weights[f"{WRITERS[1]}.weight"]))
    plan = planned(source.shape, shape, seen.distances, hidden_E, heads_LH, neurons_LF)
    biased = replace(shape, attention_bias=True, mlp_bias=True)

    def with_biases(number: int, weights: LayerWeights) -> LayerWeights:
        inputs, chosen = seen.inputs[plan.layers[number]], plan.chosen[number]
        channels = (chosen.heads[:, None] * shape.head_dim + torch.arange(shape.head_dim)).flatten()
        kept = {READERS[0]: plan.hidden, READERS[1]: plan.hidden}
        kept |= {WRITERS[0]: channels, WRITERS[1]: chosen.neurons}
        return weights | _biases(weights, inputs, kept)

    return write(source, biased, plan, out, with_biases)


@torch.no_grad()
def osscar(teacher: Path, shape: Shape, windows_BT: Tensor, out: Path) -> Path:
    """Greedy removal of heads and neurons, the rest of the map refitted by least squares.

    Layer after layer: the inputs are those of the model as it is pruned so far, the target is what
    the whole layer makes of them. The hidden size stays. Neurons go sixteen at a time; the paper's
    local search, which swaps some back, is left out.

    Source: Meng et al., "OSSCAR: One-Shot Structured Pruning in Vision and Language Models with
    Combinatorial Optimization", 2024 (arXiv:2403.12983).
    """
    source = open_checkpoint(teacher)
    assert shape.hidden_size == source.shape.hidden_size, "OSSCAR keeps the hidden size"
    distances = observe(source.model(torch.float32), windows_BT).distances
    layers = choose_layers(distances, shape.num_hidden_layers, "cosine")
    maths = LayerMath(source.config, windows_BT.shape[1], CPU, torch.float32)
    stream_BTE = source.tensor("model.embed_tokens.weight").float()[windows_BT]
    chosen: list[LayerSelection] = []
    refitted: list[LayerWeights] = []
    for layer in layers:
        weights = read_layer(source, layer, CPU)
        kept: dict[str, Any] = {}
        for block in BLOCKS:
            name = f"{block.output}.weight"
            mixed = [
                maths.mix(block, maths.read(block, stream_BTE[rows], weights)[1])
                for rows in batches(stream_BTE)
            ]
            gram_II = sum(part.flatten(0, 1).T @ part.flatten(0, 1) for part in mixed)
            if block is ATTENTION:
                sizes = (source.shape.num_key_value_heads, shape.num_key_value_heads)
                kept["heads"], kept["key_value_heads"] = keep_heads(
                    gram_II, weights[name], shape.head_dim, *sizes, shape.num_attention_heads
                )
                inputs = kept["heads"][:, None] * shape.head_dim + torch.arange(shape.head_dim)
                inputs = inputs.flatten()
            else:
                inputs = kept["neurons"] = keep_inputs(
                    gram_II, weights[name], shape.intermediate_size
                )
            weights[name] = least_squares(gram_II, weights[name], inputs)
            for rows, part in zip(batches(stream_BTE), mixed, strict=True):
                stream_BTE[rows] += linear(part, weights, block.output, torch.float32)
        chosen.append(LayerSelection(**kept))
        refitted.append(
            {f"{block.output}.weight": weights[f"{block.output}.weight"] for block in BLOCKS}
        )
    plan = as_plan(layers, torch.arange(shape.hidden_size), chosen)
    return write(source, shape, plan, out, lambda number, weights: weights | refitted[number])


RIVALS = {"minitron": minitron, "magnitude": magnitude, "flap": flap, "osscar": osscar}


def suits(rival: str, teacher: Shape, shape: Shape) -> bool:
    """Whether a rival can make the shape at all."""
    return rival != "osscar" or shape.hidden_size == teacher.hidden_size


# --- parts of them ------------------------------------------------------------------------------


@dataclass(frozen=True)
class End:
    """The rows ("out") or the columns ("in") of a linear map; ``roots`` are the group's channels
    that they belong to, by default those of the same numbers."""

    module: nn.Module
    side: str
    roots: tuple[int, ...] | None = None

    @property
    def width(self) -> int:
        module: Any = self.module
        return int(module.out_features if self.side == "out" else module.in_features)


def layer_ends(
    model: LlamaForCausalLM, axes: Mapping[str, tuple[str, ...]], axis: str, number: int
) -> list[End]:
    """The ends of a layer's linear maps that lie on an axis."""
    layer = model.model.layers[number]
    return [
        End(layer.get_submodule(name.rpartition(".")[0]), side)
        for name, of in axes.items()
        if name.startswith(("self_attn.", "mlp.")) and name.endswith(".weight")
        for side, found in zip(("out", "in"), of, strict=True)
        if found == axis
    ]


def _query_rows(end: End, head_dim: int, group_size: int, member: int) -> tuple[int, ...]:
    """For each key/value row the row of the group's query head of that number."""
    places = (divmod(row, head_dim) for row in range(end.width))
    return tuple((head * group_size + member) * head_dim + channel for head, channel in places)


def group_magnitude(ends: Sequence[End]) -> Tensor:
    """torch-pruning's importance of a group's channels."""
    group = Group()
    for end in ends:
        node = Node(end.module, None)
        prune = tp.prune_linear_out_channels if end.side == "out" else tp.prune_linear_in_channels
        group.add_dep(Dependency(prune, prune, node, node), list(range(end.width)))
        group[len(group) - 1].root_idxs = list(end.roots or range(end.width))
    scores: Tensor = tp.importance.MagnitudeImportance()(group)
    return scores


def fluctuation(inputs: Inputs, weight_OI: Tensor) -> Tensor:
    """FLAP's metric of each input: its variance times its column's squared norm, [I]."""
    return inputs.variance_I * weight_OI.double().square().sum(0)


def standardised(scores: Tensor) -> Tensor:
    """Minus the mean, over the standard deviation."""
    return (scores - scores.mean()) / scores.std().clamp_min(1e-12)


def _biases(
    weights: LayerWeights, inputs: Mapping[str, Inputs], kept: Mapping[str, Tensor]
) -> LayerWeights:
    """For each map what its removed inputs add on average, on top of the bias that it has."""
    found = {}
    for block, reader in zip(BLOCKS, READERS, strict=True):
        for name in (*block.inputs, block.output):
            looked_at = block.output if name == block.output else reader
            weight_OI = weights[f"{name}.weight"]
            bias_O = lost_on_average(weight_OI, inputs[looked_at], kept[looked_at])
            found[f"{name}.bias"] = bias_O + weights.get(f"{name}.bias", 0)
    return found


def lost_on_average(weight_OI: Tensor, inputs: Inputs, kept: Tensor) -> Tensor:
    """What the inputs that are not kept add to a map's outputs on average, [O]."""
    lost_I = inputs.mean_I.clone()
    lost_I[kept] = 0
    return (weight_OI.double() @ lost_I).float()


def least_squares(gram_II: Tensor, weight_OI: Tensor, kept: Tensor) -> Tensor:
    """The map with the other inputs' columns zero and the kept ones refitted to do their work."""
    damped_II = gram_II.to(torch.float64, copy=True)
    damped_II.diagonal().add_(DAMPING * damped_II.diagonal().mean())
    work_LO = damped_II[kept] @ weight_OI.T.double()
    refitted_OI = torch.zeros_like(weight_OI)
    refitted_OI[:, kept] = torch.linalg.solve(damped_II[kept][:, kept], work_LO).T.to(weight_OI)
    return refitted_OI
