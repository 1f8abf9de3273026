"""The report of a whole run, of a broken one, and of a hostile one."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reports import words
from reports.chart import SERIES, told_apart
from reports.charts import make_charts
from reports.model_card import write_model_card
from reports.page import (
    TEMPLATES,
    markdown_cell,
    render_markdown,
    report_data,
    script_json,
    script_text,
    together,
    write_report,
)
from reports.pruning_charts import layer_scores
from reports.quality_charts import tasks_by_model
from reports.run_folder import read_run
from reports.verdict import judge, mean_difference
from reports.view import make_view
from reports.words import significant
from shearling import ShearlingError, read_json, write_json

HOSTILE = "</script><script>alert(1)</script>"


class Page(HTMLParser):
    """What an HTML parser finds: elements with their attributes, ids, scripts and texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        (self.scripts if self._inside == "script" else self.texts).append(data)

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.elements)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def parse(run: Path) -> Page:
    return Page(write_report(run).read_text(encoding="utf-8"))


def test_a_whole_run_is_told_in_the_agreed_order(run: Path) -> None:
    page = parse(run)
    sections = [attrs["id"] for tag, attrs in page.elements if tag == "section"]
    assert sections == [
        "verdict", "cost", "stages", "quality", "tasks", "teaching", "kept", "transfer-set",
        "completions", "plan", "again",
    ]  # fmt: skip
    assert "After distill, " in page.text
    assert "of the teacher's parameters are left" in page.text
    assert "its perplexity on wikitext2 is" in page.text
    assert "came back" in page.text
    assert "within noise" in page.text
    assert "hellaswag: " in page.text
    left_out = "wikitext2, token_perplexity_2048"
    assert f"{left_out}: the model has 512 positions." in page.text
    markdown = (run / "report.md").read_text(encoding="utf-8").replace("\\", "")
    assert f"- {left_out} was skipped: the model has 512 positions.\n" in markdown
    assert "3 of 4 (75%)" in page.text
    assert "shearling run tiny --set distill.tokens=6144" in page.text
    drawn = [attrs["data-chart"] for _, attrs in page.elements if "data-chart" in attrs]
    assert drawn == CHARTS
    assert "The run was interrupted once and went on at the dashed lines." in page.text


CHARTS = [
    "quality-by-size", "quality-by-speed", "tasks", "quality-by-position", "loss", "heldout",
    "learning-rate", "gradient-norm", "training-speed", "layers", "heads", "neurons", "hidden",
    "reconstruction",
]  # fmt: skip


def test_the_contents_lead_to_the_sections_that_are_there(run: Path) -> None:
    (run / "plan.json").unlink()
    page = parse(run)
    ids = {attrs.get("id") for _, attrs in page.elements}
    links = [attrs["href"] for tag, attrs in page.elements if tag == "a"]
    assert all((link or "").removeprefix("#") in ids for link in links)
    assert "#quality" in links
    assert "#plan" not in links


def without_perplexity(run: Path) -> Path:
    for path in run.glob("stages/*/scorecard.json"):
        card = read_json(path)
        for part in ("results", "tasks", "samples"):
            card[part].pop("wikitext2", None)
        write_json(path, card)
    return run


def test_a_run_without_perplexity_is_judged_by_right_answers(run: Path) -> None:
    """Two tasks: their means, and the error of independent differences."""
    found = read_run(without_perplexity(run))
    judgement = judge(found)
    entries = judgement.comparisons["distill"]
    assert [entry.task for entry in entries] == ["grammar_pairs", "piqa"]
    differences = [entry.difference or 0.0 for entry in entries]
    stderr = sum((entry.stderr or 0.0) ** 2 for entry in entries) ** 0.5 / 2
    mean = mean_difference(entries)
    assert mean is not None
    assert mean.difference == pytest.approx(sum(differences) / 2)
    assert mean.stderr == pytest.approx(stderr)
    view = make_view(found, judgement)
    told = f"the student answers {words.score('acc', mean.value)} of 2 tasks right instead of "
    assert told in view.verdict
    (chart,) = [chart for chart in view.charts if chart.name == "quality-by-size"]
    assert "higher is better" in chart.text
    shares = [row["quality"] for row in chart.spec["data"]["values"]]
    assert all(0 <= share <= 1 for share in shares)
    assert len(shares) == 3


