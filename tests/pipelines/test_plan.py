"""`shearling plan`: from a recipe to numbers, without weights."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from rich.table import Table
from shearling_process import Shearling

from pipelines.accelerators import accelerators, named_machine, this_machine
from pipelines.cost import LIBRARIES, Moment
from pipelines.display import format_bytes
from pipelines.plan import make_plan, teacher_facts
from pipelines.preflight import transfer_set_tokens
from pipelines.recipe import Recipe, check_recipe, load_recipe
from pipelines.tables import plan_table, tables
from reports import words
from shearling import ShearlingError, read_json
from teachers.settings import TeacherSettings


@pytest.fixture
def big(recipe_data: dict[str, Any]) -> dict[str, Any]:
    """Llama 3.1 8B to 3B; nothing of it is on this disk."""
    data = copy.deepcopy(recipe_data)
    data["teacher"]["model"] = "meta-llama/Llama-3.1-8B"
    data["transfer_set"]["window"] = 4096
    data["transfer_set"]["sources"][0]["tokens"] = 10**9
    data["stages"][0]["calibration_tokens"] = 8192
    data["stages"][0]["shape"] = "llama-3.2-3b"
    data["stages"][1] |= {"tokens": 10**9, "batch_tokens": 2**18, "precision": "bfloat16"}
    data["stages"][1]["save_every_seconds"] = 60
    return data


def planned(data: dict[str, Any], accelerator: str = "h100-sxm", processes: int = 1) -> Any:
    recipe = check_recipe(data)
    facts = teacher_facts(recipe.teacher)
    return make_plan(recipe, facts, named_machine(accelerator), processes=processes)


def row(plan: dict[str, Any], name: str) -> dict[str, Any]:
    return next(dict(row) for row in plan["stages"] if row["name"] == name)


def test_a_teacher_that_is_known_by_name_need_not_be_here(big: dict[str, Any]) -> None:
    plan = planned(big, processes=8)
    assert plan["teacher"]["parameters"] == 8_030_261_248
    assert row(plan, "prune")["parameters"] == 3_212_749_824
    distill = row(plan, "distill")
    # Twice the parameters forward, four times backward, and the teacher's forward pass.
    least = 10**9 * (6 * 3.21e9 + 2 * 7.5e9)
    assert least < distill["flops"] < 1.3 * least
    work = distill["flops"] / (8 * 0.4 * 989.4e12)
    assert work < distill["seconds"] < 1.07 * work  # it opens, reads, and saves
    assert distill["memory"]["teacher"] == pytest.approx(2 * 8_030_261_248 / 8, rel=1e-6)
    assert not plan["warnings"]
    assert json.loads(json.dumps(plan)) == plan


def test_a_second_teacher_is_planned_by_what_was_brought_in(
    recipe_data: dict[str, Any], tmp_path: Path
) -> None:
    big = {"name": "big", "kind": "teacher", "model": "nobody/finetune"}
    recipe = check_recipe({**recipe_data, "stages": [big, *recipe_data["stages"]]})
    facts, here = teacher_facts(recipe.teacher), named_machine("l4")
    with pytest.raises(ShearlingError, match="shape of the teacher nobody/finetune is not known"):
        make_plan(recipe, facts, here)
    (tmp_path / "model").symlink_to(recipe.teacher.model)
    plan = make_plan(recipe, facts, here, imported={"big": tmp_path})
    assert row(plan, "big")["parameters"] == facts.shape.parameters


def test_a_stage_that_does_not_fit_says_how_many_processes_it_needs(big: dict[str, Any]) -> None:
    plan = planned(big, "a100-40gb")
    distill = row(plan, "distill")
    assert distill["least_processes"] > 1
    assert f"with {distill['least_processes']} it fits into 40 GB" in plan["warnings"][-1]
    big["stages"][1]["gradient_checkpointing"] = True
    frugal = row(planned(big, "a100-40gb"), "distill")
    assert frugal["memory_bytes"] < distill["memory_bytes"]
    assert frugal["least_processes"] < distill["least_processes"]


@pytest.mark.parametrize("processes", [1, 8])
def test_a_host_with_too_little_memory_for_all_its_processes_is_told(
    big: dict[str, Any], processes: int
) -> None:
    recipe = check_recipe(big)
    facts, gpu = teacher_facts(recipe.teacher), named_machine("h200")

    def told(host_bytes: float | None) -> list[str]:
        machine = replace(gpu, host_bytes=None if host_bytes is None else int(host_bytes))
        warnings = make_plan(recipe, facts, machine, processes=processes)["warnings"]
        return [warning for warning in warnings if "of the host's memory" in warning]

    assert not told(None)  # a machine by its name has a host that nobody knows
    [distill] = [warning for warning in told(1e9) if warning.startswith("distill")]
    assert ("for 8 processes" in distill) is (processes == 8)
    needed = float(re.search(r"needs ([\d.e+]+) GB", distill).group(1)) * 1e9  # type: ignore[union-attr]
    first = row(make_plan(recipe, facts, gpu, processes=processes), "distill")["host_bytes"]
    assert needed >= 0.99 * first
    assert any(warning.startswith("distill") for warning in told(needed))  # some room must be left
    assert not any(warning.startswith("distill") for warning in told(1.2 * needed))


def test_no_more_processes_than_a_step_has_windows_for(big: dict[str, Any]) -> None:
    """The run would be refused, after all that comes before the distillation."""
    found = row(planned(big, processes=64), "distill")
    assert found["most_processes"] == 64 == 2**18 // 4096
    with pytest.raises(ShearlingError, match="has 64 windows of 4096, fewer than the 65 proc"):
        planned(big, processes=65)
    big["stages"][1]["batch_tokens"] = 5 * 4096
    assert row(planned(big, processes=5), "distill")["most_processes"] == 5
    big["stages"][1]["on_policy"] = 0.5
    assert row(planned(big, "h200"), "distill")["most_processes"] == 1
    assert row(planned(big), "prune")["most_processes"] == 1


def test_long_windows_cost_memory_and_the_context_is_watched(big: dict[str, Any]) -> None:
    """Activations grow with the window, the masks that keep documents apart with its square."""

    def masks(window: int) -> int:
        return 28 * 2 * window**2  # of 28 layers, in 16 bits

    short = row(planned(big), "distill")["memory"]["activations"]
    big["transfer_set"]["window"] = 131_072
    long = row(planned(big), "distill")["memory"]
    linear = 32 * (short - masks(4096))
    assert long["activations"] == pytest.approx(linear + masks(131_072), rel=0.01)
    assert long["mask"] == 131_072**2
    big["stages"][1]["gradient_checkpointing"] = True
    frugal = row(planned(big), "distill")["memory"]
    assert frugal["activations"] < long["activations"] / 14
    assert frugal["logits"] == long["logits"]  # a chunk of tokens, whatever the window
    big["transfer_set"]["window"] = 262_144
    assert "more than the teacher's context of 131,072" in planned(big)["warnings"][0]


def test_each_cut_is_planned_from_the_one_before(big: dict[str, Any]) -> None:
    big["stages"] = [
        {"name": "half", "kind": "prune", "shape": {"num_hidden_layers": 16}},
        {"name": "quarter", "kind": "prune", "shape": {"intermediate_size": 7168}},
    ]
    plan = planned(big)
    first, second = (row(plan, name) for name in ("half", "quarter"))
    assert second["parameters"] < first["parameters"] < 8_030_261_248 / 1.6
    assert second["flops"] < first["flops"]
    big["stages"][1]["shape"] = {"num_hidden_layers": 20}
    with pytest.raises(ShearlingError, match="Stage quarter: The student's shape does not fit"):
        planned(big)


def test_a_search_is_planned_with_all_it_tries(big: dict[str, Any]) -> None:
    stage = big["stages"][0]
    stage["shape"] = {"params": "3.2B"}
    plan = planned(big)
    search = row(plan, "prune")
    assert 0.97 * 3.2e9 <= search["parameters"] <= 3.2e9
    assert row(plan, "distill")["parameters"] == search["parameters"]
    assert any("prune tries at most 6 shapes under its budget" in a for a in plan["assumptions"])
    stage["shape"]["tokens"] = stage["calibration_tokens"] = 32768
    dear = row(planned(big), "prune")
    stage["shape"] = "llama-3.2-3b"
    one = row(planned(big), "prune")
    # Six candidates at the full price, and the best once more.
    assert dear["flops"] == pytest.approx(7 * one["flops"], rel=0.3)
    assert one["flops"] < search["flops"] < dear["flops"]
    assert search["scratch_bytes"] > 0.9 * 2 * 3.2e9  # a candidate in 16 bits, until it is scored


def test_precision_and_writing_on_policy_cost_time(big: dict[str, Any]) -> None:
    fast = row(planned(big), "distill")
    big["stages"][1]["precision"] = "float32"
    assert row(planned(big), "distill")["seconds"] > 3 * fast["seconds"]
    big["stages"][1] |= {"precision": "auto", "on_policy": 0.5}
    written = row(planned(big), "distill")
    assert written["seconds"] > 1.5 * fast["seconds"]
    assert written["flops"] > fast["flops"]
    big["stages"][1]["on_policy_writer"] = "teacher"
    assert row(planned(big), "distill")["flops"] > written["flops"]


def test_what_the_teacher_says_of_held_out_text_waits_in_the_hosts_memory(
    big: dict[str, Any],
) -> None:
    """Each process has its share; all of them while a cache is filled."""
    few, many = 10_000, 20_000
    states = 10_000 * 4096 * 4096 * 2  # more windows, positions, dims, bytes

    def grown(processes: int, **settings: str) -> tuple[int, int]:
        rows = []
        for windows in (few, many):
            big["transfer_set"]["heldout_windows"] = windows
            big["stages"][1] |= settings
            rows.append(row(planned(big, processes=processes), "distill"))
        return tuple(rows[1][key] - rows[0][key] for key in ("memory_bytes", "host_bytes"))

    assert grown(1) == (0, states)
    assert grown(8) == (0, states / 8)
    assert grown(8, targets="sample") == (0, states)
    recipe = check_recipe(big)
    cpu = replace(named_machine("h200"), device="cpu")
    found = row(make_plan(recipe, teacher_facts(recipe.teacher), cpu), "distill")
    assert found["memory"]["held-out answers"] == 2 * states


def test_a_training_without_a_teacher_reads_the_student_alone(big: dict[str, Any]) -> None:
    big["stages"].insert(0, {"kind": "correct", "name": "mend", "tokens": 10**8})
    found = row(planned(big, "h200"), "mend")
    assert found["host_bytes"] - 500_000_000 >= 4 * 8_030_261_248


def test_models_and_checkpoints_pass_through_the_hosts_memory(big: dict[str, Any]) -> None:
    """One process reads whole models and fetches the optimizer's state whole; of several each
    writes its part through a copy, and the first gathers the student as it is stored and opens
    it."""
    stage, student, states = big["stages"][1], 3_212_749_824, 4 * 4096 * 4096 * 2

    def beside(processes: int, **settings: str) -> float:
        stage.update(settings)
        plan = planned(big, "h200", processes=processes)
        assert plan["total"]["host_bytes"] == max(r["host_bytes"] for r in plan["stages"])
        return float(row(plan, "distill")["host_bytes"] - 500_000_000)

    assert beside(1, optimizer="adamw") == 8 * student + states
    assert beside(2) == 2 * 8 * student / 2 + states / 2
    assert beside(8) == 2 * 2 * student + states / 8
    assert beside(1, optimizer="muon") < 6 * student + states
    big["teacher"]["model"] = "meta-llama/Llama-3.1-70B"
    assert beside(1) == 2 * 70_553_706_496  # as it is read
    assert beside(4) < 5 * student


def test_of_a_split_model_each_process_has_the_embeddings_whole(big: dict[str, Any]) -> None:
    """The student's in float32; the live teacher's two matrices in the products' dtype."""
    one, many = (row(planned(big, processes=count), "distill")["memory"] for count in (1, 8))
    assert "gathered embeddings" not in one
    assert many["gathered embeddings"] == 128_256 * (4 * 3072 + 2 * 2 * 4096)


