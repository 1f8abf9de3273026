"""Stage prune: cut the newest model to the shape that the recipe asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pipelines.stages.context import Context
from shearling import read_json, write_json
from students.search import candidate_shapes
from students.shape import Shape, resolve_shape

if TYPE_CHECKING:
    from torch import Tensor

    from pipelines.recipe import PruneStage

CODE_VERSION = 14
RESUMABLE = True
TEACHER_SELECTION = "teacher_selection.json"
"""What a student kept of the *teacher*; ``selection.json`` is about the model that was cut."""


def run(settings: PruneStage, context: Context) -> dict[str, Any]:
    """Write ``out/model`` and ``out/selection.json``; goes on from ``out/resume`` where it is.

    Where the shape is a budget, ``out/search.json`` comes first: the shapes tried, with scores.
    """
    from compress.prune import prune
    from compress.search import search
    from compress.selection import read_map, write_map

    newest = context.inputs["model"]
    teacher = Shape.from_config(read_json(context.inputs["teacher"] / "model" / "config.json"))
    shapes = possible_shapes(
        settings.shape_spec(),
        teacher=teacher,
        newest=Shape.from_config(read_json(newest / "model" / "config.json")),
    )
    scores = None
    if settings.budget:
        scores = search(
            newest / "model",
            context.out,
            shapes,
            context.inputs["transfer_set"],
            settings,
            tokens=settings.budget.tokens,
            seed=context.seed,
            device=context.device,
            progress=context.progress,
        )
    summary = prune(
        newest / "model",
        context.out,
        Shape(**scores[0]["shape"]) if scores else shapes[0],
        context.inputs["transfer_set"],
        settings,
        seed=context.seed,
        device=context.device,
        progress=context.progress,
    )
    cut, before = context.out / "selection.json", newest / TEACHER_SELECTION
    selection, map_ED = read_json(cut), read_map(cut)
    if before.is_file():
        first, first_map = read_json(before), read_map(before)
        map_ED = joined_map(
            teacher.hidden_size,
            first["hidden"] if first_map is None else first_map,
            selection["hidden"] if map_ED is None else map_ED,
        )
        selection = joined_selection(first, selection)
    write_json(context.out / TEACHER_SELECTION, selection)
    write_map(context.out / TEACHER_SELECTION, map_ED)
    return summary | ({"search": scores} if scores else {})


def possible_shapes(spec: str | Mapping[str, Any], *, teacher: Shape, newest: Shape) -> list[Shape]:
    """The shapes among which a search chooses where ``spec`` is a budget, else the one it tells."""
    if isinstance(spec, Mapping) and "params" in spec:
        return candidate_shapes(spec, newest)
    return [_told_shape(spec, teacher=teacher, newest=newest)]


def student_shape(spec: str | Mapping[str, Any], *, teacher: Shape, newest: Shape) -> Shape:
    """The shape to cut ``newest`` to; of a budget the first candidate, until the search is done."""
    return possible_shapes(spec, teacher=teacher, newest=newest)[0]


def _told_shape(spec: str | Mapping[str, Any], *, teacher: Shape, newest: Shape) -> Shape:
    """The shape to cut ``newest`` to, from a name or axes.

    A preset is a proportion of the teacher, however many cuts came before; axes that are given by
    number leave all others as the newest model has them.
    """
    if isinstance(spec, str):
        return resolve_shape(resolve_shape(spec, teacher).to_dict(), newest)
    return resolve_shape(spec, newest)


def joined_map(
    teacher_size: int, first: Tensor | Sequence[int], second: Tensor | Sequence[int]
) -> Tensor | None:
    """The map of the stream through two cuts, [teacher_size, C]; None where both picked dims.

    Each cut is given by its own map, [E, D] and [D, C], or by the dims that it picked.
    """
    import torch

    if isinstance(first, torch.Tensor):
        return first @ second if isinstance(second, torch.Tensor) else first[:, list(second)]
    if not isinstance(second, torch.Tensor):
        return None
    whole_EC = second.new_zeros(teacher_size, second.shape[1])
    whole_EC[list(first)] = second
    return whole_EC


def joined_selection(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """One selection for two cuts: ``second`` counts in the model that ``first`` made.

    ``layers`` and ``hidden`` are lists of indices; ``heads``, ``key_value_heads`` and ``neurons``
    have such a list for each layer of the student. ``turned`` are layers of the student.
    """
    layers: Sequence[int] = second["layers"]
    joined: dict[str, Any] = {
        "schema": 1,
        "layers": [first["layers"][layer] for layer in layers],
        "hidden": [first["hidden"][index] for index in second["hidden"]],
        "turned": [
            number
            for number, layer in enumerate(layers)
            if number in second["turned"] or layer in first["turned"]
        ],
    }
    for axis in ("heads", "key_value_heads", "neurons"):
        joined[axis] = [
            [first[axis][layer][index] for index in kept]
            for layer, kept in zip(layers, second[axis], strict=True)
        ]
    return joined
