"""How many entries stay, and which: the rounding rule and the batched selection."""

from __future__ import annotations

import pytest
import torch
from compression_cases import as_lists, slow_select
from hypothesis import given
from hypothesis import strategies as st

from fastcache.compression.base import budget, select
from fastcache.errors import ConfigError


@st.composite
def selections(draw):
    """Scores of few distinct values, so that ties are the rule, with lengths and budgets of their own."""
    batch, heads, padded = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 12))
    values = st.sampled_from([0.0, 0.5, 1.0, -2.0, float("inf"), float("-inf")])
    scores = draw(st.lists(values, min_size=batch * heads * padded, max_size=batch * heads * padded))
    lengths = draw(st.lists(st.integers(1, padded), min_size=batch, max_size=batch))
    budgets = [[draw(st.integers(1, n)) for _ in range(heads)] for n in lengths]
    return torch.tensor(scores).view(batch, heads, padded), lengths, budgets


@given(selections())
def test_select_equals_sorting_each_row(case):
    scores, lengths, budgets = case
    kept = select(scores, torch.tensor(lengths), torch.tensor(budgets))
    assert as_lists(kept) == slow_select(scores, lengths, budgets)


@given(selections())
def test_positions_ascend_and_padding_comes_last(case):
    scores, lengths, budgets = case
    largest = max(max(row) for row in budgets)
    kept = select(scores, torch.tensor(lengths), torch.tensor(budgets), max_budget=largest)
    assert kept.shape == (*scores.shape[:2], largest)
    for rows, row_budgets in zip(kept.tolist(), budgets, strict=True):
        for row, wanted in zip(rows, row_budgets, strict=True):
            assert row[:wanted] == sorted(set(row[:wanted])) and min(row[:wanted]) >= 0
            assert row[wanted:] == [-1] * (largest - wanted)


def test_one_budget_serves_all_heads_of_a_sequence():
    scores = torch.tensor([[[1.0, 3.0, 2.0], [3.0, 1.0, 2.0]], [[0.0, 1.0, 9.0], [1.0, 0.0, 9.0]]])
    kept = select(scores, torch.tensor([3, 2]), torch.tensor([2, 1]))
    assert kept.tolist() == [[[1, 2], [0, 2]], [[1, -1], [0, -1]]]


def test_of_equal_scores_the_earlier_position_stays():
    kept = select(torch.zeros(1, 1, 5), torch.tensor([5]), torch.tensor([2]))
    assert kept.tolist() == [[[0, 1]]]


def test_nan_is_dropped_first_but_never_shrinks_the_kept_set():
    scores = torch.tensor([[[float("nan"), 1.0, float("nan"), 0.0]]])
    assert select(scores, torch.tensor([4]), torch.tensor([2])).tolist() == [[[1, 3]]]
    assert select(scores, torch.tensor([4]), torch.tensor([3])).tolist() == [[[0, 1, 3]]]


def test_a_budget_above_the_length_keeps_the_whole_sequence():
    kept = select(torch.randn(1, 1, 6), torch.tensor([3]), torch.tensor([5]))
    assert kept.tolist() == [[[0, 1, 2, -1, -1]]]


@pytest.mark.parametrize(
    ("tokens", "ratio", "kept"),
    [(1000, 0.8, 199), (320, 0.8, 63), (1000, 0.9, 99), (1024, 0.5, 512), (65, 0.2, 52), (3, 0.9, 1)],
)
def test_budget_is_the_floor_of_the_float_product(tokens, ratio, kept):
    assert budget(tokens, ratio) == kept


@given(st.integers(1, 10_000), st.floats(0.01, 0.99))
def test_budget_is_within_one_of_the_exact_share(tokens, ratio):
    kept = budget(tokens, ratio)
    assert 1 <= kept <= tokens
    assert kept == 1 or tokens * (1 - ratio) - 1 < kept <= tokens * (1 - ratio)


@pytest.mark.parametrize("ratio", [0, 1, -0.5, 1.5, True, "0.5"])
def test_a_ratio_outside_zero_to_one_is_refused(ratio):
    with pytest.raises(ConfigError, match=r"compression_ratio is .* strictly between 0 and 1"):
        budget(100, ratio)
