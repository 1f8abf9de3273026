"""The base of everything that a recipe may say."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """Base of all settings: immutable, unknown keys refused, every field described."""

    model_config = ConfigDict(extra="forbid", frozen=True)
