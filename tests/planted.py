"""Junk of known kinds, planted among good texts, for the test and the benchmark of cleaning."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from teachers.cleaned import Cleaner
from teachers.cleaning import removed_folder, rows
from teachers.encoding import Encoder, tokenise
from teachers.readers import Document
from teachers.settings import CleanSettings
from teachers.tokenizer import load_tokenizer

MENU = (
    "Home | About us | Contact | Sitemap", "Log in", "Sign up for our newsletter",
    "Share on Facebook", "Tweet this", "Click here to read more", "Terms of use",
    "This site uses cookies. By continuing you accept our cookie policy.", "Privacy policy",
    "All rights reserved 2019", "Next >>", "<< Previous", "Add to cart", "Reply", "0 comments",
    "Posted in: Uncategorized", "Tags: news, sale, deals", "Subscribe", "Advertisement",
    "Enable Javascript to view this page", "Back to top", "Free shipping on orders over $50",
)  # fmt: skip
FOREIGN = {
    "de": (
        "Am frühen Morgen trieb der Schäfer seine Herde über die nassen Wiesen hinauf zum Pass.",
        "Die Wolle des letzten Jahres lag noch in großen Säcken unter dem Dach der Scheune.",
        "Niemand im Dorf wusste genau, warum die alte Mühle in jener Nacht abgebrannt war.",
        "Nach dem Regen roch die Erde so stark, dass man ihn noch im Haus bemerken konnte.",
        "Der Lehrer erklärte den Kindern, wie man aus Milch und etwas Geduld Käse macht.",
        "Wenn der Schnee schmilzt, werden die Wege zum Tal für einige Wochen gefährlich.",
    ),
    "fr": (
        "Le berger conduisait son troupeau vers les hauts pâturages dès que la neige fondait.",
        "On disait au village que le vieux moulin avait brûlé pendant une nuit sans lune.",
        "La laine de l'année passée dormait encore dans de grands sacs sous le toit.",
        "Les enfants apprenaient à l'école comment le lait devient du fromage avec le temps.",
        "Après la pluie, l'odeur de la terre entrait par toutes les fenêtres de la maison.",
        "Personne ne savait au juste pourquoi le chien refusait de traverser le pont.",
    ),
    "es": (
        "El pastor subía con su rebaño a los prados altos cuando empezaba a fundirse la nieve.",
        "En el pueblo se contaba que el molino viejo había ardido una noche sin luna.",
        "La lana del año pasado seguía guardada en grandes sacos debajo del tejado.",
        "Los niños aprendían en la escuela cómo la leche se convierte en queso con paciencia.",
        "Después de la lluvia el olor de la tierra entraba por todas las ventanas.",
        "Nadie sabía por qué el perro se negaba cada tarde a cruzar el puente de piedra.",
    ),
}
OBSCENE = ("fuck", "shit", "bitch", "cunt", "asshole", "whore", "cum", "pussy", "dick", "tits")


@dataclass(frozen=True)
class Planted:
    """A text, what it is, and the number of the text that it repeats."""

    kind: str
    text: str
    original: int | None = None


def plant(texts: list[str], questions: list[str], each: int, seed: int = 0) -> list[Planted]:
    """The good texts first, then ``each`` pieces of junk of every kind."""
    draw = random.Random(seed)
    found = [Planted("good", text) for text in texts]

    def add(kind: str, make: Callable[[], str]) -> None:
        found.extend(Planted(kind, make()) for _ in range(each))

    add("boilerplate", lambda: "\n".join(draw.choices(MENU, k=draw.randint(15, 40))))
    add("repeated lines", lambda: _repeated(draw, texts))
    add("benchmark question", lambda: _contaminated(draw, texts, questions))
    add("another language", lambda: _foreign(draw))
    add("obscene", lambda: _obscene(draw, texts))
    for kind, change in (("exact duplicate", _same), ("near duplicate", _nearly)):
        for number in draw.sample(range(len(texts)), each):
            found.append(Planted(kind, change(draw, texts[number]), number))
    return found


def _repeated(draw: random.Random, texts: list[str]) -> str:
    """A text of which one line comes back again and again."""
    lines = draw.choice(texts).split(". ")[:12]
    again = draw.choice(lines)
    return "\n".join(line for other in lines for line in (other, again, again))


def _contaminated(draw: random.Random, texts: list[str], questions: list[str]) -> str:
    words = draw.choice(texts).split(" ")
    place = draw.randrange(len(words))
    return " ".join([*words[:place], draw.choice(questions), *words[place:]])


def _foreign(draw: random.Random) -> str:
    sentences = FOREIGN[draw.choice(list(FOREIGN))]
    return " ".join(draw.choice(sentences) for _ in range(4)) + "\n" + draw.choice(sentences)


def _obscene(draw: random.Random, texts: list[str]) -> str:
    """One word in fifteen is obscene."""
    words = draw.choice(texts).split(" ")
    return " ".join(draw.choice(OBSCENE) if draw.random() < 1 / 15 else word for word in words)


def _same(draw: random.Random, text: str) -> str:
    return text.replace(". ", ".  ").replace(" a ", " A ") + "\n"


def _nearly(draw: random.Random, text: str) -> str:
    """One word in a hundred is another, and a line was put before."""
    words = text.split(" ")
    for place in draw.sample(range(len(words)), max(1, len(words) // 100)):
        words[place] = draw.choice(words)
    return f"From our archive, number {draw.randrange(10**6)}.\n" + " ".join(words)


def clean(
    planted: list[Planted],
    questions: list[str],
    settings: CleanSettings,
    folder: Path,
    work: Path,
) -> tuple[dict[int, str], dict[str, Any]]:
    """Number -> the filter that took it out, and the facts for the report."""
    encoder = Encoder(load_tokenizer(folder), folder)
    work.mkdir()
    cleaner = Cleaner(
        settings,
        work,
        questions={"questions": [[question] for question in questions]},
        teacher=folder,
        device="cpu",
        seed=0,
        progress=lambda *_, **__: None,
    )
    documents = (Document(one.text) for one in planted)
    path = work / "0.ids"
    taken = tokenise(documents, encoder, path, aside=cleaner.aside())
    _, facts = cleaner.clean([taken], [path], encoder)
    names = [one["name"] for one in facts["filters"]]
    removed = {
        row["metadata"]["number"]: name
        for name in names
        for row in rows(removed_folder(work, name))
    }
    return removed, facts


def rates(planted: list[Planted], removed: dict[int, str]) -> dict[str, float]:
    """Kind -> how much of it is gone. Of two that are alike, either may go."""
    gone: dict[str, list[bool]] = {}
    for number, one in enumerate(planted):
        lost = number in removed
        if one.original is not None:
            lost = lost or one.original in removed
        elif one.kind == "good" and lost and removed[number].endswith("duplicates"):
            lost = False  # what is like it was kept, or is in the same case
        gone.setdefault(one.kind, []).append(lost)
    return {kind: float(np.mean(found)) for kind, found in gone.items()}
