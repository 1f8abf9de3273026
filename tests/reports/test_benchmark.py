"""Scorecards: lm-eval's own numbers, exact perplexities, honest gaps."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from reports.benchmark import benchmark, finite, floors, keep_samples, read_metrics
from reports.hub import hub_answers
from reports.load import load_model, quiet_libraries
from reports.perplexity import perplexity_of_windows, ratio_error, window_losses
from reports.settings import BenchmarkSettings
from reports.speed import measure_speed
from reports.tasks import prepare
from shearling import ShearlingError, silent, write_json


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
    assert "hellaswag" in card["skipped"]
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


def test_token_perplexity_is_what_the_formats_say(
    cards: dict[str, dict[str, Any]], models: Any, local_wikitext: str
) -> None:
    model, tokenizer = load_model(models.teacher)
    ids = tokenizer(local_wikitext, add_special_tokens=False)["input_ids"]
    losses = []
    for start in range(0, len(ids) // 512 * 512, 512):
        window = torch.tensor([ids[start : start + 512]])
        with torch.no_grad():
            losses.append(model(window, labels=window).loss.item())
    losses = losses[:6]
    found = cards["teacher"]["results"]["wikitext2"]["token_perplexity_512"]
    assert found["value"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)
    assert cards["teacher"]["tasks"]["wikitext2"]["perplexity_windows"] == len(losses)
    with pytest.raises(ShearlingError, match="fewer than one window"):
        window_losses(model, tokenizer, "short", length=512, windows=1)


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
    several = {"mc2_targets": {"labels": [1, 0, 0, 0]}}
    assert floors([sample(0, 4, several)]) == {"chance": 0.25, "constant": None}


def test_offline_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert hub_answers()
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert not hub_answers(timeout=0.2)


def test_speed_is_measured_in_a_process_of_its_own(tiny_llama: Path) -> None:
    measured = measure_speed(tiny_llama)
    assert measured["speed"]["prefill_tokens_per_second"] > 0
    assert measured["speed"]["decode_tokens_per_second"] > 0
    assert measured["speed"]["prompt_tokens"] == 448  # 512 positions, 64 of them for new tokens
    assert measured["peak_memory_bytes"] > measured["memory"]["before_loading_bytes"] > 10**7


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
