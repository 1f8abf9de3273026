"""Whose model a model was made from, and on what terms: read once, carried along to its students.

Nothing is judged here. What a licence asks of those who pass a model on, it asks of the user, who
can't keep to it where it got lost on the way.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from shearling import disk_errors, read_json

CARD = "README.md"
LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
TERMS = ("license", "license_name", "license_link", "base_model")

Origin = dict[str, Any]
"""``TERMS`` as a model card's front matter has them, a text or a list of texts each; only those
that are known."""


def known_terms(said: Mapping[str, Any]) -> Origin:
    """Those of ``TERMS`` that are a text or a list of texts, whatever else stands there."""
    found: Origin = {}
    for term in TERMS:
        value = said.get(term)
        texts = value if isinstance(value, list) else [value]
        if value and all(isinstance(text, str) and text.strip() for text in texts):
            found[term] = value
    return found


def texts(value: str | list[str] | None) -> list[str]:
    """One of an ``Origin``'s values as a list."""
    return [value] if isinstance(value, str) else list(value or ())


def card_origin(folder: Path) -> Origin:
    """What the model card in a folder says; empty where there is none that can be read."""
    from huggingface_hub.repocard import metadata_load

    try:
        said = metadata_load(folder / CARD)
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return known_terms(said or {})


def origin_of(stage: Path) -> Origin:
    """The origin that the folder of a finished teacher stage tells.

    Earlier versions recorded none; then the model's own card and its hub id are looked at.
    """
    record = stage / "stage.json"
    summary = (read_json(record) if record.is_file() else {}).get("summary") or {}
    if "origin" in summary:
        return known_terms(summary["origin"])
    hub_id = {"base_model": summary["source"]} if summary.get("format") == "hub" else {}
    return {**card_origin(stage / "model"), **hub_id}


def copy_licences(source: Path, target: Path) -> None:
    """Copy the texts of a model's licence and terms of use from folder to folder, if there are."""
    with disk_errors(target):
        for path in sorted(source.iterdir()) if source.is_dir() else ():
            named = any(fnmatchcase(path.name.upper(), pattern) for pattern in LICENCES)
            if named and path.is_file():
                target.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target / path.name)
