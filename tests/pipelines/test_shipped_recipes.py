"""Every shipped recipe is checked and planned from shapes; the sizes of its students are known."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.accelerators import named_machine
from pipelines.display import format_bytes, format_seconds
from pipelines.plan import make_plan, teacher_facts
from pipelines.recipe import DistillStage, load_recipe, shipped_recipes

STUDENTS: dict[str, tuple[int, ...]] = {
    "quickstart": (96_469_056,),
    "llama-3.1-8b-to-3b": (3_212_749_824,),
    "llama-3.1-8b-to-3b-two-teachers": (3_212_749_824,),
    "llama-3.1-8b-to-1b": (3_174_988_800, 1_235_814_400),
    "llama-3.1-70b-to-8b": (8_030_261_248,),
    "llama-3.1-405b-to-70b": (70_553_706_496,),
    "llama-2-7b-to-2.7b": (2_701_560_320,),
    "llama-2-7b-to-1.3b": (1_345_423_360,),
    "llama-1-7b-halved": (3_367_676_928,),
    "code-llama-7b-to-3b": (2_914_765_824,),
    "llama-3.2-11b-vision-to-3b": (3_212_749_824,),
    "llama-3.1-8b-to-minitron-width": (4_512_746_496,),
    "llama-3.1-8b-to-minitron-depth": (4_540_469_248,),
}
OWN_INPUTS = {name for name in shipped_recipes() if name.startswith("regress-")}


def test_the_regressions_halve_their_story_teller(shared_data: Path) -> None:
    recipe = load_recipe(
        "regress-stories", [f"teacher.model={shared_data / 'models/stories260K/hf'}"]
    )
    plan = make_plan(recipe, teacher_facts(recipe.teacher), named_machine("l4"))
    sizes = {row["name"]: row["parameters"] for row in plan["stages"]}
    assert (sizes["teacher"], sizes["prune"]) == (260_032, 133_296)


def test_the_sizes_of_all_students_are_asserted() -> None:
    assert set(STUDENTS) == set(shipped_recipes()) - OWN_INPUTS


@pytest.mark.parametrize("name", STUDENTS)
def test_a_shipped_recipe_is_planned_without_weights(name: str) -> None:
    recipe = load_recipe(name)
    facts = teacher_facts(recipe.teacher)
    processes = 2 if name == "quickstart" else 8  # windows of its step
    plan = make_plan(recipe, facts, named_machine("h100-sxm"), processes=processes)
    pruned = [row for row in plan["stages"] if row["kind"] == "prune"]
    assert tuple(row["parameters"] for row in pruned) == STUDENTS[name]
    assert plan["teacher"]["context"] >= recipe.transfer_set.window
    for stage in recipe.stages:
        if isinstance(stage, DistillStage):
            (row,) = [row for row in plan["stages"] if row["name"] == stage.name]
            assert row["least_processes"] is not None  # some number of H100s will do
            assert row["tokens"] == pytest.approx(stage.tokens, rel=0.01)


@pytest.mark.parametrize("name", [name for name in STUDENTS if name != "quickstart"])
def test_large_students_are_measured_as_far_as_they_are_taught(name: str) -> None:
    recipe = load_recipe(name)
    context = teacher_facts(recipe.teacher).context
    assert context is not None
    assert recipe.transfer_set.window <= max(recipe.benchmark.perplexity_lengths) <= context


def test_a_halved_llama_is_half() -> None:
    assert STUDENTS["llama-1-7b-halved"][0] / 6_738_415_616 == pytest.approx(0.5, abs=0.001)


def sizes_page() -> str:
    """The table of docs/CLUSTERS.md. With 512 GPUs a step needs more windows than the recipe's."""
    memory = ["memory per GPU", "host's memory, first process"]
    rows = [["H100", "`batch_tokens`", *memory, "distillation", "whole run"]]
    for processes in (8, 64, 512):
        recipe = load_recipe("llama-3.1-8b-to-3b")
        (stage,) = (each for each in recipe.stages if isinstance(each, DistillStage))
        batch = max(stage.batch_tokens, processes * recipe.transfer_set.window)
        recipe = load_recipe("llama-3.1-8b-to-3b", [f"distill.batch_tokens={batch}"])
        facts = teacher_facts(recipe.teacher)
        plan = make_plan(recipe, facts, named_machine("h100-sxm"), processes=processes)
        (row,) = (row for row in plan["stages"] if row["kind"] == "distill")
        told = [
            str(processes),
            f"{batch:,}",
            format_bytes(row["memory_bytes"]),
            format_bytes(row["host_bytes"]),
            format_seconds(row["seconds"]),
            format_seconds(plan["total"]["seconds"]),
        ]
        rows.append(told)
    head, *lines = (f"| {' | '.join(cells)} |" for cells in rows)
    return "\n".join([head, "|---" * len(rows[0]) + "|", *lines])


def test_the_page_on_sizes_is_what_the_plan_says() -> None:
    page = (Path(__file__).parents[2] / "docs" / "CLUSTERS.md").read_text()
    table = sizes_page()
    assert table in page, f"docs/CLUSTERS.md should have:\n{table}"
