"""All keys of a recipe, from the models that read it: what each takes, and its default."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pipelines.recipe import KINDS, Recipe
from shearling import ShearlingError

_WORDS: dict[Any, str] = {
    bool: "true, false", int: "whole number", float: "number", str: "text", type(None): "null",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Key:
    """One key: its name, what it takes, its default (empty where it must be given), and why."""

    name: str
    takes: str
    default: str
    description: str


@dataclass(frozen=True, kw_only=True)
class Section:
    """The keys that stand beside each other; ``path`` says where in a recipe."""

    path: str
    about: str
    keys: tuple[Key, ...]


def sections(only: str | None = None) -> list[Section]:
    """Every place of a recipe that has keys, outer ones first; stages are ``stages.KIND``.

    ``only``: a path or a kind of stage, with what is inside of it.

    Raises:
        ShearlingError: there is no such place.
    """
    found = list(_walk("recipe", Recipe, set()))
    for kind, stage in KINDS.items():
        found += _walk(f"stages.{kind}", stage, set())
    if only is None:
        return found
    places = {only, f"stages.{only}"}
    chosen = [
        one for one in found if any(f"{one.path}.".startswith(f"{place}.") for place in places)
    ]
    if not chosen:
        paths = ", ".join(dict.fromkeys(one.path for one in found))
        raise ShearlingError(f"A recipe has no keys at {only!r}.", hint=f"Places: {paths}.")
    return chosen


def _walk(path: str, model: type[BaseModel], seen: set[type[BaseModel]]) -> Iterator[Section]:
    """A model's section, then those of the models in it, each once."""
    seen.add(model)
    inside: list[tuple[str, type[BaseModel]]] = []
    keys = []
    # What says which stage it is comes first; among the fields it is behind the inherited ones.
    fields = sorted(model.model_fields.items(), key=lambda field: field[0] not in ("kind", "name"))
    for name, field in fields:
        nested = list(_models(field.annotation))
        if model is Recipe and name == "stages":
            nested = []  # each kind has a section of its own
        inside += [(name, one) for one in nested]
        keys.append(
            Key(
                name=name,
                takes=_takes(field.annotation),
                default=_default(field),
                description=field.description or "",
            )
        )
    about = " ".join((model.__doc__ or "").split())
    yield Section(path=path, about=about, keys=tuple(keys))
    for name, one in inside:
        if one not in seen:
            outer = "" if model is Recipe else f"{path}."
            yield from _walk(f"{outer}{name}", one, seen)


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models in an annotation, whatever they are wrapped in."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation) if get_origin(annotation) is not Literal else ():
        yield from _models(part)


def _takes(annotation: Any) -> str:
    """What a value may be, in words."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(str(part) for part in parts)
    if origin is Annotated:
        return _takes(parts[0])
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "keys of its own"
    if origin in (list, tuple):
        return f"list ({_takes(parts[0])})"
    if origin is dict:
        return f"names with values ({_takes(parts[1])})"
    if parts:
        return " or ".join(dict.fromkeys(_takes(part) for part in parts))
    return _WORDS.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _default(field: FieldInfo) -> str:
    """As a recipe would say it, in one line."""
    if field.is_required():
        return ""
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return "its own defaults"
    if isinstance(value, tuple):
        value = list(value)
    said = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    return said.removesuffix("...\n").strip()


def as_markdown(found: Sequence[Section]) -> str:
    """As docs/RECIPES.md has them."""
    lines: list[str] = []
    for section in found:
        lines += [f"### {section.path}", "", section.about, ""]
        lines += ["| key | takes | default | |", "|---|---|---|---|"]
        for key in section.keys:
            default = f"`{key.default}`" if key.default else "must be given"
            row = (f"`{key.name}`", key.takes, default, key.description)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"
