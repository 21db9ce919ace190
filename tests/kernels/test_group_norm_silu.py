"""group_norm_silu: C++ against fp64 PyTorch, bf16 against eager, reproducible bits, layouts, refusals."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from aligntok.kernels import group_norm_silu, use_implementation
from aligntok.kernels.group_norm_silu import group_norm_silu_reference

EPS = 1e-6
LAST = torch.channels_last
SHAPES = (  # x and groups: the decoder's, odd sizes, one channel per group, one group, single values
    ((2, 32, 16, 16), 8),
    ((1, 33, 70, 31), 3),
    ((3, 12, 5, 3), 12),
    ((5, 7, 9, 1), 1),
    ((2, 512, 2, 3), 32),
    ((2, 3, 1, 1), 1),
    ((1, 1, 90, 41), 1),
    ((1, 64, 65, 66), 16),  # too large for the backward pass to keep an intermediate result
)


def inputs(shape: tuple[int, ...], dtype: torch.dtype, mean: float = 1.5, seed: int = 0) -> list[Tensor]:
    """x, weight, bias and dy; weight and bias are fp32 beside low-precision x."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, dtype=torch.float64)

    x, dy = (normal(*shape) * 2 + mean).to(dtype), normal(*shape).to(dtype)
    wide = dtype if dtype == torch.float64 else torch.float32
    weight, bias = normal(shape[1]).to(wide), normal(shape[1]).to(wide)
    x, dy = (tensor.contiguous(memory_format=LAST) for tensor in (x, dy))
    return [x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), dy]


def results(
    operator, x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor, groups: int, **options
) -> tuple[Tensor, ...]:
    """y, dx, dweight, dbias."""
    y = operator(x, weight, bias, groups, EPS, **options)
    return (y.detach(), *torch.autograd.grad(y, (x, weight, bias), dy))


def exact(
    x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor, groups: int, activation: bool = True
) -> tuple[Tensor, ...]:
    """The same from plain PyTorch in fp64, on the same (rounded) inputs."""
    wide = [tensor.detach().double().requires_grad_() for tensor in (x, weight, bias)]
    u = torch.group_norm(wide[0], groups, wide[1], wide[2], EPS)
    y = F.silu(u) if activation else u
    return (y.detach(), *torch.autograd.grad(y, wide, dy.double()))


def errors(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> list[float]:
    """Largest difference of each result relative to the largest magnitude expected."""
    return [
        ((a.double() - b).abs().max() / b.abs().max().clamp_min(1e-12)).item()
        for a, b in zip(found, expected, strict=True)
    ]


def rms_errors(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> list[float]:
    """Root mean square of each difference."""
    return [(a.double() - b).square().mean().sqrt().item() for a, b in zip(found, expected, strict=True)]


@pytest.mark.parametrize("activation", [True, False])
@pytest.mark.parametrize(("shape", "groups"), [((2, 4, 3, 2), 2), ((1, 3, 2, 5), 3), ((2, 6, 1, 2), 1)])
def test_gradcheck(shape, groups, activation):
    x, weight, bias, _ = inputs(shape, torch.float64)

    def run(*tensors: Tensor) -> Tensor:
        return group_norm_silu(*tensors, groups, EPS, activation, implementation="cpp")

    assert torch.autograd.gradcheck(run, (x, weight, bias))


@pytest.mark.parametrize("activation", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 4e-6), (torch.float16, 2e-3)])
@pytest.mark.parametrize(("shape", "groups"), SHAPES)
def test_parity_with_fp64(shape, groups, dtype, tolerance, activation):
    tensors = inputs(shape, dtype)
    found = results(group_norm_silu, *tensors, groups, activation=activation, implementation="cpp")
    assert max(errors(found, exact(*tensors, groups, activation))) < tolerance
    assert [tensor.dtype for tensor in found] == [dtype, dtype, tensors[1].dtype, tensors[2].dtype]
    assert found[0].is_contiguous(memory_format=LAST) and found[1].is_contiguous(memory_format=LAST)


@pytest.mark.parametrize("activation", [True, False])
@pytest.mark.parametrize(("shape", "groups"), [((2, 32, 16, 16), 8), ((1, 33, 70, 31), 3), ((2, 512, 4, 4), 32)])
def test_bf16_is_as_exact_as_eager(shape, groups, activation):
    tensors = inputs(shape, torch.bfloat16)
    expected = exact(*tensors, groups, activation)
    ours = results(group_norm_silu, *tensors, groups, activation=activation, implementation="cpp")
    eager = results(group_norm_silu_reference, *tensors, groups, activation=activation)
    for own, other in zip(rms_errors(ours, expected), rms_errors(eager, expected), strict=True):
        assert own <= 1.5 * other
    assert max(errors(ours, expected)) < 2**-7  # twice the spacing of bf16 numbers relative to the largest


