"""A real Llama small enough to make on the fly: random weights, trained tokenizer, plain English.

`shearling regress` and the tests need a teacher without a download. This one is a stock
``LlamaForCausalLM`` folder that every other part of the project takes for what it is. Its weights
are drawn wider than usual, so that its predictions are sharp. For regress it also reads its text
for two seconds: what breaks a model that knows nothing can as well make it better.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

SUBJECTS = ("The shepherd", "A lamb", "The old ewe", "Her dog", "The llama", "A small boy")
VERBS = ("sees", "follows", "hears", "remembers", "carries", "counts", "likes", "leaves")
OBJECTS = ("the hill", "a river", "the gate", "two stones", "the market", "some wool", "the rain")
ENDINGS = ("in the morning", "before winter", "without a word", "at 7 o'clock", "again", "slowly")

TINY_CONFIG: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 64,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "initializer_range": 0.3,
}


def tiny_documents(count: int, seed: int = 0) -> list[str]:
    """``count`` short English documents from a small grammar; the same for the same seed."""
    rng = random.Random(seed)

    def sentence() -> str:
        words = (rng.choice(SUBJECTS), rng.choice(VERBS), rng.choice(OBJECTS), rng.choice(ENDINGS))
        return " ".join(words) + "."

    return [" ".join(sentence() for _ in range(rng.randint(3, 12))) for _ in range(count)]


def write_documents(path: Path, documents: list[str]) -> Path:
    """Write documents as JSONL with the column ``text``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"text": text}, ensure_ascii=False) for text in documents)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def write_last_words(path: Path, count: int) -> Path:
    """Write a LAMBADA of the grammar: the last word of a few sentences is to be guessed."""
    return write_documents(path, [text[:200].rsplit(".", 1)[0] + "." for text in _unseen(count)])


def _unseen(count: int) -> list[str]:
    return [text for text in tiny_documents(4 * count, seed=99) if len(text) > 100][:count]


def make_tiny_llama(
    folder: Path, *, seed: int = 0, vocabulary: int = 384, steps: int = 0, **config: Any
) -> Path:
    """Make a Hugging Face folder with a tiny random Llama and its byte-level BPE tokenizer.

    ``config`` overrides single keys of ``TINY_CONFIG``. The vocabulary has at most ``vocabulary``
    tokens; the model's embedding has exactly the tokenizer's length. With ``steps`` it is trained
    on the grammar's text for so many steps.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _train_tokenizer(vocabulary)
    tokenizer.save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                **{**TINY_CONFIG, **config},
                vocab_size=len(tokenizer),
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=None,
                dtype="float32",
            )
        )
        if steps:
            _train(model, tokenizer, steps)
    model.save_pretrained(folder)
    return folder


def _train(model: Any, tokenizer: Any, steps: int, window: int = 64, batch: int = 16) -> None:
    """Next-token training on the grammar, AdamW at a constant rate."""
    import torch

    text = tokenizer.eos_token.join(tiny_documents(400, seed=2))
    tokens_N = torch.tensor(tokenizer(text)["input_ids"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        starts_B1 = torch.randint(len(tokens_N) - window, (batch, 1))
        ids_BT = tokens_N[starts_B1 + torch.arange(window)]
        model(input_ids=ids_BT, labels=ids_BT).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def _train_tokenizer(vocabulary: int) -> Any:
    """Train a byte-level BPE on the grammar's text: any UTF-8 input survives the round trip."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(tiny_documents(200, seed=1), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )
