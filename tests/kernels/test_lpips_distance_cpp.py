"""lpips_distance in C++: against fp64, zero vectors, wanted gradients, layouts, bits for any thread count, contract."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import assert_close, check_kernel, check_threads, normal, outputs_and_gradients, widened
from lpips_maps import inputs, other_layouts, with_zero_vectors
from torch import Tensor

from aligntok.kernels import explain, lpips_distance, use_implementation
from aligntok.kernels.lpips_distance import lpips_distance_reference

pytestmark = pytest.mark.usefixtures("on_the_cpu")

# Two roundings: check_kernel rounds the upstream gradient for the kernel and not for the reference
TOLERANCE = {torch.float32: 4e-6, torch.float16: 2**-9, torch.bfloat16: 2**-7}


def cpp(*tensors: Tensor) -> Tensor:
    return lpips_distance(*tensors, implementation="cpp")


@settings(max_examples=60)
@given(
    batch=st.integers(1, 3),
    channels=st.integers(2, 150),
    height=st.integers(1, 12),
    width=st.integers(1, 12),
    dtype=st.sampled_from(list(TOLERANCE)),
    gradients=st.sampled_from(["xy", "x", "y", ""]),
    seed=st.integers(0, 1000),
)
def test_against_fp64(batch, channels, height, width, dtype, gradients, seed):
    tensors = inputs(batch, channels, height, width, dtype=dtype, seed=seed, gradients=gradients)
    check_kernel(cpp, lpips_distance_reference, tensors, TOLERANCE[dtype])


@pytest.mark.parametrize("shape", [(8, 64, 30, 30), (2, 512, 8, 8), (1, 3, 1, 1)])
def test_maps_of_the_networks(shape):
    check_kernel(cpp, lpips_distance_reference, inputs(*shape, gradients="x"), TOLERANCE[torch.float32])


@pytest.mark.parametrize("zeros", ["x", "y", "xy"])
def test_zero_vectors(zeros):
    """Where all channels are zero the norm has gradient 0, and what is left is g / 1e-10."""
    tensors, rest = with_zero_vectors(zeros)
    check_kernel(cpp, lpips_distance_reference, tensors, TOLERANCE[torch.float32])
    found = outputs_and_gradients(cpp, tensors)
    expected = outputs_and_gradients(lpips_distance_reference, widened(tensors))
    for name in ("gradient 0", "gradient 1"):  # of the other pixels 1e10 times smaller
        assert found[name].isfinite().all()
        assert_close({name: found[name] * rest}, {name: expected[name] * rest}, TOLERANCE[torch.float32])


def test_nan_stays():
    fx, fy, head = inputs(2, 20, 4, 3, gradients="")
    fx[1, 5, 2, 1] = float("nan")
    distance = cpp(fx.requires_grad_(), fy, head)
    assert distance[0].isfinite() and distance[1].isnan()
    [gradient] = torch.autograd.grad(distance.sum(), fx)
    assert gradient[1, :, 2, 1].isnan().all() and gradient.isnan().sum() == 20


def test_equal_maps_have_no_distance():
    fx, _, head = inputs(2, 20, 4, 3)
    found = outputs_and_gradients(cpp, [fx, fx.detach().clone().requires_grad_(), head])
    assert not any(tensor.any() for tensor in found.values())


def test_other_layouts_give_the_same_bits():
    tensors = inputs(2, 24, 6, 5)
    expected = outputs_and_gradients(cpp, tensors)
    for others in other_layouts(*tensors):
        found = outputs_and_gradients(cpp, others)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert found["gradient 0"].is_contiguous(memory_format=torch.channels_last)


def test_same_bits_for_any_number_of_threads():
    tensors = inputs(3, 64, 40, 40, dtype=torch.bfloat16)
    check_threads(cpp, tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operator_contract(dtype):
    tensors = inputs(2, 6, 3, 4, dtype=dtype)
    torch.library.opcheck(torch.ops.aligntok.lpips_distance.default, tensors)
    detached = [tensor.detach() for tensor in tensors]
    backward = torch.ops.aligntok.lpips_distance_backward.default
    for both in (False, True):
        torch.library.opcheck(backward, (*detached, normal(2, seed=9), both))
    with pytest.raises(ValueError, match="one shape and dtype"):
        torch.ops.aligntok.lpips_distance(detached[0], detached[1][:, :5], detached[2])
    with pytest.raises(ValueError, match=r"head must be \[6\]"):
        torch.ops.aligntok.lpips_distance(*detached[:2], detached[2][:5])
    with pytest.raises(ValueError, match=r"upstream must be \[2\]"):
        backward(*detached, normal(3, seed=9), True)


def test_compiles_without_a_break():
    compiled = torch.compile(cpp, fullgraph=True, backend="aot_eager")
    for gradients in ("xy", "y"):
        tensors = inputs(2, 6, 3, 4, dtype=torch.bfloat16, gradients=gradients)
        expected, found = (outputs_and_gradients(function, tensors) for function in (cpp, compiled))
        assert all(torch.equal(one, found[name]) for name, one in expected.items())


def test_default_on_the_cpu_and_other_requests():
    tensors = inputs(2, 6, 3, 4)
    assert explain("lpips_distance", "cpu").name == "cpp"
    assert torch.equal(lpips_distance(*tensors), cpp(*tensors))
    with use_implementation("reference"):
        assert torch.equal(lpips_distance(*tensors), lpips_distance_reference(*tensors))
    with pytest.raises(ValueError, match="fp64"):
        cpp(*(tensor.double() for tensor in tensors))
    with pytest.raises(NotImplementedError, match="second derivative"):
        torch.autograd.grad(cpp(*tensors).sum(), tensors[0], create_graph=True)
