"""Open a checkpoint for measuring, without noise; lm-eval is not imported, which is big."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import tqdm  # type: ignore[import-untyped]
from safetensors import SafetensorError
from transformers import AutoTokenizer, LlamaForCausalLM

from shearling import ShearlingError


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """No progress bars, prints and warnings of transformers, datasets and lm-eval meanwhile.

    The streams stay as they are: a live display of the caller goes on. Bootstraps run in this
    process instead of a pool, which lm-eval would fork from a process with threads.
    """
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "transformers")]
    levels = [logger.level for logger in loggers]
    make_bar, pooled = tqdm.tqdm.__init__, os.environ.get("DISABLE_MULTIPROC")
    metrics = vars(sys.modules.get("lm_eval.api.metrics", ModuleType("not loaded")))
    printer = metrics.get("print", print)
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        tqdm.tqdm.__init__ = functools.partialmethod(make_bar, disable=True)
        metrics["print"] = lambda *_, **__: None
        os.environ["DISABLE_MULTIPROC"] = "1"
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        tqdm.tqdm.__init__ = make_bar
        metrics["print"] = printer
        del os.environ["DISABLE_MULTIPROC"]
        if pooled is not None:
            os.environ["DISABLE_MULTIPROC"] = pooled


def load_model(folder: Path, device: str = "cpu") -> tuple[LlamaForCausalLM, Any]:
    """Open a checkpoint folder for measuring: the model in fp32 on a CPU, and its tokenizer.

    Elsewhere than on a CPU the model keeps the precision that its config names. A folder that is
    missing, truncated, not a Llama, or without some of its weights is a ShearlingError.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ShearlingError(
            f"{folder} is not a model folder: it has no config.json.",
            hint="Name a folder with config.json and model.safetensors.",
        )
    try:
        with quiet_libraries():
            model, info = LlamaForCausalLM.from_pretrained(
                folder,
                dtype=torch.float32 if device == "cpu" else "auto",
                local_files_only=True,
                output_loading_info=True,
            )
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ShearlingError(
            f"The checkpoint {folder} can't be read: {error}",
            hint="It may be truncated or of another architecture. Make or copy it again.",
        ) from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise ShearlingError(
            f"The checkpoint {folder} lacks {len(missing)} weights, {missing[0]} among them.",
            hint="It is incomplete. Make or copy it again.",
        )
    return model.to(device).eval(), tokenizer
