"""Shapes under a budget of parameters: a short list of different ones, to be tried and scored.

A budget says how large a student may be and not where the cut falls. Minitron lists the feasible
shapes within some percent of it and lets a cheap measure rank them (Muralidharan et al., 2024,
arXiv:2407.14679, section 3); so does this, with the list kept short. Nothing here loads torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, replace
from operator import attrgetter
from typing import Any

from shearling import ShearlingError
from students.settings import read_count
from students.shape import WIDTH_STEP, Shape, resolve_shape, round_hidden

SPENT = 0.97
"""A candidate uses at least this much of the budget, or as near to it as any shape comes."""
LEAST_LAST = 0.25
"""Of the parent's size, the least that the last axis may be cut to."""
LAST_AXES = ("intermediate_size", "hidden_size", "num_hidden_layers")
"""The first of these that the recipe leaves open is chosen last, so that the budget is spent."""
DEPTHS = tuple(tenths / 10 for tenths in range(10, 1, -1))
WIDTHS = tuple(eighths / 8 for eighths in range(8, 0, -1))
FLOORS = (0.7, 0.5, 0.25, 0.0)
"""Depth and width are cut no deeper than the first of these that leaves enough candidates."""

_SHARE = re.compile(r"(\d*\.?\d+) ?(%?)")


def read_budget(given: object) -> int | float:
    """A number of parameters (``60M``, ``1.2B``, ``63_848_304``), or a fraction (``0.5``, ``50%``).

    Raises:
        ValueError: it is neither.
    """
    written = "" if isinstance(given, bool) else str(given).strip()
    if share := _SHARE.fullmatch(written):
        fraction = float(share[1]) / (100 if share[2] else 1)
        if 0 < fraction < 1:
            return fraction
    count = read_count(written)
    if count:
        return count
    raise ValueError(
        f"{given!r} is no budget; write a number of parameters (60M, 1.2B, 63_848_304) or a "
        "fraction of the model's, below 1 (0.5, 50%)"
    )


def candidate_shapes(spec: Mapping[str, Any], parent: Shape) -> list[Shape]:
    """At most ``candidates`` shapes of at most ``params`` parameters, the evenest cut first.

    ``spec`` holds those two, and axes that are given. Depth and hidden size vary, heads go with
    the hidden size, and the intermediate size is what the budget leaves.

    Raises:
        ShearlingError: no shape of this budget can be cut out of ``parent``.
    """
    params, count = spec["params"], spec["candidates"]
    budget = round(params * parent.parameters) if isinstance(params, float) else params
    axes = {axis.name for axis in fields(Shape)}
    given = {name: value for name, value in spec.items() if name in axes}
    largest = resolve_shape(given, parent)
    if largest.parameters <= budget:
        beside = f" with {_listed(given)}" if given else ""
        raise ShearlingError(
            f"The budget of {budget:,} parameters leaves nothing to search: the model to cut has "
            f"{largest.parameters:,}{beside}.",
            hint="Lower `params` in the shape of the recipe's prune stage"
            + (", or give fewer axes beside it." if given else "."),
        )
    last = next((axis for axis in LAST_AXES if axis not in given), None)
    if last is None:
        raise ShearlingError(
            f"The shape gives {_listed(given)} beside `params`, so nothing is left to search.",
            hint="Take `params` out of the shape, or one of these axes.",
        )
    found: list[Shape] = []
    for floor in FLOORS:
        grid = set(_grid(largest, given, floor))
        found = _within(budget, (_filled(shape, last, budget, parent) for shape in grid), parent)
        if len(found) >= count:
            break
    if not found:
        least = min(_smallest(largest, given, last, parent))
        raise ShearlingError(
            f"The budget of {budget:,} parameters is too small: the smallest shape that is tried "
            f"has {least:,}.",
            hint="Raise `params` in the shape of the recipe's prune stage, or cut in two prune "
            "stages.",
        )
    return _spread(found, parent, count)


def _listed(given: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in given.items())


