"""The ``tokenizer.model`` of Meta's releases, SentencePiece or tiktoken, as a fast tokenizer.

Neither library is needed: a SentencePiece model is a small protocol buffer, a tiktoken file is
lines of base64 and rank. Both are brought into the form of GGUF's metadata, from which
``gguf_tokenizer`` builds the tokenizer.
"""

from __future__ import annotations

import base64
import binascii
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from shearling import ShearlingError
from teachers.gguf_header import Gguf
from teachers.gguf_tokenizer import llama_tokenizer

_AGAIN = "Download tokenizer.model again; Llama 1 and 2 keep it beside the models' folders."
END_OF_TURN = ("<|eom_id|>", "<|eot_id|>")
_SPECIAL_TOKENS = 256
_NORMAL, _CONTROL = 1, 3

# Llama 3's special tokens by number; all others are reserved ones, counted through.
_NAMED_3 = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    9: "<|eot_id|>",
}
_NAMED_3_1 = {**_NAMED_3, 4: "<|finetune_right_pad_id|>", 8: "<|eom_id|>", 10: "<|python_tag|>"}


def meta_tokenizer(folder: Path, *, newer: bool) -> PreTrainedTokenizerFast:
    """The tokenizer of a release; ``newer`` names the special tokens as from Llama 3.1 on.

    Raises:
        ShearlingError: no tokenizer.model in the folder or above it, or a damaged one.
    """
    places = [folder / "tokenizer.model", folder.parent / "tokenizer.model"]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise ShearlingError(f"{folder} has no tokenizer.model.", hint=_AGAIN)
    content = path.read_bytes()
    try:
        # A tiktoken file is text; a SentencePiece model begins with the tag of its first piece.
        metadata = _sentencepiece(content) if content[:1] == b"\n" else _tiktoken(content, newer)
        return llama_tokenizer(Gguf(path, metadata))
    except ShearlingError:
        raise
    except Exception as error:  # bytes of any kind, read as one of two formats
        raise ShearlingError(
            f"{path} is neither a SentencePiece nor a tiktoken model: {error}", hint=_AGAIN
        ) from error


# --- tiktoken -----------------------------------------------------------------------------------


def tiktoken_merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The merges behind a tiktoken vocabulary: every way to make a token of two, in rank order."""
    merges = []
    for whole, rank in ranks.items():
        pairs = [
            (ranks[whole[:cut]], ranks[whole[cut:]], whole[:cut], whole[cut:])
            for cut in range(1, len(whole))
            if whole[:cut] in ranks and whole[cut:] in ranks
        ]
        merges += [(rank, *pair) for pair in sorted(pairs)]
    return [(left, right) for *_, left, right in sorted(merges, key=lambda merge: merge[0])]


def special_tokens(newer: bool) -> list[str]:
    """Llama 3's 256 special tokens in their order, as their Hugging Face releases name them."""
    named, names, reserved = (_NAMED_3_1 if newer else _NAMED_3), [], 0
    for number in range(_SPECIAL_TOKENS):
        if number in named:
            names.append(named[number])
        else:
            names.append(f"<|reserved_special_token_{reserved}|>")
            reserved += 1
    return names


def _tiktoken(content: bytes, newer: bool) -> dict[str, Any]:
    ranks = {}
    for number, line in enumerate(content.splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise ValueError(f"line {number} is not a token and its rank") from error
    if not ranks or sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError("its ranks are not the numbers from 0 on")
    spelling = bytes_to_unicode()

    def spell(token: bytes) -> str:
        return "".join(spelling[byte] for byte in token)

    special = special_tokens(newer)
    begin, end = (len(ranks) + special.index(_NAMED_3[number]) for number in (0, 1))
    pad = special.index("<|finetune_right_pad_id|>") + len(ranks) if newer else None
    merges = [f"{spell(left)} {spell(right)}" for left, right in tiktoken_merges(ranks)]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": [*map(spell, sorted(ranks, key=ranks.__getitem__)), *special],
        "tokenizer.ggml.token_type": [_NORMAL] * len(ranks) + [_CONTROL] * len(special),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.bos_token_id": begin,
        "tokenizer.ggml.eos_token_id": end,
        "tokenizer.ggml.padding_token_id": pad,
    }


# --- SentencePiece ------------------------------------------------------------------------------


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError(f"a number at byte {at} does not end")


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protocol buffer message: numbers and raw values, in the file's order."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        length = {1: 8, 5: 4}.get(kind)
        if kind == 2:
            length, at = _varint(data, at)
        if length is None or at + length > len(data):
            raise ValueError(f"the field at byte {at} does not fit")
        yield key >> 3, data[at : at + length]
        at += length


def _sentencepiece(content: bytes) -> dict[str, Any]:
    """sentencepiece_model.proto: pieces are field 1, the normaliser's settings field 3."""
    tokens, scores, types, prefix, model = [], [], [], True, 1
    for number, value in _fields(content):
        if number == 1:
            piece = dict(_fields(value))
            tokens.append(piece[1].decode("utf-8"))
            scores.append(struct.unpack("<f", piece.get(2, bytes(4)))[0])
            types.append(piece.get(3, _NORMAL))
        elif number == 2:
            model = dict(_fields(value)).get(3, 1)
        elif number == 3:
            prefix = bool(dict(_fields(value)).get(3, 1))
    if model != 2:
        raise ValueError("it is no BPE model")
    names = {token: index for index, token in enumerate(tokens)}
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.add_space_prefix": prefix,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.bos_token_id": names.get("<s>"),
        "tokenizer.ggml.eos_token_id": names.get("</s>"),
        "tokenizer.ggml.unknown_token_id": names.get("<unk>"),
    }
