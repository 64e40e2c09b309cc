"""Batches of texts: every text once, within the budget, with little padding, as few as the rules admit; counts."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.algebra.moments import describe_texts
from utils.models.batches import share_of, split_rows, token_batches

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=300).map(np.array)


def padded(lengths: np.ndarray, batches: list[np.ndarray]) -> int:
    return sum(len(batch) * int(lengths[batch].max()) for batch in batches)


@settings(max_examples=200, deadline=None)
@given(LENGTHS, st.integers(1, 500), st.none() | st.integers(1, 60))
def test_every_text_once_within_the_budget_longest_first_on_one_side_of_a_limit(lengths, budget, limit):
    batches = token_batches(lengths, budget, limit)
    assert sorted(np.concatenate(batches)) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * lengths[batch].max() <= budget
        assert limit is None or len(set(lengths[batch] > limit)) == 1
    assert (np.diff(lengths[np.concatenate(batches)]) <= 0).all()
    assert padded(lengths, batches) <= 1.05 * lengths.sum()
    if limit is None:  # no batch could take the first text of the next
        for number, (batch, following) in enumerate(itertools.pairwise(batches), 1):
            before = [*batches[: number - 1], np.append(batch, following[0])]
            full = (len(batch) + 1) * lengths[batch].max() > budget
            assert full or padded(lengths, before) > 1.05 * lengths[np.concatenate(before)].sum()


@settings(max_examples=100, deadline=None)
@given(LENGTHS, st.integers(1, 20), st.integers(1, 60))
def test_rows_of_a_step_are_split_by_side_and_size(lengths, size, limit):
    rows = np.random.default_rng(0).permutation(len(lengths))[: len(lengths) // 2]
    parts = split_rows(rows, size, lengths > limit)
    assert sorted(np.concatenate([rows[:0], *parts])) == sorted(rows)
    assert all(0 < len(part) <= size and len(set(lengths[part] > limit)) == 1 for part in parts)
    plain = split_rows(rows, size)
    assert np.array_equal(np.concatenate([rows[:0], *plain]), rows) and all(0 < len(part) <= size for part in plain)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4), min_size=1, max_size=60))
def test_distinct_texts_and_their_pairs_are_counted(texts):
    offsets = np.concatenate([[0], np.cumsum([len(text) for text in texts])])
    found = describe_texts(np.concatenate(texts).astype(np.int32), offsets)["rounding"]
    distinct = set(map(tuple, texts))
    assert found["num_distinct_texts"] == len(distinct)
    assert found["num_distinct_pairs"] == sum(len(text) - 1 for text in distinct)


@pytest.mark.parametrize("size", [1, 3, 64])
def test_shares_hold_every_text_once_and_are_of_like_size(size):
    lengths = np.random.default_rng(0).integers(1, 200, 3000)
    batches = token_batches(lengths, 1024)
    shares = [share_of(batches, lengths, 2048, rank, size) for rank in range(size)]
    rows = [np.concatenate([rows for rows, _ in share] or [np.arange(0)]) for share in shares]
    assert sorted(np.concatenate(rows)) == list(range(3000))
    tokens = [int(lengths[of].sum()) for of in rows]
    assert max(tokens) - min(tokens) < 2 * 3100  # two blocks
    assert all(share[-1][1] for share in shares if share)
    blocks = [0]
    for rows, ends in itertools.chain(*shares):
        blocks[-1] += int(lengths[rows].sum())
        blocks += [0] * ends
    assert blocks.pop() == 0 and sum(block < 2048 for block in blocks) <= 1
