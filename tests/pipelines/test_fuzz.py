"""Files that others wrote, of any content: a message at worst, no code run, no memory claimed."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hostile import at_worst_a_message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from pipelines.difference import as_markdown, as_table, compare_targets
from pipelines.journal import read_status
from pipelines.provenance import check_locked
from pipelines.recipe import check_recipe, load_recipe, resolve_paths
from pipelines.status import status_lines
from pipelines.steps import build_steps, decide_all
from pipelines.store import FileHashes, Store
from reports.page import render_markdown, report_data
from reports.run_folder import read_run
from reports.verdict import judge
from reports.view import make_view
from shearling import ShearlingError
from teachers.checkpoint import open_checkpoint

# On the build server always the same examples, lest a change fail for another's old mistake;
# everywhere else new ones.
few = settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize="CI" in os.environ,
)
leaves = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
    | st.sampled_from(["../../x", "\0", "!!python/name:os.system", "{{7*7}}", "1e999", "-1"])
)  # fmt: skip
anything = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


def places(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of everything in a tree of JSON."""
    yield path
    items = (
        data.items()
        if isinstance(data, dict)
        else enumerate(data)
        if isinstance(data, list)
        else ()
    )
    for key, value in items:
        yield from places(value, (*path, key))


def replaced(data: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    copy = dict(data) if isinstance(data, dict) else list(data)
    copy[path[0]] = replaced(data[path[0]], path[1:], value)
    return copy


numbers = st.sampled_from([float("inf"), float("-inf"), float("nan"), "1e30", 10**24, 1e300, -1])


def damaged(draw: st.DataObject, data: Any, by: st.SearchStrategy[Any] = anything) -> Any:
    """The data with some things in it replaced by others."""
    for _ in range(draw.draw(st.integers(1, 3))):
        data = replaced(data, draw.draw(st.sampled_from(list(places(data)))), draw.draw(by))
    return data


# --- recipes ------------------------------------------------------------------------------------


@few
@given(content=st.binary(max_size=300) | st.text(max_size=200).map(str.encode))
def test_any_bytes_as_a_recipe(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(content)
    with pytest.raises(ShearlingError):
        load_recipe(str(path))


@few
@given(draw=st.data())
def test_any_change_of_a_recipe(recipe_data: dict[str, Any], draw: st.DataObject) -> None:
    data = damaged(draw, recipe_data, anything | numbers)
    with at_worst_a_message():
        recipe = check_recipe(data if isinstance(data, dict) else {"stages": data})
        plain = recipe.model_dump(mode="json")
        json.dumps(plain, allow_nan=False)  # as a step's key is made
        resolve_paths(plain, Path())
        assert yaml.safe_load(recipe.to_yaml()) == plain


@few
@given(overrides=st.lists(st.text(max_size=30) | st.builds("{}={}".format, st.text(), st.text())))
def test_any_override(
    recipe_data: dict[str, Any], overrides: list[str], tmp_path_factory: Any
) -> None:
    path = tmp_path_factory.getbasetemp() / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_data))
    with at_worst_a_message():
        load_recipe(str(path), overrides)


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system ['touch CODE_WAS_RUN']",
        "name: !!python/object/apply:os.system ['touch CODE_WAS_RUN']",
        "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\n" + "".join(
            f"{chr(100 + n)}: &{chr(100 + n)} [*{chr(99 + n)}, *{chr(99 + n)}]\n" for n in range(20)
        ),
        "[" * 5000,
        "a: " + "x" * (1 << 20),
    ],
    ids=["code", "code below", "aliases", "deep", "long"],
)  # fmt: skip
def test_hostile_recipes(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hostile.yaml").write_text(text)
    with pytest.raises(ShearlingError):
        load_recipe("hostile.yaml")
    assert not (tmp_path / "CODE_WAS_RUN").exists()


# --- a run's own files --------------------------------------------------------------------------

REPORTED = (
    "run.json", "lock.json", "stages/prune/scorecard.json", "stages/teacher/scorecard.json",
    "stages/prune/selection.json", "stages/distill/stage.json",
    "stages/transfer_set/transfer_set.json",
)  # fmt: skip


def without_charts_of_the_page(run: Path) -> None:
    found = read_run(run)
    judgement = judge(found)
    view = make_view(found, judgement)
    render_markdown(view)
    json.dumps(report_data(found, judgement, view), allow_nan=False)


@few
@given(draw=st.data())
def test_any_content_of_a_runs_files(run: Path, draw: st.DataObject) -> None:
    name = draw.draw(st.sampled_from(REPORTED))
    path = run / name
    whole = path.read_text()
    aside = run / "aside.json"
    try:
        path.unlink()
        path.write_text(json.dumps(damaged(draw, json.loads(whole))))
        without_charts_of_the_page(run)
        with at_worst_a_message():
            list(status_lines(read_status(run)))
    finally:
        aside.write_text(whole)
        os.replace(aside, path)


@few
@given(draw=st.data())
def test_any_content_of_a_scorecard_in_a_diff(run: Path, draw: st.DataObject) -> None:
    card = json.loads((run / "stages" / "prune" / "scorecard.json").read_text())
    other = run / "other.json"
    other.write_text(json.dumps(damaged(draw, card)))
    with at_worst_a_message():
        found = compare_targets(
            str(run / "stages" / "teacher"), str(other), {}, every_metric=True, cache=run,
            console=Console(),
        )  # fmt: skip
        json.dumps(found.to_json(), allow_nan=False)
        as_table(found)
        as_markdown(found)
        found.footnotes()


@few
@given(draw=st.data())
def test_any_content_of_an_artefacts_record(
    run: Path, recipe_data: dict[str, Any], draw: st.DataObject
) -> None:
    steps = build_steps(check_recipe(recipe_data), FileHashes(run).fingerprint)
    store = Store(run / "store")
    step = draw.draw(st.sampled_from(steps))
    path = store.artefact(step.kind, step.key) / "stage.json"
    whole = path.read_text()
    try:
        record = damaged(draw, json.loads(whole))
        path.write_text(json.dumps(record))
        previous = record if isinstance(record, dict) else None
        for _, decision in decide_all(steps, store, lambda _: previous):
            assert decision.reason
    finally:
        path.write_text(whole)


@few
@given(draw=st.data())
def test_any_content_of_a_lock(run: Path, recipe_data: dict[str, Any], draw: st.DataObject) -> None:
    lock = json.loads((run / "lock.json").read_text())
    steps = build_steps(check_recipe(recipe_data), FileHashes(run).fingerprint)
    path = run / "other-lock.json"
    path.write_text(json.dumps(damaged(draw, lock)))
    with at_worst_a_message():
        check_locked(path, lock, steps)


# --- checkpoints --------------------------------------------------------------------------------


def header_of(content: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


@few
@given(draw=st.data())
def test_any_header_of_a_safetensors_file(
    tiny_llama: Path, tmp_path_factory: Any, draw: st.DataObject
) -> None:
    folder = tmp_path_factory.getbasetemp() / "damaged"
    if not folder.exists():
        shutil.copytree(tiny_llama, folder)
    header, body = header_of((tiny_llama / "model.safetensors").read_bytes())
    text = json.dumps(damaged(draw, header)).encode()
    length = draw.draw(st.sampled_from([len(text), len(text), 0, 1 << 40, (1 << 64) - 1]))
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", length) + text + body)
    with at_worst_a_message():
        checkpoint = open_checkpoint(folder)
        checkpoint.tensor("model.embed_tokens.weight")


@few
@given(draw=st.data())
def test_any_config_of_a_checkpoint(
    tiny_llama: Path, tmp_path_factory: Any, draw: st.DataObject
) -> None:
    folder = tmp_path_factory.getbasetemp() / "configured"
    if not folder.exists():
        shutil.copytree(tiny_llama, folder)
    config = json.loads((tiny_llama / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(damaged(draw, config)))
    with at_worst_a_message():
        open_checkpoint(folder)


def test_fuzzing_would_see_a_change() -> None:
    data = {"a": [1, {"b": 2}]}
    assert list(places(data)) == [(), ("a",), ("a", 0), ("a", 1), ("a", 1, "b")]
    assert replaced(data, ("a", 1, "b"), None) == {"a": [1, {"b": None}]}
