"""Scorecards: lm-eval's own numbers, exact perplexities, honest gaps."""

from __future__ import annotations

import copy
import io
import json
import math
import re
import shutil
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import hf_hub_download
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from padding import other_ids, padded
from pydantic import ValidationError
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

import reports.speed as speed_process
from pipelines.difference import settings_like
from pipelines.display import headline, skipped_lines
from pipelines.evaluate import scorecard_table
from pipelines.tiny import make_tiny_llama, tiny_documents
from reports.benchmark import (
    NO_NUMBERS,
    benchmark,
    check_examples,
    evaluate,
    finite,
    floors,
    hash_of_samples,
    keep_samples,
    load_task,
    read_metrics,
)
from reports.compare import compare_models, mismatch, unpack, written_alike
from reports.hub import hub_answers, is_passing, may_pass
from reports.lm import PrefixLM
from reports.load import load_model, quiet_libraries
from reports.perplexity import (
    losses_by_position,
    perplexity_of_windows,
    position_losses,
    ratio_error,
    spread_windows,
)
from reports.quality_charts import Mean, common_tasks, mean_share, share_tasks
from reports.settings import BenchmarkSettings
from reports.speed import has_room, measure_speed
from reports.tasks import Task, prepare
from shearling import ShearlingError, read_json, silent, write_json
from teachers.checkpoint import Checkpoint


def test_a_scorecard_has_the_agreed_form(cards: dict[str, dict[str, Any]], models: Any) -> None:
    card = cards["teacher"]
    assert card["schema"] == 1
    assert card["model"] == "teacher"
    model, _ = load_model(models.teacher)
    assert card["parameters"] == model.num_parameters()  # tied: counted once
    assert card["bytes"] == (models.teacher / "model.safetensors").stat().st_size
    assert set(card["results"]) == {"wikitext2", "grammar_pairs", "piqa"}
    assert {"word_perplexity", "byte_perplexity", "token_perplexity_512"} <= set(
        card["results"]["wikitext2"]
    )
    for metrics in card["results"].values():
        for number in metrics.values():
            assert set(number) == {"value", "stderr"}
            assert math.isfinite(number["value"])
            assert number["stderr"] is None or number["stderr"] >= 0
    assert card["tasks"]["grammar_pairs"]["samples"] == 48
    assert card["tasks"]["grammar_pairs"]["documents"] == 1024
    assert card["tasks"]["grammar_pairs"]["chance"] == 0.5
    assert card["tasks"]["piqa"]["source"] == "mirror"
    assert is_passing(card["skipped"]["hellaswag"])  # tried again where the tests' hub is not off
    assert card["completions"][0]["prompt"] == "The history of"
    assert {"torch", "transformers", "lm_eval", "shearling"} <= set(card["versions"])
    json.dumps(card, allow_nan=False)


def test_the_same_model_gives_the_same_scorecard(
    cards: dict[str, dict[str, Any]],
    models: Any,
    settings: BenchmarkSettings,
    local_wikitext: str,
    tmp_path: Path,
) -> None:
    again = benchmark(models.teacher, settings, name="teacher", cache=tmp_path)
    changing = ("peak_memory_bytes", "memory", "speed")
    for key in set(again) - set(changing):
        assert again[key] == cards["teacher"][key], key


def test_what_the_model_or_the_data_lack_is_told(
    models: Any, settings: BenchmarkSettings, tmp_path: Path
) -> None:
    few = settings.model_copy(update={"tasks": ("piqa",), "limits": {}, "speed": False})
    templated = few.model_copy(update={"chat_template": True})
    with pytest.raises(ShearlingError, match="the student has no chat template"):
        benchmark(models.teacher, templated, name="the student", cache=tmp_path)
    shown = few.model_copy(update={"num_fewshot": 5000})
    with pytest.raises(ShearlingError, match=r"piqa has .* too few for 5000") as caught:
        benchmark(models.teacher, shown, name="teacher", cache=tmp_path)
    count = int(caught.value.hint.split(" to ")[1].split()[0])
    most = few.model_copy(update={"num_fewshot": count, "limit": 1})
    card = benchmark(models.teacher, most, name="teacher", cache=tmp_path)
    assert card["tasks"]["piqa"]["num_fewshot"] == count
    assert card["peak_memory_bytes"] is None, "nothing of the model's own was measured"
    with pytest.raises(ValidationError):
        BenchmarkSettings(prompts=("",))


@pytest.fixture
def arc(tmp_path: Path) -> Path:
    """A mirror folder with six questions in the layout of ARC."""
    folder = tmp_path / "arc"
    folder.mkdir()
    choices = {"text": ["rain", "a gate"], "label": ["A", "B"]}
    rows = [
        {"id": str(n), "question": f"What falls on day {n}?", "choices": choices, "answerKey": "A"}
        for n in range(6)
    ]
    text = "".join(f"{json.dumps(row)}\n" for row in rows)
    (folder / "arc_easy.jsonl").write_text(text, encoding="utf-8")
    return folder


