from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.machine import pick_device
from pipelines.preflight import check_parents, known_teacher_shape
from pipelines.recipe import check_recipe
from pipelines.stages import transfer_set
from pipelines.stages.context import Context
from reports.settings import BenchmarkSettings
from shearling import ShearlingError, silent
from teachers.settings import SourceSettings, TransferSetSettings


def test_a_teacher_that_must_be_converted_is_not_refused_before(
    recipe_data: dict[str, Any], tmp_path: Path
) -> None:
    for name in ("params.json", "consolidated.00.pth"):
        (tmp_path / name).write_text("{}")
    recipe = check_recipe({**recipe_data, "teacher": {"model": str(tmp_path)}})
    assert known_teacher_shape(recipe, tmp_path / "store") is None


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


def test_a_path_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    check_parents(tmp_path / "new" / "folder")
    with pytest.raises(ShearlingError, match="is a file"):
        check_parents(tmp_path / "file" / "new" / "folder")


def test_a_device_that_is_not_there() -> None:
    assert pick_device("cpu") == "cpu"
    with pytest.raises(ShearlingError, match=r"finds .*cpu"):
        pick_device("cuda:77")