def test_what_has_no_paired_test_is_not_said_to_have_come_back(run: Path) -> None:
    for number, path in enumerate(sorted(run.glob("stages/*/scorecard.json"))):
        card = read_json(path)
        card["results"]["piqa"] = {"mcc": {"value": number / 4, "stderr": 0.1}}
        card["samples"]["piqa"] = {"mcc": [[1, 1], [0, number % 2]] * 12}
        write_json(path, card)
    found = read_run(run)
    judgement = judge(found)
    assert "piqa" not in [entry.task for entry in judgement.recoveries]
    assert (
        "piqa is not compared: no paired test for this metric."
        in make_view(found, judgement).details
    )


def test_one_tasks_difference_is_its_own(run: Path) -> None:
    judgement = judge(read_run(without_perplexity(run)))
    entry = judgement.comparisons["distill"][1]
    assert mean_difference([entry]) is entry
    assert mean_difference([]) is None


def test_members_of_a_group_stand_in_all_metrics_only(run: Path) -> None:
    for path in run.glob("stages/*/scorecard.json"):
        card = read_json(path)
        for part in ("results", "tasks", "samples"):
            card[part]["zoo"] = card[part]["piqa"]
        for member in ("grammar_pairs", "piqa"):
            card["tasks"][member] = {**card["tasks"][member], "group": "zoo"}
        write_json(path, card)
    found = read_run(run)
    judgement = judge(found)
    view = make_view(found, judgement, [found])
    assert {entry.task for entry in judgement.comparisons["distill"]} == {"wikitext2", "zoo"}
    for table in (view.tasks, view.answers):
        assert table is not None
        assert {row[0].text for row in table.rows} == {"wikitext2", "zoo"}
    assert view.rivals is not None
    assert not any("piqa" in column for column in view.rivals.columns)
    assert view.stages is not None
    assert "1 task" in view.stages.rows[0][3].note
    assert view.all_metrics is not None
    assert {"grammar_pairs", "piqa", "zoo"} < {row[0].text for row in view.all_metrics.rows}
    bars = tasks_by_model(found)
    assert bars is not None
    assert "zoo" in str(bars.spec)
    assert "piqa" not in str(bars.spec)
    card = write_model_card(run, run, "distill").read_text()
    assert "zoo" in card
    assert "piqa, " not in card


def test_lines_do_not_end_between_a_number_and_its_error() -> None:
    assert together("67.6 (+31.6 ± 2.7 pp)") == "67.6 (+31.6\u00a0±\u00a02.7\u00a0pp)"
    assert together("a supper") == "a supper"


def test_the_page_is_small_and_loads_nothing(run: Path) -> None:
    page = parse(run)
    assert (run / "report.html").stat().st_size < 2_000_000
    for tag, attrs in page.elements:
        assert tag not in ("link", "iframe", "object", "embed", "base") or attrs["href"] == "data:,"
        for name in ("src", "srcset", "action", "data", "poster"):
            assert name not in attrs
    policy = next(a["content"] for _, a in page.elements if "http-equiv" in a)
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert "unsafe-eval" not in policy
    assert "script-src 'sha256-" in policy


def test_the_page_can_be_read_without_eyes(run: Path) -> None:
    page = parse(run)
    assert ("html", {"lang": "en"}) in page.elements
    for tag, attrs in page.elements:
        if tag == "th":
            assert attrs.get("scope") in ("row", "col")
        if (attrs.get("id") or "").startswith("chart-"):
            assert attrs["role"] == "img"
            assert len(attrs["aria-label"] or "") > 20
    assert page.count("figcaption") == page.count("figure") == len(CHARTS)
    assert page.count("caption") == page.count("table")
    assert page.count("h1") == 1


