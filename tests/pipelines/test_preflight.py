from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from shearling_process import Shearling

from pipelines.accelerators import named_machine
from pipelines.machine import pick_device
from pipelines.plan import make_plan, teacher_facts
from pipelines.preflight import (
    check_file,
    check_parents,
    check_paths,
    check_processes,
    check_tokenizers,
    check_with_teacher,
    known_teacher_config,
    warnings,
)
from pipelines.recipe import DistillStage, check_recipe
from pipelines.stages import distill, transfer_set
from pipelines.stages.context import Context
from pipelines.tiny import make_tiny_llama
from reports.settings import BenchmarkSettings
from shearling import ShearlingError, disk_errors, read_json, silent, write_json
from students.shape import Shape
from teachers.settings import SourceSettings, TransferSetSettings


def test_a_teacher_that_must_be_converted_is_not_refused_before(
    recipe_data: dict[str, Any], tmp_path: Path
) -> None:
    for name in ("params.json", "consolidated.00.pth"):
        (tmp_path / name).write_text("{}")
    recipe = check_recipe({**recipe_data, "teacher": {"model": str(tmp_path)}})
    assert known_teacher_config(recipe, tmp_path / "store") is None


def test_a_ggufs_header_tells_what_does_not_fit_it(
    recipe_data: dict[str, Any], bare_gguf: Callable[..., Path], tmp_path: Path
) -> None:
    path = bare_gguf(hidden=32, layers=4, neurons=64, context=64)

    def check(**text: int) -> None:
        settings = recipe_data["transfer_set"] | text
        data = {**recipe_data, "teacher": {"model": str(path)}, "transfer_set": settings}
        check_with_teacher(check_recipe(data), tmp_path / "store")

    check(window=64)
    with pytest.raises(ShearlingError, match="window is 65, and the teacher was made for 64"):
        check(window=65)


