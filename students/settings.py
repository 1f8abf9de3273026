"""The base of everything that a recipe may say."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

_COUNT = re.compile(r"(\d[\d_,]{0,30}(?:\.\d+)?(?:e\+?\d{1,2})?) ?([kmb]?)", re.IGNORECASE)


def read_count(given: object) -> int | None:
    """The whole number that ``8k``, ``1e4``, ``60M`` or ``63_848_304`` stands for, or None.

    YAML reads most of these as text.
    """
    written = _COUNT.fullmatch(given.strip()) if isinstance(given, str) else None
    if written is None:
        return None
    unit = 1000 ** " kmb".index(written[2].lower() or " ")
    number = Fraction(re.sub("[_,]", "", written[1])) * unit
    return int(number) if number.denominator == 1 else None


def _as_count(given: Any) -> Any:
    count = read_count(given)
    return given if count is None else count


Count = Annotated[int, BeforeValidator(_as_count)]
"""A number of tokens, which a recipe may write as ``8k`` or ``1.5M`` too."""

MOST_COUNT = 10**15
"""More than there is of anything that a recipe counts; integers of 64 bits end not far above."""
MOST = 10**9
"""Of all other numbers; three of them multiplied still are a float32."""


_WANTED = {
    "int_parsing": "should be a whole number",
    "int_type": "should be a whole number",
    "int_from_float": "should be a whole number",
    "int_parsing_size": "is too long a number",
    "float_parsing": "should be a number",
    "float_type": "should be a number",
    "bool_parsing": "should be true or false",
    "bool_type": "should be true or false",
    "string_type": "should be a text",
}
"""What pydantic says longer, and with the names of Python's types."""


def in_our_words(problem: Mapping[str, Any]) -> str:
    """What one of pydantic's problems wants, without where it is and what was given."""
    kind, message = problem["type"], str(problem["msg"])
    if kind == "too_short":
        least = problem["ctx"]["min_length"]
        return f"needs at least {least} item{'s' if least > 1 else ''}"
    return _WANTED.get(kind, message.removeprefix("Value error, ").removeprefix("Input "))


class Settings(BaseModel):
    """Base of all settings: immutable, unknown keys refused, every field described."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _within_bounds(cls, value: Any) -> Any:
        for number in value if isinstance(value, (list, tuple)) else (value,):
            most = MOST_COUNT if isinstance(number, int) else MOST
            if isinstance(number, (int, float)) and abs(number) > most:
                raise ValueError(f"should be at most {most:,}")
        return value


class ExportSettings(Settings):
    """In which form a finished model is written."""

    to: Literal["hf", "gguf"] = Field(
        description="hf: a Hugging Face folder; gguf: one file for llama.cpp."
    )
    dtype: Literal["bfloat16", "float16", "float32"] = Field(
        default="bfloat16", description="Of the weights, where they are not quantised."
    )
    quantise: Literal["q8_0", "q5_1", "q5_0", "q4_1", "q4_0"] | None = Field(
        default=None,
        description="GGUF only: eight, five or four bits a weight. These are the kinds that the "
        "gguf package writes; llama.cpp's own tool makes the others out of an exported file. "
        "A matrix whose rows are no multiple of 32 stays in 16 bits.",
    )

    @model_validator(mode="after")
    def _fits(self) -> ExportSettings:
        if self.quantise is not None and self.to != "gguf":
            raise ValueError("quantise needs to: gguf; a Hugging Face folder is not quantised")
        return self

    def gguf_kind(self) -> str:
        """The kind of number in a GGUF: the quantisation, or the dtype in its words."""
        short = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}
        return self.quantise or short[self.dtype]
