"""The stage that builds the transfer set, cleared of the recipe's own benchmarks."""

from __future__ import annotations

import json
from pathlib import Path

from pipelines.stages import transfer_set
from pipelines.stages.context import Context
from pipelines.tiny import tiny_documents
from reports.settings import BenchmarkSettings
from shearling import read_json, silent
from teachers.settings import CleanSettings, SourceSettings, TransferSetSettings

PREMISE = "The old shepherd counted his sheep again and found that one of them was gone."


def test_the_text_is_cleared_of_the_recipes_benchmarks(tiny_llama: Path, tmp_path: Path) -> None:
    """copa through the mirror; a task whose data can't be had is told, not forgotten."""
    row = {"premise": PREMISE, "choice1": "He left.", "choice2": "He sat.", "question": "effect"}
    (tmp_path / "mirror").mkdir()
    (tmp_path / "mirror" / "copa.jsonl").write_text(json.dumps({**row, "idx": 0, "label": 0}))
    texts = tiny_documents(80, seed=4)
    texts[3] = f"{texts[3]} {PREMISE.lower()} {texts[4]}"
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "model").symlink_to(tiny_llama)
    (tmp_path / "out").mkdir()
    context = Context(
        name="transfer_set",
        inputs={"teacher": tmp_path / "teacher"},
        out=tmp_path / "out",
        run=tmp_path,
        seed=0,
        benchmark=BenchmarkSettings(
            tasks=("copa", "sciq"), mirror=str(tmp_path / "mirror"), speed=False
        ),
        device="cpu",
        cache=tmp_path / "cache",
        progress=silent,
        on_metrics=print,
    )
    settings = TransferSetSettings(
        sources=(SourceSettings(name="text", path=str(path)),),
        window=32,
        heldout_windows=2,
        clean=CleanSettings(),
    )
    facts = transfer_set.run(settings, context)
    assert facts == read_json(tmp_path / "out" / "transfer_set.json")
    cleaning = facts["cleaning"]
    assert cleaning["benchmarks"] == {"copa": 1}
    assert list(cleaning["benchmarks_not_read"]) == ["sciq"]
    assert cleaning["documents_after"] == 79
    (removed,) = (one for one in cleaning["filters"] if one["documents_removed"])
    assert removed["name"] == "benchmarks"
    assert removed["samples"][0]["text"].startswith(texts[3][:40])
