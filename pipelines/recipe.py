"""Recipes: YAML read once, checked whole, and from then on plain immutable data.

Everything that can be wrong with a recipe is collected and told in one ``ShearlingError``. Nothing
here loads torch, so a recipe is refused in a moment.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import (
    BaseModel,
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    Tag,
    ValidationError,
    create_model,
    field_validator,
    model_serializer,
    model_validator,
)

from compress.settings import CorrectSettings, DistillSettings, PruneSettings
from reports.settings import BenchmarkSettings
from shearling import ShearlingError, itemised
from students.search import read_budget
from students.settings import Count, ExportSettings, Settings, in_our_words, read_count
from students.shape import PRESETS, Shape
from teachers.families import training_recipe
from teachers.settings import TeacherSettings, TransferSetSettings, WrittenSettings

RECIPES = Path(__file__).parent / "recipes"
MAX_BYTES = 1 << 20
MAX_NODES = 20_000
"""More values than any recipe needs; a file of nested aliases can claim billions."""
MAX_DEPTH = 20
SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class _Axes(Settings):
    """The base of ``ShapeSettings``: axes that a recipe leaves out stay out when it is written."""

    @model_serializer(mode="wrap")
    def _only_given(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in handler(self).items() if value is not None}


_AXIS_TYPES: dict[str, Any] = {
    "int": Annotated[int, Field(gt=0, strict=True)],
    "bool": Annotated[bool, Field(strict=True)],
}
# The keys are Shape's own fields, so an axis that Shape learns later is known here at once.
ShapeSettings: type[_Axes] = create_model(
    "ShapeSettings",
    __base__=_Axes,
    **{
        axis.name: (_AXIS_TYPES[str(axis.type)] | None, Field(default=None, description=axis.name))
        for axis in dataclasses.fields(Shape)
    },
)  # type: ignore[call-overload]


class BudgetSettings(ShapeSettings):  # type: ignore[misc, valid-type]
    """How large the student may be; its shape is searched. Axes that are given stay as given."""

    params: int | float = Field(
        description="The most parameters that the student may have: 60M, 1.2B, 63_848_304; or a "
        "fraction of those of the model that is cut: 0.5, 50%."
    )
    candidates: int = Field(
        default=6,
        ge=1,
        le=100,
        description="Shapes that are tried, at most; fewer where the budget allows no more.",
    )
    tokens: Count = Field(
        default=8192,
        gt=0,
        description="Tokens of the transfer set with which each of them is pruned, and held-out "
        "tokens on which its KL to the cut model is measured. The best is then pruned with "
        "calibration_tokens.",
    )

    @field_validator("params", mode="before")
    @classmethod
    def _as_number(cls, params: Any) -> int | float:
        return read_budget(params)


def _kind_of_shape(value: Any) -> str:
    if isinstance(value, str):
        return "preset"
    budget = isinstance(value, BudgetSettings) or (isinstance(value, dict) and "params" in value)
    return "budget" if budget else "axes"


ShapeSpec = Annotated[
    Annotated[str, Tag("preset")]
    | Annotated[ShapeSettings, Tag("axes")]  # type: ignore[valid-type]
    | Annotated[BudgetSettings, Tag("budget")],
    Discriminator(_kind_of_shape),
]


class PruneStage(PruneSettings):
    """A stage that cuts the newest model to a smaller shape."""

    kind: Literal["prune"] = Field(description="What the stage does.")
    name: str = Field(description="The stage's name in the run folder and the report.")
    shape: ShapeSpec = Field(
        description=f"The student's shape: {', '.join(PRESETS)}; or the axes that differ from "
        "the teacher's (hidden_size: 432, num_hidden_layers: 24, ...); or a budget from which it "
        "is searched (params: 60M, or a fraction; with it candidates, tokens, and any axes)."
    )

    @field_validator("shape")
    @classmethod
    def _known_preset(cls, shape: Any) -> Any:
        if isinstance(shape, str) and shape not in PRESETS:
            near = _nearest(shape, PRESETS) or f"; shapes with names: {', '.join(PRESETS)}"
            raise ValueError(f"no shape has the name {shape!r}{near}")
        return shape

    @model_validator(mode="after")
    def _depth_is_given(self) -> PruneStage:
        listed = len(self.depth) if isinstance(self.depth, list) else None
        if listed and self.budget and self.budget.num_hidden_layers != listed:
            raise ValueError(
                f"depth lists {listed} layers; give num_hidden_layers: {listed} beside params"
            )
        return self

    @property
    def budget(self) -> BudgetSettings | None:
        """The search, where the shape is not given but searched."""
        return self.shape if isinstance(self.shape, BudgetSettings) else None

    def shape_spec(self) -> str | dict[str, Any]:
        """The shape as ``pipelines.stages.prune.possible_shapes`` takes it."""
        return self.shape if isinstance(self.shape, str) else self.shape.model_dump()


class DistillStage(DistillSettings):
    """A stage that teaches the newest model on the transfer set."""

    kind: Literal["distill"] = Field(description="What the stage does.")
    name: str = Field(description="The stage's name in the run folder and the report.")
    training: str | None = Field(
        default=None,
        description="A published training recipe: llama-1, llama-2, code-llama, llama-3, or a "
        "model's name for its learning rate too (llama-2-7b). It sets optimizer, betas, eps, "
        "weight_decay, clip, warmup, final_learning_rate and embedding_learning_rate, and turns "
        "position_clip off; what the stage gives itself stays.",
    )

    @model_validator(mode="before")
    @classmethod
    def _as_published(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("training"), str):
            return {**published_training(data), **data}
        return data


def published_training(stage: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a distill stage that its ``training`` stands for.

    Raises:
        ValueError: an unknown name, a schedule that is not ours, or a stage that would end before
            the published warm-up does.
    """
    try:
        published, rate = training_recipe(stage["training"])
    except ShearlingError as error:
        raise ValueError(f"training: {error.what.rstrip('.')}") from error
    if published.schedule != "cosine":
        raise ValueError(
            f"training: {published.name}'s schedule ({published.schedule}) can't be followed; "
            "only cosine can"
        )
    told = {
        "optimizer": "adamw",
        "betas": published.betas,
        "eps": published.epsilon,
        "weight_decay": published.weight_decay,
        "clip": published.gradient_clip,
        "position_clip": 0.0,
        "final_learning_rate": published.final_learning_rate_ratio,
        "learning_rate": rate,
        "embedding_learning_rate": 1.0,
    }
    found = {name: value for name, value in told.items() if value is not None}
    if "warmup" not in stage:
        default = DistillSettings.model_fields["batch_tokens"].default
        tokens, batch = (
            read_count(given) or given
            for given in (stage.get("tokens"), stage.get("batch_tokens", default))
        )
        if isinstance(tokens, int) and isinstance(batch, int) and batch > 0:  # else told elsewhere
            steps = max(1, round(tokens / batch))
            if published.warmup_steps > steps // 2:
                raise ValueError(
                    f"training: {published.name} warms up for {published.warmup_steps:,} steps, "
                    f"this stage has {steps:,} in all; set its warmup too, as a share of them"
                )
            found["warmup"] = published.warmup_steps / steps
    return found