@settings(max_examples=40)
@given(
    batch=st.integers(1, 5),
    groups=st.integers(1, 9),
    width=st.integers(1, 17),
    height=st.integers(1, 23),
    columns=st.integers(1, 41),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    mean=st.sampled_from([0.0, -3.0, 50.0]),
    seed=st.integers(0, 2**16),
)
def test_ragged_shapes(batch, groups, width, height, columns, dtype, mean, seed):
    tensors = inputs((batch, groups * width, height, columns), dtype, mean, seed)
    found = results(group_norm_silu, *tensors, groups, implementation="cpp")
    expected = exact(*tensors, groups)
    # Few values can have any deviation; the smaller it is, the more the rounding of x - mean weighs.
    x = tensors[0].detach().double().reshape(batch, groups, -1)
    amplification = 1 + (x.abs().amax(-1) / (x.var(-1, correction=0) + EPS).sqrt()).max().item()
    unit = 2**-8 if dtype == torch.bfloat16 else 2**-20
    assert errors(found, expected)[0] < unit + 2**-21 * amplification
    for own, other in zip(found[1:], expected[1:], strict=True):
        scale = other.abs().max().item() + 1e-3 * amplification
        assert (own.double() - other).abs().max().item() < scale * (2 * unit + 2**-20 * amplification)


@pytest.mark.parametrize("shape", [(2, 32, 40, 40), (3, 7, 65, 9), (1, 512, 16, 16)])
def test_mean_far_larger_than_deviation(shape):
    # fp32 spacing at 4096 is 2^-11: the data are exact, E[x^2] - E[x]^2 in fp32 would have no correct digit.
    x, weight, bias, dy = inputs(shape, torch.float32)
    x = (x.detach() * 64).round().div(64).add(4096.0).requires_grad_()
    expected = exact(x, weight, bias, dy, 1)
    found = results(group_norm_silu, x, weight, bias, dy, 1, implementation="cpp")
    eager = results(group_norm_silu_reference, x, weight, bias, dy, 1)
    for own, other in zip(errors(found, expected), errors(eager, expected), strict=True):
        assert own < max(2e-4, other)


def test_outlier_in_the_row_that_the_sums_are_taken_around():
    x, weight, bias, dy = inputs((1, 8, 64, 64), torch.float32)
    with torch.no_grad():
        x[:, :, 0, 0] = 1e4
    found = results(group_norm_silu, x, weight, bias, dy, 4, implementation="cpp")
    assert max(errors(found, exact(x, weight, bias, dy, 4))) < 5e-5


def test_constant_group_gives_the_bias():
    x = torch.full((2, 4, 5, 5), 3.7, requires_grad=True)
    weight, bias = torch.ones(4), torch.tensor([0.5, -1.0, 0.0, 2.0])
    y = group_norm_silu(x, weight, bias, 2, EPS, implementation="cpp")
    torch.testing.assert_close(y, F.silu(bias)[None, :, None, None].expand_as(y))


def test_silu_and_its_derivative_to_the_last_places():
    # Weight 0 makes u the bias exactly, whatever x is. The derivative arrives in dbias, one pixel and image alone.
    u = torch.linspace(-80, 80, 4096)
    x, weight, bias = torch.ones(1, 4096, 1, 1), torch.zeros(4096), u.clone().requires_grad_()
    y = group_norm_silu(x, weight, bias, 1, EPS, implementation="cpp")
    [derivative] = torch.autograd.grad(y.sum(), bias)
    wide = u.double().requires_grad_()
    expected = F.silu(wide)
    [expected_derivative] = torch.autograd.grad(expected.sum(), wide)
    relative = (y.flatten().double() / expected.detach() - 1).abs()
    assert relative[u != 0].max() < 4 * 2**-24  # four roundings: exp, 1 + e, division, product
    assert (derivative.double() - expected_derivative).abs().max() < 8 * 2**-24


def test_saturated_activation_and_nan():
    bias = torch.tensor([200.0, -200.0])
    x, weight = torch.zeros(1, 2, 4, 4, requires_grad=True), torch.ones(2)
    y = group_norm_silu(x, weight, bias, 2, EPS, implementation="cpp")
    assert y[0, 0].eq(200).all() and y[0, 1].abs().max() < 1e-30
    [dx] = torch.autograd.grad(y.sum(), x)
    assert dx.isfinite().all()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        poisoned = torch.randn(2, 32, 8, 8).to(dtype)
        poisoned[0, 0, 3, 3] = float("nan")
        y = group_norm_silu(poisoned, torch.ones(32), torch.zeros(32), 8, EPS, implementation="cpp")
        assert y[0, :4].isnan().all() and y[0, 4:].isfinite().all() and y[1].isfinite().all()