def test_processes_on_one_cpu_share_what_one_of_them_gathers(big: dict[str, Any]) -> None:
    big["stages"][1]["gradient_checkpointing"] = True
    recipe = check_recipe(big)
    facts, cpu = teacher_facts(recipe.teacher), replace(named_machine("h200"), device="cpu")
    one, many = (
        row(make_plan(recipe, facts, cpu, processes=processes), "distill") for processes in (1, 64)
    )
    assert (one["moment"], many["moment"]) == ("step", "finish")
    assert many["memory"]["gathered student"] == 2 * 2 * 3_212_749_824
    moment = Moment(what="finish", device={"weights": 6.0}, host={"gathered student": 8.0})
    assert moment.together_bytes(3) == 6 + 8 + 3 * LIBRARIES
    assert moment.host_bytes(3) == 8 + LIBRARIES


def test_processes_that_do_not_fit_into_one_memory_together_are_told(
    recipe_data: dict[str, Any],
) -> None:
    recipe = check_recipe(recipe_data)
    facts, machine = teacher_facts(recipe.teacher), named_machine("h200")
    cpu = replace(machine, device="cpu", memory_bytes=3 * LIBRARIES, host_bytes=3 * LIBRARIES)
    told = r"distill needs 4\.\d* GB with 8 processes; with 2 it fits into 1\.5 GB"
    assert re.fullmatch(told, make_plan(recipe, facts, cpu, processes=8)["warnings"][-1])
    fits = make_plan(recipe, facts, cpu, processes=2)["warnings"]
    assert not any("needs" in warning for warning in fits)