def test_report_json_has_the_agreed_form(run: Path) -> None:
    write_report(run)
    data = read_json(run / "report.json")
    assert data["schema"] == 1
    assert data["recipe"] == "tiny"
    assert [stage["name"] for stage in data["stages"]] == ["teacher", "prune", "distill"]
    for stage in data["stages"]:
        assert {
            "name",
            "kind",
            "state",
            "reason",
            "seconds",
            "peak_memory_bytes",
            "scorecard",
        } <= set(stage)
        assert stage["scorecard"]["schema"] == 1
        assert "samples" not in stage["scorecard"]
    comparisons = data["stages"][1]["comparisons"]
    assert {entry["verdict"] for entry in comparisons} <= {
        "better", "worse", "within noise", "the same",
    }  # fmt: skip
    assert data["verdict"].startswith("After distill")


def test_markdown_says_the_same(run: Path) -> None:
    write_report(run)
    text = (run / "report.md").read_text(encoding="utf-8")
    assert text.startswith("# tiny\n")
    assert "After distill, " in text
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert len(tables) == 6
    for table in tables:
        unescaped = [re.sub(r"\\\|", "", line) for line in table.splitlines()]
        assert len({line.count("|") for line in unescaped}) == 1


def test_the_report_only_reads(run: Path) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    write_report(run)
    write_report(run)
    assert {path for path in run.rglob("*") if path.is_file()} - set(before) == {
        run / "report.html", run / "report.json", run / "report.md",
    }  # fmt: skip
    assert all(path.read_bytes() == content for path, content in before.items())


FILES = (
    "run.json", "recipe.yaml", "lock.json", "stages/teacher/scorecard.json",
    "stages/distill/scorecard.json", "stages/prune/selection.json",
    "stages/distill/metrics.jsonl", "stages/transfer_set/transfer_set.json",
    "stages/distill/stage.json",
)  # fmt: skip
FOLDERS = ("stages", "stages/teacher", "stages/prune", "stages/distill", "stages/prune/model")


@pytest.mark.parametrize("lost", [*FILES, *FOLDERS])
def test_a_run_with_something_missing_still_has_a_report(lost: str, run: Path) -> None:
    path = run / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert parse(run).count("section") >= 8
    assert read_json(run / "report.json")["schema"] == 1


@pytest.mark.parametrize(
    "content",
    [None, b'[1, "x", null]\n', b"\xff\x00\xfe" * 40, b'{"a": Infinity}', b'{"a": 1e999}'],
)
@pytest.mark.parametrize("damaged", FILES)
def test_a_run_with_a_damaged_file_still_has_a_report(
    damaged: str, content: bytes | None, run: Path
) -> None:
    path = run / damaged
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if content is None else content)
    assert parse(run).count("section") >= 8
    assert read_json(run / "report.json")["schema"] == 1


def test_results_of_earlier_settings_are_not_taken_for_this_recipes(run: Path) -> None:
    record = run / "stages" / "prune" / "stage.json"
    write_json(record, {**read_json(record), "key": "earlier"})
    write_json(run / "stages" / "distill" / "benchmark.json", {"key": "earlier"})
    keys = {"prune": "now", "distill/benchmark": "now"}
    write_json(run / "lock.json", {**read_json(run / "lock.json"), "keys": keys})
    found = read_run(run)
    assert [stage.scorecard is not None for stage in found.models] == [True, False, False]
    assert any("earlier settings" in problem for problem in found.problems)
    assert "teacher" in parse(run).text


def test_every_single_value_of_a_scorecard_may_be_wrong(run: Path) -> None:
    path = run / "stages" / "prune" / "scorecard.json"
    card = read_json(path)
    for key in card:
        for wrong in (None, "text", [None], {"x": None}, {"wikitext2": 3}):
            write_json(path, {**card, key: wrong})
            found = read_run(run)
            judgement = judge(found)
            view = make_view(found, judgement)
            render_markdown(view)
            json.dumps(report_data(found, judgement, view), allow_nan=False)


def test_a_run_at_work_says_what_is_missing(run: Path) -> None:
    journal = read_json(run / "run.json")
    journal |= {"state": "running", "pid": 2**22 + 1, "process_started": 1.0}
    journal["stages"][-1] |= {"state": "running", "seconds": None}
    write_json(run / "run.json", journal)
    shutil.rmtree(run / "stages" / "distill")
    page = parse(run)
    assert "The run was interrupted; the same command goes on where it stopped." in page.text
    assert "After prune, " in page.text
    assert read_json(run / "report.json")["stages"][-1]["state"] == "interrupted"


