"""The tokenizer in a GGUF's metadata, as a fast tokenizer that gives the same ids as the original.

transformers can build one too, but (5.23) without the digit splitting of the ``smollm`` rule, so
that "a  12" gets other ids, and without Llama 3's ``ignore_merges``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers import processors as post_processors
from transformers import PreTrainedTokenizerFast

from shearling import write_json
from students.gguf_layout import LLAMA3_SPLIT, QWEN2_SPLIT
from teachers.gguf_header import Gguf, refusal


def _gpt2_split() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _digits_split() -> Any:
    """Each digit for itself, then GPT-2's rule: SmolLM's tokenizer.json."""
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2_split()])


def _regex_split(pattern: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


_llama3_split = partial(_regex_split, LLAMA3_SPLIT)


class PreTokenizer(NamedTuple):
    """What llama.cpp knows of a tokenizer by the name of its rule."""

    split: Callable[[], Any]
    """Makes what cuts text into the pieces that are merged."""
    ignore_merges: bool = False
    """A piece that is a token is taken whole (tiktoken's way)."""
    adds_bos: bool = False
    """Texts begin with BOS where the file does not say whether they do."""


# tokenizer.ggml.pre -> its rule, as in llama.cpp's llama-vocab.cpp.
PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    "gpt-2": PreTokenizer(_gpt2_split),
    "smollm": PreTokenizer(_digits_split),
    "starcoder": PreTokenizer(_digits_split),
    "refact": PreTokenizer(_digits_split),
    "qwen2": PreTokenizer(partial(_regex_split, QWEN2_SPLIT)),
    "llama-bpe": PreTokenizer(_llama3_split, ignore_merges=True, adds_bos=True),
    "llama3": PreTokenizer(_llama3_split, ignore_merges=True, adds_bos=True),
    "llama-v3": PreTokenizer(_llama3_split, ignore_merges=True, adds_bos=True),
}
_CONTROL, _USER_DEFINED = 3, 4
_SPECIAL_KEYS = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}


def special_ids(meta: Mapping[str, Any]) -> dict[str, int]:
    """bos_token, eos_token, unk_token, pad_token -> id, where the metadata has them."""
    tokens = len(meta.get("tokenizer.ggml.tokens", ()))
    ids = {name: meta.get(key) for name, key in _SPECIAL_KEYS.items()}
    return {name: i for name, i in ids.items() if isinstance(i, int) and 0 <= i < tokens}


def llama_tokenizer(gguf: Gguf) -> PreTrainedTokenizerFast:
    """The tokenizer in a GGUF's metadata, chat template and special tokens included."""
    meta = gguf.metadata
    tokens = meta.get("tokenizer.ggml.tokens")
    if not tokens or not all(isinstance(token, str) for token in tokens):
        raise refusal(gguf.path, "it carries no tokenizer")
    kind = meta.get("tokenizer.ggml.model")
    if kind == "gpt2":
        rule = _pre_tokenizer(gguf)
        backend, adds_bos = _byte_level_bpe(gguf, rule), rule.adds_bos
    elif kind == "llama":
        backend, adds_bos = _sentencepiece_bpe(gguf), True
    else:
        raise refusal(gguf.path, f"its tokenizer is of the kind {kind!r}")
    types = meta.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    for token, type_ in zip(tokens, types, strict=False):
        if type_ in (_CONTROL, _USER_DEFINED):
            special = type_ == _CONTROL
            added = [AddedToken(token, normalized=False, special=special)]
            _ = backend.add_special_tokens(added) if special else backend.add_tokens(added)
    special_tokens = {name: tokens[i] for name, i in special_ids(meta).items()}
    if meta.get("tokenizer.ggml.add_bos_token", adds_bos) and "bos_token" in special_tokens:
        bos = special_tokens["bos_token"]
        backend.post_processor = post_processors.TemplateProcessing(
            single=[bos, "$A"],
            pair=[bos, "$A", f"{bos}:1", "$B:1"],
            special_tokens=[(bos, backend.token_to_id(bos))],
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        model_max_length=int(meta.get("llama.context_length", 2048)),
        **special_tokens,
    )
    template = meta.get("tokenizer.chat_template")
    if isinstance(template, str):
        tokenizer.chat_template = template
    return tokenizer


def _vocabulary(gguf: Gguf) -> dict[str, int]:
    tokens = gguf.metadata["tokenizer.ggml.tokens"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise refusal(gguf.path, "a tokenizer with the same token twice")
    return vocabulary


def _pre_tokenizer(gguf: Gguf) -> PreTokenizer:
    pre = gguf.metadata.get("tokenizer.ggml.pre")
    if not isinstance(pre, str) or pre not in PRE_TOKENIZERS:
        raise refusal(
            gguf.path,
            f"its tokenizer splits text by the rule {pre!r}; known are "
            + ", ".join(PRE_TOKENIZERS),
        )
    return PRE_TOKENIZERS[pre]


def _byte_level_bpe(gguf: Gguf, rule: PreTokenizer) -> Tokenizer:
    vocabulary = _vocabulary(gguf)
    merges = [tuple(m.split(" ", 1)) for m in gguf.metadata.get("tokenizer.ggml.merges", ())]
    unknown = [m for m in merges if len(m) != 2 or m[0] + m[1] not in vocabulary]
    unknown += [m for m in merges if not all(part in vocabulary for part in m)]
    if unknown:
        raise refusal(gguf.path, f"a tokenizer whose merge {unknown[0]} makes no token")
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=rule.ignore_merges))
    tokenizer.pre_tokenizer = rule.split()
    tokenizer.decoder = decoders.ByteLevel()
    # ByteLevel as post-processor only mends offsets; without it they would include the space.
    tokenizer.post_processor = post_processors.ByteLevel(trim_offsets=False)
    return tokenizer


def sentencepiece_merges(
    vocabulary: Mapping[str, int], scores: Mapping[str, float]
) -> list[tuple[str, str]]:
    """The merges that a SentencePiece BPE vocabulary implies: best score of the whole first."""
    merges = [
        (scores[whole], vocabulary[whole[:cut]], vocabulary[whole[cut:]], whole, cut)
        for whole in vocabulary
        for cut in range(1, len(whole))
        if whole[:cut] in vocabulary and whole[cut:] in vocabulary
    ]
    merges.sort(key=lambda merge: (-merge[0], merge[1], merge[2]))
    return [(whole[:cut], whole[cut:]) for *_, whole, cut in merges]


def _sentencepiece_bpe(gguf: Gguf) -> Tokenizer:
    vocabulary, meta = _vocabulary(gguf), gguf.metadata
    scores = meta.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(vocabulary):
        raise refusal(gguf.path, "a SentencePiece tokenizer without a score for each token")
    types = meta.get("tokenizer.ggml.token_type") or [1] * len(vocabulary)
    plain = {
        token: index
        for (token, index), type_ in zip(vocabulary.items(), types, strict=False)
        if type_ == 1
    }
    merges = sentencepiece_merges(plain, dict(zip(vocabulary, scores, strict=True)))
    unknown = next((t for t, type_ in zip(vocabulary, types, strict=False) if type_ == 2), None)
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    # SentencePiece writes a space before the text, whatever it begins with.
    prefix = meta.get("tokenizer.ggml.add_space_prefix", True)
    replace = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = (
        normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prefix else replace
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Save in the form that transformers 4 and 5 both read."""
    tokenizer.save_pretrained(out)
    path = out / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    # transformers 5 writes its new name for the same class, which version 4 doesn't know.
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    for unused in ("backend", "is_local", "local_files_only"):
        config.pop(unused, None)
    write_json(path, config)
