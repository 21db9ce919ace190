"""The CUDA sources: compiled for both architectures, and the same kernels run on a CPU (cuda_on_host.cpp).

Also: which build runs on which device, and what CUDA tensors get where there is no CUDA part.
"""

import ctypes
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aligntok._cuda_toolkit import find_toolkit
from aligntok.kernels import _dispatch, _extension, _extension_cuda, explain
from aligntok.kernels.gan_loss import discriminator_loss_reference, generator_loss_reference
from aligntok.kernels.norm_ratio import MAX_TENSORS_CUDA
from benchmarks import cuda_report

ROOT = Path(__file__).resolve().parents[2]
SCALARS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
PHIS = {"linear": 0, "hinge": 1, "non_saturating": 2}
# Relative to the largest magnitude; fp16 and bf16 gradients are rounded to 11 and 8 bits.
GRADIENT_ERROR = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10, torch.float64: 1e-14}


@pytest.fixture(scope="session")
def toolkit():
    """The CUDA toolkit, whose compiler and headers the tests need."""
    found, _ = find_toolkit()
    if found is None:
        pytest.skip("needs nvcc")
    return found


@pytest.mark.parametrize("arch", cuda_report.ARCHITECTURES)
def test_every_source_compiles_without_spills(toolkit, arch):
    found = [row for source in cuda_report.sources() for row in cuda_report.compile_source(source, arch)]
    assert {row["source"] for row in found} == {"gan_loss_cuda.cu", "norm_ratio_cuda.cu"}
    assert len(found) == 16  # three functions and one ratio, four types each
    assert cuda_report.spilling(found) == []
    for row in found:
        assert row["arch"] == arch and 16 <= row["registers"] <= 64 and 0 < row["shared"] < 1024


def test_the_report_reads_what_ptxas_says():
    words = """ptxas info    : Compiling entry function '_Z4workPf' for 'sm_90a'
    ptxas info    : Function properties for _Z4workPf
        24 bytes stack frame, 16 bytes spill stores, 8 bytes spill loads
    ptxas info    : Used 255 registers, used 1 barriers, 24 bytes cumulative stack size, 512 bytes smem
    ptxas info    : Compiling entry function '_Z4restPf' for 'sm_90a'
        0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
    ptxas info    : Used 8 registers, used 0 barriers, 360 bytes cmem[0]
    """
    first, second = found = cuda_report.parse(words, "a.cu")
    assert first["kernel"].startswith(("work", "_Z4work"))
    assert first | {"kernel": "k"} == {
        "source": "a.cu", "kernel": "k", "arch": 90, "registers": 255, "spilled_bytes": 24, "stack": 24, "shared": 512
    }  # fmt: skip
    assert (second["registers"], second["spilled_bytes"], second["shared"]) == (8, 0, 0)
    assert cuda_report.spilling(found) == [f"{first['kernel']} on sm_90: 24 bytes spilled, 24 bytes of stack"]


def test_a_source_that_does_not_compile_is_named(toolkit, tmp_path):
    broken = tmp_path / "broken.cu"
    broken.write_text("__global__ void kernel() { undeclared = 1; }\n")
    with pytest.raises(RuntimeError, match=r"broken\.cu for sm_80[\s\S]*undeclared"):
        cuda_report.compile_source(broken, 80)


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ((8, 0), ["8.0", "9.0"], True),
        ((8, 9), ["8.0", "9.0"], True),
        ((9, 0), ["8.0", "9.0a"], True),
        ((7, 5), ["8.0", "9.0"], False),
        ((10, 0), ["8.0", "9.0"], False),
        ((12, 0), ["8.0", "9.0+PTX"], True),
        ((8, 0), ["8.6"], False),
    ],
)
def test_which_machine_code_runs_where(capability, architectures, runs):
    assert _extension_cuda._runs_on(capability, architectures) is runs