def test_a_failed_run_tells_its_error(run: Path) -> None:
    journal = read_json(run / "run.json")
    journal |= {"state": "failed", "error": {"what": "The disk is full.", "hint": "Free some."}}
    write_json(run / "run.json", journal)
    assert "The disk is full. Free some." in parse(run).text


def test_a_run_without_any_scorecard(run: Path) -> None:
    for path in run.glob("stages/*/scorecard.json"):
        path.unlink()
    page = parse(run)
    assert "No model has been measured yet" in page.text
    assert "Made but not measured yet: teacher, prune, distill." in page.text


def test_a_folder_that_is_no_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ShearlingError, match="is not a run"):
        write_report(tmp_path)


def test_no_text_can_become_markup(hostile_run: Path) -> None:
    page = parse(hostile_run)
    assert page.count("script") == 3
    assert page.count("img") == page.count("b") == 0
    assert not [attrs for _, attrs in page.elements if any(name.startswith("on") for name in attrs)]
    assert "alert(1)" in page.text  # shown, as text
    assert "{{7*7}}" in page.text
    assert not any("alert(1)</" in script for script in page.scripts)
    markdown = (hostile_run / "report.md").read_text(encoding="utf-8")
    fenced = re.sub(r"```sh\n.*?\n```", "", markdown, flags=re.DOTALL)
    assert "<script" not in fenced.replace("\\<", "")


def test_names_in_captions_and_commands_stay_names(run: Path, tmp_path: Path) -> None:
    moved = tmp_path / "my runs" / "tiny"
    shutil.copytree(run, moved)
    journal = read_json(moved / "run.json")
    journal["stages"][-1]["name"] = "<b>*last*"
    write_json(moved / "run.json", journal)
    (moved / "stages" / "distill").rename(moved / "stages" / "<b>*last*")
    (moved / "recipe.yaml").write_text("name: a *run* <b>\n")
    write_report(moved, run)
    markdown = (moved / "report.md").read_text(encoding="utf-8")
    assert "Is \\<b\\>\\*last\\* worse than the teacher" in markdown
    assert "to that of a \\*run\\* \\<b\\>, from the same documents" in markdown
    assert f"shearling report '{moved}'\n" in markdown


def test_json_and_scripts_cannot_close_their_element() -> None:
    assert "</" not in script_json({"x": HOSTILE})
    assert json.loads(str(script_json({"x": HOSTILE}))) == {"x": HOSTILE}
    assert "</script" not in script_text('x = "</script>"; y = "<!--"; z = "<SCRIPT>"')
    assert "<!--" not in script_text('y = "<!--"')
    assert markdown_cell("a|b\n<c>`d`") == r"a\|b \<c\>\`d\`"


