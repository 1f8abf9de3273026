"""A finished model for others: `shearling export`, and the recipe's export stage."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.named import find_model, refuse_earlier
from pipelines.preflight import check_parents
from reports import words
from reports.run_folder import earlier_settings
from shearling import Progress, ShearlingError, disk_errors, folder_aside, read_json, silent
from students.settings import ExportSettings
from teachers.origin import Origin, copy_licences, origin_of, texts
from teachers.settings import TeacherSettings

if TYPE_CHECKING:
    from transformers import LlamaConfig

CARD = "README.md"


def export_checkpoint(
    folder: Path,
    out: Path,
    settings: ExportSettings,
    *,
    name: str,
    origin: Origin | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Write the model in a Hugging Face folder as ``settings`` say; ``out`` is a folder to fill.

    ``origin`` is what is known of licence and base model. Returns facts of what was written: to,
    kind, converted (whether the numbers were of another kind before), stock_gguf (whether
    transformers reads all of it out of a GGUF), shares (of the weights, by kind of number), files,
    bytes, parameters, origin.

    Raises:
        ShearlingError: the model can't be held by the form that was asked for.
    """
    from students.export import export_folder, export_gguf
    from teachers.checkpoint import open_checkpoint
    from teachers.layout import expected_tensors
    from teachers.tokenizer import copy_tokenizer

    source = open_checkpoint(folder)
    shapes = expected_tensors(source.shape)
    out.mkdir(parents=True, exist_ok=True)
    copy_licences(folder, out)
    shares: dict[str, float]
    if settings.to == "hf":
        config = source.config
        export_folder(
            config, list(shapes), source.tensor, out, dtype=settings.dtype, progress=progress
        )
        copy_tokenizer(folder, out)
        generation = folder / "generation_config.json"
        if generation.is_file():
            shutil.copyfile(generation, out / generation.name)
        files = sorted(path.name for path in out.glob("*.safetensors"))
        shares = {settings.dtype: 1.0}
    else:
        kind = settings.gguf_kind()
        file = out / f"{name}-{kind}.gguf"
        shares = export_gguf(
            source.config,
            shapes,
            source.tensor,
            source.tokenizer(),
            file,
            kind=kind,
            name=name,
            end_of_turn=_end_of_turn(folder),
            origin={term: texts(value) for term, value in (origin or {}).items()},
            progress=progress,
        )
        files = [file.name]
    size = sum((out / file).stat().st_size for file in files)
    return {
        "to": settings.to,
        "kind": settings.dtype if settings.to == "hf" else settings.gguf_kind(),
        # A stage's numbers are of what was converted, not of what came out.
        "converted": source.dtype.lower() != settings.gguf_kind(),
        "stock_gguf": _stock_in_gguf(source.config),
        "shares": shares,
        "files": files,
        "bytes": size,
        "parameters": source.shape.parameters,
        "origin": origin or {},
    }


def _stock_in_gguf(config: LlamaConfig) -> bool:
    """Whether transformers' own reader of GGUFs leaves nothing out: it knows neither RoPE's
    scaling nor biases."""
    rope = config.rope_parameters.get("rope_type", "default")
    return rope == "default" and not (config.attention_bias or config.mlp_bias)


def export_line(facts: Mapping[str, Any]) -> str:
    """What was written, in one line."""
    line = f"{', '.join(facts['files'])}, {words.size(facts['bytes'])} as {facts['kind']}"
    rest = words.unquantised(facts)
    return f"{line}; {rest}" if rest else line


def _end_of_turn(folder: Path) -> int | None:
    """The second id at which generation stops, where there are two: the end of a turn."""
    path = folder / "generation_config.json"
    ends = read_json(path).get("eos_token_id") if path.is_file() else None
    return ends[-1] if isinstance(ends, list) and len(ends) > 1 else None


def write_card(
    out: Path,
    scorecard: Mapping[str, Any],
    teacher: Mapping[str, Any] | None,
    *,
    name: str,
    history: Sequence[str],
    tried: Sequence[str] = (),
    export: Mapping[str, Any],
    text: Mapping[str, Any] | None = None,
) -> None:
    """The model card beside an exported model.

    ``history`` are the kinds of stages that made it out of the teacher, ``tried`` those of which
    nothing was kept, ``export`` is what ``export_checkpoint`` returned, ``text`` the transfer set's
    facts.
    """
    from reports.model_card import model_card
    from shearling import write_text

    card = model_card(
        dict(scorecard),
        dict(teacher) if teacher is not None else None,
        name=name,
        history=history,
        tried=tried,
        export=dict(export),
        text=dict(text or {}),
        origin=export["origin"],
    )
    write_text(out / CARD, card)


def export_model(
    model: str,
    out: Path,
    settings: ExportSettings,
    *,
    cache: Path,
    progress: Progress = silent,
    tell: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Export any model: a run's last, a stage's, a Hugging Face folder, a GGUF, a hub id.

    ``out`` appears as a whole. A stage of a run gets its model card, with what was measured; the
    model of one that was made with earlier settings has none. ``tell`` hears such choices.

    Raises:
        ShearlingError: ``out`` is there already, or the model can't be read or written.
    """
    from teachers.checkpoint import import_teacher

    check_parents(out)
    if out.exists():
        raise ShearlingError(
            f"{out} is already there.", hint="Name another folder with --out, or delete it."
        )
    named = find_model(model, tell=tell)
    stage = _stage_of(Path(named).expanduser())
    if stage is not None and earlier_settings(stage[0] / "stages" / stage[1]):
        if named != model:  # else its model is asked for by itself
            refuse_earlier(Path(named).parent, kept="model", measured=True)
        tell(f"{model} belongs to earlier settings of its run, so it gets no model card")
        stage = None
    with tempfile.TemporaryDirectory(prefix="shearling-") as aside:
        origin = import_teacher(
            TeacherSettings(model=named),
            Path(aside),
            cache=cache,
            progress=progress,
            role="model",
            where="its path",
        )["origin"]
        if stage is not None:
            origin = origin_of(_teacher_of(*stage))
        with disk_errors(out), folder_aside(out) as filled:
            facts = export_checkpoint(
                Path(aside) / "model",
                filled,
                settings,
                name=_name(named),
                origin=origin,
                progress=progress,
            )
            if stage is not None:
                copy_licences(_teacher_of(*stage) / "model", filled)
                _card_of_stage(filled, *stage, facts)
    return facts


def _name(model: str) -> str:
    """A file's name for a model: of a stage's folder, a hub id, a file."""
    path = Path(model.rstrip("/"))
    last = path.parent.name if path.name in ("model", "export") else path.name
    kept = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in last)
    return kept.removesuffix(".gguf").strip("._-")[:64] or "model"


def _stage_of(model: Path) -> tuple[Path, str] | None:
    """The run and the stage, where a model is ``RUN/stages/NAME`` or its ``model``."""
    folder = model.parent if model.name == "model" else model
    is_stage = folder.parent.name == "stages" and (folder / "scorecard.json").is_file()
    return (folder.parent.parent, folder.name) if is_stage else None


def _teacher_of(run: Path, stage: str) -> Path:
    """The folder of the teacher stage that a stage's model was made from; itself if it is one."""
    stages = run / "stages"
    own = read_json(stages / stage / "stage.json").get("kind") == "teacher"
    return stages / (stage if own else "teacher")


def _card_of_stage(out: Path, run: Path, stage: str, facts: dict[str, Any]) -> None:
    from reports.model_card import write_model_card

    write_model_card(out, run, stage, export=facts)