def test_a_window_longer_than_the_teachers_context(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    config = {"max_position_embeddings": 512}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    source = SourceSettings(name="text", path="text.jsonl")
    context = Context(
        name="transfer_set",
        inputs={"teacher": tmp_path},
        out=tmp_path,
        run=tmp_path,
        seed=0,
        benchmark=BenchmarkSettings(),
        device="cpu",
        cache=tmp_path,
        progress=silent,
        on_metrics=print,
    )
    with pytest.raises(ShearlingError, match="512 tokens at most"):
        transfer_set.run(TransferSetSettings(sources=(source,), window=513), context)


@pytest.mark.parametrize(
    ("teacher", "second"),
    [
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-2-70b-hf"),
        ("meta-llama/Llama-2-7b-hf", "codellama/CodeLlama-7b-hf"),
    ],
)
def test_a_second_teacher_of_another_family_is_refused_by_its_name(
    recipe_data: dict[str, Any], teacher: str, second: str
) -> None:
    """Before anything is downloaded, and with what would work."""
    stage = {"name": "second", "kind": "teacher", "model": second}
    recipe = check_recipe({**recipe_data, "teacher": {"model": teacher}, "stages": [stage]})
    with pytest.raises(ShearlingError, match="second: Teacher and student have diff") as caught:
        make_plan(recipe, teacher_facts(recipe.teacher), named_machine("l4"))
    assert second in caught.value.what
    assert "Llama 3, 3.1 and 3.2 share one" in caught.value.hint
    stage["model"] = teacher.replace("8B", "70B").replace("7b", "70b")
    recipe = check_recipe({**recipe_data, "teacher": {"model": teacher}, "stages": [stage]})
    assert make_plan(recipe, teacher_facts(recipe.teacher), named_machine("l4"))["stages"]


def test_a_second_teacher_with_another_tokenizer_is_refused_before_work(
    recipe_data: dict[str, Any], tmp_path: Path
) -> None:
    other = make_tiny_llama(tmp_path / "other", vocabulary=300)
    stage = {"name": "second", "kind": "teacher", "model": str(other)}
    recipe = check_recipe({**recipe_data, "stages": [stage, *recipe_data["stages"]]})
    with pytest.raises(ShearlingError, match=r"300 tokens in .*other"):
        check_tokenizers(recipe)
    # Where only the import tells, the stage that would learn from it does.
    own = Path(recipe_data["teacher"]["model"])
    folders = {"teacher": own, "teacher second": other, "model": own}
    for role, folder in folders.items():
        (tmp_path / role).mkdir()
        (tmp_path / role / "model").symlink_to(folder)
    context = Context(
        name="distill",
        inputs={role: tmp_path / role for role in folders},
        out=tmp_path / "out",
        run=tmp_path,
        seed=0,
        device="cpu",
        cache=tmp_path,
        progress=silent,
        on_metrics=print,
    )
    settings = DistillStage(
        name="distill", kind="distill", tokens=1, teachers={"teacher": 1, "second": 1}
    )
    with pytest.raises(ShearlingError, match="300 tokens in"):
        distill.run(settings, context)


def test_what_the_training_loop_would_refuse_is_refused_before_work(
    recipe_data: dict[str, Any], recipe_file: Path, shearling: Shearling,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Its 256 tokens a step are 8 windows."""

    def refused(processes: int, **settings: float) -> str:
        data = copy.deepcopy(recipe_data)
        data["stages"][1] |= settings
        with pytest.raises(ShearlingError) as caught:
            check_processes(check_recipe(data), processes)
        return caught.value.what

    check_processes(check_recipe(recipe_data), 8)
    assert "8 windows of 32, fewer than the 9 processes; set batch_tokens to 288" in refused(9)
    assert "on_policy can't be used with 2 processes" in refused(2, on_policy=0.5)
    mixing = {"adaptive_mix": 1.0, "evaluate_every": 1}
    assert "adaptive_mix needs several sources" in refused(1, **mixing)
    assert refused(9, on_policy=0.5, **mixing).count("\n  - distill: ") == 3
    data = copy.deepcopy(recipe_data)
    data["stages"][1] |= {"on_policy": 0.5, **mixing}
    data["transfer_set"]["written"] = {}
    check_processes(check_recipe(data), 1)

    for command in (("run", recipe_file, "--dry-run"), ("plan", recipe_file)):
        assert shearling(*command, "--processes", "8").returncode == 0
        done = shearling(*command, "--processes", "9")
        assert done.returncode == 2
        assert "fewer than the 9 processes" in done.stderr
    monkeypatch.setenv("WORLD_SIZE", "9")  # as torchrun tells it
    assert "fewer than the 9 processes" in shearling("run", recipe_file, "--dry-run").stderr


def test_keys_that_only_a_data_set_obeys_are_told(
    recipe_data: dict[str, Any], tiny_text: Path, tmp_path: Path
) -> None:
    def told(**source: str) -> list[str]:
        given = {"sources": [{"name": "mine", **source}]}
        found = warnings(check_recipe({**recipe_data, "transfer_set": given}), None)
        return [warning for warning in found if warning.startswith("transfer_set")]

    assert told(path=str(tiny_text), split="train") == []
    assert told(path="owner/texts", split="test", config="en") == []
    split, config = told(path=str(tiny_text), split="test", config="en")
    assert split.startswith("transfer_set.sources.mine.split: test has no effect")
    assert config.startswith("transfer_set.sources.mine.config: en has no effect")
    # A folder is opened by datasets where the recipe says so, unless it holds one split anyway.
    assert told(path=str(tmp_path), format="dataset", split="test") == []
    (tmp_path / "state.json").write_text("{}")
    assert len(told(path=str(tmp_path), format="dataset", split="test")) == 1
    (tmp_path / "dataset_dict.json").write_text("{}")
    assert told(path=str(tmp_path), split="test") == []
    (config,) = told(path=str(tmp_path), split="test", config="en")
    assert config.startswith("transfer_set.sources.mine.config: en has no effect")


@pytest.mark.parametrize("path", ["owner/texts", "."])
@pytest.mark.parametrize("form", ["auto", "dataset"])
def test_a_hash_of_what_is_not_one_file_is_refused(
    recipe_data: dict[str, Any], path: str, form: str
) -> None:
    given = {"name": "mine", "path": path, "format": form, "sha256": "0" * 64}
    recipe = check_recipe({**recipe_data, "transfer_set": {"sources": [given]}})
    with pytest.raises(ShearlingError, match=r"sources\.mine\.sha256 is of one file, and"):
        check_paths(recipe)


IDLE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "target_slots: 20 has no effect, for targets is live": (
        {"target_slots": 20}, {"targets": "sample"},
    ),
    "jensen_shannon_beta: 0.2 has no effect, for jensen_shannon is 0": (
        {"jensen_shannon_beta": 0.2}, {"jensen_shannon": 1.0},
    ),
    "skew: 0.2 has no effect, for skewed_kl and skewed_reverse_kl are 0": (
        {"skew": 0.2}, {"skewed_reverse_kl": {"start": 0, "end": 1}},
    ),
    "hidden.kind: mse has no effect, for hidden.weight is 0": (
        {"hidden": {"kind": "mse"}}, {"hidden": {"kind": "mse", "weight": 1.0}},
    ),
    "attention.kind: mse has no effect, for attention.weight is 0": (
        {"attention": {"kind": "mse"}}, {"attention": {"kind": "mse", "weight": 1.0}},
    ),
    "on_policy_temperature: 0.7 has no effect, for on_policy is 0": (
        {"on_policy_temperature": 0.7}, {"on_policy": 0.5},
    ),
}  # fmt: skip


@pytest.mark.parametrize("message", IDLE)
def test_what_belongs_to_something_that_is_off_is_told(
    recipe_data: dict[str, Any], message: str
) -> None:
    def told(**settings: Any) -> list[str]:
        data = copy.deepcopy(recipe_data)
        data["stages"][1] |= settings
        recipe = check_recipe(data)
        # A run's own recipe.yaml has every default written out; that says nothing new.
        again = check_recipe(yaml.safe_load(recipe.to_yaml()))
        found = [w for w in warnings(recipe, None) if "no effect" in w]
        assert found == [w for w in warnings(again, None) if "no effect" in w]
        return found

    alone, switched_on = IDLE[message]
    assert told(**alone) == [f"distill.{message}."]
    assert told(**alone | switched_on) == []


def test_settings_that_a_cut_does_not_use_are_told(recipe_data: dict[str, Any]) -> None:
    teacher = Shape.from_config(read_json(Path(recipe_data["teacher"]["model"]) / "config.json"))

    def told(shape: dict[str, Any], known: bool = True, **settings: Any) -> list[str]:
        data = copy.deepcopy(recipe_data)
        data["stages"][0] |= {"shape": shape, **settings}
        recipe = check_recipe(data)
        return [w for w in warnings(recipe, teacher if known else None) if "no effect" in w]

    neurons = {"intermediate_size": 48}
    unused = {"depth": "cosine", "basis": "dims", "merge": "split"}
    assert [w.removeprefix("prune.") for w in told(neurons, **unused)] == [
        "depth: cosine has no effect, for no layer is cut.",
        "basis: dims has no effect, for the hidden size stays.",
        "merge: split has no effect, for embedding and output head are not made one.",
    ]
    assert told(neurons, known=False, **unused) == []
    assert told({"num_hidden_layers": 3, "hidden_size": 24}, depth="cosine", basis="dims") == []
    assert told({"params": 0.8}, **unused) == []
    (ridge,) = told(neurons, known=False, ridge=0.1, refit=False)
    assert ridge == "prune.ridge: 0.1 has no effect, for refit is false."
    assert told(neurons, ridge=0.1) == []


def test_heads_that_cannot_turn_as_the_teachers_are_told_before_the_work(
    recipe_data: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "teacher"
    shutil.copytree(recipe_data["teacher"]["model"], folder)
    config = read_json(folder / "config.json")
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    write_json(folder / "config.json", config | {"rope_parameters": rope})

    def check(**shape: int) -> None:
        data = copy.deepcopy(recipe_data) | {"teacher": {"model": str(folder)}}
        data["stages"][0]["shape"] = shape
        check_with_teacher(check_recipe(data), tmp_path / "store")

    check(num_hidden_layers=3)
    with pytest.raises(ShearlingError, match=r"Stage prune: head_dim can't go .*\(dynamic\)"):
        check(head_dim=config["head_dim"] // 2)


def test_settings_that_can_only_disappoint_are_told(recipe_data: dict[str, Any]) -> None:
    teacher = Shape.from_config(read_json(Path(recipe_data["teacher"]["model"]) / "config.json"))

    def told(correct: int = 20_000, text: int = 20_000, **changed: int) -> list[str]:
        data = copy.deepcopy(recipe_data)
        data["transfer_set"]["sources"][0]["tokens"] = text
        prune, distill = data["stages"]
        prune["calibration_tokens"] = changed.pop("calibration_tokens", teacher.hidden_size)
        distill |= {"tokens": 80_000, **changed}
        first = {"name": "correct", "kind": "correct", "tokens": correct, "batch_tokens": 1024}
        return warnings(check_recipe({**data, "stages": [first, prune, distill]}), teacher)

    assert told() == []
    (few,) = told(calibration_tokens=teacher.hidden_size - 1)
    assert "raise prune.calibration_tokens" in few
    (epochs,) = told(tokens=2_000_000)
    assert epochs.startswith("distill reads the about 20,000 tokens of the transfer set 100 times")
    (step,) = told(tokens=1)
    assert step.startswith("distill trains for 1 step of 256 tokens")
    (steps,) = told(correct=2048)
    assert steps.startswith("correct trains for 2 steps of 1,024 tokens")
    (steps,) = told(correct=200_000, tokens=20_000)
    assert steps.startswith("correct reads the about 20,000 tokens of the transfer set 10 times")


def test_what_only_the_teachers_shape_tells_is_told_once(
    recipe_file: Path, shearling: Shearling
) -> None:
    given = (recipe_file, "--set", "prune.calibration_tokens=1")
    dry = json.loads(shearling("run", *given, "--dry-run", "--json").stdout)["warnings"]
    assert any("too few to choose and refit by" in warning for warning in dry)
    done = shearling("run", *given)
    assert done.returncode == 0, done.stderr
    assert done.stdout.replace("\n", " ").count("too few to choose and refit by") == 1


def test_a_path_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    check_parents(tmp_path / "new" / "folder")
    with pytest.raises(ShearlingError, match="is a file"):
        check_parents(tmp_path / "file" / "new" / "folder")


NOWHERE = ["file/x", *(["/proc/x"] if Path("/proc").is_dir() else [])]


@pytest.mark.parametrize("out", NOWHERE)
def test_a_place_where_nothing_can_be(
    out: str, shearling: Shearling, recipe_file: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    for arguments in (
        ("run", recipe_file),
        ("init", "--teacher", tiny_llama),
        ("export", tiny_llama, "--to", "hf"),
    ):
        done = shearling(*arguments, "--out", out)
        assert done.returncode == 2, done.stderr
        assert f"{out} can't be written" in done.stderr
        assert "--out" in done.stderr


@pytest.mark.parametrize("cache", ["file", *NOWHERE])
def test_a_cache_where_no_folder_can_be(
    cache: str, shearling: Shearling, recipe_file: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (tmp_path / "file").touch()
    monkeypatch.setenv("SHEARLING_CACHE", cache)
    for command in ("run", "plan"):
        done = shearling(command, recipe_file)
        assert done.returncode == 2, done.stderr
        assert f"The cache can't be at {cache}" in done.stderr
        assert "SHEARLING_CACHE" in done.stderr


def test_a_file_that_is_missing_elsewhere_is_a_fault_all_the_same(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), disk_errors(tmp_path / "out"):
        (tmp_path / "out" / "inside").read_text()
    with pytest.raises(FileNotFoundError), disk_errors(tmp_path / "out"):
        (tmp_path / "other" / "file").read_text()


def test_a_file_s_path_that_is_a_folder(tmp_path: Path) -> None:
    check_file(tmp_path / "new" / "card.json")
    with pytest.raises(ShearlingError, match="it is a folder"):
        check_file(tmp_path)


def test_a_device_that_is_not_there() -> None:
    assert pick_device("cpu") == "cpu"
    with pytest.raises(ShearlingError, match=r"finds .*cpu"):
        pick_device("cuda:77")
    with pytest.raises(ShearlingError, match="no float64"):
        pick_device("mps")
