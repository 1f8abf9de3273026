"""Measure one checkpoint: lm-eval's tasks, perplexity, speed, memory, completions -> scorecard.

A scorecard is plain data (see `benchmark`); nothing here compares models, `compare.py` does.
Everything is deterministic on a CPU but the speeds.
"""

from __future__ import annotations

import hashlib
import math
import platform
import random
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lm_eval.api.metrics  # noqa: F401  (loaded here, so that quiet_libraries can silence it)
import numpy as np
import torch
from transformers import LlamaForCausalLM

import reports.tasks as tasks
from reports.compare import pack
from reports.group_measures import add_groups
from reports.hub import (
    FAILED_NOW,
    FROM_CACHE,
    NO_ANSWER,
    fills_disk,
    fills_memory,
    hub_answers,
    may_pass,
)
from reports.lm import PrefixLM
from reports.load import load_model, quiet_libraries
from reports.perplexity import ratio_error
from reports.settings import BenchmarkSettings
from reports.speed import measure_speed
from reports.tasks import Task, check_tasks, wikitext
from reports.text_measures import add_agreement, add_perplexities, read_text
from shearling import Progress, ShearlingError, __version__, silent
from teachers.tokenizer import ids_fingerprint

SCHEMA = 1
RANDOM_SEED, FEWSHOT_SEED = 0, 1234
"""Those of lm-eval's own command, whatever a recipe's seed: with other examples in the prompts, or
the choices at other places, other questions would be asked."""
BOOTSTRAPS = 1000
TOO_LARGE = "the model's loss is too large for a perplexity"
NO_NUMBERS = "the model's answers are not numbers"
MODELS_FAULT = (TOO_LARGE, NO_NUMBERS)
"""Why a task is skipped whose data are here."""
ANSWER_CHARACTERS = 400
"""What is kept of a written answer."""
PACKAGES = ("torch", "transformers", "lm_eval", "datasets", "tokenizers", "safetensors", "numpy")


def benchmark(
    model: Path,
    settings: BenchmarkSettings,
    *,
    name: str,
    cache: Path,
    teacher: Path | None = None,
    size: int | None = None,
    device: str = "cpu",
    progress: Progress = silent,
) -> dict[str, Any]:
    """Measure the checkpoint folder ``model`` and return its scorecard.

    With a ``teacher`` (another folder) also how far the model's answers are from the teacher's.
    ``size``: bytes of what the folder was converted from, where that is what people have on disk.

    {"schema", "model", "parameters", "bytes", "tokenizer_sha256": of the ids that it gives a text,
    "teacher_sha256": of the teacher's files, "num_fewshot": as asked for,
    "results": {task: {metric: {"value", "stderr"}}},
    "tasks": {task: facts that must agree before two scorecards may be compared, chance, and of a
    task that a group of tasks counts, which `group`},
    "skipped": {task: reason}, "speed", "peak_memory_bytes", "completions", "versions",
    "by_position": losses of stretches of the longest perplexity windows,
    "samples": {task: {metric: a document one number, [log-likelihood, weight] or [right, given]}},
    "answers": {task: what the model wrote, a document, where it was asked to write}}

    A task that doesn't exist, or a folder that is no complete checkpoint, is a ShearlingError.
    """
    check_tasks(settings)
    loaded, tokenizer = load_model(model, device)
    if settings.chat_template and not tokenizer.chat_template:
        raise ShearlingError(
            f"{name} has no chat template into which prompts could be put.",
            hint="Remove benchmark.chat_template (--chat-template).",
        )
    weights = sum(file.stat().st_size for file in Path(model).glob("*.safetensors"))
    card: dict[str, Any] = {
        "schema": SCHEMA,
        "model": name,
        "parameters": sum(parameter.numel() for parameter in loaded.parameters()),
        "bytes": weights if size is None else size,
        "tokenizer_sha256": ids_fingerprint(tokenizer),
        "num_fewshot": settings.num_fewshot,
        "results": {},
        "tasks": {},
        "skipped": {},
        "speed": {},
        "peak_memory_bytes": None,
        "completions": complete(loaded, tokenizer, settings),
        "versions": versions(),
        "by_position": {},
        "samples": {},
        "answers": {},
    }
    with quiet_libraries():
        lm = PrefixLM(loaded, tokenizer, batch_size=settings.batch_size, progress=progress)
    for task_name in settings.tasks:
        lm.what = task_name
        _run_task(task_name, lm, settings, card, cache=cache, progress=progress)
    reading, has_text = None, "wikitext2" in card["results"]
    if has_text:
        text = wikitext.raw_test_text(cache)
        add_perplexities(card, loaded, tokenizer, text, settings, progress)
        reading = read_text(loaded, tokenizer, text, settings, progress)
    del lm, loaded  # before the teacher comes
    if has_text:
        add_agreement(card, reading, model, teacher, device, progress)
    if settings.speed:
        progress("speed and memory", 0, 1)
        torch.cuda.empty_cache()  # for the process that measures
        card.update(measure_speed(model, device=device, beside=teacher))
    return card


