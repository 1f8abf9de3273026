"""What a scorecard says of lm-eval's groups of tasks: the same facts as of a task.

So a group is compared, charted and counted as the one task that it is taken for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from reports.compare import pack, unpack
from shearling import sha256_of_json


def add_groups(
    card: dict[str, Any], children: Mapping[str, Sequence[str]], versions: Mapping[str, Any]
) -> None:
    """Add facts and samples of the groups that have results, and name each to its members.

    ``children``: group -> its tasks and groups, the outermost groups first. A group without a
    number of its own only lists tasks: those count for themselves.
    """
    counted = {group: dict.fromkeys(_below(group, children)) for group in children
               if group in card["results"]}  # fmt: skip
    for group, below in counted.items():
        tasks = [name for name in below if name not in children]
        card["tasks"][group] = {"version": versions.get(group), **_facts(card, tasks)}
        joined = {
            metric: _join(number["value"], [card["samples"][task].get(metric) for task in tasks])
            for metric, number in card["results"][group].items()
        }
        card["samples"][group] = {metric: found for metric, found in joined.items() if found}
    for group, below in counted.items():
        for name in below.keys() & card["tasks"].keys():
            card["tasks"][name].setdefault("group", group)


def _below(group: str, children: Mapping[str, Sequence[str]]) -> Iterator[str]:
    for name in children.get(group, ()):
        yield name
        yield from _below(name, children)


def _facts(card: Mapping[str, Any], tasks: Sequence[str]) -> dict[str, Any]:
    """Facts of all tasks together; what is told of one answer only where they agree in it."""
    each = [card["tasks"][task] for task in tasks]
    chances = {facts["chance"] for facts in each}
    return {
        **{fact: each[0][fact] for fact in ("source", "limit", "chat_template", "precision")},
        "hash": sha256_of_json([facts["hash"] for facts in each]),
        "num_fewshot": max(facts["num_fewshot"] for facts in each),
        **{fact: sum(facts[fact] for facts in each) for fact in ("samples", "documents")},
        "higher_is_better": {m: up for f in each for m, up in f["higher_is_better"].items()},
        "chance": chances.pop() if len(chances) == 1 else None,
    }


def _join(value: float | None, members: Sequence[str | list[Any] | None]) -> str | list[Any]:
    """The members' samples in order, such that their mean is the group's ``value``.

    lm-eval weighs members by their documents, or all alike: then a sample of a small one counts
    for more. Nothing where the value is no mean of numbers.
    """
    numbers = [unpack(samples) for samples in members if samples]
    if value is None or any(isinstance(found[0], list) for found in numbers):
        return []
    documents = sum(map(len, numbers))
    alike = [[number * documents / len(found) / len(numbers) for number in found]
             for found in numbers]  # fmt: skip
    for weighted in (numbers, alike):
        joined = [number for found in weighted for number in found]
        if joined and math.isclose(float(np.mean(joined)), value, abs_tol=1e-6):
            return pack(joined)
    return []
