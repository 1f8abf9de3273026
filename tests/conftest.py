"""What all tests share: no network, one thread, and a real Llama that is tiny.

Fixtures with a session's life are never written to; a test that damages a model copies it first.
"""

from __future__ import annotations

import os
import signal

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Test processes side by side are told a terminal's width; what commands print here goes to a file.
os.environ.pop("COLUMNS", None)

from pathlib import Path

import pytest

from pipelines.tiny import make_tiny_llama, tiny_documents, write_documents

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Numbers that repeat to the last bit, and tests that leave the other core alone."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def ctrl_c_is_heard() -> None:
    """A shell that starts the tests in the background has them ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder: 4 layers, hidden 32, 4/2 heads, intermediate 64, tied, 384 tokens."""
    return make_tiny_llama(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="session")
def tiny_llama_untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same size of Llama, with an output matrix of its own and other weights."""
    folder = tmp_path_factory.mktemp("tiny") / "untied"
    return make_tiny_llama(folder, seed=1, tie_word_embeddings=False)


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file of 300 short English documents (column ``text``)."""
    return write_documents(tmp_path_factory.mktemp("text") / "tiny.jsonl", tiny_documents(300))


@pytest.fixture(scope="session")
def tiny_plain_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same kind of documents as plain text, a blank line between two documents."""
    path = tmp_path_factory.mktemp("text") / "tiny.txt"
    path.write_text("\n\n".join(tiny_documents(300)) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The workplace's data folder; a test that needs it is skipped where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip("the data folder ../shared/data is not here")
    return SHARED_DATA
