from __future__ import annotations

import copy
import json
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.recipe import check_recipe
from pipelines.stages.prune import joined_map, joined_selection, student_shape
from pipelines.steps import (
    Decision,
    Step,
    build_steps,
    decide,
    decide_all,
    differences,
    history,
)
from pipelines.store import FileHashes, Store
from reports.hub import FAILED_NOW, FROM_CACHE, NO_ANSWER
from students.shape import Shape


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "store")
    store.root.mkdir()
    return store


def steps_of(data: dict[str, Any], store: Store) -> dict[str, Step]:
    return {
        step.name: step
        for step in build_steps(check_recipe(data), FileHashes(store.root).fingerprint)
    }


def record(step: Step) -> dict[str, Any]:
    """What a finished run of the step would have left in its stage.json."""
    return json.loads(
        json.dumps(
            {
                "kind": step.kind,
                "key": step.key,
                "settings": dict(step.slice),
                "inputs": dict(step.inputs),
                "code_version": step.code_version,
            }
        )
    )


def finish(step: Step, store: Store) -> None:
    (store.open_work(step.kind, step.key, resumable=False) / "file").write_text("done")
    store.publish(step.kind, step.key, record(step))


def test_steps_in_order(recipe_data: dict[str, Any], store: Store) -> None:
    assert list(steps_of(recipe_data, store)) == [
        "teacher",
        "transfer_set",
        "teacher/benchmark",
        "prune",
        "prune/benchmark",
        "distill",
        "distill/benchmark",
    ]


def changed_by(data: dict[str, Any], store: Store, change: Any) -> set[str]:
    """Names of the steps whose keys a change of the recipe changes."""
    other = copy.deepcopy(data)
    change(other)
    before, after = steps_of(data, store), steps_of(other, store)
    return {name for name in before if before[name].key != after[name].key}


def test_what_a_change_makes_run_again(recipe_data: dict[str, Any], store: Store) -> None:
    def tasks(data: dict[str, Any]) -> None:
        data["benchmark"]["limit"] = 2

    def tokens(data: dict[str, Any]) -> None:
        data["stages"][1]["tokens"] = 2048

    def window(data: dict[str, Any]) -> None:
        data["transfer_set"]["window"] = 64

    def words(data: dict[str, Any]) -> None:
        data["name"], data["description"] = "other", "other"

    benchmarks = {"teacher/benchmark", "prune/benchmark", "distill/benchmark"}
    assert changed_by(recipe_data, store, tasks) == benchmarks
    assert changed_by(recipe_data, store, tokens) == {"distill", "distill/benchmark"}
    assert changed_by(recipe_data, store, window) == {
        "transfer_set",
        "prune",
        "prune/benchmark",
        "distill",
        "distill/benchmark",
    }
    assert changed_by(recipe_data, store, words) == set()


def test_a_text_cleared_of_questions_depends_on_the_benchmarks(
    recipe_data: dict[str, Any], store: Store
) -> None:
    def tasks(data: dict[str, Any]) -> None:
        data["benchmark"]["tasks"] = ["copa", "wikitext2"]

    assert "transfer_set" not in changed_by(recipe_data, store, tasks)
    data = copy.deepcopy(recipe_data)
    data["transfer_set"]["clean"] = {}
    step = steps_of(data, store)["transfer_set"]
    assert any("mirror" in role for role in step.inputs)
    assert "transfer_set" in changed_by(data, store, tasks)
    data["transfer_set"]["clean"] = {"benchmarks": False}
    assert "transfer_set" not in changed_by(data, store, tasks)


def test_renaming_a_stage_repeats_nothing(recipe_data: dict[str, Any], store: Store) -> None:
    other = copy.deepcopy(recipe_data)
    other["stages"][0]["name"] = "cut"
    assert steps_of(other, store)["cut"].key == steps_of(recipe_data, store)["prune"].key


def test_what_changes_no_result_repeats_nothing(recipe_data: dict[str, Any], store: Store) -> None:
    """Someone whose machine was too small, or whose disk too slow, goes on where they were."""

    def careful(data: dict[str, Any]) -> None:
        prune, distill = data["stages"][:2]
        prune |= {"save_every_seconds": 5, "stream_memory_gb": 0}
        distill |= {"save_every_seconds": 5}

    assert not changed_by(recipe_data, store, careful)


