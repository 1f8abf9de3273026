"""The prefix-tree runner against lm-eval's own HFLM: the same numbers, without computing twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from reports.lm import PrefixLM, score_positions
from reports.load import load_model, quiet_libraries
from reports.prefix_tree import PrefixTree, cut_into_blocks, pack
from shearling import ShearlingError

SENTENCES = [
    ("The shepherd sees", [" the hill before winter.", " a river.", " the", " two stones again."]),
    ("The shepherd sees the hill", [" again.", " slowly.", " in the morning."]),
    ("", ["The llama hears some wool.", "The llama hear some wool.", "A lamb follows."]),
    ("A lamb " * 300 + "likes", [" the gate.", " two stones."]),  # longer than the model's 512
    (
        "The hill and the river. " * 9,
        [" A lamb", " A lamb sees", " The hill.", " It"],
    ),  # two blocks
]


def pair(folder: Path, batch_size: int = 2) -> tuple[HFLM, PrefixLM]:
    model, tokenizer = load_model(folder)
    with quiet_libraries():
        stock = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        return stock, PrefixLM(model, tokenizer, batch_size=batch_size)


def requests(kind: str, arguments: list[tuple[str, ...]]) -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=entry, idx=index)  # type: ignore[arg-type]
        for index, entry in enumerate(arguments)
    ]


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_llama_untied"])
@pytest.mark.parametrize("batch_size", [1, 8])
def test_choices_score_as_in_stock_hflm(
    model: str, batch_size: int, request: pytest.FixtureRequest
) -> None:
    stock, mine = pair(request.getfixturevalue(model), batch_size)
    asked = requests("loglikelihood", [(c, x) for c, choices in SENTENCES for x in choices])
    expected = stock.loglikelihood(asked, disable_tqdm=True)
    found = mine.loglikelihood(asked)
    for (value, greedy), (expected_value, expected_greedy) in zip(found, expected, strict=True):
        assert value == pytest.approx(expected_value, abs=1e-4)
        assert greedy == expected_greedy


def test_writing_is_that_of_stock_hflm(tiny_llama: Path) -> None:
    stock, mine = pair(tiny_llama)
    how = {"until": ["\n"], "max_gen_toks": 8, "do_sample": False}
    asked = [(text, how) for text in ("The shepherd", "A lamb sees the", "Two stones")]
    found = requests("generate_until", asked)  # type: ignore[arg-type]
    with quiet_libraries():
        assert mine.generate_until(found) == stock.generate_until(found)


def test_rolling_scores_as_in_stock_hflm(tiny_llama: Path) -> None:
    stock, mine = pair(tiny_llama)
    texts = [("The shepherd sees the hill. " * n,) for n in (1, 40, 200)]
    asked = requests("loglikelihood_rolling", texts)  # the last is longer than two windows
    with quiet_libraries():
        expected = stock.loglikelihood_rolling(asked)
    for value, wanted in zip(mine.loglikelihood_rolling(asked), expected, strict=True):
        assert value == pytest.approx(wanted, abs=1e-3, rel=1e-6)


def test_tree_shares_beginnings_and_sees_only_ancestors() -> None:
    tree = PrefixTree()
    assert tree.add([5, 6, 7]) == [0, 1, 2]
    assert tree.is_chain
    assert tree.shared([5, 6, 9]) == 2
    assert tree.add([5, 6, 9]) == [0, 1, 3]
    assert tree.add([8]) == [4]
    assert not tree.is_chain
    assert tree.depths == [0, 1, 2, 2, 0]
    assert [tree.ancestors(node) for node in range(5)] == [[], [0], [0, 1], [0, 1], []]


@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=7), min_size=1, max_size=9),
    st.integers(1, 5),
)
def test_blocks_show_each_node_its_ancestors_and_itself(
    sequences: list[list[int]], size: int
) -> None:
    tree = PrefixTree()
    for sequence in sorted(sequences):
        tree.add(sequence)
    blocks = cut_into_blocks(tree, size)
    for node in range(len(tree)):
        keys, seen = blocks.keys_GK[node // size], blocks.seen_GBK[node // size, node % size]
        assert sorted(keys[seen].tolist()) == [*tree.ancestors(node), node]
    assert blocks.seen_GBK.any(axis=2).all()  # no softmax over nothing


def test_rows_keep_to_the_budget_and_every_request_is_in_one() -> None:
    asked: list[tuple[Any, list[int], list[int]]] = [
        (None, [1, 2, 3, index], [4, 5]) for index in range(50)
    ]
    asked.append((None, list(range(60)), [7]))
    rows = pack(asked, max_length=100, budget=20)
    assert sorted(number for row in rows for number, _, _ in row.wanted) == list(range(51))
    assert max(len(row.tree) for row in rows if len(row.wanted) > 1) <= 20
    alone = next(row for row in rows if len(row.tree) > 20)
    assert [number for number, _, _ in alone.wanted] == [50]
    assert sum(len(row.tree) for row in rows) < sum(len(c) + 1 for _, c, _ in asked)


def test_a_long_beginning_is_computed_once_though_it_exceeds_the_budget() -> None:
    start = list(range(100))
    asked: list[tuple[Any, list[int], list[int]]] = [
        (None, [*start, choice], [1, 2]) for choice in range(40)
    ]
    rows = pack(asked, max_length=500, budget=20)
    assert [len(row.tree) for row in rows] == [100 + 40 * 2]


def test_too_long_requests_are_cut_from_the_left() -> None:
    rows = pack([(None, list(range(10)), [20, 21])], max_length=4, budget=100)
    assert rows[0].tree.tokens == [7, 8, 9, 20]
    assert rows[0].wanted == [(0, [2, 3], [20, 21])]


def test_only_wanted_positions_are_projected() -> None:
    hidden, vocabulary = torch.randn(700, 8), torch.randn(30, 8)
    nodes, tokens = torch.randint(700, (900,)), torch.randint(30, (900,))
    logprob, greedy = score_positions(hidden, vocabulary, nodes, tokens)
    dense = (hidden @ vocabulary.T).log_softmax(-1)
    assert torch.allclose(logprob.float(), dense[nodes, tokens], atol=1e-5)
    assert torch.equal(greedy, dense.argmax(-1)[nodes] == tokens)


def test_of_equally_likely_tokens_the_first_is_the_greedy_one() -> None:
    vocabulary = torch.tensor([[0.0], [1.0], [1.0]])
    nodes, tokens = torch.zeros(3, dtype=torch.long), torch.arange(3)
    _, greedy = score_positions(torch.ones(1, 1), vocabulary, nodes, tokens)
    assert greedy.tolist() == [False, True, False]


def test_no_question_goes_to_the_hub(tiny_llama: Path) -> None:
    assert pair(tiny_llama)[1].get_model_info() == {}


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: (f / "config.json").unlink(), "no config.json"),
        (lambda f: (f / "model.safetensors").unlink(), "can't be read"),
        (lambda f: cut(f / "model.safetensors"), "can't be read"),
        (lambda f: (f / "config.json").write_text("{"), "can't be read"),
        (lambda f: lose_a_weight(f / "model.safetensors"), "lacks 1 weights"),
    ],
)
def test_a_damaged_checkpoint_is_a_clear_error(
    damage: Any, said: str, tiny_llama: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in tiny_llama.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    damage(folder)
    with pytest.raises(ShearlingError, match=said) as caught:
        load_model(folder)
    assert caught.value.hint


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def lose_a_weight(file: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(file)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, file, metadata={"format": "pt"})
