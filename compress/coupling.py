"""Which rows and columns must go together, asked of torch-pruning.

Its DependencyGraph follows the autograd graph of a model. On a real checkpoint that takes many
minutes; what is coupled doesn't depend on sizes, so a replica with two tiny layers of the same
architecture is traced instead, in milliseconds.

Source: Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023 (arXiv:2301.12900).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from shearling import ShearlingError

HIDDEN, QUERY, KEY_VALUE, NEURONS, WHOLE = "hidden", "query", "key_value", "neurons", "whole"
"""The axes of a Llama: the residual stream, the rows of all query heads, the rows of all
key/value heads, the FFN's neurons; WHOLE is an axis that nothing is taken from."""

_LAYER = "model.layers.0."
_REPLICA = {"hidden_size": 20, "num_attention_heads": 4, "num_key_value_heads": 2}
_REPLICA_HEAD_DIM, _REPLICA_NEURONS, _REPLICA_VOCABULARY = 6, 28, 50


@dataclass(frozen=True)
class Coupling:
    """For each parameter the axis of each of its dimensions.

    Parameters of a layer go by their name inside it (``self_attn.q_proj.weight``), the others by
    their full name (``model.embed_tokens.weight``).
    """

    axes: Mapping[str, tuple[str, ...]]

    def cut(self, name: str, tensor: Tensor, kept: Mapping[str, Tensor]) -> Tensor:
        """Narrow a parameter: on each axis in ``kept`` take those indices, in their order.

        Where a matrix [new, old] stands for an axis, its products are taken instead, with what
        the indices have left.
        """
        cuts = [(kept[axis], dim) for dim, axis in enumerate(self.axes[name]) if axis in kept]
        for taken, dim in sorted(cuts, key=lambda cut: cut[0].ndim):
            tensor = narrowed(tensor, taken, dim)
        return tensor


_ROWS = 16384
"""Rows that are multiplied at one time."""


def narrowed(tensor: Tensor, kept: Tensor, dim: int = -1) -> Tensor:
    """``tensor`` with one dimension cut: to the indices ``kept`` [new], or by its product with
    ``kept`` [new, old]."""
    if kept.ndim == 1:
        return tensor.index_select(dim, kept.to(tensor.device))
    matrix = kept.to(tensor.device)
    if tensor.ndim == 1:
        return (matrix @ tensor.to(matrix)).to(tensor.dtype)
    # A part at a time: a large vocabulary's embedding in float32 would be the largest of all.
    parts = [
        (part.to(matrix) @ matrix.T).to(tensor.dtype)
        for part in torch.split(tensor.transpose(dim, -1), _ROWS)
    ]
    return torch.cat(parts).transpose(dim, -1).contiguous()


class _NormPruning(tp.BasePruningFunc):  # type: ignore[misc]
    """Tells torch-pruning that RMSNorm is a layer with one channel dimension."""

    def prune_out_channels(self, layer: nn.Module, idxs: list[int]) -> nn.Module:
        raise NotImplementedError("the graph is only asked, nothing is pruned through it")

    prune_in_channels = prune_out_channels

    def get_out_channels(self, layer: LlamaRMSNorm) -> int:
        return int(layer.weight.shape[0])

    get_in_channels = get_out_channels


def derive_coupling(config: LlamaConfig) -> Coupling:
    """The coupling of ``config``'s architecture, read from a replica's dependency graph.

    Raises:
        ShearlingError: the graph couples something that a stock Llama can't be cut along.
    """
    replica = _replica(config)
    coupled = _tracer(replica)
    layer = replica.model.layers[0]
    attention = layer.self_attn
    axes: dict[tuple[str, str], str] = {}
    roots = ((HIDDEN, replica.model.embed_tokens), (NEURONS, layer.mlp.gate_proj))
    for axis, root in roots:
        axes |= dict.fromkeys(coupled(root), axis)
    # Attention mixes all heads, so one group holds queries, keys, values and o_proj's input;
    # which of them are query rows and which key/value rows is told by their number. Without
    # grouped attention they are the same heads, and all of them go as query rows.
    widths = {attention.k_proj.out_features: KEY_VALUE, attention.q_proj.out_features: QUERY}
    for end in coupled(attention.q_proj):
        module = replica.get_submodule(end[0])
        axes[end] = widths[module.out_features if end[1] == "out" else module.in_features]
    return Coupling(_axes_of_parameters(replica, axes))


def _replica(config: LlamaConfig) -> LlamaForCausalLM:
    """Two tiny layers with the same features, all widths different from each other."""
    small = copy.deepcopy(config)
    grouped = config.num_key_value_heads < config.num_attention_heads
    small.update(
        _REPLICA
        | {
            "num_key_value_heads": 2 if grouped else 4,
            "num_hidden_layers": 2,
            "head_dim": _REPLICA_HEAD_DIM,
            "intermediate_size": _REPLICA_NEURONS,
            "vocab_size": _REPLICA_VOCABULARY,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        }
    )
    small._attn_implementation = "eager"  # a fused kernel would hide what it couples
    return LlamaForCausalLM(small).float()


def _tracer(replica: LlamaForCausalLM) -> Callable[[nn.Module], set[tuple[str, str]]]:
    """A function from a module to the ends, (module name, "in" or "out"), its rows are tied to."""
    with torch.enable_grad():  # the graph is read off autograd's
        graph = tp.DependencyGraph().build_dependency(
            replica,
            example_inputs=torch.arange(10).view(2, 5),
            customized_pruners={LlamaRMSNorm: _NormPruning()},
            forward_fn=lambda model, tokens: model(tokens, use_cache=False).logits,
        )
    names = {module: name for name, module in replica.named_modules() if name}
    return partial(_coupled, graph, names)


def _coupled(graph: Any, names: dict[nn.Module, str], root: nn.Module) -> set[tuple[str, str]]:
    """Follow the graph from ``root``'s output rows.

    The library's own groups also track single indices through each reshape; attention's reshapes
    make that take exponential time, and only the ends are needed here.
    """
    handler = graph.get_pruner_of_module(root).prune_out_channels
    todo, seen, ends = [(graph.module2node[root], handler)], set(), set()
    while todo:
        node, handler = todo.pop()
        if (id(node), handler) in seen:
            continue
        seen.add((id(node), handler))
        if node.module in names:
            ends.add(
                (names[node.module], "out" if graph.is_out_channel_pruning_fn(handler) else "in")
            )
        todo += [(d.target, d.handler) for d in node.dependencies if d.trigger == handler]
    return ends


def _axes_of_parameters(
    replica: LlamaForCausalLM, axes: dict[tuple[str, str], str]
) -> dict[str, tuple[str, ...]]:
    """Translate ends of modules into dimensions of parameters; refuse what has no axis."""
    found: dict[str, tuple[str, ...]] = {}
    for name, parameter in replica.named_parameters(remove_duplicate=False):
        if name.startswith("model.layers.") and not name.startswith(_LAYER):
            continue
        module, _ = name.rsplit(".", 1)
        out = axes.get((module, "out"), WHOLE)
        into = axes.get((module, "in"), WHOLE)
        if isinstance(replica.get_submodule(module), nn.Embedding):
            found[name] = (WHOLE, out)
        else:
            found[name.removeprefix(_LAYER)] = (out, into) if parameter.dim() == 2 else (out,)
        inside = name.startswith(_LAYER)
        if inside and WHOLE in found[name.removeprefix(_LAYER)]:
            raise ShearlingError(
                f"torch-pruning's graph doesn't say what {name} is coupled to.",
                hint="This architecture can't be pruned; Llama-family models can.",
            )
    return found
