"""The list of a recipe's keys, and the page that shows it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.keys import as_markdown, sections
from pipelines.recipe import KINDS, check_recipe
from shearling import ShearlingError

PAGE = Path(__file__).parents[2] / "docs/RECIPES.md"


def test_the_page_shows_the_keys_that_there_are() -> None:
    """`shearling keys --markdown` writes its second part anew."""
    _, tables = PAGE.read_text(encoding="utf-8").split("prints those of a part.\n\n")
    assert tables == as_markdown(sections())


def test_every_key_of_every_stage_is_told_with_its_default() -> None:
    for kind, stage in KINDS.items():
        section = sections(f"stages.{kind}")[0]
        assert section.path == f"stages.{kind}"
        assert {key.name for key in section.keys} == set(stage.model_fields)
        assert [key.name for key in section.keys[:2]] == ["kind", "name"]
        assert all(key.description and key.takes for key in section.keys)
    distill = {key.name: key for key in sections("distill")[0].keys}
    assert (distill["clip"].takes, distill["clip"].default) == ("number", "1.0")
    assert distill["tokens"].default == ""  # must be given


def test_a_place_is_told_with_what_is_inside_of_it() -> None:
    assert [one.path for one in sections("transfer_set.clean")] == [
        "transfer_set.clean",
        "transfer_set.clean.classifier",
    ]
    with pytest.raises(ShearlingError, match="no keys at 'transfer'") as told:
        sections("transfer")
    assert "transfer_set.sources" in str(told.value.hint)


def test_the_pages_examples_are_recipes() -> None:
    examples = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(examples) == 4
    for example in examples:
        data = yaml.safe_load(example)
        before = [{"name": "prune", "kind": "prune", "shape": "like-3b"}]
        stages = data["stages"] if isinstance(data, dict) else [*before, *data]
        check_recipe({"name": "x", "teacher": {"model": "./a"}, "stages": stages}, where="x")


@pytest.mark.parametrize("options", [[], ["--json"], ["--markdown"]])
def test_the_command_prints_them(options: list[str]) -> None:
    printed = CliRunner().invoke(app, ["keys", "distill.hidden", *options])
    assert printed.exit_code == 0
    assert "normalised_mse" in printed.output
    assert "learning_rate" not in printed.output
