"""Messages that say which number would do: the numbers in them do."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aligntok.config import DiscriminatorConfig, TrainingConfig
from aligntok.data.geometry import check_size
from aligntok.errors import UserError, near_multiples
from aligntok.models.discriminator import PatchDiscriminator
from aligntok.runtime.world import World
from aligntok.training.distributed import check_accumulate, check_batches


def advised(message: str) -> list[int]:
    """The numbers behind the last "use"."""
    return [int(number) for number in re.findall(r"-?\d+", message.rpartition("use ")[2])]


@given(number=st.integers(-100, 400), factor=st.integers(1, 64))
def test_near_multiples_are_positive_distinct_and_near(number, factor):
    found = advised("use " + near_multiples(number, factor))
    assert 1 <= len(found) <= 2 and len(set(found)) == len(found)
    assert all(value > 0 and value % factor == 0 for value in found)
    assert len(found) == 1 or found[0] < found[1] == found[0] + factor
    assert all(abs(value - number) <= factor for value in found) or number < 0


@given(batch=st.integers(-9, 70), size=st.integers(1, 9))
def test_the_batches_that_are_advised_can_be_shared_out(batch, size):
    if batch > 0 and batch % size == 0:
        assert len(World(0, size).rows(batch)) * size == batch
        return
    with pytest.raises(UserError) as refused:
        World(0, size).rows(batch)
    assert advised(str(refused.value)) and all(World(0, size).rows(value) for value in advised(str(refused.value)))


def test_a_batch_smaller_than_the_processes_is_told_once_what_to_use():
    with pytest.raises(UserError, match=r"batch_size is 4, expected a multiple of the 8 processes: use 8$"):
        World(0, 8).rows(4)
    with pytest.raises(UserError, match=r"batch_size is 0, expected at least 1 image: use 1$"):
        World().rows(0)


@given(size=st.integers(-40, 200), factor=st.integers(1, 32))
def test_the_sizes_that_are_advised_fit(size, factor):
    if size > 0 and size % factor == 0:
        return check_size(size, factor)
    with pytest.raises(UserError) as refused:
        check_size(size, factor)
    for value in advised(str(refused.value)):
        check_size(value, factor)
    return None


@given(parts=st.integers(-3, 40), rows=st.integers(1, 32))
def test_the_micro_batches_that_are_advised_divide_the_batch(parts, rows):
    if parts > 0 and rows % parts == 0:
        return check_accumulate(parts, rows)
    with pytest.raises(UserError) as refused:
        check_accumulate(parts, rows)
    assert advised(str(refused.value))
    for value in advised(str(refused.value)):
        check_accumulate(value, rows)
    return None


def test_micro_batches_are_checked_for_the_rows_of_a_process(monkeypatch):
    check_batches(TrainingConfig(batch_size=8, accumulate=8))
    monkeypatch.setattr("aligntok.training.distributed.current", lambda: World(1, 2))
    with pytest.raises(UserError, match=r"accumulate is 8, expected a divisor of the 4 rows .*: use 4$"):
        check_batches(TrainingConfig(batch_size=8, accumulate=8))


@pytest.mark.parametrize("layers", [0, 1, 2, 3])
def test_a_discriminator_says_how_large_images_must_be(layers):
    network = PatchDiscriminator(DiscriminatorConfig(base_channels=2, layers=layers))
    side = network.smallest
    assert network(torch.zeros(2, 3, side, side)).numel()
    with pytest.raises(UserError, match=rf"at least {side} px, these have {side - 1} x {side}: use fewer layers"):
        network(torch.zeros(2, 3, side - 1, side))