@pytest.mark.parametrize("op", ["gan_loss", "norm_ratio"])
def test_cuda_tensors_get_the_cuda_part_by_default(monkeypatch, op):
    monkeypatch.setattr(_dispatch, "_selected", {})
    monkeypatch.setattr(_extension, "unavailable", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # a device in name only
    built = {"built": True, "reason": None, "architectures": ["8.0", "9.0"]}
    monkeypatch.setattr(_extension, "build_report", lambda: {"cuda": built})
    assert explain(op, "cuda").name == "cpp"
    missing = {"built": False, "reason": "torch is built without CUDA", "architectures": []}
    monkeypatch.setattr(_extension, "build_report", lambda: {"cuda": missing})
    found = explain(op, "cuda")
    assert found.name == "reference" and "torch is built without CUDA" in found.rejected["cpp"]
    with pytest.raises(ValueError, match="torch is built without CUDA"):
        _dispatch.select(op, "cuda", "cpp")
    assert "not for tensors on 'xpu'" in explain(op, "xpu").rejected["cpp"]
    monkeypatch.setattr(_extension, "build_report", lambda: {"cuda": built})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "the device has 7.5" in explain(op, "cuda").rejected["cpp"]


def test_python_and_cuda_agree_on_the_largest_number_of_tensors():
    header = (ROOT / "csrc" / "cuda_kernels.h").read_text()
    assert f"constexpr int kMaxTensors = {MAX_TENSORS_CUDA};" in header


@pytest.fixture(scope="session")
def on_host(toolkit, tmp_path_factory):
    """The library of cuda_on_host.cpp."""
    library = tmp_path_factory.mktemp("cuda_on_host") / "library.so"
    folders = [f"-I{toolkit.home / 'include'}", f"-I{ROOT / 'csrc'}"]
    options = ["-std=c++17", "-O1", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-shared", "-fPIC"]
    source = Path(__file__).with_name("cuda_on_host.cpp")
    subprocess.run(["c++", *options, *folders, str(source), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def _pointers(tensors):
    return (ctypes.c_void_p * len(tensors))(*[None if t is None else t.data_ptr() for t in tensors])


def _numbers(kind, values):
    return (kind * len(values))(*values)


def _gan_loss(library, phi, logits, weight, lecam=(None, 0.0), seed=0, gradients=True):
    """Loss, statistics and gradients of the CUDA kernel; the real side comes first if there are two."""
    precise = logits[0].dtype == torch.float64
    result = torch.full((1 + 2 * len(logits),), float("nan"), dtype=torch.float64 if precise else torch.float32)
    found = [torch.full_like(x, float("nan"), memory_format=torch.contiguous_format) for x in logits]
    means, lecam_weight = lecam
    scales = [weight / x.numel() for x in logits]
    counter = library.host_gan_loss(
        PHIS[phi], SCALARS[logits[0].dtype], len(logits), _pointers(logits),
        _pointers(found if gradients else [None] * len(logits)),
        _numbers(ctypes.c_int64, [x.numel() for x in logits]),
        _numbers(ctypes.c_double, [-1.0, 1.0] if len(logits) == 2 else [-1.0]),
        ctypes.c_double(weight), _numbers(ctypes.c_double, scales),
        ctypes.c_void_p(None if means is None else means.data_ptr()), ctypes.c_double(lecam_weight),
        ctypes.c_void_p(result.data_ptr()), ctypes.c_void_p(result[1:].data_ptr()), ctypes.c_uint(seed),
    )  # fmt: skip
    assert counter == 0, "the counter must be ready for the next launch"
    return [result[0], result[1:], *(found if gradients else [])]


def _logits(count, dtype, seed, offset=0):
    """`count` logits that begin `offset` elements behind a 16-byte boundary."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count + offset, generator=generator, dtype=torch.float64).mul(2).to(dtype)[offset:]


def _reference(function, logits, *arguments):
    leaves = [x.double().requires_grad_() for x in logits]
    loss, stats = function(*leaves, *arguments)
    return [loss.detach(), stats, *torch.autograd.grad(loss, leaves)]


def _assert_close(found, expected, dtype):
    errors = [1e-13 if dtype == torch.float64 else 1e-6] * 2 + [GRADIENT_ERROR[dtype]] * 2
    for one, other, error in zip(found, expected, errors, strict=False):
        scale = other.abs().max().clamp_min(1e-30)
        # fp16 gradients of a mean are partly denormal: their rounding is that of the smallest number, 2^-24.
        accepted = error * scale + (2**-24 if one.dtype == torch.float16 else 0)
        assert (one.double() - other).abs().max() <= accepted


@pytest.mark.parametrize("dtype", SCALARS, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("kind", ["hinge", "non_saturating"])
@settings(max_examples=6)
@given(
    real=st.integers(1, 3000), fake=st.integers(1, 3000), offset=st.integers(0, 3),
    lecam=st.sampled_from([0.0, 0.3]), seed=st.integers(0, 99),
)  # fmt: skip
def test_the_gan_kernel_run_on_a_cpu(on_host, dtype, kind, real, fake, offset, lecam, seed):
    logits = [_logits(real, dtype, seed, offset), _logits(fake, dtype, seed + 1)]
    means = torch.tensor([0.7, -0.4]) if lecam else None
    found = _gan_loss(on_host, kind, logits, 0.5, (means, lecam), seed)
    _assert_close(found, _reference(discriminator_loss_reference, logits, kind, means, lecam), dtype)
    phi = "linear" if kind == "hinge" else kind
    found = _gan_loss(on_host, phi, logits[:1], 1.0, seed=seed)
    _assert_close(found, _reference(generator_loss_reference, logits[:1], kind), dtype)


def test_the_gan_kernel_gives_equal_bits_in_any_order_of_blocks_and_threads(on_host):
    logits = [_logits(9001, torch.float32, 0), _logits(5000, torch.float32, 1)]
    means = torch.tensor([0.7, -0.4])
    first, *others = (_gan_loss(on_host, "non_saturating", logits, 0.5, (means, 0.3), seed) for seed in range(3))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    without = _gan_loss(on_host, "non_saturating", logits, 0.5, (means, 0.3), gradients=False)
    assert torch.equal(first[0], without[0]) and torch.equal(first[1], without[1])


def test_the_gan_kernel_loops_where_logits_outnumber_its_threads(on_host):
    logits = [_logits(600_001, torch.float32, 0)]
    found = _gan_loss(on_host, "linear", logits, 1.0)
    _assert_close(found, _reference(generator_loss_reference, logits, "hinge"), torch.float32)


def test_the_gan_kernel_keeps_nan(on_host):
    logits = [torch.zeros(40), torch.zeros(7)]
    logits[0][21] = float("nan")
    for phi in ("hinge", "non_saturating"):
        loss, stats, d_real, d_fake = _gan_loss(on_host, phi, logits, 0.5)
        assert loss.isnan() and stats[0].isnan() and d_fake.isfinite().all()
        assert phi == "hinge" or d_real[21].isnan()


def _norm_ratio(library, a, b, delta, limit, seed):
    result = torch.full((), float("nan"), dtype=torch.float64 if a[0].dtype == torch.float64 else torch.float32)
    tensors = [*a, *b]
    counter = library.host_norm_ratio(
        SCALARS[a[0].dtype], len(tensors), len(a), _pointers(tensors),
        _numbers(ctypes.c_int64, [t.numel() for t in tensors]), ctypes.c_double(delta), ctypes.c_double(limit),
        ctypes.c_void_p(result.data_ptr()), ctypes.c_uint(seed),
    )  # fmt: skip
    assert counter == 0
    return result.item()


@pytest.mark.parametrize("dtype", SCALARS, ids=lambda dtype: str(dtype).removeprefix("torch."))
@settings(max_examples=4)
@given(
    counts=st.lists(st.integers(1, 40_000), min_size=2, max_size=5), split=st.integers(1, 4),
    offset=st.integers(0, 3), seed=st.integers(0, 99),
)  # fmt: skip
def test_the_norm_kernel_run_on_a_cpu(on_host, dtype, counts, split, offset, seed):
    tensors = [_logits(count, dtype, seed + i, offset) for i, count in enumerate(counts)]
    split = min(split, len(tensors) - 1)
    a, b = tensors[:split], tensors[split:]
    found = {_norm_ratio(on_host, a, b, 1e-4, 1e4, order) for order in (seed, seed + 1)}
    assert len(found) == 1, "the order of blocks and threads must not matter"
    norms = [torch.cat([t.double() for t in side]).norm() for side in (a, b)]
    expected = (norms[0] / (norms[1] + 1e-4)).item()
    assert found.pop() == pytest.approx(expected, rel=1e-12 if dtype == torch.float64 else 1e-7)
    assert _norm_ratio(on_host, a, b, 1e-4, 0.01, seed) == pytest.approx(0.01)
