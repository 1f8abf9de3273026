"""Text that a model writes while it is taught: the student learns where its own words lead it.

A student that only reads others' text never sees its own mistakes, and piles them up when it
writes. Here it continues the first half of some windows, and the teacher says of each word what
it would have said (Agarwal et al. 2023, GKD, https://arxiv.org/abs/2306.13649). No label is right
for such text, so only the divergences count there.

The teacher may write instead (sequence-level distillation, Kim and Rush 2016,
https://arxiv.org/abs/1606.07947, with all of its probabilities): text that no epoch repeats.

Legend: B windows, T positions, R windows that are continued, L prompt length, G written tokens.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from transformers import GenerationConfig, LlamaForCausalLM

from compress.data import Batch
from compress.losses import IGNORED
from compress.precision import PrecisionChoice, in_precision


def continued(
    writer: LlamaForCausalLM,
    batch: Batch,
    *,
    share: float,
    temperature: float,
    seed: list[int],
    precision: PrecisionChoice,
    vocabulary: int | None = None,
) -> Batch:
    """The batch with the second half of a share of its windows written by ``writer``.

    A window whose document ends just there, or which has there what isn't to be learnt (another's
    turn of a conversation), is left as it is. ``seed`` decides which windows are
    taken and what is written, so a run that goes on writes the same; it is written in the
    ``precision`` in which it is read. Rows of the writer's head from ``vocabulary`` on are
    padding, which it never writes.
    """
    half = batch.input_BT.shape[1] // 2
    drawn = torch.Generator().manual_seed(_one_number(seed))
    chosen_B = torch.rand(len(batch.input_BT), generator=drawn) < share
    if half == 0:
        return batch
    goes_on_B = (batch.positions_BT[:, half] > 0).cpu() & batch.mask_BT[:, half - 1]
    rows_R = torch.nonzero(chosen_B & goes_on_B).flatten().tolist()
    if not rows_R:
        return batch
    padding = list(range(vocabulary or writer.config.vocab_size, writer.config.vocab_size))
    drawn_from = _one_number([*seed, 1])
    # Compiled layers would be compiled anew for every length, until the compiler gives up on them.
    with in_precision(writer, precision), torch.compiler.set_stance("force_eager"):
        written_RG = _write(writer, batch, rows_R, half, temperature, drawn_from, padding)
    return _with_text(batch, rows_R, half, written_RG, writer.config.eos_token_id)


def _one_number(seed: list[int]) -> int:
    """Different lists give different numbers; torch takes one number as a seed."""
    number = 0
    for part in seed:
        number = (number * 1_000_003 + part + 1) % (2**63 - 1)
    return number


@torch.no_grad()
def _write(
    writer: LlamaForCausalLM,
    batch: Batch,
    rows: list[int],
    half: int,
    temperature: float,
    seed: int,
    never: list[int],
) -> Tensor:
    """What the model writes after the first half: [R, G], of the open document alone."""
    starts = [half - 1 - int(batch.positions_BT[row, half - 1]) for row in rows]
    longest = half - min(max(start, 0) for start in starts)
    prompt_RL = torch.zeros(len(rows), longest, dtype=torch.long, device=batch.input_BT.device)
    seen_RL = torch.zeros_like(prompt_RL)
    for place, (row, start) in enumerate(zip(rows, starts, strict=True)):
        length = half - max(start, 0)
        prompt_RL[place, longest - length :] = batch.input_BT[row, half - length : half]
        seen_RL[place, longest - length :] = 1
    attention, training = writer.config._attn_implementation, writer.training
    writer.eval()  # with gradient checkpointing a training model keeps no keys and values
    writer.set_attn_implementation("sdpa")
    count = batch.input_BT.shape[1] - half
    with torch.random.fork_rng(devices=[prompt_RL.device] if prompt_RL.is_cuda else []):
        torch.manual_seed(seed)
        whole: Tensor = writer.generate(
            prompt_RL,
            attention_mask=seen_RL,
            generation_config=GenerationConfig(
                max_new_tokens=count,
                do_sample=True,
                temperature=temperature,
                top_k=0,
                # Said, lest a model's own generation config put in what it recommends for chatting.
                top_p=1.0,
                repetition_penalty=1.0,
                suppress_tokens=never or None,
                eos_token_id=writer.config.eos_token_id,
                pad_token_id=_first(writer.config.eos_token_id),
            ),
        )
    writer.set_attn_implementation(attention)
    writer.train(training)
    written_RG = whole[:, longest:]
    filler = torch.full(
        (len(rows), count - written_RG.shape[1]), _first(writer.config.eos_token_id)
    )
    return torch.cat([written_RG, filler.to(written_RG)], dim=1)


def _first(tokens: int | list[int] | None) -> int:
    if isinstance(tokens, list):
        return tokens[0]
    return tokens or 0


def _with_text(
    batch: Batch, rows: list[int], half: int, written_RG: Tensor, end: int | list[int] | None
) -> Batch:
    """Put the written halves in; what follows an end of text does not count, no label does."""
    input_BT, positions_BT = batch.input_BT.clone(), batch.positions_BT.clone()
    mask_BT, labels_BT = batch.mask_BT.clone(), batch.labels()
    width = written_RG.shape[1]
    ends = torch.tensor([] if end is None else [end] if isinstance(end, int) else end)
    for row, written_G in zip(rows, written_RG, strict=True):
        input_BT[row, half:] = written_G
        before = int(positions_BT[row, half - 1])
        positions_BT[row, half:] = torch.arange(before + 1, before + 1 + width)
        over = torch.nonzero(torch.isin(written_G.cpu(), ends)).flatten()
        # Position half - 1 asks for the first written token, the last one that counts for the end.
        asked = int(over[0]) + 1 if len(over) else width + 1
        mask_BT[row, half - 1 :] = False
        mask_BT[row, half - 1 : half - 1 + asked] = True
        labels_BT[row, half - 1 :] = IGNORED
    written = replace(batch, input_BT=input_BT, positions_BT=positions_BT)
    return written.counting(mask_BT, labels_BT)
