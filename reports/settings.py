"""What a recipe may say about measuring: data only, so no torch is loaded."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, PositiveInt

from students.settings import Settings

MAIN_WINDOW = 512
"""The window of the main perplexity, of calibration and of agreement."""


class BenchmarkSettings(Settings):
    """What is measured on every model, the teacher included."""

    tasks: tuple[str, ...] = Field(
        default=("wikitext2",),
        min_length=1,
        description="Names of tasks: this project's own (wikitext2, ...) or any of lm-eval's.",
    )
    limit: int | None = Field(
        default=None, gt=0, description="Documents a task; by default all. Same for every model."
    )
    limits: dict[str, PositiveInt] = Field(
        default_factory=dict, description="Documents for single tasks, before `limit`."
    )
    num_fewshot: int | None = Field(default=None, ge=0, description="Examples in the prompt.")
    mirror: str | None = Field(
        default=None,
        description="A folder of JSONL files that stand in for the hub's data "
        "(arc_easy.jsonl, piqa.jsonl, ...). Those of tasks whose file is absent come from the hub.",
    )
    batch_size: int = Field(default=8, gt=0, description="Sequences in one forward pass.")
    perplexity_windows: int = Field(
        default=64,
        ge=1,
        description="Windows of 512 tokens for token_perplexity_512, evenly spread over the text; "
        "the other lengths take about as many tokens.",
    )
    perplexity_lengths: tuple[PositiveInt, ...] = Field(
        default=(128, 512, 2048),
        min_length=1,
        description="Window lengths of the token perplexities; each over about as many tokens. "
        "Those that exceed the model's positions are left out with a word. The longest one is also "
        "shown by position: name the transfer set's window here if it is longer.",
    )
    agreement_windows: int = Field(
        default=8,
        ge=1,
        description="Windows of 512 tokens on which calibration is measured, and a student's "
        "answers are held against the teacher's.",
    )
    chat_template: bool = Field(
        default=False,
        description="Put the tasks' prompts into the model's chat template, as instructions "
        "and summaries always do where there is one.",
    )
    prompts: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        default=("The history of", "Water is", "Once upon a time"),
        description="Beginnings that each model completes greedily, shown side by side.",
    )
    completion_tokens: int = Field(default=40, ge=1, description="Length of each completion.")
    speed: bool = Field(
        default=True,
        description="Measure speed and memory, in a process of its own (adds some seconds); "
        "without it neither is told.",
    )

    def windows_of(self, length: int) -> int:
        """How many windows of this length have as many tokens as ``perplexity_windows`` of 512."""
        return max(1, self.perplexity_windows * MAIN_WINDOW // length)
