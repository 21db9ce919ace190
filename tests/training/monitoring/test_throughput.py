"""The peak that FLOPs are compared with, and memory."""

import time

import pytest
import torch

from aligntok.runtime.devices import Precision
from aligntok.training.monitoring import throughput
from aligntok.training.monitoring.throughput import matmul_rate, memory_gib, peak

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(
    ("name", "rate"),
    [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA A100-SXM4-40GB", 312e12)],
)
def test_the_peak_of_known_cards_is_the_published_one(name, rate, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(throughput, "matmul_rate", lambda device, dtype: 1e9)
    found = peak(Precision(torch.device("cuda"), "bf16"))
    assert found.rate == rate and name in str(found) and "published" in str(found)
    assert peak(Precision(torch.device("cuda"), "fp32")).rate == 1e9


def test_the_peak_of_other_cards_is_measured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 NVL")
    monkeypatch.setattr(throughput, "matmul_rate", lambda device, dtype: 2.5e9)
    assert str(peak(Precision(torch.device("cuda"), "bf16"))) == "2.5 GFLOP/s, measured here with bf16 matrix products"


def test_measuring_is_quick_and_leaves_the_random_state():
    matmul_rate.cache_clear()
    state, began = torch.get_rng_state(), time.monotonic()
    rate = matmul_rate(torch.device(DEVICE), torch.float32)
    assert rate > 1e8 and time.monotonic() - began < 5, "a quarter of a second; five where others use the cores"
    assert torch.equal(state, torch.get_rng_state())


def test_memory_is_that_of_this_process():
    assert 0.01 < memory_gib(torch.device("cpu")) < 1000