class CorrectStage(CorrectSettings):
    """A stage that fits the teacher to the transfer set before it is cut and teaches."""

    kind: Literal["correct"] = Field(description="What the stage does.")
    name: str = Field(description="The stage's name in the run folder and the report.")


class TeacherStage(TeacherSettings):
    """A further teacher, for a distill stage's ``teachers``."""

    kind: Literal["teacher"] = Field(description="What the stage does.")
    name: str = Field(description="The teacher's name in the run folder and in `teachers`.")


class ExportStage(ExportSettings):
    """A stage that writes the newest model for others; the next stage goes on from that model."""

    kind: Literal["export"] = Field(description="What the stage does.")
    name: str = Field(description="The stage's name in the run folder and the report.")


AnyStage = PruneStage | DistillStage | CorrectStage | TeacherStage | ExportStage
KINDS: dict[str, type[Settings]] = {
    get_args(stage.model_fields["kind"].annotation)[0]: stage for stage in get_args(AnyStage)
}
"""Kinds of stages that a recipe may list. A new kind is one class more in ``AnyStage``."""


class Recipe(Settings):
    """One whole recipe."""

    name: str = Field(description="Its name; the run lies in runs/NAME unless --out says else.")
    description: str = Field(default="", description="One sentence for people.")
    seed: int = Field(default=0, ge=0, lt=2**31, description="Seed of all that is random.")
    device: str = Field(
        default="auto",
        pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$",
        description="auto, cpu, cuda or cuda:N; auto takes an accelerator if there is one.",
    )
    teacher: TeacherSettings = Field(description="Which checkpoint teaches.")
    transfer_set: TransferSetSettings = Field(
        default=TransferSetSettings(written=WrittenSettings()),
        description="The text it teaches on; a recipe without it has the teacher write it.",
    )
    benchmark: BenchmarkSettings = Field(
        default=BenchmarkSettings(), description="What is measured on every model."
    )
    stages: tuple[Annotated[AnyStage, Field(discriminator="kind")], ...] = Field(
        min_length=1, description="What is done, in this order."
    )

    def to_yaml(self) -> str:
        """The recipe with every default written out, and whole the paths of what is here."""
        data = self.model_dump(mode="json")
        resolve_paths(data, Path())  # so `resume` finds them from everywhere
        return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)


