"""The README.md of a finished model: what it is, what it is worth, and how it came to be.

Hub metadata and evaluation results stand in its front matter, in the form that the Hugging Face hub
reads (https://huggingface.co/docs/hub/model-cards). Every number comes from the scorecards.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from reports import words
from reports.compare import compare_models, headline_metrics
from reports.groups import whole_results
from reports.page import markdown_cell
from reports.run_folder import Data, as_dict, as_list, as_number, read_run
from reports.tables import transfer
from shearling import ShearlingError, __version__, write_text
from teachers.origin import Origin, known_terms, texts

DONE = {"correct": "trained on the transfer set", "prune": "pruned", "distill": "distilled"}
TRIED = {"correct": "A training on the transfer set", "distill": "A distillation"}
TAGS = {"prune": "pruning", "distill": "distillation"}


def write_model_card(
    model: Path,
    run: Path,
    stage: str,
    *,
    export: Data | None = None,
) -> Path:
    """Write ``model/README.md`` for the model that ``stage`` of the run made; returns its path.

    ``export`` are facts of how it was written (`pipelines.export`), where it isn't the stage's own
    folder. Licence and base model are what the run's teacher told. A stage without a scorecard is a
    ShearlingError.
    """
    found = read_run(run)
    made = next((entry for entry in found.measured if entry.name == stage), None)
    if made is None or made.scorecard is None:
        known = ", ".join(entry.name for entry in found.measured) or "none"
        raise ShearlingError(
            f"The stage {stage} of {run} has no scorecard.",
            hint=f"Measured stages: {known}. Finish the run with `shearling run` first.",
        )
    history, tried = found.history(stage)
    teacher = next((entry.summary for entry in found.models if entry.kind == "teacher"), {})
    path = Path(model) / "README.md"
    text = model_card(
        made.scorecard,
        found.teacher,
        name=f"{found.name}-{stage}",
        history=history,
        tried=tried,
        export=export,
        stage=stage,
        recipe=found.recipe_text,
        text=transfer(found),
        origin=as_dict((export or teacher).get("origin")),
    )
    write_text(path, text)
    return path


def model_card(
    card: Data,
    teacher: Data | None,
    *,
    name: str,
    history: Sequence[str],
    tried: Sequence[str] = (),
    export: Data | None = None,
    stage: str = "",
    recipe: str = "",
    text: Data | None = None,
    origin: Data | None = None,
) -> str:
    """The text of a model card, front matter included.

    ``history`` are the kinds of stages that made the model out of the teacher, in order; a teacher
    has none, so its card holds nothing of the run but its own results. ``tried`` are those of
    trainings on the way whose weights were thrown away. ``stage`` is the last one's
    name in ``recipe``, ``text`` the run's transfer_set.json, ``origin`` what ``teachers.origin``
    knows of licence and base model.
    """
    export, terms = export or {}, known_terms(origin or {})
    if not history:
        teacher, text, recipe = None, None, ""
    return "\n".join(
        [
            "---",
            metadata(card, name=name, history=history, export=export, origin=terms),
            "---",
            "",
            f"# {markdown_cell(name)}",
            "",
            *_introduction(card, teacher, history, export, texts(terms.get("base_model"))),
            *_tried(tried),
            *_written_text(text or {}),
            "",
            "## Results",
            "",
            *_results(card, teacher),
            *_not_measured(export),
            "",
            "## Use",
            "",
            *(_use_of_gguf(export) if _is_gguf(export) else _use_of_folder()),
            *_recipe(recipe, stage),
            "",
        ]
    )


def metadata(card: Data, *, name: str, history: Sequence[str], export: Data, origin: Origin) -> str:
    """The YAML that the hub reads, with each task's headline numbers as evaluation results."""
    before = f", before conversion to {export['kind']}" if export.get("converted") else ""
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=task,
            dataset_name=task,
            metric_type=metric,
            metric_name=words.metric_label(task, metric) + before,
            metric_value=entry["value"],
        )
        for task, metrics in whole_results(card).items()
        for metric in headline_metrics(task, metrics)
        if (entry := metrics[metric]).get("value") is not None
    ]
    data = ModelCardData(
        model_name=name,
        library_name="gguf" if _is_gguf(export) else "transformers",
        pipeline_tag="text-generation",
        tags=["llama", *(tag for kind, tag in TAGS.items() if kind in history), "shearling"],
        **origin,
        eval_results=results or None,
    )
    yaml: str = data.to_yaml()
    return yaml


def _is_gguf(export: Data) -> bool:
    return export.get("to") == "gguf"


def _introduction(
    card: Data, teacher: Data | None, history: Sequence[str], export: Data, bases: Sequence[str]
) -> list[str]:
    size = f"{words.count(card.get('parameters'))} parameters, "
    size += words.size(export.get("bytes", card.get("bytes")))
    if export:
        size += f" as {export['kind']}"
    rest = _quantised(export)
    if bases:
        rest.insert(0, f"Its base model is {markdown_cell(', '.join(bases))}.")
    if not history:
        return [" ".join([f"A Llama of {size}, written with Shearling {__version__}.", *rest])]
    made = f"It was {_done(history)} with Shearling {__version__}."
    if teacher is None:
        return [" ".join([f"A Llama of {size}.", made, *rest])]
    share = words.percent(words.ratio(card.get("parameters"), teacher.get("parameters")))
    return [" ".join([f"A Llama of {size}: {share} of its teacher's parameters.", made, *rest])]