def test_a_stage_name_cannot_lead_out_of_the_run(run: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    write_json(secret / "stage.json", {"state": "done", "reason": "SECRET"})
    journal = read_json(run / "run.json")
    journal["stages"].append({"name": "../../../secret", "kind": "x"})
    write_json(run / "run.json", journal)
    assert "SECRET" not in parse(run).text


def test_no_two_models_look_alike(crowded_run: Path) -> None:
    found = read_run(crowded_run)
    names = [stage.name for stage in found.measured]
    looks = told_apart("model", names, by="shape")
    ranges = [looks[channel].to_dict()["scale"]["range"] for channel in ("color", "shape")]
    assert len(set(zip(*ranges, strict=True))) == len(names) == 20
    assert set(told_apart("model", names[:8], by="shape")) == {"color"}
    chart = next(chart for chart in make_charts(found) if chart.name == "quality-by-size")
    labels = [row["label"] for row in chart.spec["data"]["values"] if row["label"]]
    assert 2 <= len(labels) <= 3  # of so many points
    assert labels[0].startswith("teacher · ")
    assert labels[-1].startswith("prune-and…une-an16 · ")
    for stage in names:
        assert stage in chart.numbers


VIEWS = {
    "everybody": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "protanopia": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "deuteranopia": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    "tritanopia": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
}
"""What is seen of linear RGB (Machado, Oliveira, Fernandes 2009)."""


@pytest.mark.parametrize("seen_by", VIEWS)
def test_colours_are_told_apart_by_all_eyes(seen_by: str) -> None:
    """Distances in Oklab (Ottosson 2020), times 100: of Okabe and Ito's eight colours 7.6."""
    style = (TEMPLATES / "report.css").read_text()
    series = re.findall(r"--series-\d: #(\w{6})", style)
    assert len(series) == 3 * len(SERIES)  # in light, in the dark, on paper
    cones = [[0.4122, 0.5363, 0.0514], [0.2119, 0.6807, 0.1074], [0.0883, 0.2817, 0.6300]]
    axes = [[0.2105, 0.7936, -0.0041], [1.9780, -2.4286, 0.4506], [0.0259, 0.7828, -0.8087]]
    for start in range(0, len(series), len(SERIES)):
        colours = series[start : start + len(SERIES)]
        rgb = np.array([list(bytes.fromhex(colour)) for colour in colours]) / 255
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        seen = (linear @ np.transpose(VIEWS[seen_by])).clip(0, 1)
        lab = np.cbrt(seen @ np.transpose(cones)) @ np.transpose(axes) * 100
        assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(lab, 2)) > 12


def test_charts_are_valid_vega_lite(run: Path) -> None:
    import altair

    found = read_run(run)
    for chart in make_charts(found):
        altair.Chart.from_dict(chart.spec, validate=True)
        assert chart.spec["$schema"].startswith("https://vega.github.io/schema/vega-lite/v6")


def test_perplexity_by_position_is_shown_for_every_model(run: Path) -> None:
    (chart,) = [c for c in make_charts(read_run(run)) if c.name == "quality-by-position"]
    assert "in windows of 512" in chart.text
    for name in ("teacher", "prune", "distill"):
        card = read_json(run / "stages" / name / "scorecard.json")
        last = card["by_position"]["positions"][-1]
        assert f"{name}, 256–511: {significant(math.exp(last['loss']))}" in chart.numbers
    text = parse(run).text
    assert "Perplexity by position" in text
    # A scorecard of an earlier version has none.
    for name in ("teacher", "prune", "distill"):
        path = run / "stages" / name / "scorecard.json"
        write_json(path, {k: v for k, v in read_json(path).items() if k != "by_position"})
    assert "quality-by-position" not in [c.name for c in make_charts(read_run(run))]


def test_the_sources_shares_over_time_are_shown_where_they_change(run: Path) -> None:
    assert "mix" not in [chart.name for chart in make_charts(read_run(run))]
    path = run / "stages" / "distill" / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    evaluations = [line for line in lines if "heldout_kl" in line]
    for number, line in enumerate(evaluations):
        share = 0.5 + 0.4 * number / (len(evaluations) - 1)
        line["mix"] = {"books": share, "<b>web": 1 - share}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    chart = next(chart for chart in make_charts(read_run(run)) if chart.name == "mix")
    assert "books 50% to 90%, <b>web 50% to 10%" in chart.text
    write_report(run)
    page = parse(run)
    assert "<b>web 50% to 10%" in page.text
    assert page.count("b") == 0
    evaluations[0]["mix"] = {"books": None, "web": "x"}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_report(run)


def test_importance_may_be_recorded_in_other_ways(run: Path) -> None:
    path = run / "stages" / "prune" / "selection.json"
    for wrong in (None, [], {"layers": ["x"]}, {"layers": None}, 3):
        write_json(path, {**read_json(path), "importance": wrong, "reconstruction": wrong})
        found = read_run(run)
        assert layer_scores(next(s for s in found.stages if s.kind == "prune")) == []
        make_view(found, judge(found))