def test_the_users_files_are_part_of_the_keys(
    recipe_data: dict[str, Any], store: Store, tmp_path: Path
) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "one"}\n')
    data = copy.deepcopy(recipe_data)
    data["transfer_set"]["sources"][0]["path"] = str(text)
    before = steps_of(data, store)["transfer_set"]
    text.write_text('{"text": "one or two"}\n')
    after = steps_of(data, store)["transfer_set"]
    assert before.key != after.key
    assert differences(after, record(before)) == [
        "the files of transfer_set.sources.grammar.path changed"
    ]


def test_a_folder_of_texts_is_all_that_is_read_of_it(
    recipe_data: dict[str, Any], store: Store, tmp_path: Path
) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"text": "one"}\n')
    data = copy.deepcopy(recipe_data)
    data["transfer_set"]["sources"][0]["path"] = str(folder)

    def digest() -> str:
        steps = steps_of(data, store)
        return steps["transfer_set"].inputs["files of transfer_set.sources.grammar.path"]

    flat = digest()
    assert flat == FileHashes(store.root).fingerprint(folder)  # as it was for earlier runs
    (folder / "notes.csv").write_text("not read")
    assert digest() == flat
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "deep" / "er" / "a.jsonl").write_text('{"text": "two"}\n')
    nested = digest()
    assert nested != flat
    (folder / "deep" / "er" / "a.jsonl").write_text('{"text": "2"}\n')
    assert digest() not in (flat, nested)
    # What of its folder a data set reads, only `datasets` knows.
    data["transfer_set"]["sources"][0]["format"] = "dataset"
    before = digest()
    (folder / "deep" / "more.csv").write_text("text\nthree\n")
    assert digest() != before


def test_the_tokenizer_above_metas_folder_is_part_of_its_key(
    recipe_data: dict[str, Any], store: Store, tmp_path: Path
) -> None:
    folder = tmp_path / "llama-2" / "7b"
    folder.mkdir(parents=True)
    (folder / "params.json").write_text("{}")
    data = copy.deepcopy(recipe_data)
    data["teacher"]["model"] = str(folder)

    def key() -> str:
        return steps_of(data, store)["teacher"].key

    def keys() -> tuple[str, str]:
        """With one tokenizer.model above the folder, and with another one."""
        found = []
        for content in ("one", "two"):
            (folder.parent / "tokenizer.model").write_text(content)
            found.append(key())
        return found[0], found[1]

    one, two = keys()
    assert one == two  # not Meta's, so what lies above it is none of its business
    (folder / "consolidated.00.pth").write_text("weights")
    bare = key()
    one, two = keys()
    assert one != two
    (folder / "tokenizer.model").write_text("own")
    one, two = keys()
    assert one == two != bare


def test_decisions_and_their_reasons(recipe_data: dict[str, Any], store: Store) -> None:
    distill = steps_of(recipe_data, store)["distill"]
    assert str(decide(distill, store, None)) == "runs: first time"
    finish(distill, store)
    assert str(decide(distill, store, record(distill))) == "not run again: nothing changed"
    assert str(decide(distill, store, None)) == "not run again: nothing changed"

    data = copy.deepcopy(recipe_data)
    data["stages"][1]["tokens"] = 2048
    data["seed"] = 1
    longer = steps_of(data, store)["distill"]
    reason = str(decide(longer, store, record(distill)))
    assert reason.startswith("runs: recipe.seed 0 -> 1; recipe.distill.tokens 1024 -> 2048")
    assert "its input prune changed" in reason

    back = decide(distill, store, record(longer))
    assert not back.runs
    assert "recipe.distill.tokens 2048 -> 1024" in back.reason

    work = store.open_work(longer.kind, longer.key, resumable=True)
    (work / "resume" / "best-00000001").mkdir(parents=True)  # nothing to go on from
    assert decide(longer, store, None).reason == "it was not finished"
    (work / "resume" / "step-00000002").mkdir()
    assert decide(longer, store, None).reason == "goes on where it was interrupted"

    (store.artefact("distill", distill.key) / "file").write_text("d")
    assert decide(distill, store, record(distill)).reason == (
        "artefact damaged: file has 1 of 4 bytes"
    )


