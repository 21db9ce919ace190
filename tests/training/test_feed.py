"""Batches reach the device as the source gives them, row numbers stay on the host."""

import pytest
import torch

from aligntok.training.feed import Feed


class Counting:
    """A source whose batch says its step; keeps the steps that it was asked for."""

    def __init__(self):
        self.asked = []

    def batch(self, step):
        self.asked.append(step)
        if step == 5:
            raise ValueError("no pictures")
        return {"images": torch.full((2, 3), float(step)), "rows": torch.arange(2)}


def test_a_cpu_asks_for_what_it_needs():
    source = Counting()
    with Feed(source, torch.device("cpu"), 9) as feed:
        assert [feed.batch(step)["images"][0, 0].item() for step in (2, 3, 0)] == [2, 3, 0]
        assert source.asked == [2, 3, 0]
        with pytest.raises(ValueError, match="no pictures"):
            feed.batch(5)


@pytest.mark.cuda
def test_a_gpu_is_one_step_ahead():
    source = Counting()
    with Feed(source, torch.device("cuda"), 4) as feed:
        for step in (1, 2, 3):
            batch = feed.batch(step)
            assert batch["images"].is_cuda and batch["images"][0, 0].item() == step
            assert not batch["rows"].is_cuda
        assert feed.batch(0)["images"][0, 0].item() == 0, "any other step may follow"
    assert source.asked[:3] == [1, 2, 3] and 4 not in source.asked
    with Feed(source, torch.device("cuda"), 9) as feed, pytest.raises(ValueError, match="no pictures"):
        feed.batch(5)
