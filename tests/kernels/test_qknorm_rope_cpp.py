"""qknorm_rope in C++: against fp64, strides on both sides, the switches, same bits for any number of threads."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import assert_close, check_kernel, check_threads, normal, outputs_and_gradients, widened

from aligntok.kernels import explain
from aligntok.kernels.qknorm_rope import qknorm_rope, qknorm_rope_reference

pytestmark = pytest.mark.usefixtures("on_the_cpu")

# Two roundings: check_kernel rounds the incoming gradients for the kernel and not for the reference.
TOLERANCE = {torch.float32: 4e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7, torch.float64: 1e-13}


def inputs(B, N, H, D, seed, dtype=torch.float32, norm=True, rope=True):
    """qkv, q_weight, k_weight, cos, sin: the tables differ in every channel, which a real one does not."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weights = [normal(D, seed=seed + i, dtype=wide).requires_grad_() if norm else None for i in (1, 2)]
    tables = [normal(N, D, seed=seed + i, dtype=wide) if rope else None for i in (3, 4)]
    return [normal(B, N, 3, H, D, seed=seed, dtype=dtype, scale=2).requires_grad_(), *weights, *tables]


def cpp(*arguments):
    return qknorm_rope(*arguments, implementation="cpp")


@settings(max_examples=60)
@given(
    B=st.integers(1, 3),
    N=st.integers(1, 50),
    H=st.integers(1, 5),
    half=st.integers(1, 40),
    dtype=st.sampled_from(list(TOLERANCE)),
    norm=st.booleans(),
    rope=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_against_fp64(B, N, H, half, dtype, norm, rope, seed):
    check_kernel(cpp, qknorm_rope_reference, inputs(B, N, H, 2 * half, seed, dtype, norm, rope), TOLERANCE[dtype])


@pytest.mark.parametrize(("H", "D"), [(6, 64), (16, 72)])
def test_bf16_at_production_widths(H, D):
    """The gradients of fp32 weights are not rounded, those of bf16 tensors once: 2^-8 of their magnitude."""
    arguments = inputs(2, 100, H, D, 1, torch.bfloat16)
    found = outputs_and_gradients(cpp, arguments)
    leaves = widened(arguments)
    q_k_v = qknorm_rope_reference(*leaves)
    cotangents = [normal(2, 100, H, D, seed=97 + i).bfloat16().double() for i in range(3)]
    gradients = torch.autograd.grad(q_k_v, leaves[:3], cotangents)
    expected = {f"output {i}": y.detach() for i, y in enumerate(q_k_v)} | {"gradient 0": gradients[0]}
    assert_close({name: found[name] for name in expected}, expected, 1.01 * 2**-8)
    weights = {f"gradient {i}": gradients[i] for i in (1, 2)}
    assert_close({name: found[name] for name in weights}, weights, 1e-5)


def test_an_odd_width_without_rotation():
    check_kernel(cpp, qknorm_rope_reference, inputs(2, 5, 3, 7, 2, rope=False), 4e-6)
    check_kernel(cpp, qknorm_rope_reference, inputs(2, 5, 3, 1, 3, rope=False), 4e-6)


@pytest.mark.parametrize(("norm", "rope"), [(True, True), (False, True), (True, False)])
def test_gradcheck(norm, rope):
    arguments = inputs(2, 3, 2, 4, 4, torch.float64, norm, rope)
    assert torch.autograd.gradcheck(cpp, arguments)


@pytest.mark.parametrize("norm", [True, False])
def test_strided_projections(norm):
    B, N, H, D = 2, 6, 3, 8
    for qkv in (
        normal(B, N + 2, 3, H, D, seed=5)[:, 2:],
        normal(B, N, 3, H, 2 * D, seed=6)[..., D:],
        normal(B, N, 3, H, 2 * D, seed=7)[..., ::2],
        normal(3, B, H, N, D, seed=8).permute(1, 3, 0, 2, 4),
        normal(1, 1, 3, H, D, seed=9).expand(B, N, -1, -1, -1),
    ):
        _, *others = inputs(B, N, H, D, 10, norm=norm)
        check_kernel(cpp, qknorm_rope_reference, [qkv.requires_grad_(), *others], 4e-6)


@pytest.mark.parametrize("norm", [True, False])
def test_gradients_of_any_strides(norm):
    """Transposed as attention gives them, expanded as a sum does, and missing."""
    arguments = inputs(2, 6, 3, 8, 11, norm=norm)
    upstream = (
        normal(2, 3, 6, 8, seed=12).transpose(1, 2),
        normal(2, 6, 3, 16, seed=13)[..., ::2],
        normal(2, 1, 3, 8, seed=14).expand(-1, 6, -1, -1),
    )
    leaves = [x for x in arguments[:3] if x is not None]
    for parts in ((0, 1, 2), (0,), (1, 2)):
        results = []
        for function in (cpp, qknorm_rope_reference):
            q_k_v = function(*arguments)
            gradients = torch.autograd.grad(
                [q_k_v[i] for i in parts], leaves, [upstream[i] for i in parts], materialize_grads=True
            )
            results.append(gradients)
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, atol=2e-5, rtol=2e-5)
            assert one.is_contiguous()


