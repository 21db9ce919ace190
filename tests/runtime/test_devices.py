"""Which device a run uses; with two pretended GPUs, since one that is not the first needs care."""

import platform
from collections.abc import Iterator

import pytest
import torch

from aligntok.errors import UserError
from aligntok.runtime import devices
from aligntok.runtime.devices import choose_precision, computes_bf16


@pytest.fixture
def chosen(monkeypatch) -> Iterator[list[int]]:
    """Numbers of the GPUs that were made the current one."""
    found: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: found.append(torch.device(device).index))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    before = torch.get_float32_matmul_precision()
    yield found
    torch.set_float32_matmul_precision(before)


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


@pytest.mark.parametrize(
    ("precision", "able", "said"),
    [
        ("auto", True, "bf16 autocast"),
        ("auto", False, "fp32 (this processor has no instructions for bf16)"),
        ("bf16", True, "bf16 autocast"),
        ("bf16", False, "bf16 autocast (this processor has no instructions for it: fp32 is faster)"),
        ("fp32", True, "fp32"),
        ("fp32", False, "fp32"),
        ("tf32", True, "fp32 (this processor has no TF32)"),
    ],
)
def test_auto_is_bf16_where_the_device_computes_it(precision, able, said, monkeypatch):
    monkeypatch.setattr(devices, "computes_bf16", lambda device: able)
    assert str(choose_precision("cpu", precision)) == said


def test_an_unknown_precision_is_refused():
    with pytest.raises(UserError, match="'fp16', expected auto, bf16, tf32 or fp32"):
        choose_precision("cpu", "fp16")


@pytest.mark.parametrize(("avx512", "amx"), [(False, False), (True, False), (False, True)])
def test_an_x86_processor_computes_bf16_with_either_of_two_extensions(avx512, amx, monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert computes_bf16(torch.device("cpu")) is (avx512 or amx)


def test_a_gpu_that_only_emulates_bf16_gets_fp32(chosen, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    assert str(choose_precision("cuda")) == "fp32 (this GPU has no instructions for bf16)"


@pytest.mark.parametrize(("precision", "products"), [("bf16", "high"), ("tf32", "high"), ("fp32", "highest")])
def test_products_on_a_gpu_are_as_exact_as_the_precision_says(precision, products, chosen):
    assert str(choose_precision("cuda", precision)).startswith(precision)
    assert torch.get_float32_matmul_precision() == products and torch.backends.cudnn.benchmark


def test_an_older_gpu_has_no_tf32(chosen, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert str(choose_precision("cuda", "tf32")) == "fp32 (this GPU has no TF32)"


def test_a_processor_keeps_pytorchs_settings():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    choose_precision("cpu", "bf16")
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark) == before