def test_no_question_is_among_its_own_examples(
    arc: Path, models: Any, settings: BenchmarkSettings, tmp_path: Path
) -> None:
    asked = settings.model_copy(update={"mirror": str(arc), "num_fewshot": 5})
    with quiet_libraries():
        task = prepare("arc_easy", asked, tmp_path, tmp_path, silent)
        loaded = load_task(task, asked, {})
        assert loaded is not None
        check_examples(loaded, 5)
        with pytest.raises(ShearlingError, match="has 5 documents to show"):
            check_examples(loaded, 6)
        lm = PrefixLM(*load_model(models.teacher), batch_size=4)
        samples = evaluate(lm, loaded, limit=None, num_fewshot=5)["samples"]["arc_easy"]
    assert len(samples) == 6
    for sample in samples:
        prompt = sample["arguments"][0][0]
        assert prompt.count("What falls on day") == 6
        assert prompt.count(sample["doc"]["question"]) == 1


def test_examples_of_their_own_split_may_all_be_shown(
    arc: Path, settings: BenchmarkSettings, tmp_path: Path
) -> None:
    """As MMLU's five are."""
    lines = (arc / "arc_easy.jsonl").read_text("utf-8").replace("day", "night").splitlines(True)
    (arc / "arc_easy_train.jsonl").write_text("".join(lines[:5]), encoding="utf-8")
    asked = settings.model_copy(update={"mirror": str(arc)})
    with quiet_libraries():
        loaded = load_task(prepare("arc_easy", asked, tmp_path, tmp_path, silent), asked, {})
    assert loaded is not None
    check_examples(loaded, 5)
    with pytest.raises(ShearlingError, match="too few for 6"):
        check_examples(loaded, 6)


def test_running_text_has_no_examples(
    models: Any, settings: BenchmarkSettings, local_wikitext: str, tmp_path: Path
) -> None:
    text = {"tasks": ("wikitext2",), "limits": {}, "num_fewshot": 3, "speed": False}
    card = benchmark(
        models.teacher, settings.model_copy(update=text), name="teacher", cache=tmp_path
    )
    facts = card["tasks"]["wikitext2"]
    assert facts["num_fewshot"] == 0
    assert (facts["precision"], facts["max_length"]) == ("float32", 512)


def test_a_model_that_computes_nan_has_no_accuracy(
    models: Any, settings: BenchmarkSettings, tmp_path: Path
) -> None:
    """Of NaN the first choice would be taken, which is right as often as it is the first."""
    model, tokenizer = load_model(models.teacher)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    tokenizer.save_pretrained(tmp_path / "broken")
    asked = settings.model_copy(update={"tasks": ("piqa",), "limits": {}, "speed": False})
    card = benchmark(tmp_path / "broken", asked, name="broken", cache=tmp_path)
    assert card["results"] == {}
    assert card["skipped"] == {"piqa": NO_NUMBERS}


def test_numbers_are_those_of_simple_evaluate_with_stock_hflm(
    cards: dict[str, dict[str, Any]],
    models: Any,
    settings: BenchmarkSettings,
    local_wikitext: str,
    tmp_path: Path,
) -> None:
    with quiet_libraries():
        for name in ("wikitext2", "piqa"):
            prepare(name, settings, tmp_path, tmp_path, silent)
        model, tokenizer = load_model(models.teacher)
        expected = simple_evaluate(
            HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4),
            tasks=["wikitext2", "piqa"],
            task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
            bootstrap_iters=10,
        )["results"]
    found = cards["teacher"]["results"]
    for metric in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
        wanted = expected["wikitext2"][f"{metric},none"]
        assert found["wikitext2"][metric]["value"] == pytest.approx(wanted, rel=1e-5)
    for metric in ("acc", "acc_norm"):
        assert found["piqa"][metric]["value"] == expected["piqa"][f"{metric},none"]
        stderr = expected["piqa"][f"{metric}_stderr,none"]
        assert found["piqa"][metric]["stderr"] == pytest.approx(stderr)


def test_examples_in_the_prompts_are_those_of_stock_lm_eval(
    models: Any, settings: BenchmarkSettings, tmp_path: Path
) -> None:
    asked = settings.model_copy(update={"tasks": ("piqa",), "limits": {}, "num_fewshot": 3})
    card = benchmark(models.teacher, asked, name="x", cache=tmp_path)
    with quiet_libraries():
        prepare("piqa", settings, tmp_path, tmp_path, silent)
        model, tokenizer = load_model(models.teacher)
        stock = simple_evaluate(
            HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4),
            tasks=["piqa"],
            num_fewshot=3,
            task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
            bootstrap_iters=10,
        )
    assert card["tasks"]["piqa"]["hash"] == hash_of_samples(stock["samples"]["piqa"])
    value = card["results"]["piqa"]["acc"]["value"]
    assert value == stock["results"]["piqa"]["acc,none"]
    assert (card["num_fewshot"], card["tasks"]["piqa"]["num_fewshot"]) == (3, 3)


