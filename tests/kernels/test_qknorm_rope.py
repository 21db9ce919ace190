"""qknorm_rope: the reference against complex rotations, Triton against fp64, switches, strides, refusals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import DEVICE, check_kernel, normal, outputs_and_gradients, relative_error

from aligntok.kernels import explain
from aligntok.kernels._triton import use_configurations
from aligntok.kernels.qknorm_rope import MAX_HEAD_WIDTH, qknorm_rope, qknorm_rope_reference
from aligntok.models.lightning_dit import rope_table


def small(tile):
    config = {"TILE": tile, "IMAGES": 2, "num_warps": 1, "num_stages": 1}
    return {"qknorm_rope_forward": config, "qknorm_rope_backward": config}


SMALL = small(64)


def inputs(B, N, H, D, seed, dtype=torch.float32, norm=True, rope=True):
    """qkv, q_weight, k_weight, cos, sin; the tables are any numbers, different within a pair."""
    return [
        normal(B, N, 3, H, D, seed=seed, dtype=dtype, scale=2).requires_grad_(),
        *(normal(D, seed=seed + i).requires_grad_() if norm else None for i in (1, 2)),
        *(normal(N, D, seed=seed + i) if rope else None for i in (3, 4)),
    ]


def triton(*arguments):
    return qknorm_rope(*arguments, implementation="triton")


@settings(max_examples=8)
@given(
    B=st.integers(1, 5),
    N=st.integers(1, 4),
    H=st.integers(1, 4),
    half=st.integers(1, 20),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    norm=st.booleans(),
    rope=st.booleans(),
    tile=st.sampled_from([128, 256]),
    seed=st.integers(0, 1000),
)
def test_against_fp64(B, N, H, half, dtype, norm, rope, tile, seed):
    with use_configurations(small(tile)):
        check_kernel(triton, qknorm_rope_reference, inputs(B, N, H, 2 * half, seed, dtype, norm, rope))


@pytest.mark.parametrize("D", [1, 7])
def test_odd_heads_without_rotation(D):
    with use_configurations(SMALL):
        check_kernel(triton, qknorm_rope_reference, inputs(2, 3, 2, D, 3, rope=False))


@pytest.mark.parametrize("heads", [(16, 72), (6, 64)])
def test_pinned_configuration(heads):
    check_kernel(triton, qknorm_rope_reference, inputs(9, 1, *heads, 5))


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("D", [6, 8])
def test_strided_inputs(D, norm):
    """Packed projections that are slices or transposes of larger memory; strides that 8 divides, and others."""
    B, N, H = 3, 4, 2
    views = [
        normal(B, N + 2, 3, H, 2 * D, seed=6)[:, 1:-1, :, :, D:],
        normal(3, B, H, N, D, seed=7).permute(1, 3, 0, 2, 4),
        normal(B, N, D, 3, H, seed=8).permute(0, 1, 3, 4, 2),  # columns strided: copied
        normal(1, N, 3, H, D, seed=9).expand(B, -1, -1, -1, -1),
    ]
    _, *others = inputs(B, N, H, D, 10, norm=norm)
    others[2:] = [normal(N, 2 * D, seed=11)[:, ::2], normal(D, N, seed=12).t()]
    for view in views:
        with use_configurations(SMALL):
            check_kernel(triton, qknorm_rope_reference, [view.requires_grad_(), *others])


@pytest.mark.parametrize("norm", [True, False])
def test_gradients_as_attention_returns_them(norm):
    """Transposed, expanded (of a sum) and missing gradients of q, k and v."""
    arguments = inputs(3, 4, 2, 8, 13, norm=norm)
    wanted = [x for x in arguments if x is not None and x.requires_grad]
    gradients = [
        normal(3, 2, 4, 8, seed=14).transpose(1, 2),
        normal(3, 4, 1, 8, seed=15).expand(-1, -1, 2, -1),
        normal(8, 3, 4, 2, seed=16).permute(1, 2, 3, 0),  # columns strided
    ]
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        found, expected = [], []
        for function, results in ((triton, found), (qknorm_rope_reference, expected)):
            with use_configurations(SMALL):
                results += torch.autograd.grad(function(*arguments), wanted, [gradients[i] for i in order])
                results += torch.autograd.grad(function(*arguments)[order[0]].sum(), wanted, materialize_grads=True)
        for one, other in zip(found, expected, strict=True):
            scale = max(other.abs().max().item(), 1.0)  # the gradient of an output that is not used is zero
            assert one.shape == other.shape and (one - other).abs().max().item() <= 2e-5 * scale


def test_results_are_contiguous_and_own_their_memory():
    arguments = inputs(2, 3, 2, 8, 17, norm=False, rope=False)
    before = arguments[0].detach().clone()
    for y, part in zip(triton(*arguments), before.unbind(2), strict=True):
        assert y.is_contiguous() and torch.equal(y, part)
        y.detach().zero_()
    assert torch.equal(arguments[0], before)


@pytest.mark.parametrize("norm", [True, False])
def test_reference_is_a_rotation_of_complex_numbers(norm):
    qkv, q_weight, k_weight, *_ = (t if t is None else t.detach().double() for t in inputs(2, 12, 3, 8, 19, norm=norm))
    cos, sin = (table.to(DEVICE).double() for table in rope_table((3, 4), 8, 4))
    turn = torch.complex(cos[:, ::2], sin[:, ::2]).unsqueeze(1)  # [N, 1, D/2]
    q, k, v = qknorm_rope_reference(qkv, q_weight, k_weight, cos, sin, eps=1e-2)
    for found, x, weight in ((q, qkv[:, :, 0], q_weight), (k, qkv[:, :, 1], k_weight)):
        if norm:
            x = x / (x.square().mean(-1, keepdim=True) + 1e-2).sqrt() * weight
        expected = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)
        torch.testing.assert_close(found, expected)
    assert torch.equal(v, qkv[:, :, 2])


def test_rotation_keeps_lengths_and_depends_on_distances_only():
    """What makes it a rotary embedding: q at position i times k at position j is a function of j - i."""
    cos, sin = (table.to(DEVICE) for table in rope_table((1, 6), 8, 6))
    one = normal(1, 1, 3, 1, 8, seed=20).expand(-1, 6, -1, -1, -1)  # the same q and k at every position
    q, k, _ = triton(one, None, None, cos, sin)
    torch.testing.assert_close(q.norm(dim=-1), one[:, :, 0].norm(dim=-1))
    scores = q[0, :, 0] @ k[0, :, 0].t()  # [N, N]
    torch.testing.assert_close(scores[:-1, :-1], scores[1:, 1:])
    assert relative_error(scores, scores.t()) > 1e-2


def test_reference_differentiates_in_fp64():
    qkv, *others = (t.detach().double() for t in inputs(2, 3, 2, 4, 21))
    leaves = [t.requires_grad_() for t in (qkv, *others[:2])]
    assert torch.autograd.gradcheck(qknorm_rope_reference, [*leaves, *others[2:]])


def test_operator_contract():
    arguments = inputs(1, 2, 2, 4, 23)
    plain = [t.detach() for t in arguments]
    upstream = [normal(1, 2, 2, 4, seed=24 + i) for i in range(3)]
    ops = torch.ops.aligntok
    with use_configurations(SMALL):
        torch.library.opcheck(ops.qknorm_rope_triton.default, (*arguments, 1e-6))
        torch.library.opcheck(ops.qknorm_rope_triton_backward.default, (*upstream, *plain, 1e-6))
        bare = (*upstream, None, None, None, *plain[3:], 1e-6)
        torch.library.opcheck(ops.qknorm_rope_triton_backward.default, bare)


@pytest.mark.parametrize("norm", [True, False])
def test_compiles_without_a_break(norm):
    arguments = inputs(2, 3, 2, 8, 29, norm=norm)
    compiled = torch.compile(triton, fullgraph=True, backend="aot_eager")
    with use_configurations(SMALL):
        expected, found = (outputs_and_gradients(f, arguments) for f in (triton, compiled))
    for name, one in found.items():
        assert torch.equal(one, expected[name]), name


def test_default_on_a_cuda_device_is_triton():
    assert explain("qknorm_rope", "cuda").name == "triton"
    assert explain("qknorm_rope", "cpu").name != "triton"


QKV = torch.zeros(2, 3, 3, 2, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": torch.zeros(2, 3, 2, 2, 4)}, r"qkv: expected shape \[B, N, 3, H, D\]"),
        ({"qkv": torch.zeros(2, 0, 3, 2, 4)}, "without a zero"),
        ({"qkv": QKV.int()}, "qkv: expected dtype float32"),
        ({"q_weight": torch.zeros(4)}, "q_weight and k_weight: expected both or none"),
        ({"cos": torch.zeros(3, 4)}, "cos and sin: expected both or none"),
        ({"q_weight": torch.zeros(4), "k_weight": torch.zeros(5)}, r"expected floating-point tensors of shape \[4\]"),
        ({"cos": torch.zeros(3, 4), "sin": torch.zeros(2, 4)}, r"of shape \[3, 4\]"),
        ({"cos": torch.zeros(3, 4), "sin": torch.zeros(3, 4, device="meta")}, "on cpu"),
        ({"qkv": QKV[..., :3], "cos": torch.zeros(3, 3), "sin": torch.zeros(3, 3)}, "even head width to rotate, got 3"),
        ({"eps": -1.0}, "eps: expected a number >= 0"),
        ({"qkv": QKV.double(), "implementation": "triton"}, "fp64 is for the reference"),
        ({"qkv": torch.zeros(1, 1, 3, 1, MAX_HEAD_WIDTH + 1), "implementation": "triton"}, "do not fit"),
    ],
)
def test_refusals(change, message):
    arguments = {"qkv": QKV, "q_weight": None, "k_weight": None, "cos": None, "sin": None} | change
    with pytest.raises(ValueError, match=message):
        qknorm_rope(**arguments)