# More images than threads (an image per task) and fewer (chunks shared out), all above the size of one task.
@pytest.mark.parametrize("shape", [(6, 32, 32, 32), (1, 32, 80, 80), (3, 513, 9, 31), (2, 32, 96, 96)])
def test_same_bits_for_two_runs_and_any_number_of_threads(shape):
    tensors = inputs(shape, torch.bfloat16)
    before = torch.get_num_threads()
    runs = []
    try:
        for threads in (1, 2, 2, 5):
            torch.set_num_threads(threads)
            runs.append(results(group_norm_silu, *tensors, 1, implementation="cpp"))
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


CHECK_CAPABILITY = """
import torch
from aligntok.kernels import group_norm_silu
found = torch.backends.cpu.get_cpu_capability().replace("NO AVX", "DEFAULT")  # as torch 2.8 calls it
assert found == "{capability}", found
generator = torch.Generator().manual_seed(0)
for shape in [(2, 33, 9, 7), (1, 64, 65, 66)]:
    for dtype, tolerance in [(torch.bfloat16, 2**-7), (torch.float16, 2**-9), (torch.float32, 4e-6)]:
        x, dy = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
        weight, bias = (torch.randn(shape[1], generator=generator) for _ in range(2))
        results = []
        for implementation, kind in [("cpp", lambda t: t), ("reference", torch.Tensor.double)]:
            leaves = [kind(tensor).requires_grad_() for tensor in (x, weight, bias)]
            y = group_norm_silu(*leaves, 1, 1e-6, implementation=implementation)
            results.append([y, *torch.autograd.grad(y, leaves, kind(dy))])
        for one, other in zip(*results):
            assert (one.double() - other).abs().max() < tolerance * other.abs().max(), (shape, dtype)
"""


def test_older_instruction_sets():
    """The loops for lesser processors, run on this one. The tests above run the best it has."""
    with_avx2 = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    processes = []
    for capability in ("DEFAULT", "AVX2") if with_avx2 else ("DEFAULT",):
        environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability.lower()}
        script = CHECK_CAPABILITY.format(capability=capability)
        processes.append(subprocess.Popen([sys.executable, "-c", script], env=environment))
    assert [process.wait() for process in processes] == [0] * len(processes)


def test_other_layouts_give_the_same_bits():
    x, weight, bias, dy = inputs((2, 32, 12, 10), torch.float32)
    expected = results(group_norm_silu, x, weight, bias, dy, 8, implementation="cpp")
    sliced = torch.empty(2, 64, 12, 20)[:, ::2, :, ::2].copy_(x.detach()).requires_grad_()
    assert not sliced.is_contiguous(memory_format=LAST)
    for other in (x.detach().contiguous().requires_grad_(), sliced):
        found = results(group_norm_silu, other, weight, bias, dy.contiguous(), 8, implementation="cpp")
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
        assert found[0].is_contiguous(memory_format=LAST)
    y = group_norm_silu(x, weight, bias, 8, EPS, implementation="cpp")
    [expanded] = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(expanded, exact(x, weight, bias, torch.ones_like(x), 8)[1].float())


def test_parameters_in_bf16():
    x, weight, bias, dy = inputs((2, 32, 8, 8), torch.bfloat16)
    weight, bias = (tensor.detach().bfloat16().requires_grad_() for tensor in (weight, bias))
    found = results(group_norm_silu, x, weight, bias, dy, 8, implementation="cpp")
    assert found[2].dtype == found[3].dtype == torch.bfloat16
    assert max(errors(found, exact(x, weight, bias, dy, 8))) < 2**-7


