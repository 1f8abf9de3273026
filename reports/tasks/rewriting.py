"""rewriting: short passages to rewrite or to sum up, with one right answer each.

Data card. Passages made here from templates and a small vocabulary, four kinds in turn (any
`limit` that is a multiple of four is balanced): the past tense of a sentence, its plural, another
person's name in it, and the one sentence of a passage that says what happened. The prompt shows one
solved example of the kind. The model writes greedily, 32 tokens at most, up to the end of the line.
Metrics: `rouge_l`, ROUGE-L (F1) against the right answer (Lin 2004,
https://aclanthology.org/W04-1013), and `exact`, the answer without case and punctuation. Floor: the
passage copied as it is. A student's text is held against the teacher's too, see the scorecard.
Version 1, seed 1. Licence: as this project.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from reports.tasks.grammar_pairs import ADJECTIVES, MEN, PLACES, TRANSITIVE, WOMEN, Words
from reports.tasks.instructions import words_of
from shearling import Progress, silent

SEED = "rewriting 1"
DOCUMENTS_EACH = 40

Made = tuple[str, str]
"""(passage, right answer)"""


def past_tense(w: Words) -> Made:
    """The baker watches the lamp. -> The baker watched the lamp."""
    verb, rest = w.pick("verb", TRANSITIVE), f"the {w.thing('thing')[0]} near the "
    frame = f"The {w.person('who')[0]} {{}} {rest}{w.pick('place', PLACES)}."
    return frame.format(verb[1]), frame.format(verb[2])


def plural(w: Words) -> Made:
    """The baker watches the lamp. -> The bakers watch the lamps."""
    who, thing, verb = w.person("who"), w.thing("thing"), w.pick("verb", TRANSITIVE)
    place = w.pick("place", PLACES)
    return (
        f"The {who[0]} {verb[1]} the {thing[0]} near the {place}.",
        f"The {who[1]} {verb[0]} the {thing[1]} near the {place}.",
    )


def other_person(w: Words) -> Made:
    """Put Clara in the place of Alice: ..."""
    gender = w.coin("gender")
    names = (WOMEN, MEN)[gender]
    first = w.name("first", gender)
    second = w.pick("second", [name for name in names if name != first])
    told = f"{{}} {w.pick('verb', TRANSITIVE)[2]} the {w.thing('thing')[0]} at the "
    told += f"{w.pick('place', PLACES)}."
    return f"(put {second} in the place of {first}) {told.format(first)}", told.format(second)


def summary(w: Words) -> Made:
    """A passage about a place in which one thing happens -> what happened."""
    place, name = w.pick("place", PLACES), w.name("who", w.coin("gender"))
    verb, thing = w.pick("verb", TRANSITIVE)[2], w.thing("thing")[0]
    adjective = w.pick("adjective", ADJECTIVES)
    event = f"{name} {verb} the {thing}."
    passage = f"It was a quiet morning at the {place}. The air was cold. {event} "
    return f"{passage}The {thing} was {adjective}, and nothing else happened that day.", event


KINDS: dict[str, tuple[str, Callable[[Words], Made]]] = {
    "past_tense": ("Put the sentence into the past tense.", past_tense),
    "plural": ("Put the people and things of the sentence into the plural.", plural),
    "other_person": ("Write the sentence about another person.", other_person),
    "summary": ("Say in one short sentence who did what.", summary),
}


def make_documents() -> list[dict[str, Any]]:
    """{"kind", "passage", "prompt", "answer"}: the kinds in turn, no passage twice."""
    columns = [_column(kind) for kind in KINDS]
    return [document for row in zip(*columns, strict=True) for document in row]


def _column(kind: str) -> list[dict[str, Any]]:
    request, make = KINDS[kind]
    made: dict[str, str] = {}
    attempt = 0
    while len(made) <= DOCUMENTS_EACH:
        passage, answer = make(Words(f"{SEED} {kind}", attempt))
        made.setdefault(passage, answer)
        attempt += 1
    (shown, solved), *asked = made.items()
    return [
        {
            "kind": kind,
            "passage": passage,
            "prompt": f"{request}\n\nText: {shown}\nAnswer: {solved}\n\nText: {passage}\nAnswer:",
            "answer": answer,
        }
        for passage, answer in asked
    ]


def documents(cache: Path, progress: Progress = silent) -> list[dict[str, Any]]:
    """The task's documents; nothing is read or downloaded."""
    return make_documents()


def rouge_l(reference: str, text: str) -> float:
    """ROUGE-L (F1 of the longest common subsequence of words), 0 to 1."""
    from rouge_score.rouge_scorer import RougeScorer  # type: ignore[import-untyped]

    score: float = RougeScorer(["rougeL"]).score(reference, text)["rougeL"].fmeasure
    return score


def _plain(text: str) -> list[str]:
    return [word.lower() for word in words_of(text)]


def process_results(document: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """lm-eval hands over what the model wrote."""
    answer = results[0].strip()
    return {
        "rouge_l": rouge_l(document["answer"], answer),
        "exact": float(_plain(answer) == _plain(document["answer"])),
    }


def constant_floor(asked: Iterable[dict[str, Any]]) -> dict[str, float]:
    """What copying the passage scores, by metric."""
    copied = [process_results(document, [document["passage"]]) for document in asked]
    return {metric: sum(c[metric] for c in copied) / len(copied) for metric in copied[0]}
