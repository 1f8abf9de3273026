"""Which tasks there are, and how a task's name becomes something that lm-eval can load.

A name is looked for in this order: this project's own tasks (data made here or read out of a PyPI
package), stock tasks of lm-eval whose data lie in the mirror folder, stock tasks whose data are on
the hub. lm-eval's own index of its 12,000 task files takes ten seconds to build, so it is only
built for groups of tasks.
"""

from __future__ import annotations

import difflib
import functools
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from reports.settings import BenchmarkSettings
from shearling import Progress, ShearlingError, sha256_of_file, write_text

HERE = Path(__file__).parent

OWN = {
    "wikitext2": "wikitext",
    "lastword": "lastword",
    "cloze_leads": "cloze_leads",
    "grammar_pairs": "grammar_pairs",
    "instructions": "instructions",
    "rewriting": "rewriting",
    "summaries": "summaries",
}
"""This project's own tasks: name (and name of the YAML file here) -> module with `documents`."""

_MIRRORED = {
    "arc_easy": ("arc/arc_easy.yaml", "arc_easy", "test"),
    "arc_challenge": ("arc/arc_challenge.yaml", "arc_challenge", "test"),
    "piqa": ("piqa/piqa.yaml", "piqa", "validation"),
    "openbookqa": ("openbookqa/openbookqa.yaml", "openbookqa", "test"),
    "boolq": ("super_glue/boolq/default.yaml", "boolq", "validation"),
    "copa": ("super_glue/copa/default.yaml", "copa", "validation"),
    "social_iqa": ("siqa/siqa.yaml", "social_iqa", "validation"),
    "truthfulqa_mc1": ("truthfulqa/truthfulqa_mc1.yaml", "truthfulqa_mc", "validation"),
    "truthfulqa_mc2": ("truthfulqa/truthfulqa_mc2.yaml", "truthfulqa_mc", "validation"),
    "lambada_openai": ("lambada/lambada_openai.yaml", "lambada_openai", "test"),
}
"""Stock tasks whose file name or place isn't the task's own: (YAML, file stem, split)."""

_QUOTE = "[\"']?"
_NAMES = re.compile(
    rf"^{_QUOTE}(?:task|group|tag){_QUOTE}:[ ]*{_QUOTE}([\w.+-]+){_QUOTE}[ ]*$", re.MULTILINE
)
_LISTED_TAGS = re.compile(
    rf"^{_QUOTE}tag{_QUOTE}:[ ]*\n((?:[ ]*-[ ]+[\w.+-]+[ ]*\n)+)", re.MULTILINE
)


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task, ready to be loaded by lm-eval."""

    name: str
    source: str
    """"own", "mirror" or "hub": where its data come from."""
    file: Path | None = None
    """The task's YAML file; None (a group or a tag of tasks) leaves it to lm-eval's index."""
    data_sha256: str | None = None


def _stock_folder() -> Path:
    spec = find_spec("lm_eval.tasks")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


@functools.cache
def stock_files() -> dict[str, Path]:
    """Name of each task, group and tag of the installed lm-eval -> the YAML file that has it.

    Read with regular expressions, without importing lm-eval: a second or two instead of ten.
    """
    names: dict[str, Path] = {}
    for file in sorted(_stock_folder().rglob("*.yaml")):
        text = file.read_text(encoding="utf-8", errors="replace")
        listed = "".join(_LISTED_TAGS.findall(text))
        for name in _NAMES.findall(text) + re.findall(r"-[ ]+([\w.+-]+)", listed):
            names.setdefault(name, file)
    return names


def mirror_file(name: str, mirror: Path) -> Path | None:
    """The mirror's file for a stock task (for BLiMP: blimp/<paradigm>.jsonl), if it is there."""
    stem = _MIRRORED[name][1] if name in _MIRRORED else name
    folder, stem = (mirror / "blimp", stem[6:]) if stem.startswith("blimp_") else (mirror, stem)
    return next(
        (file for ending in ("jsonl", "json") if (file := folder / f"{stem}.{ending}").is_file()),
        None,
    )


