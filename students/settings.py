"""The base of everything that a recipe may say."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Settings(BaseModel):
    """Base of all settings: immutable, unknown keys refused, every field described."""

    model_config = ConfigDict(extra="forbid", frozen=True)


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