def test_outputs_have_the_heads_outside_and_own_their_memory():
    qkv, *others = inputs(2, 4, 3, 8, 15, norm=False, rope=False)
    before = qkv.detach().clone()
    for part, output in enumerate(cpp(qkv, *others)):
        assert output.transpose(1, 2).is_contiguous() and torch.equal(output, before[:, :, part])
        output.detach().zero_()
    assert torch.equal(qkv, before)


@pytest.mark.parametrize("shape", [(3, 130, 6, 64), (1, 64, 16, 72), (2, 37, 12, 64)])
def test_same_bits_for_any_number_of_threads(shape):
    arguments = inputs(*shape, 16, torch.bfloat16)
    check_threads(cpp, arguments)


@pytest.mark.parametrize(("norm", "rope"), [(True, True), (False, True), (False, False)])
def test_operator_contract(norm, rope):
    arguments = inputs(2, 5, 3, 8, 17, torch.bfloat16, norm, rope)
    torch.library.opcheck(torch.ops.aligntok.qknorm_rope.default, (*arguments, 1e-6))
    upstream = [normal(2, 5, 3, 8, seed=18 + i, dtype=torch.bfloat16) for i in range(3)]
    flat = [x if x is None else x.detach() for x in arguments]
    qkv = flat[0] if norm else None
    torch.library.opcheck(torch.ops.aligntok.qknorm_rope_backward.default, (*upstream, qkv, *flat[1:], 1e-6))


def test_operator_called_directly_refuses():
    op, qkv, weight = torch.ops.aligntok.qknorm_rope, torch.ones(2, 4, 3, 2, 6), torch.ones(6)
    for arguments, message in (
        ((qkv[:, :, :2], None, None, None, None), "B, N, 3, H, D"),
        ((qkv, weight, None, None, None), "both none"),
        ((qkv, None, None, torch.ones(4, 5), torch.ones(4, 5)), "cos and sin"),
        ((qkv[..., :5], None, None, torch.ones(4, 5), torch.ones(4, 5)), "even D"),
    ):
        with pytest.raises(ValueError, match=message):
            op(*arguments, 1e-6)


def test_compiles_without_a_break():
    compiled = torch.compile(cpp, fullgraph=True, backend="aot_eager")
    arguments = inputs(2, 6, 2, 8, 19, torch.bfloat16)
    expected, found = (outputs_and_gradients(f, arguments) for f in (cpp, compiled))
    assert all(torch.equal(one, found[name]) for name, one in expected.items())


def test_default_on_the_cpu():
    arguments = inputs(2, 3, 2, 8, 20)
    assert explain("qknorm_rope", "cpu").name == "cpp"
    assert all(torch.equal(a, b) for a, b in zip(qknorm_rope(*arguments), cpp(*arguments), strict=True))
    with pytest.raises(ValueError, match="on the CPU"):
        meta = [x.to("meta") for x in arguments]
        qknorm_rope(*meta, implementation="cpp")


def test_second_derivative_is_refused():
    arguments = inputs(1, 3, 2, 4, 21)
    with pytest.raises(NotImplementedError, match="second derivative"):
        torch.autograd.grad(cpp(*arguments)[0].sum(), arguments[0], create_graph=True)