def spread_over(text: str, tokenizer: Any, windows: int) -> torch.Tensor:
    """[W, 512]: so many windows, from all over a text that has more."""
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    whole_WT = ids[: len(ids) // 512 * 512].view(-1, 512)
    assert len(whole_WT) > windows
    return torch.stack([whole_WT[int(n * len(whole_WT) / windows)] for n in range(windows)])


@pytest.mark.parametrize("windows", [1, 3, 7, 10, 99])
def test_windows_lie_all_over_the_text(windows: int) -> None:
    ids_WT = spread_windows(range(103), 10, windows)
    assert ids_WT.shape == (min(windows, 10), 10)
    starts = ids_WT[:, 0].tolist()
    assert all(start % 10 == 0 for start in starts)
    gaps = {after - before for before, after in pairwise([*starts, 100])}
    assert max(gaps) - min(gaps) <= 10
    assert torch.equal(ids_WT - ids_WT[:, :1], torch.arange(10).expand_as(ids_WT))
    assert spread_windows(range(9), 10, windows).shape == (0, 10)


def test_token_perplexity_is_what_the_formats_say(
    cards: dict[str, dict[str, Any]], models: Any, local_wikitext: str
) -> None:
    model, tokenizer = load_model(models.teacher)
    losses = []
    for window_T in spread_over(local_wikitext, tokenizer, 6):
        with torch.no_grad():
            losses.append(model(window_T[None], labels=window_T[None]).loss.item())
    found = cards["teacher"]["results"]["wikitext2"]["token_perplexity_512"]
    assert found["value"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)
    assert cards["teacher"]["tasks"]["wikitext2"]["perplexity_windows"] == len(losses)
    with pytest.raises(ShearlingError, match="fewer than one window"):
        position_losses(model, tokenizer, "short", length=512, windows=1)


def test_losses_by_position_are_what_the_formats_say(
    cards: dict[str, dict[str, Any]], models: Any, local_wikitext: str
) -> None:
    """The longest window that the model has room for, cut into stretches that double."""
    model, tokenizer = load_model(models.teacher)
    windows_WT = spread_over(local_wikitext, tokenizer, 6)
    with torch.no_grad():
        logprobs_WPV = model(windows_WT).logits[:, :-1].double().log_softmax(-1)
    losses_WP = -logprobs_WPV.gather(-1, windows_WT[:, 1:, None])[..., 0]
    found = cards["teacher"]["by_position"]
    assert (found["window"], found["windows"]) == (512, len(windows_WT))
    stretches = [(row["first"], row["last"]) for row in found["positions"]]
    assert stretches == [(1, 15), (16, 31), (32, 63), (64, 127), (128, 255), (256, 511)]
    for row in found["positions"]:
        means_W = losses_WP[:, row["first"] - 1 : row["last"]].mean(dim=1)
        assert row["loss"] == pytest.approx(float(means_W.mean()), abs=1e-4)
        assert row["stderr"] == pytest.approx(float(means_W.std() / len(means_W) ** 0.5), rel=1e-2)
    weights = [last - first + 1 for first, last in stretches]
    mean = np.average([row["loss"] for row in found["positions"]], weights=weights)
    perplexity = cards["teacher"]["results"]["wikitext2"]["token_perplexity_512"]["value"]
    assert math.exp(mean) == pytest.approx(perplexity, rel=1e-5)


@pytest.mark.parametrize("positions", [1, 7, 15, 16, 100, 1023])
def test_every_position_is_in_one_stretch(positions: int) -> None:
    rows = losses_by_position(np.arange(2.0 * positions).reshape(2, positions))
    covered = [p for row in rows for p in range(row["first"], row["last"] + 1)]  # type: ignore[arg-type, operator]
    assert covered == list(range(1, positions + 1))
    assert rows[0]["stderr"] is not None
    assert losses_by_position(np.full((1, 20), np.inf))[1]["loss"] is None


def test_other_windows_cover_the_same_text_and_too_long_ones_say_so(
    cards: dict[str, dict[str, Any]],
) -> None:
    card = cards["teacher"]
    samples = card["samples"]["wikitext2"]
    assert len(samples["token_perplexity_128"]) == 6 * 512 // 128
    assert "token_perplexity_2048" not in samples
    assert "512 positions" in card["tasks"]["wikitext2"]["left_out"]["token_perplexity_2048"]
    found = card["results"]["wikitext2"]["token_perplexity_128"]
    losses = samples["token_perplexity_128"]
    assert found["value"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)


def test_agreement_with_the_teacher_is_that_of_dense_logits(
    cards: dict[str, dict[str, Any]], models: Any, local_wikitext: str
) -> None:
    found = cards["distill"]["results"]["wikitext2"]
    taught, tokenizer = load_model(models.taught)
    teacher, _ = load_model(models.teacher)
    windows = spread_over(local_wikitext, tokenizer, 3)
    with torch.no_grad():
        mine = taught(windows).logits[:, :-1].log_softmax(-1)
        theirs = teacher(windows).logits[:, :-1].log_softmax(-1)
    kl = torch.nn.functional.kl_div(mine, theirs, log_target=True, reduction="none").sum(-1)
    assert found["teacher_kl"]["value"] == pytest.approx(kl.mean().item(), rel=1e-4)
    error = kl.mean(1).std().item() / math.sqrt(3)
    assert found["teacher_kl"]["stderr"] == pytest.approx(error, rel=1e-3)
    same = (mine.argmax(-1) == theirs.argmax(-1)).float().mean().item()
    assert found["teacher_first_choice"]["value"] == pytest.approx(same)
    confidence, choice = mine.exp().max(-1)
    right = (choice == windows[:, 1:]).float()
    bins = (confidence * 15).long().clamp(max=14)
    gaps = [(confidence - right)[bins == each].sum().abs().item() for each in range(15)]
    assert found["calibration_error"]["value"] == pytest.approx(sum(gaps) / right.numel(), abs=1e-5)
    assert found["calibration_error"]["stderr"] > 0
    assert "teacher_kl" not in cards["teacher"]["results"]["wikitext2"]
    told = [cards[name].get("teacher_sha256") for name in ("teacher", "distill")]
    assert told == [None, Checkpoint(models.teacher).fingerprint()]
    assert cards["teacher"]["tokenizer_sha256"] == cards["distill"]["tokenizer_sha256"]
    assert cards["distill"]["tasks"]["wikitext2"]["higher_is_better"]["teacher_kl"] is False


def test_padding_of_the_vocabulary_has_no_part_in_agreement(
    cards: dict[str, dict[str, Any]],
    models: Any,
    settings: BenchmarkSettings,
    local_wikitext: str,
    tmp_path: Path,
) -> None:
    asked = settings.model_copy(update={"tasks": ("wikitext2",), "limits": {}})
    teacher, student = (padded(folder, tmp_path / folder.name, rows)
                        for folder, rows in ((models.teacher, 40), (models.taught, 8)))  # fmt: skip
    for measured in (models.taught, student):
        card = benchmark(measured, asked, name="x", cache=tmp_path, teacher=teacher)
        for metric in ("teacher_kl", "teacher_first_choice"):
            wanted = cards["distill"]["results"]["wikitext2"][metric]["value"]
            found = card["results"]["wikitext2"][metric]["value"]
            assert found == pytest.approx(wanted, rel=1e-4), metric


def test_a_teacher_of_other_ids_is_not_held_against_the_model(
    models: Any, settings: BenchmarkSettings, local_wikitext: str, tmp_path: Path
) -> None:
    """Also where the vocabularies are of one size."""
    other = other_ids(models.teacher, tmp_path / "other")
    asked = settings.model_copy(update={"tasks": ("wikitext2",), "limits": {}})
    card = benchmark(models.taught, asked, name="x", cache=tmp_path, teacher=other)
    assert "teacher_kl" not in card["results"]["wikitext2"]
    reason = card["tasks"]["wikitext2"]["left_out"]["teacher_kl"]
    assert "tokens in the teacher, 384 in the model, 2 of" in reason
    assert "teacher_sha256" not in card
    (line,) = (line for line in skipped_lines(card, set()) if "teacher_kl" in line)
    assert line.startswith("skipped wikitext2, teacher_kl: Teacher and student have different tok")
    Console(width=400, file=(shown := io.StringIO())).print(scorecard_table(card))
    assert re.search(r"^ *wikitext2, teacher_kl +skipped: Teacher", shown.getvalue(), re.MULTILINE)


def test_a_model_too_short_for_windows_says_so(
    tiny_llama: Path, settings: BenchmarkSettings, local_wikitext: str, tmp_path: Path
) -> None:
    short = make_tiny_llama(tmp_path / "short", max_position_embeddings=256)
    asked = settings.model_copy(update={"tasks": ("wikitext2",), "limits": {}})
    card = benchmark(short, asked, name="x", cache=tmp_path, teacher=tiny_llama)
    told = card["tasks"]["wikitext2"]["left_out"]
    assert list(told) == [
        "token_perplexity_512", "token_perplexity_2048", "calibration_error", "teacher_kl",
    ]  # fmt: skip


def test_the_chat_template_reaches_the_prompts(models: Any, mirror: Path, tmp_path: Path) -> None:
    def measure(**changed: Any) -> dict[str, Any]:
        asked = BenchmarkSettings(tasks=("piqa", "instructions"), limit=4, mirror=str(mirror),
                                  speed=False, completion_tokens=1, **changed)  # fmt: skip
        return benchmark(model, asked, name="x", cache=tmp_path)

    def in_chat(card: dict[str, Any]) -> list[bool]:
        return [card["tasks"][task]["chat_template"] for task in ("piqa", "instructions")]

    model = tmp_path / "chatty"
    shutil.copytree(models.teacher, model)
    (model / "chat_template.jinja").write_text(
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    )
    dated: list[str] = []
    plain, chat = measure(), measure(chat_template=True)
    assert in_chat(plain) == [False, True]  # orders are given in the chat that there is
    assert in_chat(chat) == [True, True]
    for date in ("{{ strftime_now('%d %b %Y') }}", "26 Jul 2024"):
        (model / "chat_template.jinja").write_text(date + "{{ messages[0]['content'] }}")
        dated.append(measure()["tasks"]["instructions"]["hash"])
    assert dated[0] == dated[1], "prompts are the same on any day"
    (model / "chat_template.jinja").unlink()
    bare = measure()
    assert in_chat(bare) == [False, False]
    assert bare["tasks"]["instructions"]["hash"] != plain["tasks"]["instructions"]["hash"]
    assert bare["tasks"]["piqa"]["hash"] == plain["tasks"]["piqa"]["hash"]
    assert plain["tasks"]["piqa"]["hash"] != chat["tasks"]["piqa"]["hash"]
    assert "chat template" in (mismatch(plain, chat, "piqa") or "")
    assert len(chat["samples"]["piqa"]["acc"]) == 4


def test_written_answers_are_judged_kept_and_held_against_the_teachers(
    models: Any, tmp_path: Path
) -> None:
    asked = BenchmarkSettings(tasks=("instructions", "rewriting"), limit=4, speed=False,
                              completion_tokens=1)  # fmt: skip
    card = benchmark(models.teacher, asked, name="x", cache=tmp_path)
    for task, metric in (("instructions", "followed"), ("rewriting", "rouge_l")):
        assert len(card["answers"][task]) == 4
        assert 0 <= card["results"][task][metric]["value"] <= 1
        assert card["results"][task][metric]["stderr"] is not None
        assert 0 <= card["tasks"][task]["floor"][metric] <= 1
        assert len(card["samples"][task][metric]) == 4
    other = copy.deepcopy(card)
    assert [e.rouge_l for e in written_alike(card, other)] == [1.0, 1.0]
    card["answers"]["rewriting"] = ["the lamp is old"] * 4
    other["answers"]["rewriting"] = ["the lamp is new", "the lamp is old"] * 2
    (alike,) = (e for e in written_alike(card, other) if e.task == "rewriting")
    assert alike.rouge_l == pytest.approx((0.75 + 1) / 2)
    other["tasks"]["rewriting"]["hash"] = "other"
    assert [e.task for e in written_alike(card, other)] == ["instructions"]


def test_lm_evals_two_cache_traps_are_not_stepped_in(
    models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its request cache switched on, lm-eval would answer a changed file with the old one."""
    monkeypatch.setenv("LM_HARNESS_CACHE_PATH", str(tmp_path / "lm-cache"))

    def measure(model: Path, text: str, limit: int) -> dict[str, Any]:
        lines = "".join(
            json.dumps({"goal": f"{text} {n}", "sol1": "The hill.", "sol2": "Wool.", "label": 0})
            + "\n"
            for n in range(6)
        )
        (tmp_path / "piqa.jsonl").write_text(lines, encoding="utf-8")
        asked = BenchmarkSettings(tasks=("piqa",), limit=limit, mirror=str(tmp_path), speed=False,
                                  completion_tokens=1)  # fmt: skip
        return benchmark(model, asked, name="x", cache=tmp_path)

    first = measure(models.teacher, "The llama", 3)
    other_data = measure(models.teacher, "A shepherd", 3)
    assert first["tasks"]["piqa"]["hash"] != other_data["tasks"]["piqa"]["hash"]
    assert first["tasks"]["piqa"]["data_sha256"] != other_data["tasks"]["piqa"]["data_sha256"]
    other_limit = measure(models.teacher, "A shepherd", 5)
    assert other_limit["tasks"]["piqa"]["samples"] == 5
    other_model = measure(models.pruned, "A shepherd", 3)
    assert other_model["tasks"]["piqa"]["hash"] == other_data["tasks"]["piqa"]["hash"]
    assert other_model["completions"] != other_data["completions"] or (
        other_model["parameters"] != other_data["parameters"]
    )
    assert not (tmp_path / "lm-cache").exists()


def write_flock(folder: Path, *, by_documents: bool) -> Path:
    """lm-eval's files of a group of two tasks, one of them in a group inside."""
    choices = {"doc_to_text": "{{q}}", "doc_to_choice": "{{c}}", "doc_to_target": "label"}
    for name, documents in (("lambs", 8), ("ewes", 4)):
        rows = [{"q": f"The {name[:-1]} {text}", "c": [" sees the hill", " wool"], "label": n % 2}
                for n, text in enumerate(tiny_documents(documents, seed=documents))]  # fmt: skip
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        files = {"test": str(folder / f"{name}.jsonl")}
        task = {
            "task": name, "dataset_path": "json", "output_type": "multiple_choice", **choices,
            "dataset_kwargs": {"data_files": files, "cache_dir": str(folder / "arrow")},
            "test_split": "test", "metric_list": [{"metric": "acc", "aggregation": "mean"}],
        }  # fmt: skip
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
    counted = {"aggregate_metric_list": [{"metric": "acc", "weight_by_size": by_documents}]}
    for group in ({"group": "young", "task": ["lambs"], **counted},
                  {"group": "flock", "task": ["young", "ewes"], **counted},
                  {"group": "farm", "task": ["flock"]}):  # fmt: skip
        (folder / f"{group['group']}.yaml").write_text(yaml.safe_dump(group))
    return folder


@pytest.mark.parametrize("by_documents", [True, False])
def test_a_group_of_tasks_counts_as_one_task(
    by_documents: bool, models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As MMLU does, whose 57 tasks would outvote all others; a group without a number is none."""
    folder = write_flock(tmp_path, by_documents=by_documents)

    def load(*_: Any) -> dict[str, Any]:
        return dict(TaskManager(include_path=str(folder), include_defaults=False).load(["farm"]))

    monkeypatch.setattr("reports.benchmark.load_task", load)
    asked = BenchmarkSettings(tasks=("mmlu",), speed=False, completion_tokens=1)
    teacher, cut = (
        benchmark(model, asked, name=model.name, cache=tmp_path)
        for model in (models.teacher, models.pruned)
    )
    assert set(teacher["results"]) == {"lambs", "ewes", "young", "flock"}
    facts = teacher["tasks"]
    assert [facts[name].get("group") for name in ("flock", "young", "lambs", "ewes")] == [
        None, "flock", "flock", "flock",
    ]  # fmt: skip
    assert (facts["flock"]["samples"], facts["flock"]["chance"]) == (12, 0.5)
    samples = {name: unpack(values["acc"]) for name, values in teacher["samples"].items()}
    value = teacher["results"]["flock"]["acc"]["value"]
    assert np.mean(samples["flock"]) == pytest.approx(value)
    if by_documents:
        assert samples["flock"] == samples["lambs"] + samples["ewes"]
    else:
        assert value == pytest.approx((np.mean(samples["lambs"]) + np.mean(samples["ewes"])) / 2)
    (entry,) = compare_models(teacher, cut)
    assert (entry.task, entry.documents) == ("flock", 12)
    assert entry.p is not None
    assert entry.difference == pytest.approx((entry.value or 0) - (entry.reference or 0))
    assert share_tasks(teacher) == {"flock": "acc"}
    assert mean_share(teacher) == Mean(
        value=value, stderr=teacher["results"]["flock"]["acc"]["stderr"], tasks=1
    )
    assert headline(teacher).count(" acc ") == 1
    every = compare_models(teacher, cut, headlines_only=False)
    assert {entry.task for entry in every} == {"lambs", "ewes", "young", "flock"}
    assert settings_like(cut, {})["tasks"] == ["flock"]
    cut["tasks"]["ewes"]["hash"] = cut["tasks"]["flock"]["hash"] = "other"
    assert mismatch(teacher, cut, "flock")


def test_means_are_of_right_answers_on_common_tasks() -> None:
    def card(**tasks: str) -> dict[str, Any]:
        scores = {t: {metric: {"value": 0.5, "stderr": 0.1}} for t, metric in tasks.items()}
        return {"results": scores, "tasks": {task: {} for task in tasks}}

    cards = [
        card(instructions="followed", copa="acc", piqa="acc", gsm8k="exact_match"),
        card(instructions="followed", piqa="acc", gsm8k="exact_match"),
        card(summaries="followed"),  # has no tasks with right answers
    ]
    assert share_tasks(cards[0]) == {"copa": "acc", "piqa": "acc", "gsm8k": "exact_match"}
    assert common_tasks(cards) == ["piqa", "gsm8k"]
    assert common_tasks(cards[2:]) == []
    mean = mean_share(cards[0], common_tasks(cards))
    assert mean is not None
    assert mean.tasks == 2


def test_errors_of_perplexities() -> None:
    value, error = perplexity_of_windows([1.0, 1.2, 0.8, 1.0])
    assert value == pytest.approx(math.e)
    assert error == pytest.approx(math.e * 0.1632993 / 2, rel=1e-5)
    assert perplexity_of_windows([1.0])[1] is None
    assert ratio_error([2.0, 4.0, 6.0], [1.0, 2.0, 3.0]) == pytest.approx(0.0)
    assert ratio_error([1.0], [1.0]) is None


def test_what_json_cannot_hold_becomes_null() -> None:
    assert finite(float("nan")) is finite(float("inf")) is finite("N/A") is None
    flat = {"alias": "x", "acc,none": 0.5, "acc_stderr,none": "N/A", "f1,strict": 1.0}
    assert read_metrics(flat) == {
        "acc": {"value": 0.5, "stderr": None},
        "f1,strict": {"value": 1.0, "stderr": None},
    }


def test_samples_are_kept_small() -> None:
    rows = [
        {"filter": "none", "metrics": ["acc", "word_perplexity"], "acc": float(index % 2),
         "word_perplexity": (-1.5, 3)} for index in range(4)
    ]  # fmt: skip
    assert keep_samples(rows) == {"acc": "0101", "word_perplexity": [[-1.5, 3.0]] * 4}


def test_floors_are_those_of_guessing_and_of_one_constant_answer() -> None:
    def sample(target: Any, choices: int, doc: Any = None) -> dict[str, Any]:
        arguments = [("q", f" {index} apples") for index in range(choices)]
        return {"filter": "none", "metrics": ["acc"], "target": target, "arguments": arguments,
                "doc": doc or {}}  # fmt: skip

    numbers = [sample(0, 2), sample(1, 4), sample("1", 4), sample(" 1 apples", 2)]
    assert floors(numbers) == {"chance": 0.375, "constant": 0.75}
    assert floors([sample(0, 2), sample(0, 2)])["constant"] is None
    # Of numbers as choices a number says which, a text what.
    sums = [sample(target, 3) for target in (0, 0, 1, "0")]
    for question in sums:
        question["arguments"] = [("1 - 1 =", f" {choice}") for choice in (2, 0, 1)]
    assert floors(sums) == {"chance": pytest.approx(1 / 3), "constant": 0.5}
    several = {"mc2_targets": {"labels": [1, 0, 0, 0]}}
    assert floors([sample(0, 4, several)]) == {"chance": 0.25, "constant": None}


def test_offline_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert hub_answers()
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert not hub_answers(timeout=0.2)


def test_a_proxy_is_asked_for_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind one no connection of our own gets out, and the hub is there all the same."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:8")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert hub_answers(timeout=0.2)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert not hub_answers(timeout=0.2)


class Hub(BaseHTTPRequestHandler):
    """A hub that answers every request with one status."""

    status = 200

    def do_HEAD(self) -> None:
        self.send_response(self.status)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.mark.parametrize(
    ("status", "passing"), [(429, True), (503, True), (401, False), (404, False)]
)
def test_a_busy_hub_is_told_from_one_that_refuses(
    status: int, passing: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(Hub, "status", status)
    monkeypatch.setattr(time, "sleep", lambda _: None)  # the library tries for 23 seconds
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with HTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        try:
            address = f"http://127.0.0.1:{server.server_address[1]}"
            with pytest.raises(OSError) as caught:  # noqa: PT011 (of many kinds)
                hf_hub_download("a/b", "c.json", endpoint=address, cache_dir=tmp_path)
        finally:
            server.shutdown()
    assert may_pass(caught.value) is passing
    hidden = FileNotFoundError("no such data set")  # as datasets hides it
    hidden.__context__, hidden.__suppress_context__ = caught.value, True
    assert may_pass(hidden) is passing


def failing_task(folder: Path, error: str) -> Task:
    """A task on the hub, whose data set ends in an error when it is loaded."""
    code = f"def load(**_):\n    try:\n        raise {error}\n    except Exception as error:\n"
    (folder / "broken.py").write_text(f"{code}        raise ValueError('no data set') from error\n")
    lines = ["task: broken", "custom_dataset: !function broken.load", "test_split: test"]
    (folder / "broken.yaml").write_text("\n".join([*lines, "doc_to_text: x", "doc_to_target: y\n"]))
    return Task(name="broken", source="hub", file=folder / "broken.yaml")


def test_a_full_disk_is_no_reason_to_skip_a_task(tmp_path: Path) -> None:
    skipped: dict[str, str] = {}
    settings = BenchmarkSettings()
    assert load_task(failing_task(tmp_path, "KeyError('x')"), settings, skipped) is None
    assert "and loading them failed: ValueError: no data set" in skipped["broken"]
    assert not is_passing(skipped["broken"])
    assert load_task(failing_task(tmp_path, "TimeoutError()"), settings, skipped) is None
    assert is_passing(skipped["broken"])
    for error in ("OSError(28, 'No space')", "OSError('Not enough disk space. Needed: 1 GB')"):
        with pytest.raises(ShearlingError, match="disk is full") as caught:
            load_task(failing_task(tmp_path, error), settings, {})
        assert "HF_HOME" in caught.value.hint
    with pytest.raises(ValueError, match="no data set"):  # which a run tells as a lack of memory
        load_task(failing_task(tmp_path, "MemoryError()"), settings, {})


def test_speed_is_measured_in_a_process_of_its_own(tiny_llama: Path) -> None:
    measured = measure_speed(tiny_llama)
    assert measured["speed"]["prefill_tokens_per_second"] > 0
    assert measured["speed"]["decode_tokens_per_second"] > 0
    for what in ("prefill", "decode"):
        low, high = measured["speed"][f"{what}_tokens_per_second_quartiles"]
        assert low < measured["speed"][f"{what}_tokens_per_second"] < high
    assert measured["speed"]["prompt_tokens"] == 448  # 512 positions, 64 of them for new tokens
    assert measured["peak_memory_bytes"] > measured["memory"]["before_loading_bytes"] > 10**7


def test_a_teacher_writes_in_turns_beside_the_model(tiny_llama: Path, tmp_path: Path) -> None:
    """The one with eight times the layers is slower."""
    config = read_json(tiny_llama / "config.json")
    deep = LlamaConfig(**config | {"num_hidden_layers": 8 * config["num_hidden_layers"]})
    LlamaForCausalLM(deep).save_pretrained(tmp_path)
    for file in tiny_llama.glob("token*"):
        shutil.copy(file, tmp_path)
    asked = BenchmarkSettings(tasks=("grammar_pairs",), limit=2, completion_tokens=1)
    card = benchmark(tiny_llama, asked, name="x", cache=tmp_path, teacher=tmp_path)
    low, high = card["speed"]["decode_times_teacher_interval"]
    assert 1 < low <= card["speed"]["decode_times_teacher"] <= high
    card = benchmark(tiny_llama, asked, name="x", cache=tmp_path)
    assert "decode_times_teacher" not in card["speed"]


def test_a_teacher_that_fails_beside_the_model_costs_the_ratio_alone(
    tiny_llama: Path, tmp_path: Path
) -> None:
    speed = measure_speed(tiny_llama, beside=tmp_path)["speed"]  # an empty folder
    assert speed["decode_tokens_per_second"] > 0
    assert "decode_times_teacher" not in speed
    told = speed["decode_times_teacher_left_out"]
    assert told == "it ended with code 1: Name a folder with config.json and model.safetensors."


def test_models_are_opened_where_memory_has_room_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [tmp_path / "student", tmp_path / "teacher"]
    for folder in folders:
        folder.mkdir()
        with (folder / "model.safetensors").open("wb") as file:
            file.truncate(500_000_000)  # sparse
    free = SimpleNamespace(available=2_600_000_000)
    monkeypatch.setattr("psutil.virtual_memory", lambda: free)
    assert has_room("cpu", *folders)  # 32 bits where the file may have 16, and a quarter more
    free.available = 2_400_000_000
    assert not has_room("cpu", *folders)


def test_a_teacher_without_room_in_memory_is_told(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=0))
    monkeypatch.setattr("sys.argv", ["speed", str(tiny_llama), "--beside", str(tiny_llama)])
    speed_process.main()
    alone, beside = map(json.loads, capsys.readouterr().out.splitlines())
    told = beside["speed"].pop("decode_times_teacher_left_out")
    assert told == "free memory has no room for both models"
    assert beside == alone


def test_a_child_that_fails_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ShearlingError, match="ended with code"):
        measure_speed(tmp_path)


def test_a_missing_checkpoint_and_a_missing_task_are_clear_errors(
    tiny_llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(ShearlingError, match=r"no config\.json"):
        benchmark(tmp_path, BenchmarkSettings(), name="x", cache=tmp_path)
    tasks = BenchmarkSettings(tasks=("grammar_pair",))
    with pytest.raises(ShearlingError, match="grammar_pair "):
        benchmark(tiny_llama, tasks, name="x", cache=tmp_path)


def test_scorecards_can_be_written(cards: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    write_json(tmp_path / "scorecard.json", cards["distill"])
    assert (tmp_path / "scorecard.json").stat().st_size < 20_000


def test_measuring_prints_nothing(
    models: Any, mirror: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    lines = [json.dumps({"text": f"The llama sees the hill {word}"}) for word in ("again", "now")]
    (mirror / "lambada_openai.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    asked = BenchmarkSettings(tasks=("lambada_openai",), mirror=str(mirror), speed=False)
    card = benchmark(models.teacher, asked, name="x", cache=tmp_path)
    assert card["results"]["lambada_openai"]["perplexity"]["stderr"] is not None  # bootstrapped
    out = capfd.readouterr()
    assert (out.out, out.err) == ("", "")