def test_checkpoints_take_their_time(big: dict[str, Any]) -> None:
    """38.6 GB of a 3B with AdamW at half a gigabyte a second, and the best weights so far."""
    stage, disk = big["stages"][1], 0.5e9
    stage |= {"optimizer": "adamw", "keep": "last"}

    def lasts(processes: int = 8, **settings: Any) -> float:
        stage.update(settings)
        return float(row(planned(big, processes=processes), "distill")["seconds"])

    each = 12 * 3_212_749_824 / disk
    never = lasts(save_every_seconds=1e9)
    # However often it is asked for, 20 parts of 21 go to the work; but 0 is after each step.
    assert lasts(save_every_seconds=1) == lasts(save_every_seconds=60)
    assert 0.04 * never < lasts(save_every_seconds=60) - never <= 0.05 * never
    assert lasts(save_every_seconds=0) - never == pytest.approx(3815 * each, abs=1.01 * each)
    assert lasts(save_every_seconds=3600) - never == pytest.approx(never // 3600 * each, abs=0.2)
    # All processes write to one disk; 64 are done before it would be time for one.
    assert lasts(64, save_every_seconds=60) - lasts(64, save_every_seconds=1e9) == 0
    stage["evaluate_every"] = 1000  # of 3815 steps
    assert lasts(8, keep="best", save_every_seconds=1e9) - lasts(8, keep="last") == pytest.approx(
        3 * 4 * 3_212_749_824 / disk, abs=0.2
    )


def test_kept_hidden_states_take_their_disk(big: dict[str, Any]) -> None:
    stage = big["stages"][1]
    stage |= {"targets": "sample", "tokens": 1_000_000}
    plain = row(planned(big), "distill")
    stage["hidden"] = {"weight": 1.0}
    kept = row(planned(big), "distill")
    distinct = (plain["disk_bytes"] - 2 * plain["parameters"]) / 60
    layers = kept["disk_bytes"] - plain["disk_bytes"]
    assert kept["cache_bytes"] == kept["disk_bytes"] - 2 * kept["parameters"]
    assert plain["cache_bytes"] + layers == kept["cache_bytes"]
    assert layers == pytest.approx(distinct * 28 * (4096 + 2 * 64), rel=1e-6)


def test_text_that_the_teacher_writes_is_planned(big: dict[str, Any]) -> None:
    packed = row(planned(big), "transfer_set")
    del big["transfer_set"]
    plan = planned(big)
    writing = row(plan, "transfer_set")
    assert writing["tokens"] == 500_000
    assert writing["flops"] == pytest.approx(2 * 7.5e9 * 524_288, rel=0.1)
    assert writing["memory"]["teacher"] == 2 * 8_030_261_248
    assert packed["flops"] == 0
    # 8 rounds of 1024 steps, each at least the time in which an H100 reads the weights.
    assert writing["seconds"] > 8 * 1024 * 2 * 8.03e9 / 3350e9
    assert any("the recipe names no text, so the teacher writes 500,000" in a
               for a in plan["assumptions"])  # fmt: skip
    assert "the 500,000 tokens that the teacher writes 2000 times" in plan["warnings"][0]
    assert "raise transfer_set.written.tokens" in plan["warnings"][0]


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"params": "9B"}, "leaves nothing to search: the model to cut has 8,030,261,248"),
        ({"params": "10M"}, "is too small: the smallest shape that is tried has"),
    ],
)
def test_a_budget_that_no_shape_meets_is_told(
    big: dict[str, Any], shape: dict[str, Any], message: str
) -> None:
    big["stages"][0]["shape"] = shape
    with pytest.raises(ShearlingError, match="Stage prune: The budget of") as caught:
        planned(big)
    assert message in caught.value.what
    assert "`params`" in caught.value.hint