def test_a_new_version_of_the_code_is_a_reason(
    recipe_data: dict[str, Any], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = record(steps_of(recipe_data, store)["prune"])
    monkeypatch.setattr("pipelines.stages.prune.CODE_VERSION", before["code_version"] + 1)
    after = steps_of(recipe_data, store)["prune"]
    version = before["code_version"]
    assert decide(after, store, before).reason == f"code version {version} -> {version + 1}"


def test_a_lost_artefact_is_a_reason(recipe_data: dict[str, Any], store: Store) -> None:
    prune = steps_of(recipe_data, store)["prune"]
    assert decide(prune, store, record(prune)).reason == "its artefact is gone from the store"


def test_a_mirror_file_that_appears_later_is_measured(
    recipe_data: dict[str, Any], store: Store, tmp_path: Path
) -> None:
    data = copy.deepcopy(recipe_data)
    data["benchmark"]["mirror"] = str(tmp_path / "mirror")
    (tmp_path / "mirror").mkdir()
    before = steps_of(data, store)["teacher/benchmark"]
    (tmp_path / "mirror" / "unrelated.jsonl").write_text("{}")
    assert steps_of(data, store)["teacher/benchmark"].key == before.key
    (tmp_path / "mirror" / "copa.jsonl").write_text("{}")
    assert steps_of(data, store)["teacher/benchmark"].key != before.key


def test_maps_of_the_stream_are_joined_as_the_cuts_followed() -> None:
    stream_E = torch.randn(8)
    dims_D, dims_C = [1, 3, 4, 6], [0, 3]
    map_ED, map_DC = torch.randn(8, 4), torch.randn(4, 2)
    for first, narrow in ((dims_D, stream_E[dims_D]), (map_ED, stream_E @ map_ED)):
        for second, narrower in ((dims_C, narrow[dims_C]), (map_DC, narrow @ map_DC)):
            joined = joined_map(8, first, second)
            if joined is None:
                assert (first, second) == (dims_D, dims_C)
            else:
                torch.testing.assert_close(stream_E @ joined, narrower)


def test_cuts_one_after_another_are_joined() -> None:
    first = {
        "layers": [0, 2, 3],
        "hidden": [1, 3, 5, 7],
        "turned": [2],
        "heads": [[0, 2], [1, 3], [0, 1]],
        "key_value_heads": [[0], [1], [0]],
        "neurons": [[4, 5, 6], [1, 2, 3], [7, 8, 9]],
    }
    second = {
        "layers": [0, 2],
        "hidden": [0, 3],
        "turned": [],
        "heads": [[1], [0]],
        "key_value_heads": [[0], [0]],
        "neurons": [[0, 2], [1]],
    }
    assert joined_selection(first, second) == {
        "schema": 1,
        "layers": [0, 3],
        "hidden": [1, 7],
        "turned": [1],
        "heads": [[2], [0]],
        "key_value_heads": [[0], [0]],
        "neurons": [[4, 6], [8]],
    }


def test_a_preset_is_a_proportion_of_the_teacher_after_any_cut() -> None:
    teacher = Shape(
        hidden_size=64,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=112,
        vocab_size=100,
        tie_word_embeddings=True,
    )
    middle = student_shape("like-3b", teacher=teacher, newest=teacher)
    assert student_shape("like-3b", teacher=teacher, newest=middle) == middle
    cut = student_shape({"num_hidden_layers": 2}, teacher=teacher, newest=middle)
    assert (cut.num_hidden_layers, cut.hidden_size) == (2, middle.hidden_size)


def test_moving_files_repeats_nothing(
    recipe_data: dict[str, Any], store: Store, tmp_path: Path
) -> None:
    """Their hashes are in the keys, where they lie is not; but a reader goes by the ending."""
    moved = copy.deepcopy(recipe_data)
    model, text = moved["teacher"]["model"], moved["transfer_set"]["sources"][0]["path"]
    moved["teacher"]["model"] = str(shutil.copytree(model, tmp_path / "elsewhere" / "llama"))
    there = shutil.copy(text, tmp_path / "elsewhere" / "other name.jsonl")
    moved["transfer_set"]["sources"][0]["path"] = str(there)
    before, after = steps_of(recipe_data, store), steps_of(moved, store)
    assert {name: step.key for name, step in before.items()} == {
        name: step.key for name, step in after.items()
    }
    assert str(tmp_path) not in json.dumps([dict(step.slice) for step in after.values()])
    renamed = shutil.copy(text, tmp_path / "elsewhere" / "as.txt")
    moved["transfer_set"]["sources"][0]["path"] = str(renamed)
    assert steps_of(moved, store)["transfer_set"].key != before["transfer_set"].key


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """Something that accepts connections where the hub should be."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        yield server


def test_a_task_that_missed_the_hub_is_measured_when_it_answers(
    recipe_data: dict[str, Any],
    store: Store,
    hub: socket.socket,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    step = steps_of(recipe_data, store)["teacher/benchmark"]
    reasons = {
        "piqa": f"its data are on the Hugging Face hub, {NO_ANSWER}; {FROM_CACHE}",
        "copa": f"its data are on the Hugging Face hub, {NO_ANSWER}",  # as earlier versions said
        "hellaswag": f"its data are on the Hugging Face hub, {FAILED_NOW}: HTTPError: 429",
        "boolq": "its data are on the Hugging Face hub, and loading them failed: no such thing",
    }
    (store.open_work(step.kind, step.key, resumable=False) / "file").write_text("done")
    store.publish(step.kind, step.key, record(step) | {"summary": {"skipped": reasons}})
    found = decide(step, store, record(step))
    assert (found.runs, found.reason) == (True, "can be measured now: piqa, copa, hellaswag")
    hub.close()
    assert not decide(step, store, record(step)).runs
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert not decide(step, store, record(step)).runs


def test_an_export_knows_what_was_kept(recipe_data: dict[str, Any], store: Store) -> None:
    data = copy.deepcopy(recipe_data)
    data["stages"].append({"name": "small", "kind": "export", "to": "gguf"})
    steps = steps_of(data, store)
    assert history(steps["small"], steps, store) == (["prune", "distill"], [])
    distill = steps["distill"]
    store.open_work(distill.kind, distill.key, resumable=False)
    store.publish(distill.kind, distill.key, record(distill) | {"summary": {"kept_step": 0}})
    assert history(steps["small"], steps, store) == (["prune"], ["distill"])


def test_an_export_tells_what_was_measured_since(
    recipe_data: dict[str, Any], store: Store, hub: socket.socket
) -> None:
    """Tasks that missed the hub are no change of settings, but the card should have them."""
    data = copy.deepcopy(recipe_data)
    data["stages"].append({"name": "small", "kind": "export", "to": "gguf"})
    steps = steps_of(data, store)

    def publish(name: str, started: str, **summary: Any) -> None:
        step = steps[name]
        (store.open_work(step.kind, step.key, resumable=False) / "file").write_text("done")
        made = record(step) | {"started": started, "summary": summary}
        store.publish(step.kind, step.key, made)

    def decision() -> Decision:
        decided = decide_all(list(steps.values()), store, record)
        return next(each for step, each in decided if step.name == "small")

    publish("teacher/benchmark", "2026-01-01T10:00:00+00:00")
    publish("distill/benchmark", "2026-01-01T11:00:00+00:00", skipped={"piqa": FAILED_NOW})
    publish("small", "2026-01-01T12:00:00+00:00")
    assert decision() == Decision(True, "measured anew: distill/benchmark")
    hub.close()
    assert decision() == Decision(False, "nothing changed")
    publish("distill/benchmark", "2026-01-02T11:00:00+00:00")
    assert decision() == Decision(True, "measured anew: distill/benchmark")
    publish("small", "2026-01-02T12:00:00+00:00")
    assert not decision().runs


def with_teachers(data: dict[str, Any]) -> dict[str, Any]:
    data = copy.deepcopy(data)
    first, last = data["stages"]
    data["stages"] = [
        {"name": "corrected", "kind": "correct", "tokens": 512},
        {"name": "big", "kind": "teacher", "model": data["teacher"]["model"]},
        first,
        {**last, "teachers": {"teacher": 0.5, "big": 0.5}},
    ]
    return data


def test_a_corrected_teacher_is_cut_and_teaches_with_another(
    recipe_data: dict[str, Any], store: Store
) -> None:
    steps = steps_of(with_teachers(recipe_data), store)
    assert steps["corrected"].needs["teacher"] == "teacher"
    assert steps["prune"].needs["model"] == steps["prune"].needs["teacher"] == "corrected"
    assert dict(steps["distill"].needs) == {
        "teacher": "corrected",
        "model": "prune",
        "transfer_set": "transfer_set",
        "teacher big": "big",
    }
    assert "big/benchmark" in steps
