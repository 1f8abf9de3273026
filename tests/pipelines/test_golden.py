"""A stage whose results change for the same recipe must raise its CODE_VERSION.

Otherwise artefacts of the old code would be taken for the new code's. What the stages of the tiny
recipe gave at a version stands in golden.json. Hashes of the sources would cry at every comment;
this only speaks when results move, by more than another processor's rounding. After raising a
version, write the new results with

    SHEARLING_GOLDEN=write python -m pytest tests/pipelines/test_golden.py
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from pipelines.steps import STAGES

GOLDEN = Path(__file__).parent / "golden.json"
CLOSE = 0.02
"""Relative: far above rounding, below what a change of the maths does to random weights."""


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def facts_of(run: Path) -> dict[str, dict[str, list[float]]]:
    """Lists of numbers that a stage's results come down to, by kind."""
    stages = run / "stages"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    text = read(stages / "transfer_set" / "transfer_set.json")
    selection = read(stages / "prune" / "selection.json")
    cards = {name: read(stages / name / "scorecard.json") for name in ("teacher", "distill")}
    return {
        "teacher": {"parameters": [cards["teacher"]["parameters"]]},
        "transfer_set": {
            key: [text[key]] for key in ("windows", "tokens", "documents", "heldout_windows")
        },
        "prune": {
            "layers": selection["layers"],
            "hidden": selection["hidden"],
            "heads": [head for layer in selection["heads"] for head in layer],
            "errors": [
                value
                for entry in selection["reconstruction"]
                for name, value in entry.items()
                if "ridge" not in name
            ],
        },
        "distill": {
            "losses": [line["loss"] for line in lines if "loss" in line],
            "heldout": [line["heldout_kl"] for line in lines if "heldout_kl" in line],
        },
        "benchmark": {
            f"{name} {task} {metric}": [number["value"]]
            for name, card in cards.items()
            for task, metrics in card["results"].items()
            for metric, number in metrics.items()
        },
    }


def test_results_change_only_with_the_version(finished: tuple[Path, str]) -> None:
    facts = facts_of(finished[0])
    now = {
        kind: {"code_version": STAGES[kind].CODE_VERSION, "facts": found}
        for kind, found in facts.items()
    }
    if os.environ.get("SHEARLING_GOLDEN") == "write":
        GOLDEN.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")
    golden = read(GOLDEN)
    moved = []
    for kind, known in golden.items():
        if known["code_version"] != now[kind]["code_version"]:
            break  # what comes after it is made from other things
        for name, values in known["facts"].items():
            if facts[kind].get(name) != pytest.approx(values, rel=CLOSE, abs=1e-6):
                moved.append(f"{kind}: {name} {values[:4]} -> {facts[kind].get(name, [])[:4]}")
        assert not moved, (
            f"The {kind} stage gives other results for the same recipe: raise CODE_VERSION in "
            f"pipelines/stages/{kind}.py, then write golden.json anew (see the head of this file). "
            + "; ".join(moved)
        )
