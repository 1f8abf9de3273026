"""What is measured on running text besides lm-eval's tasks; a scorecard has it under wikitext2."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from transformers import LlamaForCausalLM

from reports.agreement import (
    Reading,
    agreement,
    calibration_error,
    confidences,
    mean_and_error,
    read_windows,
)
from reports.load import load_model
from reports.perplexity import (
    losses_by_position,
    perplexity_of_windows,
    position_losses,
    spread_windows,
)
from reports.settings import MAIN_WINDOW as WINDOW
from reports.settings import BenchmarkSettings
from shearling import Progress, ShearlingError
from teachers.checkpoint import Checkpoint
from teachers.tokenizer import check_same_tokenizer, token_count

TASK = "wikitext2"


def add_perplexities(
    card: dict[str, Any], model: LlamaForCausalLM, tokenizer: Any, text: str,
    settings: BenchmarkSettings, progress: Progress,
) -> None:  # fmt: skip
    """Perplexity at each of the settings' window lengths, over about the same number of tokens.

    In the longest windows also by position: whether a model still uses what it read long ago.
    """
    for length in sorted(settings.perplexity_lengths):
        metric = f"token_perplexity_{length}"
        if length > model.config.max_position_embeddings:
            _leave_out(
                card, metric, f"the model has {model.config.max_position_embeddings} positions"
            )
            continue
        windows = settings.windows_of(length)
        losses_WP = position_losses(
            model, tokenizer, text, length=length, windows=windows, progress=progress
        )
        losses = [float(loss) for loss in losses_WP.mean(axis=1)]
        card["by_position"] = {
            "window": length,
            "windows": len(losses),
            "positions": losses_by_position(losses_WP),
        }
        _add(card, metric, *perplexity_of_windows(losses), losses, higher_is_better=False)
        if length == WINDOW:
            card["tasks"][TASK]["perplexity_windows"] = len(losses)


def read_text(
    model: LlamaForCausalLM, tokenizer: Any, text: str, settings: BenchmarkSettings,
    progress: Progress,
) -> Reading | None:  # fmt: skip
    """The model on some windows; None where the text or the model is too short for one."""
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    ids_WT = spread_windows(tokens, WINDOW, settings.agreement_windows)
    if not len(ids_WT) or model.config.max_position_embeddings < WINDOW:
        return None
    return read_windows(model, ids_WT, progress)


def add_agreement(
    card: dict[str, Any], reading: Reading | None, model: Path, teacher: Path | None, device: str,
    progress: Progress,
) -> None:  # fmt: skip
    """Calibration of the model, and where there is a teacher, how far the model is from it.

    Compared are the tokens that both have a row for: rows of padding say nothing.
    """
    if reading is None:
        for metric in ("calibration_error", *(["teacher_kl"] if teacher else [])):
            _leave_out(card, metric, f"the model or the text is shorter than {WINDOW} tokens")
        return
    value, error = calibration_error(*confidences(reading))
    _add(card, "calibration_error", value, error, None, higher_is_better=False)
    card["tasks"][TASK]["agreement_windows"] = len(reading.ids_WT)
    if teacher is None:
        return
    try:
        check_same_tokenizer(teacher, model)
    except ShearlingError as error:
        named = error.what.replace(str(teacher), "the teacher").replace(str(model), "the model")
        _leave_out(card, "teacher_kl", named.removesuffix("."))
        return
    card["teacher_sha256"] = Checkpoint(teacher).fingerprint()
    taught_by, tokenizer = load_model(teacher, device)
    theirs = read_windows(taught_by, reading.ids_WT, progress)
    rows = min(token_count(tokenizer), len(theirs.vocabulary_VD), len(reading.vocabulary_VD))
    kl_W, same_W = agreement(theirs.of_rows(rows), reading.of_rows(rows), progress)
    _add(card, "teacher_kl", *mean_and_error(kl_W), kl_W, higher_is_better=False)
    _add(card, "teacher_first_choice", *mean_and_error(same_W), same_W, higher_is_better=True)


def _leave_out(card: dict[str, Any], metric: str, reason: str) -> None:
    card["tasks"][TASK].setdefault("left_out", {})[metric] = reason


def _add(
    card: dict[str, Any], metric: str, value: float, error: float | None,
    samples: list[float] | None, *, higher_is_better: bool,
) -> None:  # fmt: skip
    finite = [number if number is not None and math.isfinite(number) else None
              for number in (value, error)]  # fmt: skip
    card["results"][TASK][metric] = {"value": finite[0], "stderr": finite[1]}
    card["tasks"][TASK]["higher_is_better"][metric] = higher_is_better
    if samples and all(math.isfinite(sample) for sample in samples):
        card["samples"][TASK][metric] = [round(sample, 6) for sample in samples]