def test_a_local_teacher_is_read_from_its_config(recipe_data: dict[str, Any]) -> None:
    recipe = check_recipe(recipe_data)
    facts = teacher_facts(recipe.teacher)
    assert (facts.form, facts.dtype_bytes, facts.context) == ("folder", 4, 512)
    assert facts.told_by == "its config.json"


@pytest.mark.parametrize("name", ["nobody/knows-this", "./nowhere", "x.gguf"])
def test_an_unknown_teacher_is_refused(name: str) -> None:
    with pytest.raises(ShearlingError, match="is not known") as caught:
        teacher_facts(TeacherSettings(model=name))
    assert "shearling families" in caught.value.hint


def test_a_gguf_is_read_from_its_header(bare_gguf: Callable[..., Path]) -> None:
    path = bare_gguf(hidden=64, layers=1, neurons=128)
    facts = teacher_facts(TeacherSettings(model=str(path)))
    assert (facts.form, facts.shape.vocab_size, facts.shape.hidden_size) == ("gguf", 384, 64)


def test_tokens_of_the_transfer_set(recipe_data: dict[str, Any]) -> None:
    data = copy.deepcopy(recipe_data)
    tokens, known = transfer_set_tokens(check_recipe(data))
    assert known
    size = Path(data["transfer_set"]["sources"][0]["path"]).stat().st_size
    assert tokens == size // 4
    data["transfer_set"]["sources"][0] |= {"path": "owner/dataset", "format": "dataset"}
    assert transfer_set_tokens(check_recipe(data)) == (1024, False)  # what distill wants
    data["transfer_set"]["sources"][0]["tokens"] = 5000
    assert transfer_set_tokens(check_recipe(data)) == (5000, True)