RESERVED_NAMES = frozenset({*Recipe.model_fields, "store"})
"""Names no stage may have: `--set NAME.key=value` and stages/NAME must mean one thing."""


# --- finding and reading ------------------------------------------------------------------------


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the project, by name."""
    return {path.stem: path for path in sorted(RECIPES.glob("*.yaml"))}


def load_recipe(reference: str, overrides: Sequence[str] = ()) -> Recipe:
    """Load a recipe from a path or by a shipped name, with ``--set`` overrides applied.

    Raises:
        ShearlingError: one error with every mistake of file and overrides.
    """
    path = find_recipe(reference)
    data = read_recipe(path)
    resolve_paths(data, path.parent)
    data.setdefault("name", path.stem)
    mistakes = [m for m in (apply_override(data, text) for text in overrides) if m]
    mistakes += unusable_paths(data)
    return check_recipe(data, where=reference, mistakes=mistakes)


def find_recipe(reference: str) -> Path:
    path = Path(reference).expanduser()
    shipped = shipped_recipes()
    if path.is_file():
        return path
    if reference in shipped:
        return shipped[reference]
    if path.is_dir():
        raise ShearlingError(f"{reference} is a folder.", hint="Name the recipe's .yaml file.")
    raise ShearlingError(
        f"There is no recipe {reference}: no such file, and no shipped recipe of that name"
        f"{_nearest(reference, shipped)}",
        hint=f"Shipped recipes: {', '.join(shipped)}. `shearling init` writes a new one.",
    )


class _Loader(yaml.SafeLoader):
    """A SafeLoader that refuses a key given twice, where YAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} is given twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_recipe(path: Path) -> dict[str, Any]:
    """Read one YAML mapping from a file of untrusted content."""
    hint = "A recipe is a YAML file of a few lines; `shearling init` writes one."
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ShearlingError(f"{path} can't be read: {error.strerror}.", hint=hint) from error
    if len(raw) > MAX_BYTES:
        raise ShearlingError(f"{path} is larger than {MAX_BYTES:,} bytes.", hint=hint)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ShearlingError(
            f"{path} is not UTF-8 text: byte {error.start} is {raw[error.start]:#04x}.",
            hint="Save the recipe as UTF-8.",
        ) from error
    try:
        data = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ShearlingError(
            f"{path} is not valid YAML: {_first_line(error)}", hint=hint
        ) from error
    if not isinstance(data, dict):
        raise ShearlingError(f"{path} holds {_kind_of(data)}, not a mapping of keys.", hint=hint)
    if _too_big(data):
        raise ShearlingError(f"{path} holds more values than a recipe can need.", hint=hint)
    return data


