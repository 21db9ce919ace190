"""FLOPs per image, counted once; the peak that they are compared with."""

import time

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from aligntok.kernels import adapter_projection, qknorm_attention
from aligntok.runtime import files
from aligntok.runtime.devices import Precision
from aligntok.training.monitoring import throughput
from aligntok.training.monitoring.throughput import FlopLedger, matmul_rate, memory_gib, peak, step_kind

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def counted(work) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def product(ledger: FlopLedger, kind: str, rows: int) -> float | None:
    ledger.begin()
    torch.ones(rows, 8) @ torch.ones(8, 16)
    return ledger.end(kind, rows)


def test_a_kind_of_step_is_counted_once_and_kept(tmp_path):
    ledger = FlopLedger(tmp_path / "flops.json", "stage1", start=0)
    assert product(ledger, "autoencoder", 4) == 2 * 4 * 8 * 16
    assert ledger._wanted is False
    assert product(ledger, "autoencoder", 3) == 2 * 3 * 8 * 16, "another number of images"
    assert product(ledger, "autoencoder+discriminator", 4) is None, "it was not watched, so the next one will be"
    assert product(ledger, "autoencoder+discriminator", 4) == 2 * 4 * 8 * 16
    resumed = FlopLedger(tmp_path / "flops.json", "stage1", start=7)
    assert resumed._wanted is False and resumed.known == ledger.known
    assert FlopLedger(tmp_path / "flops.json", "stage1", start=0)._wanted, "a part that starts over may have changed"
    assert FlopLedger(tmp_path / "flops.json", "stage2", start=7)._wanted


def test_counting_changes_no_bit(tmp_path):
    """SiLU's gradient too, which the counter would take apart."""
    network = torch.nn.Sequential(torch.nn.Linear(32, 24), torch.nn.SiLU(), torch.nn.Linear(24, 8))
    x, found = torch.randn(48, 32, generator=torch.Generator().manual_seed(0)), []
    for counted in (False, True):
        ledger = FlopLedger(tmp_path / "flops.json", "generator", start=0)
        if counted:
            ledger.begin()
        given = x.clone().requires_grad_()
        network(given).square().sum().backward()
        found.append(given.grad)
        ledger.abandon()
    assert torch.equal(*found)


def test_a_failed_step_leaves_no_counter_behind(tmp_path):
    ledger = FlopLedger(tmp_path / "flops.json", "stage1", start=0)
    ledger.begin()
    ledger.abandon()
    assert ledger.end("autoencoder", 4) is None and not ledger.file.exists()
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


def test_counting_allows_gradients_at_an_image(tmp_path):
    """autograd.grad at a leaf, which the adversarial loss takes, fails under the counter's hooks into modules."""
    ledger = FlopLedger(tmp_path / "flops.json", "stage1", start=0)
    image, layer = torch.randn(2, 8, requires_grad=True), torch.nn.Linear(8, 4)
    ledger.begin()
    torch.autograd.grad(layer(image).sum(), image)
    assert ledger.end("generator", 2) == 2 * (2 * 2 * 8 * 4), "forward and the gradient at the image"


def test_a_disk_that_refuses_does_not_stop_the_count(tmp_path, monkeypatch):
    def no_space(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "_flush", no_space)
    ledger = FlopLedger(tmp_path / "flops.json", "stage1", start=0)
    assert product(ledger, "autoencoder", 4) == 2 * 4 * 8 * 16


@pytest.mark.parametrize("tokens", [40, 300])
def test_attention_is_counted_whoever_computes_it(tokens):
    shape = (1, 2, tokens, 16)
    q = torch.randn(shape, device=DEVICE, requires_grad=True)
    found = counted(lambda: F.scaled_dot_product_attention(q, q, q).sum().backward())
    assert found in (
        sdpa_flop_count(*[shape] * 3) + sdpa_backward_flop_count(*[shape] * 4),
        3 * sdpa_flop_count(*[shape] * 3),  # where PyTorch writes it out
    )


def test_our_attention_counts_as_pytorchs():
    qkv = torch.randn(1, 20, 3, 2, 64, device=DEVICE, requires_grad=True)
    shape = (1, 2, 20, 64)
    forward, backward = sdpa_flop_count(*[shape] * 3), sdpa_backward_flop_count(*[shape] * 4)
    assert counted(lambda: qknorm_attention(qkv, implementation="triton").sum().backward()) == forward + backward
    assert counted(lambda: qknorm_attention(qkv, implementation="reference").detach()) == forward


@pytest.mark.parametrize("input_gradient", [True, False])
def test_our_projection_counts_as_the_reference(input_gradient):
    p = torch.randn(1, 20, 32, device=DEVICE, requires_grad=input_gradient)
    weight, bias = (torch.randn(s, device=DEVICE, requires_grad=True) for s in ((16, 32), (16,)))
    found = [
        counted(lambda name=name: adapter_projection(p, weight, bias, "gelu", implementation=name).sum().backward())
        for name in ("triton", "reference")
    ]
    assert found[0] == found[1] == 2 * 20 * 32 * 16 * (3 if input_gradient else 2)


def test_kind_of_a_step():
    assert step_kind({"l1": 0, "grad_norm_discriminator": 0, "grad_norm_autoencoder": 0}) == "autoencoder+discriminator"
    assert step_kind({}) == ""


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
