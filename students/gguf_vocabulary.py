"""A Hugging Face tokenizer as the metadata of a GGUF, so that llama.cpp gives the same ids."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from shearling import ShearlingError
from students.gguf_layout import LLAMA3_SPLIT, QWEN2_SPLIT

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


def vocabulary_metadata(tokenizer: PreTrainedTokenizerBase, size: int) -> dict[str, Any]:
    """The ``tokenizer.*`` keys of a GGUF for a model whose embedding has ``size`` rows.

    Rows beyond the tokenizer's own become unused tokens.

    Raises:
        ShearlingError: a tokenizer of a kind that llama.cpp has no name for.
    """
    data: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    model = data["model"]
    if model.get("type") != "BPE":
        raise _refusal(f"it is of the kind {model.get('type')}, not BPE")
    sentencepiece = bool(model.get("byte_fallback"))
    added = {token["id"]: token for token in data.get("added_tokens", ())}
    names = {index: token for token, index in model["vocab"].items()}
    names |= {index: token["content"] for index, token in added.items()}
    if names and max(names) >= size:
        raise _refusal(f"it has the token {max(names)}, the model only {size} rows")
    unknown = tokenizer.unk_token_id if sentencepiece else None
    tokens = [names.get(index, f"[PAD{index}]") for index in range(size)]
    types = [_type(index, names, added, unknown, sentencepiece) for index in range(size)]
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    metadata: dict[str, Any] = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
    }
    if sentencepiece:
        metadata |= {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.scores": _scores(tokens, merges),
            "tokenizer.ggml.add_space_prefix": _adds_space(data),
        }
    else:
        metadata |= {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": _split_rule(data),
            "tokenizer.ggml.merges": merges,
        }
    return metadata | _special(tokenizer)


def _refusal(why: str) -> ShearlingError:
    return ShearlingError(
        f"The tokenizer can't be written into a GGUF: {why}.",
        hint="Export the model as a Hugging Face folder instead (--to hf).",
    )


def _type(
    index: int,
    names: Mapping[int, str],
    added: Mapping[int, Mapping[str, Any]],
    unknown: int | None,
    sentencepiece: bool,
) -> int:
    if index not in names:
        return UNUSED
    if index == unknown:
        return UNKNOWN
    if index in added:
        return CONTROL if added[index].get("special") else USER_DEFINED
    name = names[index]
    is_byte = sentencepiece and len(name) == 6 and name.startswith("<0x") and name.endswith(">")
    return BYTE if is_byte else NORMAL


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """SentencePiece merges the pair whose whole has the best score: minus its place in line.

    What no merge makes (bytes, single characters) comes after all that some merge makes.
    """
    places: dict[str, int] = {}
    for merge in merges:
        left, _, right = merge.partition(" ")
        places.setdefault(left + right, len(places))
    return [-float(places.get(token, len(places))) for token in tokens]


def _adds_space(data: Mapping[str, Any]) -> bool:
    """Whether a space is written before the text, by the pre-tokenizer or the normaliser."""
    text = json.dumps([data.get("normalizer"), data.get("pre_tokenizer")])
    return '"Prepend"' in text or '"prepend_scheme": "always"' in text or '"first"' in text


_SPLITS = {LLAMA3_SPLIT: "llama-bpe", QWEN2_SPLIT: "qwen2"}


def _split_rule(data: Mapping[str, Any]) -> str:
    """llama.cpp's name for how text is split before merging.

    It splits text as it is. NFC, which changes few texts, is let pass: Qwen2's files have it, and
    llama.cpp leaves it out.
    """
    normaliser = (data.get("normalizer") or {}).get("type", "NFC")
    if normaliser != "NFC":
        raise _refusal(f"it changes text first ({normaliser}), which llama.cpp does not")
    split = data["pre_tokenizer"] or {}
    parts = split.get("pretokenizers") or [split]
    kinds = [part.get("type") for part in parts]
    if kinds[-1] == "ByteLevel" and parts[-1].get("add_prefix_space"):
        raise _refusal("it puts a space before each text, which llama.cpp does not")
    if kinds == ["ByteLevel"] and parts[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits"):
        return "smollm"
    pattern = parts[0].get("pattern", {}).get("Regex")
    if kinds == ["Split", "ByteLevel"] and pattern in _SPLITS:
        return _SPLITS[pattern]
    raise _refusal(f"it splits text by a rule that llama.cpp has no name for ({kinds})")


def _special(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Ids of the special tokens, whether texts begin with one, and the chat template."""
    ids = {
        "tokenizer.ggml.bos_token_id": tokenizer.bos_token_id,
        "tokenizer.ggml.eos_token_id": tokenizer.eos_token_id,
        "tokenizer.ggml.unknown_token_id": tokenizer.unk_token_id,
        "tokenizer.ggml.padding_token_id": tokenizer.pad_token_id,
    }
    found: dict[str, Any] = {key: value for key, value in ids.items() if value is not None}
    begins = tokenizer("a")["input_ids"][:1]
    found["tokenizer.ggml.add_bos_token"] = begins == [tokenizer.bos_token_id]
    if isinstance(tokenizer.chat_template, str):
        found["tokenizer.chat_template"] = tokenizer.chat_template
    return found
