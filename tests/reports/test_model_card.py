"""The model card: what the hub reads, and what people read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from reports.model_card import model_card, write_model_card
from reports.run_folder import read_run
from shearling import ShearlingError


def test_the_hub_reads_the_numbers_of_the_scorecard(run: Path, tmp_path: Path) -> None:
    path = write_model_card(tmp_path, run, "distill", license="apache-2.0", base_model="a/b")
    card = ModelCard.load(path)
    assert card.data.license == "apache-2.0"
    assert card.data.base_model == "a/b"
    scorecard = read_run(run).measured[-1].scorecard
    assert scorecard is not None
    found = {(r.dataset_name, r.metric_type): r.metric_value for r in card.data.eval_results}
    assert found["piqa", "acc"] == scorecard["results"]["piqa"]["acc"]["value"]
    assert ("wikitext2", "token_perplexity_512") in found
    assert "of its teacher's parameters (a/b)" in card.text
    assert "LlamaForCausalLM" in card.text
    assert "name: tiny" in card.text


def test_a_card_without_a_teacher(cards: dict[str, dict[str, Any]]) -> None:
    text = model_card(cards["prune"], None, name="x")
    assert "teacher's" not in text
    assert ModelCard(text).data.license is None


def test_a_recipe_cannot_close_its_fence(cards: dict[str, dict[str, Any]]) -> None:
    text = model_card(cards["prune"], None, name="x`|<b>", recipe="a: |\n  ````\n  # no heading\n")
    assert "`````yaml" in text
    assert "# x\\`\\|\\<b\\>" in text


def test_a_stage_that_was_not_measured_is_an_error(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ShearlingError, match="no scorecard") as caught:
        write_model_card(tmp_path, run, "nothing")
    assert "distill" in caught.value.hint


@pytest.mark.parametrize(
    ("sources", "told"),
    [
        ([{"tokens": 5000}], ""),
        ([{"tokens": 5000, "written": {"seed": 1}}], "No text of others was used"),
        ([{"tokens": 5000, "written": {"seed": 1}}, {"tokens": 15000}], "25% of the transfer set"),
    ],
)
def test_it_says_where_the_teacher_wrote_the_text(
    cards: dict[str, dict[str, Any]], sources: list[dict[str, Any]], told: str
) -> None:
    text = model_card(cards["prune"], None, name="x", text={"sources": sources})
    assert told in text
    assert ("5.0k tokens that the teacher wrote itself" in text) == bool(told)