@torch.inference_mode()
def complete(
    model: LlamaForCausalLM, tokenizer: Any, settings: BenchmarkSettings
) -> list[dict[str, str]]:
    """What the model writes after each of the settings' prompts, greedily."""
    completions = []
    for prompt in settings.prompts:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(model.device)
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=settings.completion_tokens,
            pad_token_id=model.config.pad_token_id or 0,
            temperature=None,
            top_p=None,
            top_k=None,
        )
        text = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        completions.append({"prompt": prompt, "text": text})
    return completions


def versions() -> dict[str, str]:
    """Versions of everything that could change a number."""
    found = {package: version(package) for package in PACKAGES}
    return {"shearling": __version__, "python": platform.python_version(), **found}


def _run_task(
    name: str,
    lm: PrefixLM,
    settings: BenchmarkSettings,
    card: dict[str, Any],
    *,
    cache: Path,
    progress: Progress,
) -> None:
    """Evaluate one task (or one of lm-eval's groups) and add what came out to the scorecard."""
    limit = settings.limits.get(name, settings.limit)
    with tempfile.TemporaryDirectory(prefix="shearling-tasks-") as folder, quiet_libraries():
        task = tasks.prepare(name, settings, Path(folder), cache, progress)
        random.seed(RANDOM_SEED)  # before loading, for some tasks shuffle their choices then
        np.random.seed(FEWSHOT_SEED)
        torch.manual_seed(FEWSHOT_SEED)
        loaded = load_task(task, settings, card["skipped"])
        if loaded is None:
            return
        check_examples(loaded, settings.num_fewshot)
        in_chat = settings.chat_template or asks_in_chat(loaded, lm.tokenizer)
        try:
            results = evaluate(
                lm,
                loaded,
                limit=limit,
                num_fewshot=settings.num_fewshot,
                chat_template=in_chat,
            )
        except OverflowError:  # lm-eval's exp of a mean loss above 709 nats
            card["skipped"][name] = TOO_LARGE
            return
        except FloatingPointError:
            card["skipped"][name] = NO_NUMBERS
            return
    for found, metrics in results["results"].items():
        if not (read := read_metrics(metrics)):  # a group that only lists tasks
            continue
        card["results"][found] = read
        samples = results["samples"].get(found)
        if samples is None:
            continue
        card["samples"][found] = keep_samples(samples)
        card["tasks"][found] = {
            "version": results["versions"].get(found),
            "hash": hash_of_samples(samples),
            "data_sha256": task.data_sha256,
            "source": task.source,
            "limit": limit,
            "num_fewshot": results["n-shot"].get(found, 0),
            "chat_template": in_chat,
            "precision": str(lm.model.dtype).removeprefix("torch."),
            # A model of more positions reads more before each word.
            "max_length": lm.max_length if is_rolling(loaded["tasks"][found]) else None,
            "samples": results["n-samples"][found]["effective"],
            "documents": results["n-samples"][found]["original"],
            "higher_is_better": results["higher_is_better"].get(found, {}),
            **floors(samples),
            "floor": tasks.constant_floor(found, [sample["doc"] for sample in samples]),
        }
        if answers := keep_answers(samples):
            card["answers"][found] = answers
        add_ratio_errors(card["results"][found], card["samples"][found])
    add_groups(card, results["group_subtasks"], results["versions"])


