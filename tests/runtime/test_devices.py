"""Which device a run uses; with two pretended GPUs, since one that is not the first needs care."""

import pytest
import torch

from aligntok.errors import UserError
from aligntok.runtime.devices import choose_precision


@pytest.fixture
def chosen(monkeypatch) -> list[int]:
    """Numbers of the GPUs that were made the current one."""
    found: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: found.append(torch.device(device).index))
    return found


def test_a_gpu_named_by_its_number_becomes_the_current_one(chosen):
    assert choose_precision("cuda:1").device == torch.device("cuda:1") and chosen == [1]
    assert choose_precision("cuda").device == torch.device("cuda") and chosen == [1]
    assert choose_precision("auto").device.type == "cuda" and chosen == [1]


def test_a_gpu_that_is_not_there_is_refused(chosen):
    with pytest.raises(UserError, match="'cuda:2', but 2 CUDA devices are seen"):
        choose_precision("cuda:2")
    assert not chosen


@pytest.mark.parametrize(("device", "told"), [("cuda", "sees no CUDA device"), ("gpu", "expected auto, cpu, cuda")])
def test_refusals_without_one(device, told, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=told):
        choose_precision(device)
