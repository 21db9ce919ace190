"""group_norm_silu in Triton: against fp64, far means and outliers, layouts, the operator's contract, refusals.

The kernels for a group that fits one program and those for strips of larger maps are both tried, at every step.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import DEVICE, assert_close, check_kernel, normal, outputs_and_gradients, widened
from torch import Tensor

from aligntok.kernels import explain, group_norm_silu
from aligntok.kernels._triton import record_launches, use_configurations
from aligntok.kernels.group_norm_silu import WHOLE, group_norm_silu_reference

EPS = 1e-6
LAST = torch.channels_last
ONE_PROGRAM = {"LARGEST": 16384, "WARP": 512, "WARPS": 4, "num_stages": 1}
_OPTIONS = {"num_warps": 1, "num_stages": 1}
SMALL = {
    "group_norm_silu_strips": {"ROWS": 8, "CHANNELS": 32, "STEPS": 2, **_OPTIONS},
    "group_norm_silu_tiles": {"ROWS": 16, "CHANNELS": 32, **_OPTIONS},
    "group_norm_silu_partials": {"BLOCK": 8, **_OPTIONS},
}
IN_STRIPS = {f"group_norm_silu_{name}": ONE_PROGRAM | {"LARGEST": 0} for name in ("whole", "whole_backward")}
BOTH_WAYS = pytest.mark.parametrize("ways", [{}, IN_STRIPS | SMALL], ids=["one program", "strips"])


def triton(*inputs) -> Tensor:
    return group_norm_silu(*inputs, implementation="triton")


def inputs(*shape: int, groups: int, dtype=torch.float32, mean: float = 0.5, seed: int = 0, activation=True) -> list:
    """x in channels-last memory, fp32 weight and bias, and the switches."""
    x = (normal(*shape, seed=seed, scale=2) + mean).to(dtype).contiguous(memory_format=LAST)
    weight, bias = normal(shape[1], seed=seed + 1), normal(shape[1], seed=seed + 2)
    return [x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), groups, EPS, activation]


@BOTH_WAYS
@settings(max_examples=6)
@given(
    batch=st.integers(1, 2),
    groups=st.integers(1, 4),
    width=st.integers(1, 11),
    height=st.integers(4, 7),
    columns=st.integers(4, 7),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    activation=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_against_fp64(ways, batch, groups, width, height, columns, dtype, activation, seed):
    shape = (batch, groups * width, height, columns)
    with use_configurations(ways):
        check_kernel(
            triton,
            group_norm_silu_reference,
            inputs(*shape, groups=groups, dtype=dtype, seed=seed, activation=activation),
        )


@pytest.mark.parametrize("ways", [{}, IN_STRIPS], ids=["one program", "strips"])
def test_pinned_configurations(ways):
    with use_configurations(ways):  # a little more than a strip of pixels and a block of channels
        check_kernel(triton, group_norm_silu_reference, inputs(1, 66, 10, 27, groups=6))


@BOTH_WAYS
def test_mean_far_larger_than_deviation(ways):
    # fp32 spacing at 4096 is 2^-11: the data are exact, E[x^2] - E[x]^2 in fp32 would have no correct digit.
    x, *rest = inputs(1, 16, 8, 7, groups=2)
    x = (x.detach() * 64).round().div(64).add(4096.0).requires_grad_()
    with use_configurations(ways):
        check_kernel(triton, group_norm_silu_reference, [x, *rest], tolerance=2e-4)


@BOTH_WAYS
@pytest.mark.parametrize("place", [0, 55])
def test_outliers(ways, place):
    x, *rest = inputs(1, 8, 8, 7, groups=2)
    with torch.no_grad():
        x[:, :, place // 7, place % 7] = 1e4
    with use_configurations(ways):
        check_kernel(triton, group_norm_silu_reference, [x, *rest], tolerance=5e-5)


@BOTH_WAYS
def test_constant_group_and_nan(ways):
    x = torch.full((2, 4, 5, 6), 3.7, device=DEVICE).contiguous(memory_format=LAST)
    bias = torch.tensor([0.5, -200.0, 0.0, 200.0], device=DEVICE)
    with use_configurations(ways):
        y = triton(x, torch.ones_like(bias), bias, 2, EPS)
        torch.testing.assert_close(
            y, torch.nn.functional.silu(bias)[None, :, None, None].expand_as(y), atol=1e-3, rtol=0
        )
        x[0, 1, 2, 2] = float("nan")
        y = triton(x, torch.ones_like(bias), bias, 2, EPS)
    assert y[0, :2].isnan().all() and y[0, 2:].isfinite().all() and y[1].isfinite().all()


@pytest.mark.parametrize("ways", [{}, IN_STRIPS], ids=["one program", "strips"])
def test_other_layouts_give_the_same_bits(ways):
    x, *rest = inputs(2, 12, 5, 4, groups=3)
    sliced = torch.empty(2, 24, 5, 8, device=DEVICE)[:, ::2, :, ::2].copy_(x.detach()).requires_grad_()
    assert not sliced.is_contiguous(memory_format=LAST)
    with use_configurations(ways):
        expected = outputs_and_gradients(triton, [x, *rest])
        for other in (x.detach().contiguous().requires_grad_(), sliced):
            found = outputs_and_gradients(triton, [other, *rest])
            assert all(torch.equal(found[name], expected[name]) for name in expected)
            assert found["output 0"].is_contiguous(memory_format=LAST)
        y = triton(x, *rest)
        [expanded] = torch.autograd.grad(y.sum(), x)
    assert expanded.is_contiguous(memory_format=LAST)
    [exact] = torch.autograd.grad(group_norm_silu_reference(*(wide := widened([x, *rest]))).sum(), wide[0])
    assert_close({"dx": expanded}, {"dx": exact}, 2e-5)


@pytest.mark.parametrize("ways", [{}, IN_STRIPS], ids=["one program", "strips"])
def test_parameters_keep_their_dtype(ways):
    x, weight, bias, *switches = inputs(1, 16, 4, 5, groups=2, dtype=torch.float16)
    for dtype in (torch.float32, torch.float16):
        parameters = [p.detach().to(dtype).requires_grad_() for p in (weight, bias)]
        with use_configurations(ways):
            check_kernel(triton, group_norm_silu_reference, [x, *parameters, *switches])
            y = triton(x, *parameters, *switches)
        gradients = torch.autograd.grad(y.sum(), parameters)
        assert y.dtype == torch.float16 and [g.dtype for g in gradients] == [dtype, dtype]
        assert gradients[0].data_ptr() != gradients[1].data_ptr() and all(g.is_contiguous() for g in gradients)


def test_frozen_parameters():
    x, weight, bias, *switches = inputs(1, 8, 4, 5, groups=2)
    expected = outputs_and_gradients(triton, [x, weight, bias, *switches])
    found = outputs_and_gradients(triton, [x, weight.detach(), bias.detach(), *switches])
    assert found.keys() == {"output 0", "gradient 0"} and torch.equal(found["gradient 0"], expected["gradient 0"])


@pytest.mark.parametrize(("side", "launches"), [(16, (1, 1)), (32, (1, 1)), (33, (3, 3)), (64, (3, 3))])
def test_a_group_that_fits_one_program_is_read_once(side, launches):
    """The decoder's 512 channels in 32 groups at 256 px and below."""
    x = torch.empty(8, 512, side, side, device="meta", dtype=torch.bfloat16).contiguous(memory_format=LAST)
    weight, bias = (torch.empty(512, device="meta") for _ in range(2))
    for arch in WHOLE:
        with record_launches(arch) as recorded:
            y = triton(x.requires_grad_(), weight, bias, 32, EPS)
            forward = len(recorded)
            torch.autograd.grad(y, x, torch.empty_like(y))
        assert (forward, len(recorded) - forward) == launches


