"""The shapes that a budget of parameters leaves open."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from shapes import LLAMA_2_7B, LLAMA_3_1_8B, SMOLLM2_135M

from shearling import ShearlingError
from students.search import SPENT, candidate_shapes, read_budget
from students.shape import Shape

TEACHERS = [SMOLLM2_135M, LLAMA_2_7B, LLAMA_3_1_8B]


def searched(parent: Shape, params: int | float, count: int = 6, **axes: Any) -> list[Shape]:
    return candidate_shapes({"params": params, "candidates": count, **axes}, parent)


def least_budget(parent: Shape) -> int:
    """The smallest budget, as the error that refuses one parameter tells it."""
    with pytest.raises(ShearlingError, match="too small") as caught:
        searched(parent, 1)
    return int(caught.value.what.split("has ")[1].rstrip(".").replace(",", ""))


@pytest.mark.parametrize("parent", TEACHERS, ids=["135m", "2-7b", "3.1-8b"])
@pytest.mark.parametrize("share", [0.9, 0.7, 0.5, 0.3])
def test_candidates_spend_the_budget_and_differ(parent: Shape, share: float) -> None:
    budget = round(share * parent.parameters)
    shapes = searched(parent, share)
    assert shapes == searched(parent, budget)
    assert 1 < len(shapes) <= 6
    assert len(set(shapes)) == len(shapes)
    for shape in shapes:
        assert SPENT * budget <= shape.parameters <= budget
        assert not shape.problems_as_student_of(parent)
        assert shape.head_dim == parent.head_dim
        assert shape.hidden_size % 8 == shape.intermediate_size % 8 == 0
        assert shape.tie_word_embeddings is parent.tie_word_embeddings
        assert parent.intermediate_size / 4 <= shape.intermediate_size <= parent.intermediate_size
    assert len({shape.num_hidden_layers for shape in shapes}) > 1
    assert len({shape.intermediate_size for shape in shapes}) > 1
    if share < 0.8:
        assert len({shape.hidden_size for shape in shapes}) > 1


@given(
    layers=st.integers(1, 12),
    group=st.integers(1, 4),
    key_value_heads=st.integers(1, 4),
    hidden_per_head=st.integers(2, 24),
    intermediate=st.integers(4, 300),
    vocabulary=st.integers(10, 2000),
    tied=st.booleans(),
    share=st.floats(0.05, 0.99),
    count=st.integers(1, 8),
)
@settings(max_examples=150, deadline=None)
def test_any_teacher_gets_valid_candidates_or_an_error_that_tells_the_least(
    layers: int,
    group: int,
    key_value_heads: int,
    hidden_per_head: int,
    intermediate: int,
    vocabulary: int,
    tied: bool,
    share: float,
    count: int,
) -> None:
    parent = Shape(
        hidden_size=group * key_value_heads * hidden_per_head,
        num_hidden_layers=layers,
        num_attention_heads=group * key_value_heads,
        num_key_value_heads=key_value_heads,
        head_dim=8,
        intermediate_size=intermediate,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
    )
    budget = round(share * parent.parameters)
    assume(budget >= 1)
    least = least_budget(parent)
    if budget < least:
        with pytest.raises(ShearlingError, match="too small"):
            searched(parent, budget, count)
        return
    shapes = searched(parent, budget, count)
    assert 1 <= len(shapes) <= count
    for shape in shapes:
        assert shape.parameters <= budget
        assert not shape.problems_as_student_of(parent)
        # It spends the budget, or it could not be one neuron wider.
        wider = dataclasses.replace(shape, intermediate_size=shape.intermediate_size + 1)
        assert (
            shape.parameters >= SPENT * budget
            or wider.parameters > budget
            or wider.problems_as_student_of(parent)
        )


def test_axes_beside_the_budget_stay_as_they_are() -> None:
    for shape in searched(SMOLLM2_135M, 60_000_000, num_hidden_layers=30):
        assert shape.num_hidden_layers == 30
    narrow = searched(SMOLLM2_135M, 60_000_000, hidden_size=432, num_attention_heads=6)
    assert {(shape.hidden_size, shape.num_attention_heads) for shape in narrow} == {(432, 6)}
    for shape in searched(SMOLLM2_135M, 60_000_000, intermediate_size=1024):
        assert shape.intermediate_size == 1024
        assert SPENT * 60e6 <= shape.parameters <= 60e6
    tied = searched(LLAMA_3_1_8B, 0.5, tie_word_embeddings=True)
    assert all(shape.tie_word_embeddings for shape in tied)


def test_one_candidate_is_the_evenest_cut() -> None:
    """No axis of it is cut as deep as the deepest-cut axis of any other."""

    def deepest(shape: Shape) -> float:
        axes = ("num_hidden_layers", "hidden_size", "intermediate_size")
        return min(getattr(shape, axis) / getattr(SMOLLM2_135M, axis) for axis in axes)

    (first,) = searched(SMOLLM2_135M, 0.6, 1)
    others = searched(SMOLLM2_135M, 0.6, 100)
    assert len(others) > 6
    assert deepest(first) == max(map(deepest, others))


@pytest.mark.parametrize(
    ("written", "budget"),
    [
        ("60M", 60_000_000),
        ("1.2B", 1_200_000_000),
        ("2.3m", 2_300_000),
        ("500 k", 500_000),
        ("63_848_304", 63_848_304),
        ("63,848,304", 63_848_304),
        (63_848_304, 63_848_304),
        (6e7, 60_000_000),
        (0.5, 0.5),
        ("0.5", 0.5),
        ("50%", 0.5),
        ("7.5 %", 0.075),
    ],
)
def test_budgets_as_people_write_them(written: object, budget: float) -> None:
    found = read_budget(written)
    assert found == budget
    assert type(found) is type(budget)


@pytest.mark.parametrize(
    "written",
    ["many", "", "0", 0, -5, True, None, "100%", 1.5, "60MM", "1.23456789M", float("nan")],
)
def test_what_is_no_budget(written: object) -> None:
    with pytest.raises(ValueError, match=r"is no budget; write a number of parameters \(60M"):
        read_budget(written)


@pytest.mark.parametrize(
    ("params", "axes", "what", "hint"),
    [
        (200_000_000, {}, "leaves nothing to search: the model to cut has 134,515,008", "Lower"),
        (134_515_008, {}, "leaves nothing to search", "Lower `params`"),
        (100_000_000, {"num_hidden_layers": 15}, "with num_hidden_layers 15", "fewer axes"),
        (1_000_000, {}, "is too small: the smallest shape that is tried has", "Raise `params`"),
        (
            50_000_000,
            {"hidden_size": 432, "num_hidden_layers": 26, "intermediate_size": 880},
            "nothing is left to search",
            "Take `params` out",
        ),
        (60_000_000, {"num_hidden_layers": 31}, "larger than the teacher's 30", "Change `shape`"),
    ],
)
def test_budgets_that_no_shape_meets(
    params: int, axes: dict[str, Any], what: str, hint: str
) -> None:
    with pytest.raises(ShearlingError) as caught:
        searched(SMOLLM2_135M, params, **axes)
    assert what in caught.value.what
    assert hint in caught.value.hint


@pytest.mark.parametrize("parent", TEACHERS, ids=["135m", "2-7b", "3.1-8b"])
def test_the_least_budget_that_is_told_is_enough(parent: Shape) -> None:
    least = least_budget(parent)
    assert searched(parent, least)[0].parameters == least
    with pytest.raises(ShearlingError, match="too small"):
        searched(parent, least - 1)