def test_autocast_leaves_bf16_between_convolutions():
    convolution, norm = torch.nn.Conv2d(3, 16, 3), torch.nn.GroupNorm(4, 16, eps=EPS)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = convolution(torch.randn(2, 3, 9, 9).contiguous(memory_format=LAST))
        y = group_norm_silu(hidden, norm.weight, norm.bias, 4, EPS, implementation="cpp")
    assert hidden.dtype == y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert norm.weight.grad.dtype == torch.float32 and convolution.weight.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    x, weight, bias, dy = inputs((2, 8, 5, 3), dtype)
    torch.library.opcheck(torch.ops.aligntok.group_norm_silu.default, (x, weight, bias, 4, EPS, True))
    flat = [tensor.detach() for tensor in (x.contiguous(), weight, bias)]
    torch.library.opcheck(torch.ops.aligntok.group_norm_silu_forward.default, (*flat, 4, EPS, True))
    _, mean, rstd = torch.ops.aligntok.group_norm_silu_forward(*flat, 4, EPS, True)
    torch.library.opcheck(torch.ops.aligntok.group_norm_silu_backward.default, (dy, *flat, mean, rstd, True))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_break(dynamic):
    # The graph goes to the eager backend: what is asked is whether operator and gradient can be traced.
    compiled = torch.compile(group_norm_silu, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for size in (6, 9) if dynamic else (6,):
        tensors = inputs((2, 8, size, 4), torch.bfloat16)
        expected = results(group_norm_silu, *tensors, 4, implementation="cpp")
        found = results(compiled, *tensors, 4, implementation="cpp")
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_no_gradient_and_partial_gradient():
    x, weight, bias, dy = inputs((2, 8, 5, 3), torch.float32)
    full = results(group_norm_silu, x, weight, bias, dy, 2, implementation="cpp")
    with torch.no_grad():
        y = group_norm_silu(x, weight, bias, 2, EPS, implementation="cpp")
    assert not y.requires_grad and torch.equal(y, full[0])
    frozen = group_norm_silu(x, weight.detach(), bias.detach(), 2, EPS, implementation="cpp")
    [dx] = torch.autograd.grad(frozen, x, dy)
    assert torch.equal(dx, full[1])


def test_second_derivative_is_refused():
    x, weight, bias, _ = inputs((1, 4, 3, 3), torch.float32)
    y = group_norm_silu(x, weight, bias, 2, EPS, implementation="cpp")
    with pytest.raises(NotImplementedError, match="second derivative"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_reference_follows_the_request():
    tensors = inputs((2, 8, 4, 4), torch.float32)
    with use_implementation("reference"):
        found = results(group_norm_silu, *tensors, 4)
    expected = results(group_norm_silu_reference, *tensors, 4)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("implementation", ["cpp", "reference"])
@pytest.mark.parametrize(
    ("x", "weight", "bias", "groups", "eps", "message"),
    [
        ((2, 8, 4), (8,), (8,), 2, EPS, r"x: expected shape \[B, C, H, W\]"),
        ((2, 8, 0, 4), (8,), (8,), 2, EPS, "without a zero"),
        ((2, 8, 4, 4), (8,), (8,), 3, EPS, "groups: expected a divisor of the 8 channels, got 3"),
        ((2, 8, 4, 4), (8,), (8,), 0, EPS, "groups: expected a divisor"),
        ((2, 8, 4, 4), (7,), (8,), 2, EPS, r"weight: expected shape \[8\], got \[7\]"),
        ((2, 8, 4, 4), (8,), (8, 1), 2, EPS, r"bias: expected shape \[8\]"),
        ((2, 8, 4, 4), (8,), (8,), 2, -1.0, "eps: expected a number >= 0"),
    ],
)
def test_wrong_shapes(x, weight, bias, groups, eps, message, implementation):
    tensors = torch.ones(x), torch.ones(weight), torch.ones(bias)
    with pytest.raises(ValueError, match=message):
        group_norm_silu(*tensors, groups, eps, implementation=implementation)


@pytest.mark.parametrize(
    ("x", "weight", "bias", "message"),
    [
        (torch.int32, torch.float32, torch.float32, "x: expected dtype"),
        (torch.float64, torch.float32, torch.float32, "weight: expected dtype float64"),
        (torch.float32, torch.bfloat16, torch.bfloat16, "weight: expected dtype float32"),
        (torch.bfloat16, torch.bfloat16, torch.float32, "bias: expected dtype"),
    ],
)
def test_wrong_dtypes(x, weight, bias, message):
    with pytest.raises(ValueError, match=message):
        group_norm_silu(torch.ones(2, 8, 4, 4, dtype=x), torch.ones(8, dtype=weight), torch.ones(8, dtype=bias), 2, EPS)


def test_operator_called_directly_refuses_wrong_shapes():
    op = torch.ops.aligntok.group_norm_silu.default
    with pytest.raises(ValueError, match="do not divide"):
        op(torch.ones(2, 8, 4, 4), torch.ones(8), torch.ones(8), 3, EPS, True)
    with pytest.raises(ValueError, match="weight and bias"):
        op(torch.ones(2, 8, 4, 4), torch.ones(7), torch.ones(8), 2, EPS, True)