def test_two_runs_are_held_against_each_other(run: Path, tmp_path: Path) -> None:
    rival = tmp_path / "runs" / "rival"
    shutil.copytree(run, rival)
    card = read_json(rival / "stages" / "distill" / "scorecard.json")
    answers = card["samples"]["piqa"]["acc"]
    card["samples"]["piqa"]["acc"] = ("0" if "1" in answers else "1") * len(answers)
    write_json(rival / "stages" / "distill" / "scorecard.json", {**card, "parameters": 12345})
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    out = tmp_path / "both"
    assert write_report(run, rival, out=out) == out / "report.html"
    assert all(path.read_bytes() == content for path, content in before.items())
    text = (out / "report.html").read_text(encoding="utf-8")
    assert 'id="table-rivals"' in text
    assert "tiny (rival)" in text
    data = read_json(out / "report.json")
    (told,) = data["rivals"]
    assert told["model"] == "distill"
    by_task = {(e["task"], e["metric"]): e for e in told["comparisons"]}
    assert by_task["piqa", "acc"]["difference"] != 0
    assert by_task["wikitext2", "word_perplexity"]["verdict"] == "the same"
    assert "Against other runs" in (out / "report.md").read_text(encoding="utf-8")


def test_runs_that_were_asked_otherwise_are_not_drawn_beside(run: Path, tmp_path: Path) -> None:
    rival = tmp_path / "runs" / "rival"
    shutil.copytree(run, rival)
    ours, theirs = read_run(run), read_run(rival)
    alike = {chart.name: chart.text for chart in make_charts(ours, [theirs])}["quality-by-size"]
    assert "Not drawn" not in alike
    for path in rival.glob("stages/*/scorecard.json"):
        card = read_json(path)
        card["tasks"]["wikitext2"]["perplexity_windows"] += 1
        write_json(path, card)
    (chart,) = (
        chart for chart in make_charts(ours, [read_run(rival)]) if chart.name == "quality-by-size"
    )
    assert "Not drawn, for they were asked otherwise: tiny (rival)." in chart.text


def test_runs_of_different_tokenizers_are_held_against_each_other_by_the_word(
    run: Path, tmp_path: Path
) -> None:
    rival = tmp_path / "runs" / "rival"
    shutil.copytree(run, rival)
    for path in rival.glob("stages/*/scorecard.json"):
        write_json(path, {**read_json(path), "tokenizer_sha256": "other"})
    found = [read_run(folder) for folder in (run, rival)]
    charts = [{c.name: c.text for c in make_charts(found[0], with_)} for with_ in ((), found[1:])]
    told = [each["quality-by-size"].split(" (")[0] for each in charts]
    assert told == ["Perplexity per token, windows of 512", "Perplexity per word"]
    (data,) = report_data(found[0], judge(found[0]), make_view(found[0], judge(found[0])),
                          found[1:])["rivals"]  # fmt: skip
    reasons = {entry["metric"]: entry["reason"] for entry in data["comparisons"]}
    assert "different tokenizers" in reasons["token_perplexity_512"]
    assert reasons["word_perplexity"] is None


def test_a_stage_at_work_shows_its_curves(run: Path) -> None:
    lines = (run / "stages" / "distill" / "metrics.jsonl").read_text().splitlines()
    told = [{**json.loads(line), "stage": "distill"} for line in lines]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in told))
    shutil.rmtree(run / "stages" / "distill")
    journal = read_json(run / "run.json")
    journal["stages"][-1] |= {"state": "failed", "seconds": None}
    write_json(run / "run.json", journal)
    names = [chart.name for chart in make_charts(read_run(run))]
    assert "loss" in names
    assert "heldout" in names


def test_plan_and_reality_stand_side_by_side(run: Path) -> None:
    table = make_view(read_run(run), judge(read_run(run))).reality
    assert table is not None
    assert [cell.text for cell in table.rows[0]] == [
        "distill", "time", "5.0 s", "2.5 s", "0.50",
    ]  # fmt: skip
    planned = {"name": "distill", "disk_bytes": 5000, "cache_bytes": 3000}
    for cached, told in ((3000, "2.00 kB"), (0, "5.00 kB"), (5000, None)):
        planned["cache_bytes"] = cached
        write_json(run / "plan.json", {"stages": [planned]})
        table = make_view(read_run(run), judge(read_run(run))).reality
        found = table.rows[0][2].text if table else None
        assert found == told
    for wrong in (None, [], {"stages": 3}, {"stages": [{"name": "distill", "seconds": "x"}]}):
        write_json(run / "plan.json", wrong)
        assert make_view(read_run(run), judge(read_run(run))).reality is None


