"""recipe.yaml and lock.json: what a run did, and with what; and `run --locked`, which insists."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines import machine
from pipelines.journal import now
from pipelines.recipe import Recipe
from pipelines.steps import STAGES, Step, differences
from shearling import (
    ShearlingError,
    itemised,
    read_json,
    sha256_of_json,
    without_secrets,
    write_text,
)

SCHEMA = 1
RECIPE_FILE = "recipe.yaml"
LOCK_FILE = "lock.json"
SAME_HARDWARE = ("processor", "threads", "accelerators")
"""What of the hardware can change the bits of a result."""


def lock_data(
    recipe: Recipe, steps: Sequence[Step], *, device: str, command: str
) -> dict[str, Any]:
    """The content of lock.json: all that the results are a function of."""
    return {
        "schema": SCHEMA,
        "created": now(),
        "recipe": recipe.name,
        "recipe_sha256": sha256_of_json(recipe.model_dump(mode="json")),
        "seed": recipe.seed,
        "command": command,
        "git": machine.git_state(),
        "python": platform.python_version(),
        "packages": machine.package_versions(),
        "hardware": machine.hardware(),
        "device": device,
        "code_versions": {kind: module.CODE_VERSION for kind, module in STAGES.items()},
        "keys": {step.name: step.key for step in steps},
        "steps": {step.name: _facts(step) for step in steps},
        "inputs": {
            name: digest
            for step in steps
            for name, digest in step.inputs.items()
            if name not in step.needs
        },
    }


def _facts(step: Step) -> dict[str, Any]:
    return {
        "kind": step.kind,
        "settings": dict(step.slice),
        "inputs": dict(step.inputs),
        "code_version": step.code_version,
    }


def write_provenance(run: Path, recipe: Recipe, lock: Mapping[str, Any]) -> None:
    """Write both files. From then on the run is this recipe's, however it ends.

    So run.json, `status` and `resume` name one recipe, and no result of the recipe before is
    taken for a stage of this one (``reports.run_folder``).
    """
    texts = {
        RECIPE_FILE: recipe.to_yaml(),
        LOCK_FILE: json.dumps(lock, indent=2, ensure_ascii=False) + "\n",
    }
    for name, text in texts.items():
        write_text(run / name, without_secrets(text))


# --- run --locked -------------------------------------------------------------------------------


def check_locked(file: Path, now_: Mapping[str, Any], steps: Sequence[Step]) -> None:
    """Refuse to run if anything that can change a result is not as ``file`` says.

    Raises:
        ShearlingError: with every difference.
    """
    hint = "Name the lock.json in the folder of a run that this version made."
    if not file.is_file():
        raise ShearlingError(f"{file} is no file, so nothing can be held to it.", hint=hint)
    wanted = read_json(file, hint=hint)
    if not isinstance(wanted, dict) or not isinstance(wanted.get("steps"), dict):
        raise ShearlingError(
            f"{file} is not a lock.json that can be held to: it has no steps.",
            hint=hint,
        )
    found = list(dict.fromkeys([*_around(wanted, now_), *_steps(wanted["steps"], steps)]))
    if found:
        raise ShearlingError(
            itemised(f"This run would not be the one that {file} locks:", found),
            hint="Mend what differs, or run without --locked.",
        )


def _around(wanted: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[str]:
    for name in ("python", "device"):
        yield from _differing(name, wanted.get(name), here[name])
    for group, names in (("packages", None), ("hardware", SAME_HARDWARE)):
        old, new = _mapping(wanted.get(group)), here[group]
        for name in names or dict.fromkeys([*old, *new]):
            yield from _differing(name, old.get(name), new.get(name))
    old_git, new_git = _mapping(wanted.get("git")), _mapping(here["git"])
    if old_git and new_git:
        yield from _differing("git commit", old_git.get("commit"), new_git["commit"])
    if new_git and not new_git["clean"]:
        yield "the checkout has changes that are not committed"


def _steps(wanted: Mapping[str, Any], steps: Sequence[Step]) -> Iterator[str]:
    for step in steps:
        if not isinstance(wanted.get(step.name), dict):
            yield f"{step.name} is not in the lock"
            continue
        for difference in differences(step, wanted[step.name]):
            if not difference.startswith("its input "):  # told at the step that makes it
                yield f"{step.name}: {difference}"
    for name in wanted.keys() - {step.name for step in steps}:
        yield f"{name} is in the lock, not in the recipe"


def _differing(name: str, old: Any, new: Any) -> Iterator[str]:
    if old != new:
        yield f"{name} {_shown(old)} -> {_shown(new)}"


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def _mapping(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}