def _first_line(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _kind_of(data: Any) -> str:
    names = {list: "a list", str: "a text", type(None): "nothing"}
    return names.get(type(data), f"a {type(data).__name__}")


def _too_big(data: Any) -> bool:
    """Whether the tree of ``data`` is deeper or larger than a recipe's; stops early."""
    nodes = 0
    todo = [(data, 0)]
    while todo:
        value, depth = todo.pop()
        nodes += 1
        if nodes > MAX_NODES or depth > MAX_DEPTH:
            return True
        if isinstance(value, Mapping):
            todo += [(v, depth + 1) for v in value.values()]
        elif isinstance(value, (list, tuple)):
            todo += [(v, depth + 1) for v in value]
    return False


# --- paths --------------------------------------------------------------------------------------


def resolve_paths(data: dict[str, Any], folder: Path) -> None:
    """Make paths that exist in ``folder`` absolute; a linked file keeps its own name.

    Works in place on unchecked data, so it touches only what has the expected form.
    """
    for _, owner, key in _path_slots(data):
        value = owner[key]
        if value and not Path(value).is_absolute():
            inside = folder / value
            if _unusable(inside) is None and inside.exists():
                owner[key] = str(inside.parent.resolve() / inside.name)


def unusable_paths(data: dict[str, Any]) -> list[str]:
    """A line for each path that the system can't even look for."""
    found = (
        (label, owner[key], _unusable(Path(owner[key]))) for label, owner, key in _path_slots(data)
    )
    return [f"{label}: {value[:60]!r} can't be used: {why}" for label, value, why in found if why]


def _unusable(path: Path) -> str | None:
    """Why the system doesn't say whether something is there; None where it does."""
    try:
        path.expanduser().exists()
    except OSError as error:
        return error.strerror or str(error)
    except RuntimeError as error:  # a home folder of nobody
        return str(error).rstrip(".")
    return None


def _path_slots(data: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], str]]:
    """The places in a recipe that may hold a local path and hold a text: their label, the mapping
    and its key."""
    transfer_set = data.get("transfer_set")
    sources = transfer_set.get("sources") if isinstance(transfer_set, dict) else None
    owners = [("teacher", data.get("teacher"), "model")]
    owners += [("benchmark", data.get("benchmark"), "mirror")]
    for where, items, key in (
        ("transfer_set.sources", sources, "path"),
        ("stages", data.get("stages"), "model"),
    ):
        items = items if isinstance(items, list) else []
        owners += [(f"{where}.{number}", item, key) for number, item in enumerate(items)]
    for label, owner, key in owners:
        if isinstance(owner, dict) and isinstance(owner.get(key), str):
            yield f"{label}.{key}", owner, key


# --- overrides ----------------------------------------------------------------------------------


def apply_override(data: dict[str, Any], text: str) -> str | None:
    """Apply one ``a.b=c`` to raw recipe data in place; return what is wrong with it, if anything.

    The first part is a top-level key or the name of a stage; further parts are keys, numbers of
    list items, or the ``name`` of one. The value is read as YAML.
    """
    path, equals, value_text = text.partition("=")
    parts = path.strip().split(".")
    if not equals or not all(parts):
        return f"--set {text}: write it as KEY.KEY=VALUE, as in distill.tokens=100000"
    try:
        value = yaml.load(value_text, _Loader)
    except (yaml.YAMLError, ValueError) as error:
        return f"--set {text}: the value is not valid YAML: {_first_line(error)}"
    if _too_big(value):
        return f"--set {path}: the value is too large"
    place = _first_place(data, parts[0])
    if place is None:
        known = [*Recipe.model_fields, *_stage_names(data)]
        return (
            f"--set {path}: {parts[0]!r} is neither a top-level key nor a stage"
            f"{_nearest(parts[0], known)}"
        )
    if len(parts) == 1 and place is not data:
        return f"--set {path}: names a whole stage; name a key of it, as in {path}.KEY=VALUE"
    return _assign(place, parts, value, label=path)


def _stage_names(data: Mapping[str, Any]) -> list[str]:
    stages = data.get("stages")
    stages = stages if isinstance(stages, list) else []
    return [s["name"] for s in stages if isinstance(s, dict) and isinstance(s.get("name"), str)]