def _grid(largest: Shape, given: Mapping[str, Any], floor: float) -> Iterator[Shape]:
    """Every depth and width from ``floor`` up; axes that are given stay as they are."""
    for depth in DEPTHS:
        for width in WIDTHS:
            if min(depth, width) >= floor:
                scaled = _at_width(largest, given, width)
                layers = max(1, round(largest.num_hidden_layers * depth))
                axes = {"num_hidden_layers": layers, **given}
                yield replace(scaled, **axes)


def _at_width(shape: Shape, given: Mapping[str, Any], width: float) -> Shape:
    """Hidden size and heads at a share; query heads go inside their groups, where there are any."""
    heads, key_value_heads = shape.num_attention_heads, shape.num_key_value_heads
    if not {"num_attention_heads", "num_key_value_heads"} & given.keys():
        if shape.group_size > 1:
            heads = key_value_heads * max(1, round(shape.group_size * width))
        else:
            heads = key_value_heads = max(1, round(heads * width))
    return replace(
        shape,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        hidden_size=round_hidden(shape.hidden_size * width, heads, shape.hidden_size),
    )


def _sized(shape: Shape, axis: str, size: int) -> Shape:
    changed: dict[str, Any] = {axis: size}
    return replace(shape, **changed)


def _steps(shape: Shape, axis: str) -> tuple[int, int]:
    """The step that kernels like on an axis, and the finest that a Llama allows."""
    heads = shape.num_attention_heads
    return {
        "intermediate_size": (WIDTH_STEP, 1),
        "hidden_size": (math.lcm(WIDTH_STEP, heads), heads),
        "num_hidden_layers": (1, 1),
    }[axis]


def _least(parent: Shape, axis: str, step: int) -> int:
    size: int = getattr(parent, axis)
    return math.ceil(LEAST_LAST * size / step) * step


def _filled(shape: Shape, axis: str, budget: int, parent: Shape) -> Shape:
    """The largest ``axis`` within the budget: parameters grow linearly on every axis.

    In the steps that kernels like, unless these leave too much of a small model's budget unspent.
    A shape that has no room for the least of the axis comes out larger than the budget.
    """
    first = _sized(shape, axis, 0).parameters
    each = _sized(shape, axis, 1).parameters - first
    for step in _steps(shape, axis):
        room = min((budget - first) // each, getattr(parent, axis)) // step * step
        least = _least(parent, axis, step)
        shape = _sized(shape, axis, max(room, least))
        if room >= least and shape.parameters >= SPENT * budget:
            break
    return shape


def _within(budget: int, shapes: Iterable[Shape], parent: Shape) -> list[Shape]:
    """Those that can be cut out of ``parent`` and spend the budget as well as any, in one order."""
    possible = {
        shape
        for shape in shapes
        if shape.parameters <= budget and not shape.problems_as_student_of(parent)
    }
    fullest = max((shape.parameters for shape in possible), default=0)
    enough = SPENT * (budget if fullest >= SPENT * budget else fullest)
    full = [shape for shape in possible if shape.parameters >= enough]
    order = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
    return sorted(full, key=attrgetter(*order), reverse=True)


def _smallest(largest: Shape, given: Mapping[str, Any], last: str, parent: Shape) -> Iterator[int]:
    """Parameters of every depth and width when the last axis is cut to its least."""
    for shape in _grid(largest, given, FLOORS[-1]):
        _, finest = _steps(shape, last)
        smallest = _sized(shape, last, _least(parent, last, finest))
        if not smallest.problems_as_student_of(parent):
            yield smallest.parameters


def _spread(shapes: list[Shape], parent: Shape, count: int) -> list[Shape]:
    """The evenest cut, then one after another the shape that is least like those chosen.

    Source: Kennard and Stone, "Computer aided design of experiments", 1969.
    """

    def place(shape: Shape) -> list[float]:
        return [math.log(getattr(shape, axis) / getattr(parent, axis)) for axis in LAST_AXES]

    chosen = [max(shapes, key=lambda shape: min(place(shape)))]
    while len(chosen) < min(count, len(shapes)):
        rest = [shape for shape in shapes if shape not in chosen]
        chosen.append(
            max(rest, key=lambda s: min(math.dist(place(s), place(other)) for other in chosen))
        )
    return chosen
