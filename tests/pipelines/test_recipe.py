from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.recipe import (
    MAX_BYTES,
    check_recipe,
    load_recipe,
    read_recipe,
    shipped_recipes,
)
from shearling import ShearlingError


@pytest.fixture
def data(recipe_data: dict[str, Any]) -> dict[str, Any]:
    return copy.deepcopy(recipe_data)


def mistakes(data: dict[str, Any]) -> str:
    with pytest.raises(ShearlingError) as caught:
        check_recipe(data)
    assert caught.value.hint
    return caught.value.what


def test_a_good_recipe_is_read_and_survives_being_written(data: dict[str, Any]) -> None:
    recipe = check_recipe(data)
    assert recipe.stages[1].name == "distill"
    assert check_recipe(yaml.safe_load(recipe.to_yaml())) == recipe


def test_a_recipe_without_text_has_the_teacher_write_it(data: dict[str, Any]) -> None:
    del data["transfer_set"]
    recipe = check_recipe(data)
    assert recipe.transfer_set.written
    assert check_recipe(yaml.safe_load(recipe.to_yaml())) == recipe
    data["transfer_set"] = {"window": 32}
    assert "transfer_set: has neither sources nor written" in mistakes(data)
    data["transfer_set"] = {"written": {"temprature": 1}}
    assert "written.temprature: unknown key; did you mean 'temperature'?" in mistakes(data)


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_validates(name: str) -> None:
    assert load_recipe(name).name == name


def test_an_unknown_key_names_the_nearest_known_one(data: dict[str, Any]) -> None:
    data["stages"][1]["tokns"] = 5
    assert "distill.tokns: unknown key; did you mean 'tokens'?" in mistakes(data)


@pytest.mark.parametrize(
    ("place", "key", "nearest"),
    [
        ((), "seeds", "seed"),
        (("teacher",), "modle", "model"),
        (("transfer_set",), "windw", "window"),
        (("transfer_set", "sources", 0), "feild", "field"),
        (("benchmark",), "task", "tasks"),
        (("stages", 0), "calibration_token", "calibration_tokens"),
        (("stages", 0, "shape"), "hiden_size", "hidden_size"),
        (("stages", 1, "hidden"), "wieght", "weight"),
    ],
)
def test_nearest_keys_at_every_depth(
    data: dict[str, Any], place: tuple[str | int, ...], key: str, nearest: str
) -> None:
    data["stages"][1]["hidden"] = {"weight": 0.5}
    target: Any = data
    for part in place:
        target = target[part]
    target[key] = 1
    found = mistakes(data)
    assert f"{key}: unknown key; did you mean {nearest!r}?" in found
    assert "a mistake" in found


def test_all_mistakes_are_told_at_once(data: dict[str, Any]) -> None:
    data["seed"] = "many"
    data["extra"] = 1
    data["stages"][0]["shape"] = "like-3c"
    data["stages"][0]["ridge"] = -1
    data["stages"][1]["tokens"] = 0
    data["stages"].append({"name": "PRUNE", "kind": "distil"})
    found = mistakes(data)
    assert "7 mistakes" in found
    for part in (
        "seed: ",
        "extra: unknown key",
        "prune.shape: no shape has the name 'like-3c'; did you mean 'like-3b'?",
        "prune.ridge: should be greater than 0, not -1",
        "distill.tokens: should be greater than 0, not 0",
        "PRUNE.kind: must be one of prune, distill, correct, teacher, export; did you mean",
        "is given to more than one stage",
    ):
        assert part in found


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden", "a" * 65, "a b", "con\n"])
def test_names_that_are_no_folder_names(data: dict[str, Any], name: str) -> None:
    data["stages"][0]["name"] = name
    assert "can't be a folder's name" in mistakes(data)
    data["stages"][0]["name"] = "prune"
    data["name"] = name
    assert "can't be a folder's name" in mistakes(data)


