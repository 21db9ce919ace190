"""swiglu: Triton against the fp64 reference, strided rows, the operator's contract, refusals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import DEVICE, check_kernel, normal

from aligntok.kernels import explain, swiglu
from aligntok.kernels import swiglu as public
from aligntok.kernels._triton import use_configurations
from aligntok.kernels.swiglu import swiglu_reference

SMALL = {name: {"BLOCK": 32, "num_warps": 1, "num_stages": 1} for name in ("swiglu_forward", "swiglu_backward")}


def triton(packed):
    return swiglu(packed, implementation="triton")


@settings(max_examples=15)
@given(
    rows=st.integers(1, 9),
    half=st.integers(1, 80),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    seed=st.integers(0, 1000),
)
def test_against_fp64(rows, half, dtype, seed):
    packed = normal(2, rows, 2 * half, seed=seed, dtype=dtype, scale=2).requires_grad_()
    with use_configurations(SMALL):
        check_kernel(triton, swiglu_reference, [packed])


def test_strided_rows_are_not_copied_wrong():
    wide = normal(6, 50, seed=1)
    for packed in (wide[:, 3:37], wide[::2, :20], wide.t()[:, :4]):
        check_kernel(triton, swiglu_reference, [packed.requires_grad_()])


def test_pinned_configuration():
    check_kernel(triton, swiglu_reference, [normal(3, 2 * 1100, seed=2).requires_grad_()])


def test_operator_contract():
    packed = normal(3, 10, seed=3).requires_grad_()
    torch.library.opcheck(torch.ops.aligntok.swiglu_triton.default, (packed,))
    torch.library.opcheck(torch.ops.aligntok.swiglu_triton_backward.default, (packed.detach(), normal(3, 5, seed=4)))


def test_default_on_a_cuda_device_is_triton():
    assert explain("swiglu", "cuda").name == "triton"
    assert explain("swiglu", "cpu").name != "triton"


def test_refusals():
    with pytest.raises(ValueError, match="2H"):
        public(torch.zeros(3, 5, device=DEVICE))
    with pytest.raises(ValueError, match="float32"):
        public(torch.zeros(3, 4, dtype=torch.int32, device=DEVICE))
    with pytest.raises(ValueError, match="fp64"):
        public(torch.zeros(3, 4, dtype=torch.float64, device=DEVICE), implementation="triton")
