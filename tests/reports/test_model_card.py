"""The model card: what the hub reads, and what people read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from reports.model_card import model_card, write_model_card
from reports.run_folder import read_run
from reports.verdict import judge
from reports.view import make_view
from shearling import ShearlingError, read_json, write_json


def test_the_hub_reads_the_numbers_of_the_scorecard(run: Path, tmp_path: Path) -> None:
    record = run / "stages" / "teacher" / "stage.json"
    terms = {"license": "other", "license_name": "sheep", "license_link": "LICENSE"}
    summary = {"origin": {**terms, "base_model": "a/b", "license_says": 3}}
    write_json(record, {**read_json(record), "summary": summary})
    card = ModelCard.load(write_model_card(tmp_path, run, "distill"))
    assert {term: getattr(card.data, term) for term in terms} == terms
    assert card.data.base_model == "a/b"
    scorecard = read_run(run).measured[-1].scorecard
    assert scorecard is not None
    found = {(r.dataset_name, r.metric_type): r.metric_value for r in card.data.eval_results}
    assert found["piqa", "acc"] == scorecard["results"]["piqa"]["acc"]["value"]
    assert ("wikitext2", "token_perplexity_512") in found
    assert "Its base model is a/b." in card.text
    assert "LlamaForCausalLM" in card.text
    assert "name: tiny" in card.text
    assert "It was pruned and distilled with Shearling" in card.text
    assert card.data.tags == ["llama", "pruning", "distillation", "shearling"]
    assert card.data.library_name == "transformers"


def test_a_stage_is_told_as_what_it_is(run: Path, tmp_path: Path) -> None:
    """Not as what later stages make of it."""
    pruned = ModelCard.load(write_model_card(tmp_path, run, "prune"))
    assert "It was pruned, not distilled, with Shearling" in pruned.text
    assert "distilled with" not in pruned.text
    assert pruned.data.tags == ["llama", "pruning", "shearling"]
    assert "what its stage prune made" in pruned.text
    teacher = ModelCard.load(write_model_card(tmp_path, run, "teacher"))
    assert not [word for word in ("prun", "distil", "| teacher |") if word in teacher.text]
    assert teacher.data.tags == ["llama", "shearling"]
    assert len(teacher.data.eval_results) == len(pruned.data.eval_results)


@pytest.mark.parametrize(
    ("history", "told"),
    [
        (["distill"], "It was distilled with"),
        (["correct"], "It was trained on the transfer set with"),
        (["correct", "prune", "distill"], "trained on the transfer set, pruned and distilled with"),
        (["unknown"], "It was made with"),
    ],
)
def test_the_stages_in_words(
    cards: dict[str, dict[str, Any]], history: list[str], told: str
) -> None:
    assert told in model_card(cards["distill"], cards["teacher"], name="x", history=history)


@pytest.mark.parametrize("kept", [0, 12])
def test_a_distillation_that_was_thrown_away_is_not_claimed(
    run: Path, tmp_path: Path, kept: int
) -> None:
    record = run / "stages" / "distill" / "stage.json"
    write_json(record, {**read_json(record), "summary": {"kept_step": kept}})
    card = ModelCard.load(write_model_card(tmp_path, run, "distill"))
    assert ("It was pruned, not distilled, with Shearling" in card.text) == (kept == 0)
    assert ("distillation" in card.data.tags) == (kept > 0)
    assert ("A distillation was tried and not kept: no evaluation" in card.text) == (kept == 0)
    view = make_view(read_run(run), judge(read_run(run)))
    assert any("Nothing of distill was kept" in said for said in view.details) == (kept == 0)


GGUF = {
    "to": "gguf", "kind": "q4_0", "converted": True, "stock_gguf": True, "bytes": 12345678,
    "files": ["x-q4_0.gguf"], "shares": {"f16": 0.83, "q4_0": 0.165, "f32": 0.005},
}  # fmt: skip


def gguf_card(run: Path, out: Path, **changes: Any) -> ModelCard:
    return ModelCard.load(write_model_card(out, run, "distill", export=GGUF | changes))


def test_the_card_of_a_gguf_is_about_the_gguf(run: Path, tmp_path: Path) -> None:
    card = gguf_card(run, tmp_path)
    assert "12.3 MB as q4_0" in card.text
    assert (
        "Its weights: 83% f16, 16% q4_0; those of f16 have rows that are no multiple" in card.text
    )
    assert "measured before the model was converted to q4_0" in card.text
    names = [result.metric_name for result in card.data.eval_results]
    assert names
    assert all(name.endswith(", before conversion to q4_0") for name in names)
    assert card.data.library_name == "gguf"
    assert "llama-cli -m x-q4_0.gguf" in card.text
    assert 'file = "path/to/this/folder", "x-q4_0.gguf"' in card.text
    assert "pipeline(" not in card.text


def test_what_was_not_converted_was_measured(run: Path, tmp_path: Path) -> None:
    same = {"kind": "f32", "converted": False, "shares": {"f32": 1.0}}
    card = gguf_card(run, tmp_path, **same)
    assert "measured before" not in card.text
    assert "Its weights" not in card.text
    assert not [r for r in card.data.eval_results if "before" in r.metric_name]


def test_a_file_that_transformers_would_misread_is_not_shown_with_it(
    run: Path, tmp_path: Path
) -> None:
    text = gguf_card(run, tmp_path, stock_gguf=False).text
    assert "from_pretrained" not in text
    assert "Not with transformers" in text


def test_a_files_name_cannot_break_out_of_its_command(run: Path, tmp_path: Path) -> None:
    text = gguf_card(run, tmp_path, files=['a"; rm -r `x`\n```\n# b.gguf']).text
    assert "-m 'a\"; rm -r `x`\n```\n# b.gguf' -p" in text
    assert "````sh\n" in text
    assert '"a\\"; rm -r `x`\\n```\\n# b.gguf"' in text


def test_a_card_without_a_teacher(cards: dict[str, dict[str, Any]]) -> None:
    text = model_card(cards["prune"], None, name="x", history=["prune"])
    assert "teacher's" not in text
    assert ModelCard(text).data.license is None


def test_a_recipe_cannot_close_its_fence(cards: dict[str, dict[str, Any]]) -> None:
    recipe = "a: |\n  ````\n  # no heading\n"
    text = model_card(cards["prune"], None, name="x`|<b>", history=["prune"], recipe=recipe)
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
    text = model_card(cards["prune"], None, name="x", history=["prune"], text={"sources": sources})
    assert told in text
    assert ("5.0k tokens that the teacher wrote itself" in text) == bool(told)
