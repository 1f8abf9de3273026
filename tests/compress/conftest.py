"""A teacher, a smaller student and text for both, all tiny and real."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from pipelines.tiny import make_tiny_llama, write_documents
from teachers.settings import SourceSettings, TransferSetSettings
from teachers.transfer_set import build_transfer_set


@pytest.fixture(scope="session")
def tiny_student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama smaller than ``tiny_llama`` on every axis: 2 layers, hidden 24, 2/2 heads."""
    return make_tiny_llama(
        tmp_path_factory.mktemp("student") / "llama",
        seed=5,
        num_hidden_layers=2,
        hidden_size=24,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=40,
    )


@pytest.fixture(scope="session")
def tiny_transfer_set(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, tiny_text: Path
) -> Path:
    """Windows of 32 tokens, most with a document's end inside; 4 held out."""
    folder = tmp_path_factory.mktemp("transfer")
    settings = TransferSetSettings(
        sources=(SourceSettings(name="tiny", path=str(tiny_text)),), window=32, heldout_windows=4
    )
    build_transfer_set(settings, tiny_llama, folder / "set", seed=0, cache=folder / "cache")
    return folder / "set"


@pytest.fixture(scope="session")
def two_sources(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, tiny_text: Path
) -> Path:
    """As ``tiny_transfer_set``, with a second source beside the grammar: digits by chance."""
    folder = tmp_path_factory.mktemp("two")
    rng = random.Random(0)
    numbers = [" ".join(str(rng.randint(0, 9)) for _ in range(40)) for _ in range(200)]
    digits = write_documents(folder / "digits.jsonl", numbers)
    sources = (
        SourceSettings(name="grammar", path=str(tiny_text)),
        SourceSettings(name="digits", path=str(digits)),
    )
    settings = TransferSetSettings(sources=sources, window=32, heldout_windows=8)
    build_transfer_set(settings, tiny_llama, folder / "set", seed=0, cache=folder / "cache")
    return folder / "set"
