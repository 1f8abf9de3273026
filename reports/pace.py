"""How fast a model is against another, and whether that is more than the noise of a machine.

A student's scorecard has a ratio that was measured in turns with its teacher. Where it has none
(scorecards of earlier versions, or memory without room for both), speeds of two processes must do,
whose quartiles know nothing of what else the machine did a minute later. Models of one shape are
equally fast, whatever their weights: those that a run measured on the same terms are measurements
of one speed, and how far they are apart is noise too.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from reports import words
from reports.run_folder import Data, Run, Stage, as_dict, as_list, as_number

READS = "prefill_tokens_per_second"
WRITES = "decode_tokens_per_second"
IN_TURNS = "decode_times_teacher"
"""A ratio to the teacher's speed, in scorecards of students."""
_SHAPE = (
    "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "intermediate_size", "vocab_size",
)  # fmt: skip
_TERMS = ("prompt_tokens", "new_tokens", "batch", "precision", "device", "threads")


@dataclass(frozen=True, kw_only=True)
class Pace:
    """A speed, or a ratio of two, and between what it lies."""

    middle: float
    low: float
    high: float

    @property
    def known(self) -> bool:
        """Whether there is a spread; earlier scorecards have none."""
        return self.low < self.high

    @property
    def is_noise(self) -> bool:
        """Of a ratio: whether it may as well be 1."""
        return self.low <= 1 <= self.high

    @property
    def range(self) -> str:
        """Of a ratio: between what it lies, "1.27 to 1.40"."""
        return f"{self.low:.2f} to {self.high:.2f}" if self.known else "measured once"

    def told(self) -> str:
        """Its spread, "1,010 to 1,090"; empty where that isn't known."""
        return f"{words.significant(self.low)} to {words.significant(self.high)}" * self.known


def measured_pace(card: Data, key: str) -> Pace | None:
    """A scorecard's speed (or ratio) and its quartiles (interval); without them that alone."""
    speed = as_dict(card.get("speed"))
    middle = as_number(speed.get(key))
    if middle is None or middle <= 0:
        return None
    around = speed.get(f"{key}_quartiles") or speed.get(f"{key}_interval")
    ends = [as_number(value) for value in as_list(around)]
    known = [value for value in ends if value is not None and value > 0]
    return Pace(middle=middle, low=min([middle, *known]), high=max([middle, *known]))


def pace(run: Run, stage: Stage, key: str) -> Pace | None:
    """The speed (or ratio) of a stage's model, of all that the run measured of its shape."""
    if stage.scorecard is None or measured_pace(stage.scorecard, key) is None:
        return None
    alike = [stage]
    if stage.config:
        alike = [each for each in run.measured if _alike(each, stage)]
    paces = [measured_pace(each.scorecard, key) for each in alike if each.scorecard]
    known = [each for each in paces if each is not None]
    return Pace(
        middle=statistics.median(each.middle for each in known),
        low=min(each.low for each in known),
        high=max(each.high for each in known),
    )


def _alike(one: Stage, other: Stage) -> bool:
    """Whether two speeds are a function of the same, but for the machine and its other work."""
    same_shape = all(one.config.get(axis) == other.config.get(axis) for axis in _SHAPE)
    return same_shape and not terms_apart(one.scorecard or {}, other.scorecard or {})


def terms_apart(one: Data, other: Data) -> list[str]:
    """On which terms the speeds of two scorecards were not measured alike: ["threads 8 and 2"]."""
    mine, theirs = (as_dict(card.get("speed")) for card in (one, other))
    return [
        f"{term.replace('_', ' ')} {mine.get(term, 'unknown')} and {theirs.get(term, 'unknown')}"
        for term in _TERMS
        if mine.get(term) != theirs.get(term)
    ]


def _teacher(run: Run) -> Stage | None:
    return next((stage for stage in run.measured if stage.kind == "teacher"), None)


def faster(run: Run, student: Stage) -> Pace | None:
    """How many times as fast as the teacher a student writes.

    In turns, with a confidence interval; or of two speeds. `low` and `high` are the worst cases of
    all that were measured of the shape. None where a speed is missing, or where the two were
    measured on other terms.
    """
    teacher = _teacher(run)
    if teacher is None:
        return None
    in_turns = pace(run, student, IN_TURNS)
    if in_turns and not _alike(teacher, student):
        return in_turns
    if terms_apart(teacher.scorecard or {}, student.scorecard or {}):
        return None
    ours, theirs = pace(run, student, WRITES), pace(run, teacher, WRITES)
    if not ours or not theirs:
        return None
    return Pace(
        middle=ours.middle / theirs.middle,
        low=ours.low / theirs.high,
        high=ours.high / theirs.low,
    )


def measured_beside_one_teacher(runs: Sequence[Run]) -> bool:
    """Whether all models but the teacher wrote in turns with it, on the same terms."""
    grounds = set()
    for number, run in enumerate(runs):
        cards = [s.scorecard for s in run.measured if s.scorecard is not run.teacher]
        known = [card for card in cards if card and measured_pace(card, IN_TURNS)]
        if not known or len(known) < len(cards):
            return False
        for card in known:
            speed = as_dict(card.get("speed"))
            # Where a scorecard does not name its teacher, it is taken to be the run's own.
            teacher = str(card.get("teacher_sha256") or number)
            grounds.add((teacher, *(str(speed.get(term)) for term in _TERMS)))
    return len(grounds) == 1


def why_not_in_turns(student: Stage | None) -> list[str]:
    """A sentence where a scorecard says why its model did not write in turns with the teacher."""
    speed = as_dict((student.scorecard or {}).get("speed")) if student else {}
    reason = speed.get(f"{IN_TURNS}_left_out")
    if student is None or not isinstance(reason, str):
        return []
    return [f"{student.name} was not measured in turns with its teacher: {reason}."]


def why_no_ratio(run: Run, student: Stage | None) -> list[str]:
    """A sentence where both speeds are known and no ratio of them would mean anything."""
    teacher = _teacher(run)
    if teacher is None or student is None or faster(run, student):
        return []
    known = all(measured_pace(stage.scorecard or {}, WRITES) for stage in (teacher, student))
    apart = "; ".join(terms_apart(teacher.scorecard or {}, student.scorecard or {}))
    told = f"The speeds of {teacher.name} and {student.name} were measured on other terms"
    return [f"{told} ({apart}), so there is no ratio of them."] if known and apart else []