def _first_place(data: dict[str, Any], first: str) -> Any:
    """The mapping in which an override's first part is looked up."""
    if first in Recipe.model_fields:
        return data
    if first in _stage_names(data):
        return {s["name"]: s for s in data["stages"] if isinstance(s, dict) and "name" in s}
    return None


def _assign(place: Any, parts: list[str], value: Any, *, label: str) -> str | None:
    for depth, part in enumerate(parts):
        key = _key_in(place, part)
        if key is None:
            above = ".".join(parts[:depth]) or "the recipe"
            return f"--set {label}: {above} has no item {part!r}"
        if depth == len(parts) - 1:
            place[key] = value
            return None
        below = place.get(key) if isinstance(place, dict) else place[key]
        if not isinstance(below, (dict, list)):
            # `--set benchmark.limit=5` must work where the recipe says nothing of benchmark, and
            # `--set prune.shape.hidden_size=432` where it names a preset.
            below = place[key] = {}
        place = below
    raise AssertionError("parts is never empty")


def _key_in(place: dict[str, Any] | list[Any], part: str) -> Any:
    if isinstance(place, dict):
        return part
    if part.isdecimal() and int(part) < len(place):
        return int(part)
    for index, item in enumerate(place):
        if isinstance(item, dict) and item.get("name") == part:
            return index
    return None


# --- checking -----------------------------------------------------------------------------------


def check_recipe(
    data: Mapping[str, Any], *, where: str = "given", mistakes: Iterable[str] = ()
) -> Recipe:
    """Validate raw data. Raises one ShearlingError that lists ``mistakes`` and all found here."""
    found = list(mistakes)
    recipe = None
    try:
        recipe = Recipe.model_validate(dict(data))
    except ValidationError as error:
        problems = [dict(problem) for problem in error.errors(include_url=False)]
        found += [_mistake(data, problem) for problem in problems if not _echo(problem, problems)]
    found += _structure_mistakes(data)
    if recipe is not None and not found:
        return recipe
    count = "a mistake" if len(found) == 1 else f"{len(found)} mistakes"
    raise ShearlingError(
        itemised(f"The recipe {where} has {count}:", found),
        hint="Mend the recipe or the --set options. `shearling keys` lists all keys, `shearling "
        "init` writes a commented recipe.",
    )


def _structure_mistakes(data: Mapping[str, Any]) -> list[str]:
    """Mistakes between the parts of a recipe, read from raw data so that none hides another."""
    found = []
    stages = data.get("stages")
    listed = stages if isinstance(stages, list) else []
    names = _stage_names(data)
    if isinstance(data.get("name"), str) and not SAFE_NAME.fullmatch(data["name"]):
        found.append(f"name: {data['name']!r} can't be a folder's name; {_SAFE_NAME_RULE}")
    for name in dict.fromkeys(names):
        if not SAFE_NAME.fullmatch(name):
            found.append(f"stages: the name {name!r} can't be a folder's name; {_SAFE_NAME_RULE}")
        elif name in RESERVED_NAMES:
            found.append(f"stages: no stage may have the name {name!r}; it means something else")
    # Folder names that differ only in case are one folder on some disks.
    folded = [name.casefold() for name in names]
    for name in dict.fromkeys(name for name in folded if folded.count(name) > 1):
        found.append(f"stages: the name {name!r} is given to more than one stage")
    kinds = [stage.get("kind") for stage in listed if isinstance(stage, dict)]
    if "distill" in kinds and "prune" not in kinds[: kinds.index("distill")]:
        found.append(
            "stages: a distill stage stands before any prune stage, so the student would be the "
            "teacher itself; put a prune stage first"
        )
    if "correct" in kinds and "prune" in kinds[: len(kinds) - kinds[::-1].index("correct")]:
        found.append(
            "stages: a correct stage stands after a prune stage, but it fits the teacher, from "
            "which the student is cut; put it first"
        )
    found += _teacher_mistakes(listed)
    return found


