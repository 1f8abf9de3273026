"""The tokenizer in a Hugging Face folder: read, told apart, carried along unchanged."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from shearling import (
    ShearlingError,
    disk_errors,
    read_json,
    sha256_of_file,
    sha256_of_json,
    write_json,
)
from teachers.layout import AGAIN
from teachers.origin import copy_licences

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
"""The files that make a tokenizer; copied byte for byte they give a student the same ids."""


def has_tokenizer(folder: Path) -> bool:
    """Whether there is a tokenizer in a folder."""
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face folder, or a ShearlingError that says what is missing."""
    if not has_tokenizer(folder):
        raise ShearlingError(
            f"{folder} has no tokenizer (tokenizer.json or tokenizer.model).",
            hint="Copy the tokenizer's files into the folder of the model.",
        )
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the tokenizers library raises bare Exception
        raise ShearlingError(
            f"The tokenizer in {folder} can't be read: {error}",
            hint=AGAIN,
        ) from error
    return tokenizer


def token_count(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the highest token's number: rows of a model from there on are padding.

    ``len(tokenizer)`` is less where numbers are left out.
    """
    numbers: dict[str, int] = tokenizer.get_vocab()
    return max(len(tokenizer), *(number + 1 for number in numbers.values()))


def tokenizer_fingerprint(folder: Path) -> str:
    """SHA-256 over the tokenizer's files in a folder."""
    digest = hashlib.sha256()
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            digest.update(f"{name}\0{sha256_of_file(folder / name)}\n".encode())
    return digest.hexdigest()


def ids_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of which ids a text becomes: one for all that `check_same_tokenizer` lets pass.

    Files are others where a model was saved again or came as a GGUF, and the ids are the same.
    """
    return sha256_of_json([_ordinary(tokenizer), tokenizer(_PROBE)["input_ids"]])


_PROBE = "In 2023, 1234567 sheep 🐑: x**2\n\t美洲驼 é\u0301 <s>"


def same_ids(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers turn text into the same ids: also behind a space and behind the token
    that texts begin with, where Llama 2's files are read in two ways."""
    if ids_fingerprint(one) != ids_fingerprint(other):
        return False
    probes = (" x", f"{one.bos_token or ''}[x", f"{one.bos_token or ''} x")
    return all(one(probe)["input_ids"] == other(probe)["input_ids"] for probe in probes)


def check_same_tokenizer(teacher: Path, student: Path) -> None:
    """The student's tokenizer gives the teacher's ids: else their probabilities can't be compared.

    Chat template, names of special tokens (Llama 3.1 gave some of 3's reserved ones a use) and
    padding of the vocabulary may differ: logits of rows that are no token, or that one of them
    lacks, are left out of the loss.

    Raises:
        ShearlingError: two tokenizers; says what would work.
    """
    if tokenizer_fingerprint(teacher) == tokenizer_fingerprint(student):
        return
    theirs, ours = load_tokenizer(teacher), load_tokenizer(student)
    if same_ids(theirs, ours):
        return
    their_ids, our_ids = _ordinary(theirs), _ordinary(ours)
    differing = sum(our_ids.get(token) != number for token, number in their_ids.items())
    raise other_tokenizer(
        f"{len(theirs):,} tokens in {teacher}, {len(ours):,} in {student}, {differing:,} of the "
        "teacher's with another number or none"
    )


def other_tokenizer(how: str) -> ShearlingError:
    """Why two models can't be teacher and student, and what would work."""
    return ShearlingError(
        f"Teacher and student have different tokenizers: {how}. "
        "What the teacher says of its tokens can't be compared with the student's.",
        hint="Teach with a model of the student's own family (Llama 3, 3.1 and 3.2 share one "
        "tokenizer, so do Llama 1 and 2), or make this teacher the recipe's `teacher` and cut the "
        "student out of it with a prune stage, which keeps the teacher's tokenizer.",
    )


def _ordinary(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The tokens that text is made of: all but those that were added, and their numbers."""
    added = tokenizer.get_added_vocab()
    return {token: n for token, n in tokenizer.get_vocab().items() if token not in added}


def copy_companions(source: Path, target: Path) -> None:
    """What makes a folder of weights usable: tokenizer, way of generating, and the licence."""
    copy_tokenizer(source, target)
    copy_licences(source, target)
    generation = source / "generation_config.json"
    if generation.is_file():
        shutil.copyfile(generation, target / generation.name)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy a tokenizer's files as they are: same ids, chat template and special tokens."""
    with disk_errors(target):
        target.mkdir(parents=True, exist_ok=True)
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, target / name)


def drop_tokens(folder: Path, tokens: set[str]) -> None:
    """Take tokens out of a tokenizer's files, wherever they are listed or named."""
    for name in TOKENIZER_FILES:
        path = folder / name
        if path.suffix == ".json" and path.is_file():
            write_json(path, _without(read_json(path, hint=AGAIN), tokens))


def _without(data: Any, tokens: set[str]) -> Any:
    """JSON without the entries whose key, value or ``content`` is one of the tokens."""

    def kept(value: Any) -> bool:
        named = value.get("content") if isinstance(value, dict) else value
        return not (isinstance(named, str) and named in tokens)

    if isinstance(data, dict):
        left = {key: value for key, value in data.items() if key not in tokens and kept(value)}
        return {key: _without(value, tokens) for key, value in left.items()}
    if isinstance(data, list):
        return [_without(value, tokens) for value in data if kept(value)]
    return data
