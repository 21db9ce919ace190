"""Kernels are tested on poisoned memory: whatever torch.empty returns is filled with NaN."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """An output that a kernel leaves unwritten is NaN and fails its comparison."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs are made on the CPU, also where there is a GPU: for tests of C++ operators."""
    monkeypatch.setattr("kernel_checks.DEVICE", "cpu")