def asks_in_chat(loaded: dict[str, Any], tokenizer: Any) -> bool:
    """Whether the task gives orders, which a model that has a chat template expects inside it.

    Without the template such a model doesn't answer: it scores below a constant text.
    """
    wanted = [(t.get_config("metadata") or {}).get("chat") for t in loaded["tasks"].values()]
    return any(wanted) and bool(tokenizer.chat_template)


def check_examples(loaded: dict[str, Any], count: int | None) -> None:
    """Every task that shows examples has as many as are asked for.

    Raises:
        ShearlingError: with the task that has the fewest.
    """
    if not count:
        return
    there = {
        # Where lm-eval leaves out the document that is asked about, it wants another one.
        name: len(list(task.fewshot_docs())) - (task.fewshot_cfg.split == task.config.test_split)
        for name, task in loaded["tasks"].items()
        if shows_examples(task)
    }
    least = min(there, key=there.__getitem__, default=None)
    if least is not None and there[least] < count:
        raise ShearlingError(
            f"{least} has {there[least]} documents to show as examples, too few for {count}.",
            hint=f"Set benchmark.num_fewshot (--fewshot) to {there[least]} or less.",
        )


def shows_examples(task: Any) -> bool:
    """Whether a task's prompts can have examples before them; running text has none."""
    return task.get_config("num_fewshot") != 0 and not is_rolling(task)


def is_rolling(task: Any) -> bool:
    """Whether a task reads running text, in windows as long as the model's positions allow."""
    return bool(task.OUTPUT_TYPE == "loglikelihood_rolling")


def load_task(
    task: Task, settings: BenchmarkSettings, skipped: dict[str, str]
) -> dict[str, Any] | None:
    """Load a task with lm-eval; None (and a reason in ``skipped``) if its data can't be had.

    Raises:
        ShearlingError: the disk is full, which is no fault of the task.
    """
    from lm_eval.tasks import TaskManager

    def load() -> dict[str, Any]:
        if task.file is None:
            return dict(TaskManager().load([task.name]))
        return dict(TaskManager(include_defaults=False).load([str(task.file)]))

    if task.source != "hub":
        return load()
    missing = f"no file of it in benchmark.mirror ({settings.mirror})" if settings.mirror else ""
    where = "its data are on the Hugging Face hub"
    if not hub_answers():
        offline = f"{where}, {NO_ANSWER}; {FROM_CACHE}"
        skipped[task.name] = "; ".join(part for part in (missing, offline) if part)
        return None
    try:
        return load()
    except Exception as error:
        # Whatever the hub, the data set's builder or a missing extra raises: the other tasks'
        # numbers are worth more than a stop after hours.
        if fills_memory(error):
            raise
        if fills_disk(error):
            raise ShearlingError(
                f"The disk is full: the data of {task.name} could not be put into the hub's cache.",
                hint="Free some space, or set HF_HOME to a folder elsewhere.",
            ) from error
        why = FAILED_NOW if may_pass(error) else "and loading them failed"
        reason = f"{where}, {why}: {type(error).__name__}: {error}".split("\n")[0]
        skipped[task.name] = "; ".join(part for part in (missing, reason) if part)
        return None


def evaluate(
    lm: PrefixLM,
    loaded: dict[str, Any],
    *,
    limit: int | None,
    num_fewshot: int | None,
    chat_template: bool = False,
) -> dict[str, Any]:
    """lm-eval's `evaluate`, prepared as its `simple_evaluate` does.

    `simple_evaluate` itself is not used: after each task it would spend seconds on a report of the
    machine. Neither are lm-eval's caches: the key of `use_cache` doesn't know the model, and that
    of `cache_requests` knows neither the data's path nor the limit.
    """
    from lm_eval.evaluator import evaluate as run

    for task in loaded["tasks"].values():
        if num_fewshot is not None and shows_examples(task):
            task.set_config(key="num_fewshot", value=num_fewshot)
        elif task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    results: dict[str, Any] = run(
        lm=lm,
        task_dict=loaded,
        limit=limit,
        bootstrap_iters=BOOTSTRAPS,
        log_samples=True,
        apply_chat_template=chat_template,
        fewshot_as_multiturn=chat_template,
    )
    return results


def finite(value: Any) -> float | None:
    """A number as JSON can hold it: None for NaN, infinity and lm-eval's "N/A"."""
    if isinstance(value, bool | int | float | np.number) and math.isfinite(float(value)):
        return float(value)
    return None


