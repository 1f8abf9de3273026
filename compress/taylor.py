"""First-order Taylor importance: how much the loss would change if a part were switched off.

Every part gets a gate g, which is 1. To first order, closing it changes the loss of a window by
-∂L/∂g, and ∂L/∂g = Σ a ∂L/∂a over the activations a of the part. The importance is the mean of
|∂L/∂g| over the windows; L is the cross-entropy of the next token.

Source: Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019
(arXiv:1906.10771), with gates for whole structures; Ma et al., "LLM-Pruner", 2023
(arXiv:2305.11627).

The gradient walks from the last layer to the first. In memory are one layer, its gradient, some
positions' logits, and the stream before each layer, kept where ``Streams`` has room for it.

Legend: B windows, T positions, E hidden, H query heads, Q query rows, F neurons, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from compress.importance import PartScores
from compress.layer import ATTENTION, MLP, LayerMath, LayerWeights, batches, normed, read_layer
from compress.streams import Streams
from shearling import Progress, silent
from teachers.checkpoint import Checkpoint
from teachers.layout import EMBEDDING, FINAL_NORM, HEAD

TAYLOR_TOKENS = 8192
HEAD_POSITIONS = 512
"""Positions whose logits are in memory at one time."""


def taylor_scores(
    source: Checkpoint,
    windows_BT: Tensor,
    streams: Streams,
    device: torch.device,
    dtype: torch.dtype,
    vocabulary: int,
    progress: Progress = silent,
) -> list[PartScores]:
    """Each layer's importances, from one forward and one backward pass over some windows.

    The embedding's share of the hidden dims is in the first layer's.
    """
    tokens_BT = windows_BT[: max(1, TAYLOR_TOKENS // windows_BT.shape[1])]
    maths = LayerMath(source.config, tokens_BT.shape[1], device, dtype)
    layers = source.shape.num_hidden_layers
    stream_BTE = streams.embedded("taylor-0", source.tensor(EMBEDDING), tokens_BT)
    before = []
    for number in range(layers):
        progress("gradients", number, 2 * layers)
        before.append(stream_BTE)
        stream_BTE = streams.empty(f"taylor-{number + 1}", tuple(stream_BTE.shape))
        stream_BTE.copy_(before[-1])
        maths.advance(stream_BTE, read_layer(source, number, device))
    gradient_BTE = streams.empty("taylor-gradient", tuple(stream_BTE.shape))
    head_VE = source.tensor(HEAD)[:vocabulary].to(device, dtype)
    _through_head(source, head_VE, maths, tokens_BT, stream_BTE, gradient_BTE)
    scores: list[PartScores] = []
    for number in reversed(range(layers)):
        progress("gradients", 2 * layers - 1 - number, 2 * layers)
        weights = read_layer(source, number, device)
        scores.append(_through_layer(maths, weights, before[number], gradient_BTE))
    closed_BTE = before[0].float() * gradient_BTE.float()
    scores[-1].hidden_E.add_(closed_BTE.sum(1).abs().sum(0))
    return scores[::-1]


def _through_head(
    source: Checkpoint,
    head_VE: Tensor,
    maths: LayerMath,
    tokens_BT: Tensor,
    stream_BTE: Tensor,
    gradient_BTE: Tensor,
) -> None:
    """The gradient of every window's summed loss with respect to the last stream."""
    norm_E = source.tensor(FINAL_NORM, torch.float32).to(maths.device)
    for window, labels_T in enumerate(tokens_BT):
        leaf_TE = stream_BTE[window].to(maths.device, torch.float32, copy=True).requires_grad_()
        slope_TE = torch.zeros_like(leaf_TE)
        # Some positions at a time: a long window's logits would be the largest of all.
        for some in torch.split(torch.arange(len(labels_T) - 1), HEAD_POSITIONS):
            with torch.enable_grad():
                final_NE = normed(leaf_TE[some], maths.eps) * norm_E
                logits_NV = F.linear(final_NE.to(maths.dtype), head_VE).float()
                labels_N = labels_T[some + 1].to(maths.device)
                loss = F.cross_entropy(logits_NV, labels_N, reduction="sum")
            slope_TE += torch.autograd.grad(loss, leaf_TE)[0]
        gradient_BTE[window] = slope_TE.to(gradient_BTE)


def _through_layer(
    maths: LayerMath,
    weights: LayerWeights,
    before_BTE: Tensor,
    gradient_BTE: Tensor,
) -> PartScores:
    """Take the gradient from behind a layer to before it, and add up what its gates say."""
    heads = torch.zeros(weights[f"{ATTENTION.output}.weight"].shape[1] // maths.config.head_dim)
    hidden, neurons = (torch.zeros(size) for size in weights[f"{MLP.output}.weight"].shape)
    for rows in batches(before_BTE):
        leaf_BTE = before_BTE[rows].to(maths.device, torch.float32, copy=True).requires_grad_()
        gates: list[Tensor] = []

        def gated(activations: Tensor, gates: list[Tensor] = gates) -> Tensor:
            gate = torch.ones_like(activations[:, :1]).requires_grad_()
            gates.append(gate)
            return activations * gate

        with torch.enable_grad():
            stream = leaf_BTE
            for block in (ATTENTION, MLP):
                _, parts = maths.read(block, stream, weights)
                mixed = gated(maths.mix(block, parts))
                stream = stream + gated(maths.linear(mixed, weights, block.output))
        upstream_BTE = gradient_BTE[rows].to(stream)
        slopes = torch.autograd.grad(stream, [leaf_BTE, *gates], upstream_BTE)
        gradient_BTE[rows] = slopes[0].to(gradient_BTE)
        query_BQ, attended_BE, neurons_BF, written_BE = (slope[:, 0] for slope in slopes[1:])
        heads += query_BQ.view(len(query_BQ), len(heads), -1).sum(2).abs().sum(0).cpu()
        neurons += neurons_BF.abs().sum(0).cpu()
        hidden += (attended_BE.abs() + written_BE.abs()).sum(0).cpu()
    return PartScores(hidden_E=hidden, heads_H=heads, neurons_F=neurons)