def test_tokens_of_a_folder_are_those_of_all_that_is_read(
    recipe_data: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.txt").write_text("a" * 400)
    (tmp_path / "deep" / "b.txt").write_text("b" * 800)
    (tmp_path / "picture.png").write_bytes(bytes(4000))
    data = copy.deepcopy(recipe_data)
    data["transfer_set"]["sources"][0]["path"] = str(tmp_path)
    assert transfer_set_tokens(check_recipe(data)) == (300, True)


# --- machines -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", accelerators())
def test_every_accelerator_has_a_source_and_sane_numbers(name: str) -> None:
    machine = named_machine(name)
    assert machine.source.startswith("https://")
    assert machine.rates["bfloat16"] > machine.rates["float32"] >= machine.rates["float64"] > 0
    assert 20e9 < machine.memory_bytes < 300e9
    assert machine.precision("auto") == "bfloat16"


def test_an_unknown_accelerator_names_the_known_ones() -> None:
    with pytest.raises(ShearlingError, match="abacus") as caught:
        named_machine("abacus")
    assert "h100-sxm" in caught.value.hint


def test_this_machine_is_measured_once(tmp_path: Path) -> None:
    first = this_machine(tmp_path, "cpu", tmp_path / "runs" / "x")
    assert first.on_cpu
    assert first.disk_free_bytes
    rates = read_json(tmp_path / "product_rates.json")["rates"]
    (key,) = rates
    rates[key]["bfloat16"] = 123.0
    (tmp_path / "product_rates.json").write_text(json.dumps({"rates": rates}))
    assert this_machine(tmp_path, "cpu", tmp_path).rates["bfloat16"] == 123.0
    (tmp_path / "product_rates.json").write_text("[]")
    assert this_machine(tmp_path, "cpu", tmp_path).rates["bfloat16"] > 1e8


# --- the command --------------------------------------------------------------------------------


def test_plan_prints_a_table_or_json(
    big: dict[str, Any], shearling: Shearling, tmp_path: Path
) -> None:
    (tmp_path / "big.yaml").write_text(yaml.safe_dump(big))
    arguments = ("plan", "big.yaml", "--accelerator", "h100-sxm", "--processes", "8")
    done = shearling(*arguments)
    assert done.returncode == 0, done.stderr
    assert "3,212,749,824" in done.stdout
    assert "on 8 x h100-sxm" in done.stdout
    plan = json.loads(shearling(*arguments, "--json", "--set", "distill.tokens=2097152").stdout)
    assert row(plan, "distill")["tokens"] == 2097152
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("width", [80, 100])
def test_a_plan_is_whole_on_a_narrow_terminal(width: int) -> None:
    recipe = load_recipe("llama-3.1-8b-to-3b")
    facts = teacher_facts(recipe.teacher)
    plan = make_plan(recipe, facts, named_machine("h100-sxm"), processes=8)
    console = Console(file=StringIO(), width=width)
    found = [part for part in plan_table(plan, width=width) if isinstance(part, Table)]
    console.print(*found, sep="\n")
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert max(map(len, lines)) <= width
    printed = "\n".join(lines)
    assert "…" not in printed
    for row in plan["stages"]:
        (numbers, memory) = [line for line in lines if line.startswith(f"{row['name']} ")]
        for number in (row["parameters"], row["tokens"]):
            assert not number or words.count(number) in numbers
        assert format_bytes(row["memory_bytes"]) in numbers
        assert row["moment"] in memory
    assert re.search(r"^distill .* 8 h 12 min\b", printed, re.MULTILINE)
    assert re.search(r"^distill .* 2-256\b", printed, re.MULTILINE)


def test_a_long_name_is_folded_and_its_numbers_stay_whole() -> None:
    console = Console(file=StringIO(), width=50)
    rows = [("n" * 64, 123_456_789, "12 min 34 s")]
    (table,) = tables({"name": "left", "tokens": "right", "time": "right"}, rows, width=50)
    console.print(table)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert "  123.5M  12 min 34 s" in printed
    assert printed.count("n") == 64 + "name tokens min".count("n")


def test_plan_measures_this_machine(recipe_file: Path, shearling: Shearling) -> None:
    plan = json.loads(shearling("plan", recipe_file, "--json").stdout)
    assert plan["machine"]["source"] == "measured here"
    assert plan["total"]["seconds"] < 120
    # However little a stage has to do, its libraries open first.
    assert all(row(plan, name)["seconds"] >= 1 for name in ("prune", "distill"))
    assert isinstance(check_recipe(yaml.safe_load(recipe_file.read_text())), Recipe)
    assert shearling("plan", recipe_file, "--accelerator", "abacus").returncode == 2