def _teacher_mistakes(stages: list[Any]) -> list[str]:
    """Distill stages that name teachers which are not there yet."""
    found, known = [], ["teacher"]
    for stage in (stage for stage in stages if isinstance(stage, dict)):
        named = stage.get("teachers") if stage.get("kind") == "distill" else None
        for name in named if isinstance(named, dict) else ():
            if name not in known:
                found.append(
                    f"{stage.get('name')}.teachers: no teacher stage before it has the name "
                    f"{name!r}{_nearest(str(name), known)}"
                )
        if stage.get("kind") == "teacher" and isinstance(stage.get("name"), str):
            known.append(stage["name"])
    return found


_SAFE_NAME_RULE = "use letters, digits, '.', '_' and '-' (64 at most, a letter or digit first)"


def _echo(problem: dict[str, Any], problems: list[dict[str, Any]]) -> bool:
    """Whether a list is called too short only because its items are wrong, told elsewhere."""
    here = problem["loc"]
    return problem["type"] == "too_short" and any(
        len(other["loc"]) > len(here) and other["loc"][: len(here)] == here for other in problems
    )


_WORDS = {
    "Tuple": "list",
    "tuple": "list",
    "dictionary or object to extract fields from": "mapping",
}


def _mistake(data: Mapping[str, Any], problem: dict[str, Any]) -> str:
    """One of pydantic's problems in our words."""
    location: tuple[str | int, ...] = problem["loc"]
    shown = _shown_location(data, location)
    kind, message = problem["type"], in_our_words(problem)
    if kind == "extra_forbidden":
        return f"{shown}: unknown key{_nearest(str(location[-1]), _known_keys(location))}"
    if kind == "missing":
        return f"{shown}: is missing"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        given = problem["input"].get("kind") if isinstance(problem["input"], dict) else None
        near = _nearest(given, KINDS) if isinstance(given, str) else ""
        return f"{shown}.kind: must be one of {', '.join(KINDS)}{near}"
    for word, ours in _WORDS.items():
        message = message.replace(word, ours)
    given = problem["input"]
    if isinstance(given, (str, int, float, bool)) and kind != "value_error":
        message += f", not {_short(given)}"
        if kind.startswith("int_") and (meant := read_count(given)) is not None:
            message += f"; write {meant}"
    return f"{shown}: {message}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


_SHAPE_TAGS = ("preset", "axes", "budget")
_TAGS = frozenset({*KINDS, *_SHAPE_TAGS})
_NUMBER_TAGS = ("number", "ramp")


def _shown_location(data: Mapping[str, Any], location: tuple[str | int, ...]) -> str:
    """``("stages", 1, "distill", "tokens")`` as the user would write it in --set."""
    parts: list[str] = []
    if len(location) > 1 and location[0] == "stages" and isinstance(location[1], int):
        stage = data["stages"][location[1]]
        name = stage.get("name") if isinstance(stage, dict) else None
        rest = location[2:]
        if rest and rest[0] in KINDS:
            rest = rest[1:]
        parts = [name if isinstance(name, str) else f"stages.{location[1]}"]
    else:
        rest = location
    before: str | int | None = None
    for part in rest:
        if not (before == "shape" and part in _TAGS) and part not in _NUMBER_TAGS:
            parts.append(str(part))
        before = part
    return ".".join(parts) or "recipe"


def _known_keys(location: tuple[str | int, ...]) -> list[str]:
    """The keys that the model at ``location``'s parent knows."""
    models: list[type[BaseModel]] = [Recipe]
    for part in location[:-1]:
        if isinstance(part, int) or part in (*_SHAPE_TAGS, *_NUMBER_TAGS):
            continue
        below = [m.model_fields[part].annotation for m in models if part in m.model_fields]
        if below:
            models = [model for annotation in below for model in _models_in(annotation)]
        elif part in KINDS:
            models = [KINDS[part]]
    return sorted({name for model in models for name in model.model_fields})


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """All pydantic models inside an annotation such as ``tuple[A | B, ...]``."""
    if isinstance(annotation, type) and get_origin(annotation) is None:
        return [annotation] if issubclass(annotation, BaseModel) else []
    if isinstance(annotation, UnionType) or get_origin(annotation) is Union or get_args(annotation):
        return [model for part in get_args(annotation) for model in _models_in(part)]
    return []


def _nearest(name: str, known: Iterable[str]) -> str:
    """``; did you mean 'x'?``, or nothing where no known name is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""