def _done(history: Sequence[str]) -> str:
    """``[prune, distill]`` -> "pruned and distilled"."""
    done = [DONE.get(kind, "made") for kind in history]
    told = " and ".join(filter(None, (", ".join(done[:-1]), done[-1])))
    return told if "distill" in history or "prune" not in history else f"{told}, not distilled,"


def _tried(kinds: Sequence[str]) -> list[str]:
    """What is not among the things that were done, because nothing came of it."""
    told = [TRIED[kind] for kind in dict.fromkeys(kinds) if kind in TRIED]
    why = "was tried and not kept: no evaluation found a better model than the one before it."
    return ["", " ".join(f"{what} {why}" for what in told)] if told else []


def _quantised(export: Data) -> list[str]:
    """What the weights of a quantised GGUF really are; its vectors, always f32, aside."""
    if not str(export.get("kind")).startswith("q"):
        return []
    kinds = export["shares"].items()
    stored = ", ".join(f"{words.some_percent(s)} {kind}" for kind, s in kinds if kind != "f32")
    why = "; those of f16 have rows that are no multiple of 32" if "f16" in export["shares"] else ""
    return [f"Its weights: {stored}{why}."]


def _written_text(text: Data) -> list[str]:
    """What is to be known of text that nobody but the teacher wrote."""
    sources = [as_dict(source) for source in as_list(text.get("sources"))]
    tokens = dict.fromkeys(("all", "written"), 0.0)
    for source in sources:
        count = as_number(source.get("tokens")) or 0.0
        tokens["all"] += count
        tokens["written"] += count if source.get("written") else 0.0
    if not tokens["written"]:
        return []
    told = f"{words.count(tokens['written'])} tokens that the teacher wrote itself"
    if tokens["written"] == tokens["all"]:
        return ["", f"No text of others was used: the transfer set is {told}."]
    share = words.percent(words.ratio(tokens["written"], tokens["all"]))
    return ["", f"{share} of the transfer set is text by the teacher itself: {told}."]


def _results(card: Data, teacher: Data | None) -> list[str]:
    judged: dict[tuple[str, str], Any] = {}
    if teacher is not None:
        judged = {(entry.task, entry.metric): entry for entry in compare_models(teacher, card)}
    alone = teacher is None
    lines = ["| task | this model | teacher | difference |", "| --- | ---: | ---: | ---: |"]
    if alone:
        lines = ["| task | this model |", "| --- | ---: |"]
    for task, metrics in whole_results(card).items():
        for metric in headline_metrics(task, metrics):
            found = metrics[metric]
            entry = judged.get((task, metric))
            reference, gap = words.MISSING, words.MISSING
            if entry is not None:
                reference = words.score(metric, entry.reference)
                if entry.difference is not None:
                    told = words.difference(metric, entry.difference, entry.stderr)
                    gap = f"{told}, {entry.verdict}"
            label = markdown_cell(f"{task}, {words.metric_label(task, metric)}")
            value = words.score(metric, found.get("value"), found.get("stderr"))
            lines.append(f"| {label} | {value} |" + ("" if alone else f" {reference} | {gap} |"))
    note = "± is a standard error."
    if not alone:
        note += (
            " Differences are paired over the same documents; “within noise” means p ≥ 0.05 after "
            "Holm's correction."
        )
    return [*lines, "", note]


def _not_measured(export: Data) -> list[str]:
    """Rounding costs quality, and nobody has looked how much."""
    if not export.get("converted"):
        return []
    return [
        "",
        f"All this was measured before the model was converted to {export['kind']}; what is in "
        "this folder was not measured.",
    ]


def _use_of_folder() -> list[str]:
    return [
        "It is a stock `LlamaForCausalLM`; no remote code is needed.",
        "",
        "```python",
        "from transformers import pipeline",
        "",
        'generate = pipeline("text-generation", "path/to/this/folder")',
        'print(generate("The history of", max_new_tokens=40)[0]["generated_text"])',
        "```",
    ]


def _use_of_gguf(export: Data) -> list[str]:
    (file,) = export["files"]
    lines = [
        "With llama.cpp:",
        "",
        *_fenced("sh", f'llama-cli -m {shlex.quote(file)} -p "The history of" -n 40'),
        "",
    ]
    if not export["stock_gguf"]:
        why = "leaves out RoPE's scaling and biases, of which this model has some"
        return [*lines, f"Not with transformers: its reader of GGUFs {why}."]
    code = f"""\
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, file = "path/to/this/folder", {json.dumps(file)}
model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file)
tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)"""
    how = "With transformers and the package gguf, which make 32-bit floats of it:"
    return [*lines, how, "", *_fenced("python", code)]


def _recipe(recipe: str, stage: str) -> list[str]:
    if not recipe:
        return []
    which = [f"This model is what its stage {markdown_cell(stage)} made.", ""] if stage else []
    return ["", "## Recipe", "", *which, *_fenced("yaml", recipe.rstrip())]


def _fenced(language: str, text: str) -> list[str]:
    fence = "`" * max(3, max((len(run) for run in _backticks(text)), default=0) + 1)
    return [f"{fence}{language}", text, fence]


def _backticks(text: str) -> list[str]:
    """The runs of backticks in a text: a fence must be longer than any."""
    return "".join(c if c == "`" else " " for c in text).split()
