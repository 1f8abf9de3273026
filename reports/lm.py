"""lm-eval's HFLM for Llama checkpoints, with one difference: no token is computed twice.

The questions of a multiple-choice task share long beginnings (the question before its choices, the
few-shot examples before all questions, "The keys to the cabinet" before "are" and "is"). Here the
token sequences of many requests become one *prefix tree*; the tree's nodes stand in one row, each
node attends to its ancestors only, and its position is its depth. That is exact, needs no padding,
and only the positions that predict a wanted token are projected to the vocabulary, a few hundred at
a time, so the logits never stand as one [batch, time, vocabulary] tensor.

Shapes: N nodes of a tree, D hidden, V vocabulary, P positions that are projected.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from lm_eval.models.huggingface import HFLM
from transformers import LlamaForCausalLM

from shearling import Progress, silent

PROJECTED_AT_ONCE = 256
"""Positions whose logits exist at one time."""

Request = tuple[Any, list[int], list[int]]
"""What lm-eval hands over: the strings (or None), the context's tokens, the continuation's."""


@dataclass
class PrefixTree:
    """Token sequences merged where they begin alike; parents stand before their children."""

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    _children: dict[tuple[int, int], int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tokens)

    def add(self, sequence: Sequence[int]) -> list[int]:
        """Add a sequence and return the node of each of its tokens."""
        path: list[int] = []
        node = -1
        for depth, token in enumerate(sequence):
            child = self._children.get((node, token))
            if child is None:
                child = len(self.tokens)
                self._children[node, token] = child
                self.tokens.append(token)
                self.parents.append(node)
                self.depths.append(depth)
            node = child
            path.append(node)
        return path

    def shared(self, sequence: Sequence[int]) -> int:
        """How many of the sequence's first tokens are in the tree already."""
        node = -1
        for length, token in enumerate(sequence):
            child = self._children.get((node, token))
            if child is None:
                return length
            node = child
        return len(sequence)

    @property
    def is_chain(self) -> bool:
        """Whether the tree is one plain sequence."""
        return all(parent == node - 1 for node, parent in enumerate(self.parents))

    def ancestors(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """[N, N] bool: row n is true at n and its ancestors."""
        seen_NN = np.zeros((len(self), len(self)), dtype=np.bool_)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                seen_NN[node, :node] = seen_NN[parent, :node]
            seen_NN[node, node] = True
        return seen_NN


@dataclass
class Row:
    """One forward pass: a tree, and for each request in it the nodes that predict its tokens."""

    tree: PrefixTree = field(default_factory=PrefixTree)
    wanted: list[tuple[int, list[int], list[int]]] = field(default_factory=list)
    """(number of the request, predicting nodes, predicted tokens)"""


def pack(requests: Sequence[Request], max_length: int, budget: int) -> list[Row]:
    """Distribute requests over rows of at most ``budget`` nodes (a longer request stands alone).

    Sorted by their tokens, requests with a common beginning are neighbours and meet in one row.
    As in HFLM, what exceeds ``max_length`` is cut from the left, and the last token is no input.
    """
    inputs = [(ctx + cont)[-(max_length + 1) :][:-1] for _, ctx, cont in requests]
    rows: list[Row] = []
    for number in sorted(range(len(inputs)), key=inputs.__getitem__):
        sequence, continuation = inputs[number], requests[number][2]
        row = rows[-1] if rows else None
        if row is None or len(row.tree) + len(sequence) - row.tree.shared(sequence) > budget:
            row = Row()
            rows.append(row)
        path = row.tree.add(sequence)
        row.wanted.append((number, path[-len(continuation) :], continuation))
    return rows


class PrefixLM(HFLM):  # type: ignore[misc]
    """HFLM whose log-likelihoods are computed on prefix trees; everything else is inherited."""

    def __init__(
        self,
        model: LlamaForCausalLM,
        tokenizer: Any,
        *,
        batch_size: int,
        progress: Progress = silent,
        what: str = "benchmark",
    ) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        self.node_budget = 64 * batch_size
        self.progress = progress
        self.what = what

    def get_model_info(self) -> dict[str, Any]:
        """Nothing: HFLM would ask the hub for the revision of a model that is already here."""
        return {}

    def loglikelihood(
        self, requests: list[Any], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """As HFLM, without its progress bars; ``progress`` is told instead."""
        scores: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return scores

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """As HFLM; the windows of one document go through the trees one after the other."""
        totals: list[float] = []
        for done, request in enumerate(requests):
            self.progress(self.what, done, len(requests))
            totals += super().loglikelihood_rolling([request], disable_tqdm=True)
        return totals

    def _loglikelihood_tokens(
        self,
        requests: list[Request],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Sum of log-probabilities of each continuation, and whether greedy decoding gives it."""
        scores: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        rows = pack(requests, self.max_length, self.node_budget)
        for done, row in enumerate(rows):
            if len(rows) > 1:
                self.progress(self.what, done, len(rows))
            for number, score in self._score(row):
                scores[number] = score
        return scores

    @torch.inference_mode()
    def _score(self, row: Row) -> list[tuple[int, tuple[float, bool]]]:
        hidden_ND = self._hidden(row.tree)
        nodes = torch.tensor([node for _, path, _ in row.wanted for node in path])
        tokens = torch.tensor([token for _, _, tokens in row.wanted for token in tokens])
        logprob_P, greedy_P = score_positions(
            hidden_ND, self.model.lm_head.weight, nodes.to(self.device), tokens.to(self.device)
        )
        scored, start = [], 0
        for number, path, _ in row.wanted:
            part = slice(start, start + len(path))
            scored.append((number, (float(logprob_P[part].sum()), bool(greedy_P[part].all()))))
            start += len(path)
        return scored

    def _hidden(self, tree: PrefixTree) -> torch.Tensor:
        """[N, D]: the last hidden state of each node, after the final norm."""
        ids = torch.tensor([tree.tokens], device=self.device)
        if tree.is_chain:
            output = self.model.model(ids, use_cache=False)
        else:
            seen = torch.from_numpy(tree.ancestors()).to(self.device)[None, None]
            mask = torch.zeros(seen.shape, dtype=self.model.dtype, device=self.device)
            mask.masked_fill_(~seen, torch.finfo(mask.dtype).min)
            depths = torch.tensor([tree.depths], device=self.device)
            output = self.model.model(
                ids, attention_mask=mask, position_ids=depths, use_cache=False
            )
        hidden_ND: torch.Tensor = output.last_hidden_state[0]
        return hidden_ND


def score_positions(
    hidden_ND: torch.Tensor,
    vocabulary_VD: torch.Tensor,
    nodes_P: torch.Tensor,
    tokens_P: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability (float64) of token p at node p, and whether it is the likeliest token.

    A node that predicts several tokens (one for each choice) is projected once; the logits of
    only PROJECTED_AT_ONCE nodes exist at a time.
    """
    unique_U, where_P = torch.unique(nodes_P, return_inverse=True)
    logprob_P = torch.empty(len(nodes_P), dtype=torch.float64, device=nodes_P.device)
    greedy_P = torch.empty(len(nodes_P), dtype=torch.bool, device=nodes_P.device)
    for start in range(0, len(unique_U), PROJECTED_AT_ONCE):
        chunk = unique_U[start : start + PROJECTED_AT_ONCE]
        logits_CV = (hidden_ND[chunk] @ vocabulary_VD.T).float()
        mine = (where_P >= start) & (where_P < start + len(chunk))
        rows = where_P[mine] - start
        # As HFLM does, to agree with it: torch's fp32 log_softmax is about 1e-5 too high a token.
        logprob_CV = logits_CV.log_softmax(dim=-1)
        logprob_P[mine] = logprob_CV[rows, tokens_P[mine]].double()
        greedy_P[mine] = logits_CV.argmax(dim=-1)[rows] == tokens_P[mine]
    return logprob_P, greedy_P
