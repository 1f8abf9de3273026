"""The benchmarks' questions as texts, from this project's tasks and through the mirror."""

from __future__ import annotations

import json
from pathlib import Path

from reports.questions import questions_of
from reports.settings import BenchmarkSettings

PREMISE = "The old shepherd counted his sheep again and found that one of them was gone."
CHOICES = ("He went up the hill to look for it.", "He lit the lamp and read a book.")


def test_questions_stand_with_their_answers(tmp_path: Path) -> None:
    row = {
        "premise": PREMISE,
        "choice1": CHOICES[0],
        "choice2": CHOICES[1],
        "question": "effect",
        "idx": 0,
        "label": 0,
    }
    (tmp_path / "copa.jsonl").write_text(f"{json.dumps(row)}\n" * 3)
    settings = BenchmarkSettings(
        tasks=("copa", "grammar_pairs"), mirror=str(tmp_path), limit=1, speed=False
    )
    questions, unread = questions_of(settings, tmp_path)
    assert unread == {}
    assert len(questions["copa"]) == 3  # whatever the limit
    assert PREMISE in questions["copa"][0]
    joined = [text for text in questions["copa"][0] if PREMISE[:-1] in text and text != PREMISE]
    assert any("went up the hill" in text for text in joined)
    assert any("lit the lamp" in text for text in joined)
    assert len(questions["grammar_pairs"]) == 1024
    assert all(len(texts) >= 2 for texts in questions["grammar_pairs"])
