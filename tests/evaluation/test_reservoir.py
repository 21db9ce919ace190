"""The reservoir: everything while there is room, a uniform sample beyond, and no more memory than that."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aligntok.evaluation.reservoir import Reservoir


def filled(capacity: int, sizes: list[int], seed: int = 0) -> Reservoir:
    reservoir, numbers = Reservoir(capacity, 1, seed), torch.arange(sum(sizes)).float()[:, None]
    for batch in numbers.split(sizes):
        reservoir.add(batch)
    return reservoir


@settings(max_examples=40)
@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=6), capacity=st.integers(1, 20), seed=st.integers(0, 3))
def test_rows_are_the_sets_own_and_each_at_most_once(sizes, capacity, seed):
    reservoir = filled(capacity, sizes, seed)
    rows, total = reservoir.rows.flatten().tolist(), sum(sizes)
    assert reservoir.count == total and len(rows) == min(total, capacity) == len(set(rows))
    assert set(rows) <= set(range(total))
    if total <= capacity:
        assert rows == list(range(total))
    # the same whatever the batches are
    assert torch.equal(reservoir.rows, filled(capacity, [total], seed).rows)


def test_every_row_is_as_likely_as_every_other():
    """10 of 40 rows, 2,000 times: each is expected 500 times, with a standard deviation of 19."""
    counts = torch.zeros(40)
    for seed in range(2000):
        counts[filled(10, [7, 33], seed).rows.flatten().long()] += 1
    assert counts.sum() == 20_000
    assert (counts - 500).abs().max() < 5 * (2000 * 0.25 * 0.75) ** 0.5


def test_memory_does_not_grow_with_the_rows():
    reservoir = filled(100, [50] * 100)
    assert reservoir.count == 5000 and reservoir._rows.shape == (100, 1)
    assert len(filled(10_000, [50])._rows) == 50  # nor with the capacity


def test_another_seed_keeps_others():
    assert not torch.equal(filled(5, [50], 0).rows, filled(5, [50], 1).rows)
    assert filled(5, [50], 0).rows.mean() != pytest.approx(2.0)  # not simply the first five
