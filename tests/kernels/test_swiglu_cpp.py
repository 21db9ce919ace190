"""swiglu in C++: against fp64, strided rows, extreme gates, same bits for any number of threads, the contract."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import assert_close, check_kernel, check_threads, normal, outputs_and_gradients

from aligntok.kernels import explain, swiglu, use_implementation
from aligntok.kernels.swiglu import swiglu_reference

pytestmark = pytest.mark.usefixtures("on_the_cpu")

# Two roundings: check_kernel rounds dy for the kernel and not for the reference, then the gradient is rounded.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7, torch.float64: 1e-14}


def cpp(packed):
    return swiglu(packed, implementation="cpp")


@settings(max_examples=60)
@given(
    rows=st.integers(1, 40),
    half=st.integers(1, 150),
    dtype=st.sampled_from(list(TOLERANCE)),
    seed=st.integers(0, 1000),
)
def test_against_fp64(rows, half, dtype, seed):
    packed = normal(2, rows, 2 * half, seed=seed, dtype=dtype, scale=2).requires_grad_()
    check_kernel(cpp, swiglu_reference, [packed], TOLERANCE[dtype])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1.01 * 2**-8)])
def test_one_rounding_at_the_production_width(dtype, tolerance):
    packed, dy = (normal(3, 70, n, seed=n, dtype=dtype) for n in (2048, 1024))
    results = []
    for function, kind in ((cpp, lambda x: x), (swiglu_reference, torch.Tensor.double)):
        leaf = kind(packed).requires_grad_()
        y = function(leaf)
        results.append({"y": y.detach(), "gradient": torch.autograd.grad(y, leaf, kind(dy))[0]})
    assert_close(*results, tolerance)


def test_gradcheck():
    assert torch.autograd.gradcheck(cpp, [normal(3, 4, 10, seed=2, dtype=torch.float64).requires_grad_()])


def test_strided_rows_and_gradients():
    wide = normal(6, 50, seed=3)
    for packed in (wide[:, 3:37], wide[::2, :20], wide.t()[:, :4], wide[0, 4:10], wide[:1].expand(5, -1)):
        check_kernel(cpp, swiglu_reference, [packed.requires_grad_()], TOLERANCE[torch.float32])
    packed = normal(4, 5, 12, seed=4).requires_grad_()
    half = normal(5, 4, 12, seed=5)
    for dy in (half.transpose(0, 1)[..., ::2], half[:, :1, :6].expand(-1, 4, -1).transpose(0, 1), torch.ones(())):
        dy = dy.expand(4, 5, 6)
        [found] = torch.autograd.grad(cpp(packed), packed, dy)
        [expected] = torch.autograd.grad(swiglu_reference(packed), packed, dy)
        torch.testing.assert_close(found, expected)


def test_extreme_gates_and_nan():
    gate = torch.tensor([200.0, -200.0, 1e30, -1e30, 0.0, float("nan")])
    packed = torch.cat([gate, torch.full_like(gate, 3.0)]).requires_grad_()
    y = cpp(packed)
    assert y[[0, 2]].eq(3 * gate[[0, 2]]).all() and y[4] == 0 and y[5].isnan()
    assert y[1].abs() < 1e-30 and y[3].abs() < 1e-6
    [gradient] = torch.autograd.grad(y[:5].sum(), packed)
    assert gradient[:5].isfinite().all() and gradient[[5, 11]].isnan().all()
    assert gradient[0] == 3 and gradient[6] == 200 and gradient[4] == 1.5


def test_same_bits_for_any_number_of_threads():
    packed = normal(400, 2 * 300, seed=6, dtype=torch.bfloat16).requires_grad_()
    check_threads(cpp, [packed])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operator_contract(dtype):
    packed = normal(3, 10, seed=7, dtype=dtype).requires_grad_()
    torch.library.opcheck(torch.ops.aligntok.swiglu.default, (packed,))
    dy = normal(3, 5, seed=8, dtype=dtype)
    torch.library.opcheck(torch.ops.aligntok.swiglu_backward.default, (packed.detach(), dy))
    with pytest.raises(ValueError, match="2H"):
        torch.ops.aligntok.swiglu(packed.detach()[:, :3])
    with pytest.raises(ValueError, match="does not fit"):
        torch.ops.aligntok.swiglu_backward(packed.detach(), dy[:2])


def test_compiles_without_a_break():
    compiled = torch.compile(cpp, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (3, 6):
        packed = normal(rows, 14, seed=9, dtype=torch.bfloat16).requires_grad_()
        expected, found = (outputs_and_gradients(f, [packed]) for f in (cpp, compiled))
        assert all(torch.equal(one, found[name]) for name, one in expected.items())


def test_default_on_the_cpu_and_other_requests():
    packed = normal(3, 8, seed=10).requires_grad_()
    assert explain("swiglu", "cpu").name == "cpp"
    assert torch.equal(swiglu(packed), cpp(packed))
    with use_implementation("reference"):
        assert torch.equal(swiglu(packed), swiglu_reference(packed))
    with pytest.raises(ValueError, match="on the CPU"):
        swiglu(torch.zeros(2, 4, device="meta"), implementation="cpp")


def test_second_derivative_is_refused():
    packed = normal(3, 8, seed=11).requires_grad_()
    with pytest.raises(NotImplementedError, match="second derivative"):
        torch.autograd.grad(cpp(packed).sum(), packed, create_graph=True)
