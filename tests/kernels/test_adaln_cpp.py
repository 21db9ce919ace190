"""adaln in C++: against fp64 in every pair of dtypes, strides, missing inputs, same bits for any number of threads."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import assert_close, check_kernel, check_threads, normal, outputs_and_gradients, widened

from aligntok.kernels import explain
from aligntok.kernels.adaln import adaln, adaln_reference

pytestmark = pytest.mark.usefixtures("on_the_cpu")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# y comes from the rounded x_new, which the fp64 reference does not round: two roundings where x is not fp32.
TOLERANCE = {torch.float32: 4e-6, torch.float16: 2**-9, torch.bfloat16: 2**-6}


def inputs(B, N, D, seed, dtype=torch.float32, branch=torch.float32, shift=True, residual=True, weight=True):
    """x, scale, shift, h, gate, weight; the vectors in the branch's dtype, the weight in fp32."""

    def vector(i):
        return normal(B, D, seed=seed + i, dtype=branch).requires_grad_()

    return [
        normal(B, N, D, seed=seed, dtype=dtype, scale=2).requires_grad_(),
        vector(1),
        vector(2) if shift else None,
        normal(B, N, D, seed=seed + 3, dtype=branch).requires_grad_() if residual else None,
        vector(4) if residual else None,
        normal(D, seed=seed + 5).requires_grad_() if weight else None,
    ]


def outputs(function, **options):
    """function(*arguments), only y where x_new is x itself."""

    def run(*arguments):
        x_new, y = function(*arguments, **options)
        return y if arguments[3] is None else (x_new, y)

    return run


def cpp(dtype=None):
    return outputs(adaln, dtype=dtype, implementation="cpp")


