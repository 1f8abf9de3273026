"""grammar_pairs: which of two sentences is grammatical?

Data card. Minimal pairs of English made here from templates and a small vocabulary, after the idea
of BLiMP (Warstadt et al. 2020, https://arxiv.org/abs/1912.00582) and with none of its data. The
sentences of a pair have the same length but for a word or two, and differ in one place. Sixteen
phenomena take turns, so any `limit` that is a multiple of sixteen is balanced. Which sentence
stands first is drawn. Metric: `acc`, chance 0.5. Version 1, seed 1. Licence: as this project.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from reports.tasks.draw import draw
from shearling import Progress, silent

SEED = "grammar_pairs 1"
PAIRS_EACH = 64

PEOPLE = {
    "baker": "bakers", "carpenter": "carpenters", "cousin": "cousins", "dancer": "dancers",
    "farmer": "farmers", "gardener": "gardeners", "hunter": "hunters", "judge": "judges",
    "lawyer": "lawyers", "neighbor": "neighbors", "nurse": "nurses", "painter": "painters",
    "pilot": "pilots", "sailor": "sailors", "singer": "singers", "soldier": "soldiers",
    "student": "students", "tailor": "tailors", "teacher": "teachers", "writer": "writers",
}  # fmt: skip
THINGS = {
    "basket": "baskets", "blanket": "blankets", "bottle": "bottles", "bridge": "bridges",
    "candle": "candles", "carpet": "carpets", "clock": "clocks", "hammer": "hammers",
    "lamp": "lamps", "letter": "letters", "mirror": "mirrors", "mountain": "mountains",
    "necklace": "necklaces", "painting": "paintings", "ribbon": "ribbons", "saddle": "saddles",
    "shovel": "shovels", "statue": "statues", "table": "tables", "wagon": "wagons",
}  # fmt: skip
WOMEN = ("Alice", "Clara", "Diana", "Emma", "Hannah", "Julia", "Laura", "Martha", "Rachel", "Susan")
MEN = (
    "Albert",
    "Daniel",
    "Edward",
    "George",
    "Henry",
    "Oscar",
    "Peter",
    "Robert",
    "Simon",
    "Walter",
)
MASS = (
    "bread",
    "butter",
    "flour",
    "furniture",
    "luggage",
    "money",
    "sand",
    "sugar",
    "water",
    "wine",
)
ADJECTIVES = (
    "broken",
    "cheap",
    "clean",
    "dark",
    "dirty",
    "famous",
    "heavy",
    "large",
    "old",
    "strange",
)
PLACES = ("bridge", "church", "harbor", "market", "river", "school", "station", "village")

# base, third person, past, participle of verbs whose past and participle differ
IRREGULAR = (
    ("break", "breaks", "broke", "broken"), ("choose", "chooses", "chose", "chosen"),
    ("draw", "draws", "drew", "drawn"), ("forget", "forgets", "forgot", "forgotten"),
    ("give away", "gives away", "gave away", "given away"), ("hide", "hides", "hid", "hidden"),
    ("see", "sees", "saw", "seen"), ("shake", "shakes", "shook", "shaken"),
    ("steal", "steals", "stole", "stolen"), ("take", "takes", "took", "taken"),
)  # fmt: skip
# base, third person of intransitive verbs
INTRANSITIVE = (
    ("cough", "coughs"), ("dream", "dreams"), ("laugh", "laughs"), ("shout", "shouts"),
    ("sing", "sings"), ("sleep", "sleeps"), ("smile", "smiles"), ("travel", "travels"),
    ("wait", "waits"), ("whisper", "whispers"),
)  # fmt: skip
# base, third person, past of verbs that take a person or a thing
TRANSITIVE = (
    ("admire", "admires", "admired"), ("clean", "cleans", "cleaned"),
    ("describe", "describes", "described"), ("follow", "follows", "followed"),
    ("notice", "notices", "noticed"), ("remember", "remembers", "remembered"),
    ("touch", "touches", "touched"), ("watch", "watches", "watched"),
)  # fmt: skip
REFLEXIVE_VERBS = (
    "blamed",
    "defended",
    "described",
    "helped",
    "hurt",
    "praised",
    "trusted",
    "washed",
)
OPINIONS = ("believes", "claims", "hopes", "says", "suspects", "thinks")


@dataclass(frozen=True)
class Words:
    """Words drawn for one pair: each call with the same slot gives the same word."""

    phenomenon: str
    attempt: int

    def pick(self, slot: str, words: Any) -> Any:
        """One of the words (or of a dict's items), drawn by phenomenon, attempt and slot."""
        options = list(words.items()) if isinstance(words, dict) else list(words)
        return options[draw(SEED, self.phenomenon, self.attempt, slot) % len(options)]

    def person(self, slot: str) -> tuple[str, str]:
        """(singular, plural) of a person."""
        noun: tuple[str, str] = self.pick(slot, PEOPLE)
        return noun

    def thing(self, slot: str) -> tuple[str, str]:
        """(singular, plural) of a thing."""
        noun: tuple[str, str] = self.pick(slot, THINGS)
        return noun

    def coin(self, slot: str) -> int:
        """0 or 1: singular or plural, woman or man."""
        return draw(SEED, self.phenomenon, self.attempt, slot) % 2

    def name(self, slot: str, gender: int) -> str:
        """A woman's (0) or a man's (1) first name."""
        name: str = self.pick(slot, (WOMEN, MEN)[gender])
        return name


Pair = tuple[str, str]
"""(grammatical, ungrammatical)"""


def subject_verb(w: Words) -> Pair:
    """The singer laughs / laugh near the bridge."""
    number, verb = w.coin("number"), w.pick("verb", INTRANSITIVE)
    frame = f"The {w.person('subject')[number]} often {{}} near the {w.pick('place', PLACES)}."
    return frame.format(verb[1 - number]), frame.format(verb[number])


def verb_across_phrase(w: Words) -> Pair:
    """The letter from the farmers is / are old: an attractor of the other number between."""
    number = w.coin("number")
    subject, attractor = w.thing("subject")[number], w.person("attractor")[1 - number]
    frame = f"The {subject} from the {attractor} {{}} {w.pick('adjective', ADJECTIVES)}."
    right, wrong = ("is", "are")[number], ("are", "is")[number]
    return frame.format(right), frame.format(wrong)


def verb_across_clause(w: Words) -> Pair:
    """The writer that the judges follow laughs / laugh."""
    number, verb, inner = w.coin("number"), w.pick("verb", INTRANSITIVE), w.pick("in", TRANSITIVE)
    subject, attractor = w.person("subject")[number], w.person("attractor")[1 - number]
    frame = f"The {subject} that the {attractor} {inner[number]} often {{}}."
    return frame.format(verb[1 - number]), frame.format(verb[number])


def determiner_noun(w: Words) -> Pair:
    """Clara cleaned these baskets / basket."""
    number, thing = w.coin("number"), w.thing("thing")
    determiner = w.pick("determiner", (("this", "these"), ("that", "those")))[number]
    who, verb = w.name("name", w.coin("gender")), w.pick("verb", TRANSITIVE)[2]
    frame = f"{who} {verb} {determiner} {{}} near the {w.pick('place', PLACES)}."
    return frame.format(thing[number]), frame.format(thing[1 - number])


def determiner_adjective_noun(w: Words) -> Pair:
    """Oscar noticed that heavy basket / baskets."""
    number, thing = w.coin("number"), w.thing("thing")
    determiner = w.pick("determiner", (("this", "these"), ("that", "those")))[number]
    who, verb = w.name("name", w.coin("gender")), w.pick("verb", TRANSITIVE)[2]
    frame = f"{who} {verb} {determiner} {w.pick('adjective', ADJECTIVES)} {{}}."
    return frame.format(thing[number]), frame.format(thing[1 - number])


def reflexive_gender(w: Words) -> Pair:
    """Clara praised herself / himself."""
    gender = w.coin("gender")
    verb, place = w.pick("verb", REFLEXIVE_VERBS), w.pick("place", PLACES)
    frame = f"{w.name('name', gender)} {verb} {{}} at the {place}."
    forms = ("herself", "himself")
    return frame.format(forms[gender]), frame.format(forms[1 - gender])


def reflexive_number(w: Words) -> Pair:
    """The gardeners blamed themselves / himself."""
    # Only plural subjects: a singular "themselves" is grammatical for many speakers.
    verb, place = w.pick("verb", REFLEXIVE_VERBS), w.pick("place", PLACES)
    frame = f"The {w.person('subject')[1]} {verb} {{}} at the {place}."
    return frame.format("themselves"), frame.format(w.pick("wrong", ("herself", "himself")))


def reflexive_distance(w: Words) -> Pair:
    """Clara thinks that the soldiers hurt themselves / herself."""
    gender = w.coin("gender")
    opinion, verb = w.pick("opinion", OPINIONS), w.pick("verb", REFLEXIVE_VERBS)
    frame = f"{w.name('name', gender)} {opinion} that the {w.person('inner')[1]} {verb} {{}}."
    return frame.format("themselves"), frame.format(("herself", "himself")[gender])


def polarity_licensor(w: Words) -> Pair:
    """No / Some sailor has ever noticed the bridge."""
    verb, thing = w.pick("verb", TRANSITIVE)[2], w.thing("thing")[w.coin("number")]
    frame = f"{{}} {w.person('subject')[0]} has ever {verb} the {thing}."
    return frame.format("No"), frame.format(w.pick("wrong", ("Some", "This", "That")))


def polarity_scope(w: Words) -> Pair:
    """No pilot that the nurses trusted ... ever / The pilot that no nurses trusted ... ever."""
    subject, inner = w.person("subject")[0], w.person("inner")[1]
    verb, outer = w.pick("inner verb", TRANSITIVE)[2], w.pick("outer", TRANSITIVE)[2]
    tail = f"has ever {outer} the {w.thing('thing')[0]}."
    return (
        f"No {subject} that the {inner} {verb} {tail}",
        f"The {subject} that no {inner} {verb} {tail}",
    )


def wh_island(w: Words) -> Pair:
    """What did Clara say that / ask whether Oscar noticed?"""
    gender, verb = w.coin("gender"), w.pick("verb", TRANSITIVE)[2]
    speaker, actor = w.name("speaker", gender), w.name("actor", 1 - gender)
    right = w.pick("right", ("say that", "think that", "claim that"))
    wrong = w.pick("wrong", ("ask whether", "wonder whether", "know why"))
    frame = f"What did {speaker} {{}} {actor} {verb} near the {w.pick('place', PLACES)}?"
    return frame.format(right), frame.format(wrong)


def filled_gap(w: Words) -> Pair:
    """Clara knows that / what Oscar touched the basket."""
    gender, verb = w.coin("gender"), w.pick("verb", TRANSITIVE)[2]
    knower = w.pick("knows", ("knows", "remembers", "saw", "understands"))
    who, actor = w.name("who", gender), w.name("actor", 1 - gender)
    tail = f"{actor} {verb} the {w.thing('thing')[0]} at the {w.pick('place', PLACES)}."
    return f"{who} {knower} that {tail}", f"{who} {knower} what {tail}"


def participle(w: Words) -> Pair:
    """The dancer has broken / broke the mirror."""
    verb, number = w.pick("verb", IRREGULAR), w.coin("number")
    head = f"The {w.person('subject')[number]} {('has', 'have')[number]} already"
    tail = f"the {w.thing('thing')[w.coin('things')]}."
    return f"{head} {verb[3]} {tail}", f"{head} {verb[2]} {tail}"


def modal_form(w: Words) -> Pair:
    """The tailors should watch / watched the clock."""
    verb, modal = w.pick("verb", TRANSITIVE), w.pick("modal", ("should", "must", "can", "will"))
    head = f"The {w.person('subject')[w.coin('number')]} {modal}"
    tail = f"the {w.thing('thing')[w.coin('things')]} at the {w.pick('place', PLACES)}."
    return f"{head} {verb[0]} {tail}", f"{head} {verb[2]} {tail}"


def quantity(w: Words) -> Pair:
    """Too many / much candles were near the church; too much / many sugar was."""
    countable = w.coin("countable")
    noun = w.thing("thing")[1] if countable else w.pick("mass", MASS)
    place = w.pick("place", PLACES)
    frame = f"There {('was', 'were')[countable]} too {{}} {noun} near the {place}."
    forms = ("much", "many")
    return frame.format(forms[countable]), frame.format(forms[1 - countable])


def pronoun_case(w: Words) -> Pair:
    """The nurse watched them / they at the station."""
    right, wrong = w.pick("case", (("them", "they"), ("him", "he"), ("us", "we"), ("me", "I")))
    verb, place = w.pick("verb", TRANSITIVE)[2], w.pick("place", PLACES)
    frame = f"The {w.person('subject')[w.coin('number')]} {verb} {{}} at the {place}."
    return frame.format(right), frame.format(wrong)


PHENOMENA: tuple[Callable[[Words], Pair], ...] = (
    subject_verb, verb_across_phrase, verb_across_clause, determiner_noun,
    determiner_adjective_noun, reflexive_gender, reflexive_number, reflexive_distance,
    polarity_licensor, polarity_scope, wh_island, filled_gap,
    participle, modal_form, quantity, pronoun_case,
)  # fmt: skip


def pairs(phenomenon: Callable[[Words], Pair], number: int) -> list[Pair]:
    """That many different pairs of one phenomenon."""
    made: dict[Pair, None] = {}
    for attempt in count():
        made[phenomenon(Words(phenomenon.__name__, attempt))] = None
        if len(made) == number:
            break
    return list(made)


def make_documents() -> list[dict[str, Any]]:
    """{"phenomenon", "choices", "label"}: the phenomena in turn, the right sentence anywhere."""
    columns = [pairs(phenomenon, PAIRS_EACH) for phenomenon in PHENOMENA]
    documents = []
    for row in zip(*columns, strict=True):
        for phenomenon, (right, wrong) in zip(PHENOMENA, row, strict=True):
            label = draw(SEED, "place", phenomenon.__name__, right, wrong) % 2
            choices = [wrong, right] if label else [right, wrong]
            documents.append(
                {"phenomenon": phenomenon.__name__, "choices": choices, "label": label}
            )
    return documents


def documents(cache: Path, progress: Progress = silent) -> list[dict[str, Any]]:
    """The task's documents; nothing is read or downloaded."""
    return make_documents()
