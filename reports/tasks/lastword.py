"""lastword: which word ends this paragraph?

Data card. Paragraphs of WikiText-2's test split (CC-BY-SA-3.0) of 50 to 150 words whose last word
is a plain lower-case word. The wrong answers have the same kind of ending (-ed, -ing, -ly, -s, or
none) and about the same length, and don't occur in the paragraph's last sentence; they are words of
the paragraph's earlier sentences (common ones left out), and where these don't suffice, last words
of other paragraphs. After the idea of LAMBADA (Paperno et al. 2016, https://arxiv.org/abs/1606.06031).
Metrics: `acc`, the likeliest of five words (chance 0.2); `exact`, greedy decoding writes the word
(chance 0); `perplexity` of the word. Version 1, seed 1.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reports.tasks.draw import insert_at_random, shuffled
from reports.tasks.wikitext import raw_test_text, split_pages, split_paragraphs
from shearling import Progress, silent

SEED = "lastword 1"
WRONG_ANSWERS = 4
COMMON_WORDS = 150
WORDS = range(50, 151)

_END = re.compile(r"^(?P<context>.+) (?P<word>[a-z]{3,}) ?\.$", re.DOTALL)


def ending(word: str) -> str:
    """The kind of ending by which wrong answers are matched."""
    return next((end for end in ("ing", "ed", "ly", "s") if word.endswith(end)), "")


def _words(text: str) -> list[str]:
    return re.findall(r"\b[a-z]{3,}\b", text)


def make_documents(paragraphs: Sequence[str]) -> list[dict[str, Any]]:
    """{"context", "choices", "label"} for each fitting paragraph, in seeded order."""
    ends = {match["context"]: match["word"] for match in map(_END.match, paragraphs) if match}
    ends = {context: word for context, word in ends.items() if len(context.split()) + 1 in WORDS}
    pool = sorted(set(ends.values()))
    common = {word for word, _ in Counter(_words(" ".join(ends))).most_common(COMMON_WORDS)}
    documents = []
    for context in shuffled(ends, SEED):
        word = ends[context]
        *earlier, last = context.split(". ")

        def fits(other: str, word: str = word, last: str = last) -> bool:
            near = abs(len(other) - len(word)) <= 3 and ending(other) == ending(word)
            return near and other != word and other not in _words(last)

        nearby = sorted({other for other in _words(". ".join(earlier)) if fits(other)} - common)
        far = [other for other in pool if other not in nearby and fits(other)]
        order = shuffled(nearby, SEED, context) + shuffled(far, SEED, context)
        wrong = order[:WRONG_ANSWERS]
        if len(wrong) == WRONG_ANSWERS:
            choices, label = insert_at_random(word, wrong, SEED, "place", context)
            documents.append({"context": context, "choices": choices, "label": label})
    return documents


def documents(cache: Path, progress: Progress = silent) -> list[dict[str, Any]]:
    """The task's documents, made from WikiText-2's test split."""
    pages = split_pages(raw_test_text(cache, progress))
    return make_documents([text for page in pages for text in split_paragraphs(page)])


def process_results(
    document: dict[str, Any], results: Sequence[tuple[float, bool]]
) -> dict[str, float]:
    """lm-eval hands over (log-likelihood, is greedy) of each choice."""
    scores = [score for score, _ in results]
    right = document["label"]
    return {
        "acc": float(scores.index(max(scores)) == right),
        "exact": float(results[right][1]),
        "perplexity": scores[right],
    }