@pytest.mark.parametrize("name", ["teacher", "transfer_set", "benchmark", "store", "seed"])
def test_reserved_stage_names(data: dict[str, Any], name: str) -> None:
    data["stages"][0]["name"] = name
    assert f"no stage may have the name {name!r}" in mistakes(data)


def test_stages_are_needed_and_in_order(data: dict[str, Any]) -> None:
    data["stages"] = data["stages"][::-1]
    assert "a distill stage stands before any prune stage" in mistakes(data)
    data["stages"] = []
    assert "stages: " in mistakes(data)
    del data["stages"]
    assert "stages: is missing" in mistakes(data)


@pytest.mark.parametrize("shape", [{"hidden_size": True}, {"hidden_size": "24"}, {"x": 1}, 3, None])
def test_shapes_of_wrong_types(data: dict[str, Any], shape: Any) -> None:
    data["stages"][0]["shape"] = shape
    assert "prune.shape" in mistakes(data)


# --- published training recipes ---


def test_a_published_training_recipe_by_name(data: dict[str, Any]) -> None:
    stage = data["stages"][1]
    del stage["batch_tokens"]
    stage |= {"training": "llama-2-13b", "tokens": 1024 * 20_000, "clip": 0.5}
    distill = check_recipe(data).stages[1]
    assert (distill.optimizer, distill.betas, distill.eps) == ("adamw", (0.9, 0.95), 1e-5)
    assert (distill.weight_decay, distill.final_learning_rate) == (0.1, 0.1)
    assert (distill.warmup, distill.learning_rate) == (0.1, 3e-4)  # 2,000 of 20,000 steps
    assert distill.clip == 0.5  # what the stage says itself stays
    assert distill.position_clip == 0
    recipe = check_recipe(data)
    assert check_recipe(yaml.safe_load(recipe.to_yaml())) == recipe


@pytest.mark.parametrize("tokens", [2 * 10**9, "2B", "2_000M", "2e9"])
@pytest.mark.parametrize("batch", [100_000, "100k"])
def test_the_published_warm_up_holds_however_tokens_are_written(
    data: dict[str, Any], tokens: int | str, batch: int | str
) -> None:
    data["stages"][1] |= {"training": "llama-2", "tokens": tokens, "batch_tokens": batch}
    assert check_recipe(data).stages[1].warmup == 0.1  # 2,000 of 20,000 steps
    data["stages"][1]["tokens"] = "2M"
    assert "this stage has 20 in all" in mistakes(data)


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ("llama-2", "warms up for 2,000 steps, this stage has 4 in all; set its warmup too"),
        ("lama-2", "No training recipe 'lama-2' was published. Did you mean 'llama-2'?"),
        ("smollm2", "can't be followed; only cosine can"),
    ],
)
def test_training_recipes_that_do_not_fit(
    data: dict[str, Any], training: str, message: str
) -> None:
    data["stages"][1]["training"] = training
    assert message in mistakes(data)