def check_tasks(settings: BenchmarkSettings) -> None:
    """Raise one ShearlingError that names every task that doesn't exist. Cheap; opens no data."""
    asked = [*settings.tasks, *settings.limits]
    unknown = [name for name in asked if name not in OWN and name not in _MIRRORED]
    unknown = [name for name in unknown if name not in stock_files()]
    if not unknown:
        not_run = sorted(set(settings.limits) - set(settings.tasks))
        if not_run:
            raise ShearlingError(
                f"benchmark.limits names {', '.join(not_run)}, which benchmark.tasks does not.",
                hint="Add it to benchmark.tasks or remove its limit.",
            )
        return
    known = [*OWN, *_MIRRORED, *stock_files()]
    lines = []
    for name in dict.fromkeys(unknown):
        near = list(dict.fromkeys(difflib.get_close_matches(name, known, n=3, cutoff=0.5)))
        lines.append(f"{name} (near: {', '.join(near)})" if near else name)
    raise ShearlingError(
        f"No such benchmark task: {'; '.join(lines)}.",
        hint=f"Name tasks in benchmark.tasks: {', '.join(OWN)}, or any of lm-eval's.",
    )


def prepare(
    name: str, settings: BenchmarkSettings, work: Path, cache: Path, progress: Progress
) -> Task:
    """Write what lm-eval needs to load the task into ``work`` and say where it is.

    ``work`` is a temporary folder; lm-eval's Arrow files go there as well, so nothing of one run
    (a stale copy of a changed file, say) is met by the next.
    """
    if name in OWN:
        return _prepare_own(name, work, cache, progress)
    file = mirror_file(name, Path(settings.mirror).expanduser()) if settings.mirror else None
    if file is None:
        stock = stock_files().get(name)
        single = stock and re.search(
            rf"^{_QUOTE}task{_QUOTE}:[ ]*{_QUOTE}{re.escape(name)}{_QUOTE}[ ]*$",
            stock.read_text("utf-8"),
            re.MULTILINE,
        )
        return Task(name=name, source="hub", file=stock if single else None)
    return _prepare_mirrored(name, file, work)


def _prepare_own(name: str, work: Path, cache: Path, progress: Progress) -> Task:
    module = import_module(f"reports.tasks.{OWN[name]}")
    documents: Callable[[Path, Progress], Iterable[dict[str, Any]]] = module.documents
    data = work / f"{name}.jsonl"
    lines = (json.dumps(document, ensure_ascii=False) for document in documents(cache, progress))
    write_text(data, "".join(f"{line}\n" for line in lines))
    return _write_task(name, "own", HERE / f"{name}.yaml", {"test": data}, work)


def _prepare_mirrored(name: str, file: Path, work: Path) -> Task:
    stock = stock_files().get(name)
    if name in _MIRRORED:
        stock, split = _stock_folder() / _MIRRORED[name][0], _MIRRORED[name][2]
    elif name.startswith("blimp_"):
        stock, split = _stock_folder() / "blimp" / f"{name[6:]}.yaml", "validation"
    else:
        split = "test"
    if stock is None or not stock.is_file():
        raise ShearlingError(
            f"{file} stands in for the task {name}, which this lm-eval does not have.",
            hint="Remove it from benchmark.tasks.",
        )
    splits = {split: file.resolve()}
    train = file.with_name(f"{file.stem}_train{file.suffix}")
    if train.is_file():
        splits["train"] = train.resolve()
    return _write_task(name, "mirror", stock, splits, work)


def constant_floor(name: str, asked: Iterable[dict[str, Any]]) -> dict[str, float]:
    """What a constant answer scores on an own task that is written, by metric; {} for others."""
    module = import_module(f"reports.tasks.{OWN[name]}") if name in OWN else None
    floor: Callable[..., dict[str, float]] | None = getattr(module, "constant_floor", None)
    return floor(asked) if floor else {}


def _write_task(name: str, source: str, base: Path, splits: dict[str, Path], work: Path) -> Task:
    """A YAML file that includes the base file and points it at local data."""
    config = {
        "include": str(base),
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": {split: str(path) for split, path in splits.items()},
            "cache_dir": str(work / "arrow"),
        },
        "training_split": "train" if "train" in splits else None,
        "validation_split": "validation" if "validation" in splits else None,
        "test_split": "test" if "test" in splits else None,
        # Named, or lm-eval would show what it asks about among the examples of a test split.
        "fewshot_split": next((split for split in ("train", "test") if split in splits), None),
    }
    file = work / f"{name}.yaml"
    write_text(file, yaml.safe_dump(config))
    measured = next(path for split, path in splits.items() if split != "train")
    return Task(name=name, source=source, file=file, data_sha256=sha256_of_file(measured))
