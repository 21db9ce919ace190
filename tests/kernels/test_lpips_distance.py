"""lpips_distance: Triton against the fp64 reference, zero vectors, wanted gradients, layouts, contract, refusals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import assert_close, check_kernel, normal, outputs_and_gradients, widened
from lpips_maps import inputs, other_layouts, with_zero_vectors
from torch import Tensor

from aligntok.kernels import explain
from aligntok.kernels._triton import record_launches, use_configurations
from aligntok.kernels.lpips_distance import lpips_distance, lpips_distance_reference

SMALL = {"lpips_distance": {"TILE": 256, "num_warps": 1, "num_stages": 1}}


def triton(*inputs: Tensor) -> Tensor:
    return lpips_distance(*inputs, implementation="triton")


@settings(max_examples=12)
@given(
    batch=st.integers(1, 2),
    channels=st.integers(3, 80),
    height=st.integers(1, 6),
    columns=st.integers(1, 6),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    gradients=st.sampled_from(["xy", "x", "y", ""]),
    seed=st.integers(0, 1000),
)
def test_against_fp64(batch, channels, height, columns, dtype, gradients, seed):
    tensors = inputs(batch, channels, height, columns, dtype=dtype, seed=seed, gradients=gradients)
    with use_configurations(SMALL):
        check_kernel(triton, lpips_distance_reference, tensors)


@pytest.mark.parametrize("shape", [(2, 64, 9, 17), (1, 512, 3, 5), (1, 5000, 2, 1)])
def test_pinned_configuration(shape):
    check_kernel(triton, lpips_distance_reference, inputs(*shape))


def test_one_channel_and_equal_maps_have_no_gradient():
    fx, fy, head = inputs(2, 1, 4, 3)
    found = outputs_and_gradients(triton, [fx, fy, head])
    expected = lpips_distance_reference(*widened([fx, fy, head]))
    assert_close({"output 0": found["output 0"]}, {"output 0": expected}, 2e-5)
    assert max(found[name].abs().max() for name in ("gradient 0", "gradient 1")) < 1e-3  # 1 / |f| is up to hundreds
    fx, _, head = inputs(2, 20, 4, 3)
    found = outputs_and_gradients(triton, [fx, fx.detach().clone().requires_grad_(), head])
    assert not any(tensor.any() for tensor in found.values())


@pytest.mark.parametrize("zeros", ["x", "y", "xy"])
def test_zero_vectors(zeros):
    """Where all channels are zero: the norm has gradient 0, what is left is g / 1e-10. No NaN anywhere."""
    tensors, rest = with_zero_vectors(zeros)
    with use_configurations(SMALL):
        check_kernel(triton, lpips_distance_reference, tensors)
        found = outputs_and_gradients(triton, tensors)
    expected = outputs_and_gradients(lpips_distance_reference, widened(tensors))
    for name in ("gradient 0", "gradient 1"):  # of the other pixels 1e10 times smaller
        assert found[name].isfinite().all()
        assert_close({name: found[name] * rest}, {name: expected[name] * rest}, 2e-5)


def test_other_layouts_give_the_same_bits():
    tensors = inputs(2, 24, 6, 5)
    expected = outputs_and_gradients(triton, tensors)
    for others in other_layouts(*tensors):
        found = outputs_and_gradients(triton, others)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert found["gradient 0"].is_contiguous(memory_format=torch.channels_last)


def test_expanded_cotangent_and_dtype_of_the_head():
    fx, fy, head = inputs(3, 20, 4, 5, dtype=torch.float16)
    for weights in (head, head.half(), head.bfloat16()):
        wide = widened([fx, fy, weights])
        found = torch.autograd.grad(triton(fx, fy, weights).sum(), (fx, fy))
        expected = torch.autograd.grad(lpips_distance_reference(*wide).sum(), wide[:2])
        assert_close(dict(zip("xy", found, strict=True)), dict(zip("xy", expected, strict=True)), 4e-3)


@pytest.mark.parametrize(("gradients", "written"), [("x", 1), ("y", 1), ("xy", 2)])
def test_only_wanted_gradients_are_computed(gradients, written):
    fx, fy, head = (t.to("meta") for t in inputs(8, 64, 16, 16, gradients=""))
    wanted = [t.requires_grad_() for name, t in (("x", fx), ("y", fy)) if name in gradients]
    with record_launches(90) as recorded:
        distance = triton(fx, fy, head)
        torch.autograd.grad(distance, wanted, torch.empty_like(distance))
    assert len(recorded) == 2 and recorded[1].arguments["BOTH"] is (written == 2)


def test_operator_contract():
    tensors = inputs(1, 6, 3, 4)
    torch.library.opcheck(torch.ops.aligntok.lpips_distance_triton.default, tensors)
    backward = torch.ops.aligntok.lpips_distance_triton_backward.default
    for both in (False, True):
        torch.library.opcheck(backward, (*(t.detach() for t in tensors), normal(1, seed=9), both))


def test_compiles_without_a_break():
    compiled = torch.compile(lpips_distance, fullgraph=True, backend="aot_eager")
    for gradients in ("xy", "y"):
        tensors = inputs(2, 6, 3, 4, dtype=torch.float16, gradients=gradients)
        found = outputs_and_gradients(lambda *args: compiled(*args, implementation="triton"), tensors)
        expected = outputs_and_gradients(triton, tensors)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_default_on_a_cuda_device_is_triton():
    assert explain("lpips_distance", "cuda").name == "triton"
    assert explain("lpips_distance", "cpu").name != "triton"


def test_what_the_reference_is_for():
    fx, fy, head = inputs(2, 6, 3, 4)
    with pytest.raises(ValueError, match="fp64"):
        triton(fx.double(), fy.double(), head.double())
    trained = head.requires_grad_()
    with pytest.raises(ValueError, match="gradient of head"):
        triton(fx, fy, trained)
    with torch.no_grad():
        assert triton(fx, fy, trained).isfinite().all()
    tensors = [t.detach().double().requires_grad_() for t in (fx, fy, trained)]
    assert torch.autograd.gradcheck(lambda *t: lpips_distance(*t), tensors)


@pytest.mark.parametrize(
    ("fx", "fy", "head", "message"),
    [
        (torch.ones(1, 3, 2), torch.ones(1, 3, 2), torch.ones(3), r"\[B, C, H, W\]"),
        (torch.ones(1, 3, 2, 0), torch.ones(1, 3, 2, 0), torch.ones(3), "without a zero"),
        (torch.ones(1, 3, 2, 2), torch.ones(1, 3, 2, 1), torch.ones(3), "two equal shapes"),
        (torch.ones(1, 3, 2, 2), torch.ones(1, 3, 2, 2).half(), torch.ones(3), "one dtype"),
        (torch.ones(1, 3, 2, 2).int(), torch.ones(1, 3, 2, 2).int(), torch.ones(3), "float32"),
        (torch.ones(1, 3, 2, 2), torch.ones(1, 3, 2, 2), torch.ones(4), r"head: expected floating-point numbers \[3\]"),
        (torch.ones(1, 3, 2, 2), torch.ones(1, 3, 2, 2), torch.ones(3, device="meta"), "one device"),
    ],
)
def test_refusals(fx, fy, head, message):
    with pytest.raises(ValueError, match=message):
        lpips_distance(fx, fy, head)