@pytest.mark.parametrize("ways", [{}, IN_STRIPS | SMALL], ids=["one program", "strips"])
def test_operator_contract(ways):
    x, weight, bias, *switches = inputs(1, 6, 5, 4, groups=2)
    with use_configurations(ways):
        forward = torch.ops.aligntok.group_norm_silu_triton.default
        torch.library.opcheck(forward, (x, weight, bias, *switches))
        _, mean, rstd = forward(x, weight, bias, *switches)
        saved = [t.detach() for t in (x, weight, bias, mean, rstd)]
        dy = normal(1, 6, 5, 4, seed=5)
        torch.library.opcheck(torch.ops.aligntok.group_norm_silu_triton_backward.default, (dy, *saved, True))


def test_compiles_without_a_break():
    compiled = torch.compile(group_norm_silu, fullgraph=True, backend="aot_eager")
    tensors = inputs(1, 8, 4, 5, groups=2, dtype=torch.float16)
    found = outputs_and_gradients(lambda *args: compiled(*args, implementation="triton"), tensors)
    expected = outputs_and_gradients(triton, tensors)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_default_on_a_cuda_device_is_triton():
    assert explain("group_norm_silu", "cuda").name == "triton"
    assert explain("group_norm_silu", "cpu").name != "triton"


def test_refusals():
    x, weight, bias = (torch.ones(shape, dtype=torch.float64, device=DEVICE) for shape in ((1, 4, 3, 3), 4, 4))
    with pytest.raises(ValueError, match="fp64"):
        triton(x, weight, bias, 2, EPS)
    assert group_norm_silu(x, weight, bias, 2, EPS).dtype == torch.float64
    with pytest.raises(ValueError, match="groups: expected a divisor of the 4 channels"):
        triton(x.float(), weight.float(), bias.float(), 3, EPS)