def read_metrics(metrics: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """lm-eval's flat {"acc,none": x, "acc_stderr,none": y} -> {"acc": {"value", "stderr"}}."""
    read = {}
    for key, value in metrics.items():
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        label = metric if filtered == "none" else key
        error = finite(metrics.get(f"{metric}_stderr,{filtered}"))
        read[label] = {"value": finite(value), "stderr": error}
    return read


def keep_samples(samples: Sequence[Mapping[str, Any]]) -> dict[str, str | list[Any]]:
    """Per metric what lm-eval aggregates: 0 or 1 a document ("0110"), a value, or two of them."""
    filters = sorted({sample["filter"] for sample in samples})
    kept: dict[str, str | list[Any]] = {}
    for filtered in filters:
        rows = [sample for sample in samples if sample["filter"] == filtered]
        for metric in rows[0]["metrics"]:
            values = [_compact(row.get(metric)) for row in rows]
            if all(value is not None for value in values):
                label = metric if filtered == "none" else f"{metric},{filtered}"
                kept[label] = pack(values)
    return kept


def keep_answers(samples: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the model wrote on each document, cut short; nothing for a task of likelihoods."""
    first = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
    written = [sample["filtered_resps"][0] for sample in first]
    if not all(isinstance(text, str) for text in written):
        return []
    return [text.strip()[:ANSWER_CHARACTERS] for text in written]


def _compact(value: Any) -> int | float | list[float] | None:
    if isinstance(value, tuple | list):
        parts = [finite(part) for part in value]
        return [part for part in parts if part is not None] if None not in parts else None
    number = finite(value)
    return int(number) if number in (0.0, 1.0) else number


def hash_of_samples(samples: Sequence[Mapping[str, Any]]) -> str:
    """SHA-256 over what was asked: each document, prompt and target, as lm-eval hashes them."""
    ordered = sorted(samples, key=lambda s: (s["doc_id"], s["filter"]))
    parts = (s["doc_hash"] + s["prompt_hash"] + s["target_hash"] for s in ordered)
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def floors(samples: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """What no knowledge at all scores on a task of choices: guessing, and one constant answer.

    Both are None where there are no choices; `constant` also where the right answer always stands
    at the same place (a fact about the file, not about the task) or several answers are right.
    """
    first = [s for s in samples if s["filter"] == samples[0]["filter"]]
    choices = [len(sample["arguments"]) for sample in first]
    if "acc" not in first[0]["metrics"] or min(choices) < 2:
        return {"chance": None, "constant": None}
    several = [(sample["doc"].get("mc2_targets") or {}).get("labels", ()) for sample in first]
    if [len(labels) for labels in several] == choices:
        return {"chance": float(np.mean([np.mean(labels) for labels in several])), "constant": None}
    right = [_right_choice(sample) for sample in first]
    known = None not in right and len(set(right)) > 1
    constant = max(right.count(place) for place in set(right)) / len(right) if known else None
    return {"chance": float(np.mean([1 / count for count in choices])), "constant": constant}


def _right_choice(sample: Mapping[str, Any]) -> int | None:
    """Index of the right choice; lm-eval logs it as a number, as its digits, or as its text.

    A number is an index also where a choice reads the same, as in arithmetic.
    """
    texts = [arguments[1].strip() for arguments in sample["arguments"]]
    target = sample["target"]
    if isinstance(target, int):
        return int(target) if 0 <= target < len(texts) else None
    target = str(target).strip()
    if target in texts:
        return texts.index(target)
    return int(target) if target.isdigit() else None


def add_ratio_errors(
    results: dict[str, dict[str, float | None]], samples: Mapping[str, Sequence[Any]]
) -> None:
    """Give weighted perplexities the standard errors that lm-eval doesn't compute."""
    for metric in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
        pairs = samples.get(metric)
        if metric not in results or pairs is None:
            continue
        error = ratio_error([pair[0] for pair in pairs], [pair[1] for pair in pairs])
        value = results[metric]["value"]
        if error is not None and value is not None:
            scale = 1 / math.log(2) if metric == "bits_per_byte" else value
            results[metric]["stderr"] = finite(error * scale)
