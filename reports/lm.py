"""lm-eval's HFLM for Llama checkpoints, with one difference: no token is computed twice.

The questions of a multiple-choice task share long beginnings (the question before its choices, the
few-shot examples before all questions, "The keys to the cabinet" before "are" and "is"). Here the
token sequences of many requests become one *prefix tree*; the tree's nodes stand in one row, each
node attends to its ancestors only, and its position is its depth. That is exact, the linear maps
need no padding, and only the positions that predict a wanted token are projected to the vocabulary,
a few hundred at a time, so the logits never stand as one [batch, time, vocabulary] tensor.

Shapes: N nodes of a tree, G blocks of B nodes with K keys each (see `prefix_tree`), H query and
J key/value heads, E head dim, D hidden, V vocabulary, P positions that are projected.
"""

from __future__ import annotations

from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from transformers import AttentionInterface, AttentionMaskInterface, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from reports.prefix_tree import BLOCK, PrefixTree, Request, Row, cut_into_blocks, pack
from shearling import Progress, silent
from teachers.conversations import same_every_day

PROJECTED_AT_ONCE = 256
"""Positions whose logits exist at one time."""
ATTENTION = "shearling_prefix_tree"
"""Under this name transformers finds `tree_attention`."""


def tree_attention(
    module: torch.nn.Module,
    query_1HNE: torch.Tensor,
    key_1JNE: torch.Tensor,
    value_1JNE: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    tree_keys: torch.Tensor | None = None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention among the nodes of a tree, block by block; without a tree transformers' own.

    ``tree_keys`` is [G, K], the nodes that are each block's keys, and ``attention_mask``
    [G, 1, B, K] is added to the scores. Returns [1, N, H, E].
    """
    if tree_keys is None:
        plain: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module,
            query_1HNE,
            key_1JNE,
            value_1JNE,
            attention_mask,
            scaling=scaling,
            **kwargs,
        )
        return plain
    assert attention_mask is not None
    _, heads, nodes, width = query_1HNE.shape
    groups, shared = len(tree_keys), heads // key_1JNE.shape[1]
    padded_HNE = torch.nn.functional.pad(query_1HNE[0], (0, 0, 0, groups * BLOCK - nodes))
    # The queries of the heads that share a key head stand below each other, so no key is repeated.
    query_GJQE = (
        padded_HNE.view(-1, shared, groups, BLOCK, width)
        .permute(2, 0, 1, 3, 4)
        .reshape(groups, -1, shared * BLOCK, width)
    )
    output_GJQE = torch.nn.functional.scaled_dot_product_attention(
        query_GJQE,
        key_1JNE[0][:, tree_keys].transpose(0, 1),
        value_1JNE[0][:, tree_keys].transpose(0, 1),
        attn_mask=attention_mask.repeat(1, 1, shared, 1),
        scale=scaling,
    )
    output_GBHE = (
        output_GJQE.reshape(groups, -1, shared, BLOCK, width)
        .permute(0, 3, 1, 2, 4)
        .reshape(groups * BLOCK, heads, width)
    )
    return output_GBHE[None, :nodes], None


AttentionInterface.register(ATTENTION, tree_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


class PrefixLM(HFLM):  # type: ignore[misc]
    """HFLM whose log-likelihoods are computed on prefix trees, and whose chats are of one day."""

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
        model.set_attn_implementation(ATTENTION)
        self.node_budget = 64 * batch_size
        self.progress = progress
        self.what = what

    def get_model_info(self) -> dict[str, Any]:
        """Nothing: HFLM would ask the hub for the revision of a model that is already here."""
        return {}

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """As HFLM, but a template that writes today's date writes the same one tomorrow."""
        self.chat_template_args = same_every_day(self.tokenizer)
        text: str = super().apply_chat_template(chat_history, add_generation_prompt)
        return text

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
        """Sum of log-probabilities of each continuation, and whether greedy decoding gives it.

        Raises:
            FloatingPointError: the model computes NaN.
        """
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
        if bool(logprob_P.isnan().any()):  # of NaN lm-eval would take the first choice
            raise FloatingPointError("the model computes NaN")
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
            blocks = cut_into_blocks(tree)
            seen_GBK = torch.from_numpy(blocks.seen_GBK).to(self.device)
            mask_GBK = torch.zeros(seen_GBK.shape, dtype=self.model.dtype, device=self.device)
            mask_GBK.masked_fill_(~seen_GBK, torch.finfo(mask_GBK.dtype).min)
            output = self.model.model(
                ids,
                attention_mask=mask_GBK[:, None],
                position_ids=torch.tensor([tree.depths], device=self.device),
                use_cache=False,
                tree_keys=torch.from_numpy(blocks.keys_GK).to(self.device),
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
        rows, asked = where_P[mine] - start, tokens_P[mine]
        # Of equally likely tokens the first, as greedy decoding (and HFLM) takes it: in bfloat16
        # one position of twenty has several.
        greedy_P[mine] = logits_CV.argmax(dim=-1)[rows] == asked
        # As HFLM does, to agree with it: torch's fp32 log_softmax is about 1e-5 too high a token.
        logprob_P[mine] = logits_CV.log_softmax(dim=-1)[rows, asked].double()
    return logprob_P, greedy_P