# --- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"name: a\nname: b\n", "line 2, column 1: the key 'name' is given twice"),
        (b"stages: [\n", "is not valid YAML: line 2"),
        (b"\xff\xfe\x00", "is not UTF-8 text"),
        (b"- 1\n", "holds a list, not a mapping"),
        (b"", "holds nothing, not a mapping"),
        (b"x: !!python/object/apply:os.system ['true']\n", "is not valid YAML"),
        (b"x: &x [*x]\n", "more values than a recipe can need"),
        (b"#" * (MAX_BYTES + 1), "is larger than"),
        (b"[" * 5000, "is not valid YAML"),
    ],
)
def test_files_that_are_no_recipe(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(ShearlingError, match=r".") as caught:
        load_recipe(str(path))
    assert message in caught.value.what


def test_a_file_of_nested_aliases_is_refused(tmp_path: Path) -> None:
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    path = tmp_path / "bomb.yaml"
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(ShearlingError, match="more values than a recipe can need"):
        read_recipe(path)


def test_an_unknown_recipe_names_the_shipped_ones() -> None:
    with pytest.raises(ShearlingError) as caught:
        load_recipe("quickstrat")
    assert "did you mean 'quickstart'?" in caught.value.what
    assert "quickstart" in caught.value.hint


def test_paths_count_from_the_recipe_then_from_here(
    data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "recipes"
    (folder / "near").mkdir(parents=True)
    data["teacher"]["model"] = "near"
    data["transfer_set"]["sources"][0]["path"] = "far.txt"
    (folder / "r.yaml").write_text(yaml.safe_dump(data), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("recipes/r.yaml")
    assert recipe.teacher.model == str(folder / "near")
    assert recipe.transfer_set.sources[0].path == "far.txt"


def test_a_written_recipe_is_read_the_same_from_everywhere(
    data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data["transfer_set"]["sources"][0]["path"] = "text.txt"
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(data), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for name in ("here", "elsewhere"):
        Path(name).mkdir()
    Path("here", "text.txt").write_text("text")
    monkeypatch.chdir("here")
    given = load_recipe("../r.yaml", ["teacher.model=../here"])
    assert given.teacher.model == "../here"  # messages name it as it was given
    Path("../elsewhere/recipe.yaml").write_text(given.to_yaml(), encoding="utf-8")
    monkeypatch.chdir("../elsewhere")
    written = load_recipe("recipe.yaml")
    assert Path(written.teacher.model).samefile("../here")
    assert written.transfer_set.sources[0].path == str(tmp_path / "here" / "text.txt")


def test_a_linked_text_keeps_its_ending(data: dict[str, Any], tmp_path: Path) -> None:
    """As in the hub's cache, where snapshots link to files that are named by their hashes."""
    (tmp_path / "0a1b2c").write_text("text")
    (tmp_path / "text.txt").symlink_to("0a1b2c")
    data["transfer_set"]["sources"][0]["path"] = "./text.txt"
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(data), encoding="utf-8")
    recipe = load_recipe(str(tmp_path / "r.yaml"))
    assert recipe.transfer_set.sources[0].path == str(tmp_path / "text.txt")


def test_the_name_is_the_files_by_default(data: dict[str, Any], tmp_path: Path) -> None:
    del data["name"]
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    assert load_recipe(str(path)).name == "mine"


# --- --set --------------------------------------------------------------------------------------


def test_overrides_reach_stages_lists_and_absent_keys(recipe_file: Path) -> None:
    recipe = load_recipe(
        str(recipe_file),
        [
            "distill.tokens=2048",
            "distill.hidden.weight=0.5",
            "prune.shape.hidden_size=16",
            "transfer_set.sources.0.tokens=77",
            "transfer_set.sources.grammar.field=body",
            "benchmark.tasks=[copa, piqa]",
            "seed=3",
        ],
    )
    prune, distill = recipe.stages
    assert (distill.tokens, distill.hidden.weight, recipe.seed) == (2048, 0.5, 3)
    assert prune.shape_spec()["hidden_size"] == 16
    assert recipe.transfer_set.sources[0].tokens == 77
    assert recipe.transfer_set.sources[0].field == "body"
    assert recipe.benchmark.tasks == ("copa", "piqa")


def test_an_override_turns_a_preset_into_axes(recipe_file: Path) -> None:
    overrides = ["prune.shape=like-3b", "prune.shape.hidden_size=16"]
    recipe = load_recipe(str(recipe_file), overrides)
    assert recipe.stages[0].shape_spec() == {"hidden_size": 16}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("prun.shape=x", "'prun' is neither a top-level key nor a stage; did you mean 'prune'?"),
        ("distill.tokens", "write it as KEY.KEY=VALUE"),
        ("=5", "write it as KEY.KEY=VALUE"),
        ("distill..tokens=5", "write it as KEY.KEY=VALUE"),
        ("distill.tokens=[", "the value is not valid YAML"),
        ("transfer_set.sources.9.path=x", "has no item '9'"),
        ("distill.tokns=5", "distill.tokns: unknown key; did you mean 'tokens'?"),
        ("distill.tokens=few", "not 'few'"),
        ("distill.tokens=0k", "greater than 0"),
        ("distill.tokens=1.2345k", "not '1.2345k'"),
        ("distill.evaluate_every=1e4", "not '1e4'; write 10000"),
        ("distill.evaluate_every=5k", "; write 5000"),
    ],
)
def test_wrong_overrides(recipe_file: Path, override: str, message: str) -> None:
    with pytest.raises(ShearlingError) as caught:
        load_recipe(str(recipe_file), [override])
    assert message in caught.value.what


@pytest.mark.parametrize(
    ("written", "meant"),
    [("8k", 8000), ("1.2B", 1_200_000_000), ("1_000 k", 1_000_000), ("5e6", 5_000_000), ("7", 7)],
)
def test_tokens_may_be_written_short(recipe_file: Path, written: str, meant: int) -> None:
    overrides = [f"{key}={written}" for key in ("distill.tokens", "transfer_set.sources.0.tokens")]
    short = load_recipe(str(recipe_file), overrides)
    long = [f"{override.split('=')[0]}={meant}" for override in overrides]
    assert short == load_recipe(str(recipe_file), long)
    assert short.transfer_set.sources[0].tokens == meant


def numbers_in(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every number in a recipe that is written out."""
    items = data.items() if isinstance(data, dict) else enumerate(data)
    for key, value in items:
        if isinstance(value, (dict, list)):
            yield from numbers_in(value, (*path, key))
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield (*path, key)


def test_no_number_is_infinite_or_boundless(data: dict[str, Any]) -> None:
    data["stages"][1] |= {"teachers": {"teacher": 2.0}, "forward_kl": {"start": 1, "end": 0.5}}
    data["stages"][0]["ridge"] = 0.1
    data["transfer_set"]["sources"][0]["weight"] = 1.0
    whole = check_recipe(data).model_dump(mode="json")
    paths = list(numbers_in(whole))
    assert len(paths) > 40
    for path in paths:
        for wrong in (math.inf, -math.inf, math.nan, 10**24, 1e30):
            changed = copy.deepcopy(whole)
            place = changed
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = wrong
            key = next(part for part in reversed(path) if isinstance(part, str))
            assert key in mistakes(changed), (path, wrong)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("distill.clip=.inf", "distill.clip: should be a finite number, not inf"),
        ("distill.betas=[2, 3]", "distill.betas.0: should be less than 1, not 2"),
        ("distill.betas=[0.9, -1]", "distill.betas.1: should be greater than or equal to 0"),
        ("distill.tokens=1e30", "should be at most 1,000,000,000,000,000"),
        ("distill.tokens='" + "9" * 5000 + "'", "distill.tokens: "),
        ("distill.micro_batch_windows='" + "9" * 5000 + "'", "distill.micro_batch_windows: "),
        ("distill.batch_tokens=1e15", "should be less than or equal to 1000000000"),
        ("distill.tokens=abc", "distill.tokens: should be a whole number, not 'abc'\n"),
        ("distill.tokens=1.5", "distill.tokens: should be a whole number, not 1.5\n"),
        ("distill.clip=high", "distill.clip: should be a number, not 'high'\n"),
        ("distill.compile=often", "distill.compile: should be true or false, not 'often'\n"),
        ("teacher.model=5", "teacher.model: should be a text, not 5\n"),
        ("stages=[]", "stages: needs at least 1 item\n"),
        ("prune.shape=nope", "no shape has the name 'nope'; shapes with names: llama-3.2-3b, "),
        ("distill.learning_rate=1e300", "should be at most 1,000,000,000"),
        ("distill=100000", "distill: names a whole stage; name a key of it, as in distill.KEY"),
        ("prune={shape: like-1b}", "prune: names a whole stage"),
        ("teacher.model=~nobody.here/x", "teacher.model: '~nobody.here/x' can't be used: "),
        ("benchmark.mirror=" + "m" * 300, "can't be used: File name too long"),
    ],
)
def test_values_that_do_not_fit(recipe_file: Path, override: str, message: str) -> None:
    with pytest.raises(ShearlingError) as caught:
        load_recipe(str(recipe_file), [override])
    assert message in f"{caught.value.what}\n"


def test_mistakes_of_file_and_overrides_come_together(data: dict[str, Any], tmp_path: Path) -> None:
    data["extra"] = 1
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    with pytest.raises(ShearlingError, match="2 mistakes"):
        load_recipe(str(path), ["nothing.at=all"])


def test_mistakes_with_teachers_are_named(data: dict[str, Any]) -> None:
    data["stages"][1]["teachers"] = {"teacher": 1, "bgi": 1}
    data["stages"].insert(0, {"name": "big", "kind": "teacher", "model": "x"})
    data["stages"].insert(2, {"name": "late", "kind": "correct", "tokens": 5})
    found = mistakes(data)
    assert "distill.teachers: no teacher stage before it has the name 'bgi'" in found
    assert "did you mean 'big'?" in found
    assert "a correct stage stands after a prune stage" in found


def test_a_weight_is_a_number_or_a_ramp(data: dict[str, Any]) -> None:
    stage = data["stages"][1]
    stage["forward_kl"], stage["temperature"] = {"start": 1, "end": 0.5}, {"start": 4, "end": 1}
    assert check_recipe(data).stages[1].forward_kl.end == 0.5
    assert check_recipe(yaml.safe_load(check_recipe(data).to_yaml())) == check_recipe(data)
    stage["forward_kl"], stage["temperature"] = {"start": 1, "ende": 0}, {"start": 1, "end": 0}
    found = mistakes(data)
    assert "distill.forward_kl.ende: unknown key; did you mean 'end'?" in found
    stage["forward_kl"] = -1
    assert "distill.forward_kl: " in mistakes(data)


def test_a_shape_may_be_a_budget(data: dict[str, Any], recipe_file: Path) -> None:
    data["stages"][0]["shape"] = {"params": "20k", "num_hidden_layers": 3}
    recipe = check_recipe(data)
    assert recipe.stages[0].shape_spec() == {
        "params": 20_000,
        "candidates": 6,
        "tokens": 8192,
        "num_hidden_layers": 3,
    }
    assert check_recipe(yaml.safe_load(recipe.to_yaml())) == recipe
    overridden = load_recipe(str(recipe_file), ["prune.shape={params: 50%}"])
    assert overridden.stages[0].budget.params == 0.5
    overridden = load_recipe(str(recipe_file), ["prune.shape=like-3b", "prune.shape.params=1.2B"])
    assert overridden.stages[0].budget.params == 1_200_000_000


def test_mistakes_in_a_budget_are_named(data: dict[str, Any]) -> None:
    stage = data["stages"][0]
    stage["shape"] = {"params": "sixty", "candidates": 0, "hiden_size": 24}
    found = mistakes(data)
    assert "prune.shape.params: 'sixty' is no budget; write a number of parameters" in found
    assert "prune.shape.candidates: " in found
    assert "prune.shape.hiden_size: unknown key; did you mean 'hidden_size'?" in found
    stage["shape"] = {"parms": "60M"}
    assert "prune.shape.parms: unknown key; did you mean 'params'?" in mistakes(data)
    stage["shape"], stage["depth"] = {"params": 0.5}, [0, 3]
    assert "depth lists 2 layers; give num_hidden_layers: 2 beside params" in mistakes(data)
    stage["shape"]["num_hidden_layers"] = 2
    assert check_recipe(data).stages[0].budget.num_hidden_layers == 2