@settings(max_examples=60)
@given(
    B=st.integers(1, 4),
    N=st.integers(1, 70),
    D=st.integers(4, 90),
    dtype=st.sampled_from(DTYPES),
    shift=st.booleans(),
    residual=st.booleans(),
    weight=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_against_fp64(B, N, D, dtype, shift, residual, weight, seed):
    arguments = inputs(B, N, D, seed, dtype, dtype, shift, residual, weight)
    check_kernel(cpp(), outputs(adaln_reference), arguments, TOLERANCE[dtype])


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("y", DTYPES)
@pytest.mark.parametrize("branch", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_mixed_dtypes(dtype, branch, y, residual):
    """Every result has the dtype of its own tensor, and an fp32 stream is not rounded on the way."""
    arguments = inputs(2, 9, 37, 1, dtype, branch, residual=residual)
    found = outputs_and_gradients(cpp(y), arguments)
    expected = outputs_and_gradients(outputs(adaln_reference), widened(arguments))
    stream = {"output 0": found.pop("output 0")} if residual else {}
    assert_close(stream, {name: expected[name] for name in stream}, TOLERANCE[dtype])
    coarsest = max(TOLERANCE[one] for one in (dtype, branch, y))
    assert_close(found, {name: expected[name] for name in found}, coarsest)
    assert all(value.dtype == dtype for value in stream.values())
    assert found["output 1" if residual else "output 0"].dtype == y
    for name, value in found.items():
        if name.startswith("gradient"):
            assert value.dtype == arguments[int(name.split()[1])].dtype


@pytest.mark.parametrize("D", [384, 1152])
def test_autocast_at_production_widths(D):
    """fp32 stream, bf16 branch: the gradients of bf16 tensors are rounded once, 2^-8 of their magnitude."""
    arguments = inputs(2, 256, D, 2, branch=torch.bfloat16)
    found = outputs_and_gradients(cpp(torch.bfloat16), arguments)
    # dy is rounded to bf16 in the call above, and the reference must see the same one.
    leaves = widened(arguments)
    x_new, y = adaln_reference(*leaves)
    cotangents = [normal(2, 256, D, seed=97).double(), normal(2, 256, D, seed=98).bfloat16().double()]
    gradients = torch.autograd.grad([x_new, y], leaves, cotangents)
    assert_close({"x_new": found["output 0"]}, {"x_new": x_new.detach()}, 1e-6)
    for i, expected in enumerate(gradients):
        tolerance = 1.01 * 2**-8 if arguments[i].dtype == torch.bfloat16 else 1e-5
        assert_close({str(i): found[f"gradient {i}"]}, {str(i): expected}, tolerance)
    assert_close({"y": found["output 1"]}, {"y": y.detach()}, 1.01 * 2**-8)


def from_projection(function):
    """The same with shift, scale and gate in one tensor [B, 6D]."""

    def run(x, packed, h):
        shift, scale, gate = packed.chunk(6, dim=-1)[:3]
        return function(x, scale, shift, h, gate, None)

    return run


@pytest.mark.parametrize("view", range(4))
def test_chunks_of_one_projection_and_strided_streams(view):
    B, N, D = 3, 70, 20
    base = normal(B, N + 3, 2 * D, seed=3)
    x = (
        base[:, 3:, :D],
        base[:, 3:, ::2],
        normal(D, B, N, seed=4).permute(1, 2, 0),
        base[:1, :1, :D].expand(B, N, D),
    )[view]
    packed = normal(B, 6 * D, seed=5, dtype=torch.bfloat16).requires_grad_()
    h = normal(N, B, 2 * D, seed=6).transpose(0, 1)[..., D:].requires_grad_()
    arguments = [x.requires_grad_(), packed, h]
    found = outputs_and_gradients(from_projection(cpp()), arguments)
    expected = outputs_and_gradients(from_projection(outputs(adaln_reference)), widened(arguments))
    rounded = {"gradient 1": found.pop("gradient 1")}
    assert_close(rounded, {"gradient 1": expected.pop("gradient 1")}, 1.01 * 2**-8)
    assert_close(found, expected, 4e-6)


def test_without_residual_x_is_handed_through():
    x, scale, *_ = inputs(2, 5, 8, 6)
    x_new, y = adaln(x, scale, implementation="cpp")
    assert x_new is x
    [gradient] = torch.autograd.grad(y.sum() + x_new.square().sum(), x)
    [expected] = torch.autograd.grad(adaln_reference(x, scale)[1].sum() + x.square().sum(), x)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("used", [0, 1])
def test_one_output_unused(used):
    arguments = inputs(2, 7, 16, 7)
    results = []
    for function in (cpp(), outputs(adaln_reference)):
        loss = function(*arguments)[used].square().sum()
        results.append(torch.autograd.grad(loss, arguments, allow_unused=True))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, torch.zeros_like(one) if other is None else other, atol=1e-4, rtol=1e-5)


def test_y_comes_from_the_rounded_stream():
    arguments = inputs(2, 5, 64, 8, torch.bfloat16, torch.bfloat16)
    x_new, y = adaln(*arguments, dtype=torch.float32, implementation="cpp")
    x, scale, shift, h, gate, weight = arguments
    exact = x.double() + gate.double().unsqueeze(1) * h.double()
    assert (x_new - exact).abs().max() <= 2**-8 * exact.abs().max()
    _, expected = adaln_reference(x_new, scale, shift, weight=weight, dtype=torch.float32)
    torch.testing.assert_close(y, expected)


# More chunks than threads and fewer, one of 64 rows and a remainder, above the size of one thread's task.
@pytest.mark.parametrize("shape", [(5, 150, 384), (1, 300, 200), (1, 63, 1000)])
def test_same_bits_for_any_number_of_threads(shape):
    arguments = inputs(*shape, 9, branch=torch.bfloat16)
    check_threads(cpp(torch.bfloat16), arguments)


def test_nan_and_zero_rows():
    x, scale, *_ = inputs(1, 3, 40, 10)
    with torch.no_grad():
        x[0, 0], x[0, 1, 7] = 0, float("nan")
    _, y = adaln(x, scale, dtype=torch.bfloat16, implementation="cpp")
    [gradient] = torch.autograd.grad(y.sum(), x)
    assert y[0, 0].eq(0).all() and y[0, 1].isnan().all() and y[0, 2].isfinite().all()
    assert gradient[0, 1].isnan().all() and gradient[0, [0, 2]].isfinite().all()


@pytest.mark.parametrize("residual", [True, False])
def test_operator_contract(residual):
    x, scale, shift, h, gate, weight = inputs(2, 5, 8, 11, branch=torch.bfloat16, residual=residual)
    torch.library.opcheck(torch.ops.aligntok.adaln.default, (x, h, gate, scale, shift, weight, 1e-6, torch.bfloat16))
    flat = [tensor if tensor is None else tensor.detach() for tensor in (x, h, gate, scale, shift, weight)]
    x_new, y, rstd = torch.ops.aligntok.adaln(*flat, 1e-6, torch.bfloat16)
    stream = x_new if residual else flat[0]
    arguments = (stream if residual else None, y, stream, rstd, *flat[1:])
    torch.library.opcheck(torch.ops.aligntok.adaln_backward.default, arguments)


def test_operator_called_directly_refuses():
    op, x, vector = torch.ops.aligntok.adaln, torch.ones(2, 3, 4), torch.ones(2, 4)
    for arguments, message in (
        ((x[0], None, None, vector, None, None), "B, N, D"),
        ((x, x, None, vector, None, None), "together"),
        ((x, None, None, vector[:1], None, None), "scale, shift and gate"),
        ((x, None, None, vector, None, vector), "weight"),
        ((x.double(), None, None, vector, None, None), "no Double"),
    ):
        with pytest.raises(ValueError, match=message):
            op(*arguments, 1e-6, arguments[0].dtype)


@pytest.mark.parametrize("residual", [True, False])
def test_compiles_without_a_break(residual):
    compiled = torch.compile(cpp(torch.bfloat16), fullgraph=True, backend="aot_eager")
    arguments = inputs(2, 6, 12, 12, branch=torch.bfloat16, residual=residual)
    expected, found = (outputs_and_gradients(f, arguments) for f in (cpp(torch.bfloat16), compiled))
    assert all(torch.equal(one, found[name]) for name, one in expected.items())


def test_default_on_the_cpu_and_refusals():
    arguments = inputs(2, 3, 8, 13)
    assert explain("adaln", "cpu").name == "cpp"
    assert all(torch.equal(a, b) for a, b in zip(adaln(*arguments), cpp()(*arguments), strict=True))
    x, scale = arguments[0].detach().double(), arguments[1].detach().double()
    assert torch.equal(adaln(x, scale)[1], adaln_reference(x, scale)[1])
    with pytest.raises(ValueError, match="fp64 is for the reference"):
        adaln(x, scale, implementation="cpp")
    with pytest.raises(ValueError, match="on the CPU"):
        adaln(torch.zeros(1, 2, 4, device="meta"), torch.zeros(1, 4, device="meta"), implementation="cpp")


def test_second_derivative_is_refused():
    arguments = inputs(1, 3, 4, 14)
    with pytest.raises(NotImplementedError, match="second derivative"):
        torch.autograd.grad(cpp()(*arguments)[1].sum(), arguments[0], create_graph=True)