def test_a_devices_memory_is_held_against_the_devices(run: Path) -> None:
    """And not against what the process has in the host's, which is another memory."""

    def told(planned: dict[str, Any], **measured: int) -> dict[str, list[str]]:
        record = read_json(run / "stages" / "distill" / "stage.json")
        write_json(run / "stages" / "distill" / "stage.json", {**record, **measured})
        plan = {"stages": [{"name": "distill", "memory_bytes": 4 * 10**9, **planned}]}
        write_json(run / "plan.json", plan)
        table = make_view(read_run(run), judge(read_run(run))).reality
        assert table is not None
        return {row[1].text: [cell.text for cell in row[2:]] for row in table.rows}

    assert told({"host_bytes": None}) == {"memory": ["4.00 GB", "1.00 GB", "0.25"]}
    earlier = told({"host_bytes": 2 * 10**9})
    assert list(earlier) == ["device memory", "host memory"]
    assert earlier["device memory"][0] == "4.00 GB"
    assert "GB" not in earlier["device memory"][1]
    assert told({"host_bytes": 2 * 10**9}, device_peak_bytes=3 * 10**9) == {
        "device memory": ["4.00 GB", "3.00 GB", "0.75"],
        "host memory": ["2.00 GB", "1.00 GB", "0.50"],
    }
    assert list(told({"host_bytes": 2 * 10**9, "memory_bytes": 0})) == ["host memory"]


def test_secrets_are_not_shown(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "a secret that is told to nobody")
    journal = read_json(run / "run.json")
    journal["command"] = "shearling run x --set teacher.revision=hf_abcdefghijklmnopqrstuvwxyzabcd"
    journal["error"] = {
        "what": "https://user:password@host/x said: a secret that is told to nobody",
        "hint": "",
    }
    journal["state"] = "failed"
    write_json(run / "run.json", journal)
    write_report(run)
    for name in ("report.html", "report.md", "report.json"):
        text = (run / name).read_text(encoding="utf-8")
        assert "hf_abcdef" not in text
        assert "password" not in text
        assert "told to nobody" not in text
    assert "hf_***" in (run / "report.md").read_text(encoding="utf-8").replace("\\", "")


def test_each_task_is_told_whether_the_student_is_worse_and_whether_that_is_noise(
    run: Path,
) -> None:
    found = read_run(run)
    judgement = judge(found)
    table = make_view(found, judgement).answers
    assert table is not None
    assert "distill" in table.caption
    entries = judgement.comparisons["distill"]
    assert [row[0].text for row in table.rows] == [entry.task for entry in entries]
    said = {"worse": ("yes", "yes"), "better": ("no, better", "yes"), "the same": ("no", "no"),
            "within noise": ("can't be told", "no")}  # fmt: skip
    for entry, row in zip(entries, table.rows, strict=True):
        if entry.difference is not None:
            assert (row[1].text, row[3].text) == said[entry.verdict]
    floor = next(row[4] for row in table.rows if row[0].text == "grammar_pairs")
    assert floor.text in ("yes", "not surely")
    assert float(floor.note.rstrip("%")) >= 50


def test_shapes_that_were_searched_stand_by_rank(run: Path) -> None:
    path = run / "stages" / "prune" / "stage.json"
    record = read_json(path)
    shape = {"num_hidden_layers": 3, "hidden_size": 24, "num_attention_heads": 4}
    record["summary"]["search"] = [
        {"shape": shape, "parameters": 29_500, "kl": 0.125},
        {"shape": HOSTILE, "parameters": HOSTILE, "kl": None},
        HOSTILE,
    ]
    write_json(path, record)
    page = parse(run)
    assert HOSTILE not in page.text
    assert "1 0.125 3 24 4 – – 29,500" in page.text
    assert "| 1 | 0.125 | 3 | 24 | 4 |" in (run / "report.md").read_text(encoding="utf-8")
