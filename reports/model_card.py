"""The README.md of a finished model: what it is, what it is worth, and how it came to be.

Hub metadata and evaluation results stand in its front matter, in the form that the Hugging Face hub
reads (https://huggingface.co/docs/hub/model-cards). Every number comes from the scorecards.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from reports import words
from reports.compare import compare_models, headline_metrics
from reports.page import markdown_cell
from reports.run_folder import Data, as_dict, as_list, as_number, read_run
from reports.tables import transfer
from shearling import ShearlingError, __version__, write_text


def write_model_card(
    model: Path, run: Path, stage: str, *, license: str | None = None, base_model: str | None = None
) -> Path:
    """Write ``model/README.md`` for the model that ``stage`` of the run made; returns its path.

    ``license`` is a hub identifier (apache-2.0, llama3.1, ...) and ``base_model`` a hub id; both
    are left out where they aren't known. A stage without a scorecard is a ShearlingError.
    """
    found = read_run(run)
    made = next((entry for entry in found.measured if entry.name == stage), None)
    if made is None or made.scorecard is None:
        known = ", ".join(entry.name for entry in found.measured) or "none"
        raise ShearlingError(
            f"The stage {stage} of {run} has no scorecard.",
            hint=f"Measured stages: {known}. Finish the run with `shearling run` first.",
        )
    path = Path(model) / "README.md"
    text = model_card(
        made.scorecard,
        found.teacher,
        name=f"{found.name}-{stage}",
        recipe=found.recipe_text,
        text=transfer(found),
        license=license,
        base_model=base_model,
    )
    write_text(path, text)
    return path


def model_card(
    card: Data,
    teacher: Data | None,
    *,
    name: str,
    recipe: str = "",
    text: Data | None = None,
    license: str | None = None,
    base_model: str | None = None,
) -> str:
    """The text of a model card, front matter included; ``text`` is the run's transfer_set.json."""
    return "\n".join(
        [
            "---",
            metadata(card, name=name, license=license, base_model=base_model),
            "---",
            "",
            f"# {markdown_cell(name)}",
            "",
            *_introduction(card, teacher, base_model),
            *_written_text(text or {}),
            "",
            "## Results",
            "",
            *_results(card, teacher),
            "",
            "## Use",
            "",
            "It is a stock `LlamaForCausalLM`; no remote code is needed.",
            "",
            "```python",
            "from transformers import pipeline",
            "",
            'generate = pipeline("text-generation", "path/to/this/folder")',
            'print(generate("The history of", max_new_tokens=40)[0]["generated_text"])',
            "```",
            *_recipe(recipe),
            "",
        ]
    )


def metadata(card: Data, *, name: str, license: str | None, base_model: str | None) -> str:
    """The YAML that the hub reads, with each task's headline numbers as evaluation results."""
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=task,
            dataset_name=task,
            metric_type=metric,
            metric_name=words.metric_label(task, metric),
            metric_value=entry["value"],
        )
        for task, metrics in card["results"].items()
        for metric in headline_metrics(task, metrics)
        if (entry := metrics[metric]).get("value") is not None
    ]
    data = ModelCardData(
        model_name=name,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["llama", "pruning", "distillation", "shearling"],
        license=license,
        base_model=base_model,
        eval_results=results or None,
    )
    yaml: str = data.to_yaml()
    return yaml


def _introduction(card: Data, teacher: Data | None, base_model: str | None) -> list[str]:
    size = f"{words.count(card.get('parameters'))} parameters, {words.size(card.get('bytes'))}"
    if teacher is None:
        return [f"A Llama of {size}, made with Shearling {__version__}."]
    share = words.percent(words.ratio(card.get("parameters"), teacher.get("parameters")))
    of = f" ({markdown_cell(base_model)})" if base_model else ""
    return [
        f"A Llama of {size}: {share} of its teacher's parameters{of}. It was cut out of the "
        f"teacher by structured pruning and then taught by it, with Shearling {__version__}."
    ]


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
    lines = ["| task | this model | teacher | difference |", "| --- | ---: | ---: | ---: |"]
    for task, metrics in card["results"].items():
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
            lines.append(f"| {label} | {value} | {reference} | {gap} |")
    return [
        *lines,
        "",
        "± is a standard error. Differences are paired over the same documents; “within noise” "
        "means p ≥ 0.05 after Holm's correction.",
    ]


def _recipe(recipe: str) -> list[str]:
    if not recipe:
        return []
    fence = "`" * max(3, max((len(run) for run in _backticks(recipe)), default=0) + 1)
    return ["", "## Recipe", "", f"{fence}yaml", recipe.rstrip(), fence]


def _backticks(text: str) -> list[str]:
    """The runs of backticks in a text: a fence must be longer than any."""
    return "".join(c if c == "`" else " " for c in text).split()
