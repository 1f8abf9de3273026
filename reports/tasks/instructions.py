"""instructions: does the model's text keep to one rule that a program can check?

Data card. Requests made here from templates and a small vocabulary, each with one rule about the
form of the answer, after the idea of IFEval (Zhou et al. 2023, https://arxiv.org/abs/2311.07911)
and with none of its data. Ten rules take turns, so any `limit` that is a multiple of ten is
balanced. Asked through the model's chat template where it has one. The model writes greedily, 48
tokens at most. Metric: `followed`, the share of answers
that keep to their rule; an empty answer keeps to none. Floor: the best of a few constant answers.
Version 2, seed 1. Licence: as this project.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from reports.tasks.draw import choose
from reports.tasks.grammar_pairs import ADJECTIVES, PLACES, THINGS
from shearling import Progress, silent

SEED = "instructions 1"
DOCUMENTS_EACH = 16
TOPICS = tuple(f"a {adjective} {place}" for adjective in ("small", "quiet") for place in PLACES)
CONSTANTS = ("", "Yes.", "yes", "NO", "1. one\n2. two\n3. three", '["one", "two", "three"]')
"""Answers that a program without a model could always give."""

Rule = tuple[str, Callable[[str, str], bool]]
"""(the request, with {topic} and {word}; whether an answer keeps to it, given the word)"""


def words_of(text: str) -> list[str]:
    """The words of a text, without punctuation."""
    return re.findall(r"[\w'-]+", text)


def sentences_of(text: str) -> list[str]:
    """The sentences of a text, by what ends them."""
    return [part for part in re.split(r"(?<=[.!?])\s+", text.strip()) if words_of(part)]


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.strip().splitlines() if line.strip()]


def _is_list_of_three(text: str) -> bool:
    try:
        found = json.loads(text.strip())
    except (ValueError, RecursionError):
        return False
    return isinstance(found, list) and len(found) == 3 and all(isinstance(x, str) for x in found)


def _mentions(text: str, word: str) -> bool:
    return word in (found.lower() for found in words_of(text))


RULES: dict[str, Rule] = {
    "mentions": (
        'Write one sentence about {topic} that has the word "{word}" in it.',
        lambda text, word: _mentions(text, word),
    ),
    "leaves_out": (
        'Describe {topic} in one sentence of at least six words, without the letter "z" and '
        "without a comma.",
        lambda text, _: (
            len(words_of(text)) >= 6 and not set("zZ,") & set(text) and len(sentences_of(text)) == 1
        ),
    ),
    "lower_case": (
        "Write one sentence about {topic} in lower case letters only.",
        lambda text, _: len(words_of(text)) >= 4 and text == text.lower(),
    ),
    "upper_case": (
        "WRITE ONE SENTENCE ABOUT {topic} IN CAPITAL LETTERS ONLY.",
        lambda text, _: len(words_of(text)) >= 4 and text == text.upper(),
    ),
    "two_sentences": (
        "Describe {topic} in exactly two sentences.",
        lambda text, _: len(sentences_of(text)) == 2 and text.strip()[-1] in ".!?",
    ),
    "at_most_eight_words": (
        "Describe {topic} in at least three and at most eight words.",
        lambda text, _: 3 <= len(words_of(text)) <= 8,
    ),
    "numbered": (
        'Name three things that can be seen at {topic}, as a list with lines that begin with "1.", '
        '"2." and "3.".',
        lambda text, _: [line[:2] for line in _lines(text)] == ["1.", "2.", "3."],
    ),
    "question": (
        "Ask one question about {topic}.",
        lambda text, _: len(sentences_of(text)) == 1 and text.strip().endswith("?"),
    ),
    "begins_with": (
        'Write one sentence about {topic}. Its first word must be "{word}".',
        lambda text, word: [w.lower() for w in words_of(text)[:1]] == [word],
    ),
    "json_list": (
        "Name three things that can be seen at {topic}, as a JSON list of three strings and "
        "nothing else.",
        lambda text, _: _is_list_of_three(text),
    ),
}


def make_documents() -> list[dict[str, Any]]:
    """{"rule", "word", "prompt"}: the rules in turn."""
    words = sorted([*THINGS, *ADJECTIVES])
    documents = []
    for number in range(DOCUMENTS_EACH):
        for rule, (request, _) in RULES.items():
            word = choose(words, SEED, rule, number, "word")
            # Topics differ within a rule, so no request is asked twice.
            topic = TOPICS[number % len(TOPICS)]
            prompt = request.format(topic=topic, word=word)
            documents.append({"rule": rule, "word": word, "prompt": prompt})
    return documents


def documents(cache: Path, progress: Progress = silent) -> list[dict[str, Any]]:
    """The task's documents; nothing is read or downloaded."""
    return make_documents()


def follows(document: dict[str, Any], answer: str) -> bool:
    """Whether an answer keeps to the document's rule; an empty one doesn't."""
    return bool(answer.strip()) and RULES[document["rule"]][1](answer.strip(), document["word"])


def process_results(document: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """lm-eval hands over what the model wrote."""
    return {"followed": float(follows(document, results[0]))}


def constant_floor(asked: Iterable[dict[str, Any]]) -> dict[str, float]:
    """The best that one of the constant answers scores on the documents, by metric."""
    known = list(asked)
    shares = [sum(follows(document, text) for document in known) for text in CONSTANTS]
    return {"followed": max(shares) / len(known)}
