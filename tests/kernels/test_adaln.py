"""adaln: the reference against the formula, Triton against the fp64 reference, switches, strides, refusals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import DEVICE, TOLERANCE, assert_close, check_kernel, normal, outputs_and_gradients, widened

from aligntok.kernels import explain
from aligntok.kernels._triton import use_configurations
from aligntok.kernels.adaln import MAX_WIDTH, adaln, adaln_reference

SMALL = {
    "adaln_forward": {"ROWS": 2, "num_warps": 1, "num_stages": 1},
    "adaln_backward": {"ROWS": 2, "CHUNK": 4, "num_warps": 1, "num_stages": 1},
}


def inputs(B, N, D, seed, dtype=torch.float32, h=True, weight=True, branch=None):
    """x, a modulation [B, 3D] (scale, shift, gate), h and weight; h and modulation in `branch`, weight in fp32."""
    branch = branch or dtype
    return [
        normal(B, N, D, seed=seed, dtype=dtype, scale=2).requires_grad_(),
        normal(B, 3 * D, seed=seed + 1, dtype=branch).requires_grad_(),
        normal(B, N, D, seed=seed + 2, dtype=branch).requires_grad_() if h else None,
        normal(D, seed=seed + 3).requires_grad_() if weight else None,
    ]


def from_projection(function, shift=True, **options):
    """function(x, modulation, h, weight) whose vectors are chunks of one projection; x_new only where it is new."""

    def run(x, modulation, h, weight):
        scale, offset, gate = modulation.chunk(3, dim=-1)
        gate = None if h is None else gate
        x_new, y = function(x, scale, offset if shift else None, h, gate, weight, **options)
        return y if h is None else (x_new, y)

    return run


def check(shift=True, arguments=(), tolerance=None):
    kernel, reference = (
        from_projection(adaln, shift, implementation="triton"),
        from_projection(adaln_reference, shift),
    )
    check_kernel(kernel, reference, arguments, tolerance)


@settings(max_examples=10)
@given(
    B=st.integers(1, 2),
    N=st.integers(1, 7),
    D=st.integers(4, 70),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    h=st.booleans(),
    shift=st.booleans(),
    weight=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_against_fp64(B, N, D, dtype, h, shift, weight, seed):
    with use_configurations(SMALL):
        check(shift, inputs(B, N, D, seed, dtype, h, weight))


@pytest.mark.parametrize("D", [1, 2, 3])
def test_narrow_rows(D):
    """Without a residual gradient beside it, the norm's own is close to zero here."""
    with use_configurations(SMALL):
        check(arguments=inputs(2, 3, D, 3))


@pytest.mark.parametrize("h", [True, False])
def test_pinned_configuration(h):
    check(arguments=inputs(1, 18, 72, 5, h=h))


def test_fp32_stream_with_half_branch():
    """The dtypes of autocast: y, h and the modulation in half precision beside an fp32 stream and weight."""
    arguments = inputs(2, 5, 24, 7, branch=torch.float16)
    kernel = from_projection(adaln, dtype=torch.float16, implementation="triton")
    with use_configurations(SMALL):
        found = outputs_and_gradients(kernel, arguments)
    assert found["output 0"].dtype == found["gradient 0"].dtype == found["gradient 3"].dtype == torch.float32
    assert found["output 1"].dtype == found["gradient 1"].dtype == found["gradient 2"].dtype == torch.float16
    expected = outputs_and_gradients(from_projection(adaln_reference, dtype=torch.float16), widened(arguments))
    assert_close(found, expected, TOLERANCE[torch.float16])


def test_y_comes_from_the_rounded_stream():
    x, modulation, h, weight = inputs(1, 4, 16, 9, torch.float16)
    x_new, y = from_projection(adaln, implementation="triton")(x, modulation, h, weight)
    again = adaln(x_new, *modulation.chunk(3, dim=-1)[:2], weight=weight, implementation="triton")[1]
    assert torch.equal(y, again)


@pytest.mark.parametrize("h", [True, False])
def test_strided_inputs(h):
    wide = normal(2, 20, 7, seed=11)
    views = [
        wide.transpose(1, 2)[:, :4, :16],  # columns strided: copied
        wide[:, ::5, 1:],  # rows strided
    ]
    for x in views:
        B, N, D = x.shape
        branch = normal(B, N, 2 * D, seed=12)[..., D:].requires_grad_() if h else None
        modulation = normal(3 * D, B, seed=13).t().requires_grad_()
        with use_configurations(SMALL):
            check(arguments=[x.requires_grad_(), modulation, branch, normal(2 * D, seed=14)[::2].requires_grad_()])


@pytest.mark.parametrize("used", ["x_new", "y"])
def test_one_unused_output(used):
    """The last block's x_new, and a block whose y nobody reads, have no gradient to hand back."""

    def run(function, **options):
        both = from_projection(function, **options)
        return lambda *arguments: both(*arguments)[("x_new", "y").index(used)]

    x, modulation, h, weight = inputs(2, 5, 12, 15)
    with use_configurations(SMALL):
        if used == "y":
            check_kernel(run(adaln, implementation="triton"), run(adaln_reference), [x, modulation, h, weight])
            return
        x_new = run(adaln, implementation="triton")(x, modulation, h, weight)
        found = torch.autograd.grad(x_new.sum(), [x, modulation, h, weight])
    gate = modulation.chunk(3, dim=1)[2]
    expected = [torch.ones_like(x), torch.cat([torch.zeros_like(modulation[:, :24]), h.sum(1)], dim=1)]
    expected += [gate.unsqueeze(1).expand_as(h), torch.zeros_like(weight)]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_without_a_branch_the_stream_is_handed_through():
    x, modulation, _, weight = inputs(2, 3, 8, 17)
    for implementation in ("triton", "reference"):
        x_new, _ = adaln(x, modulation[:, :8], weight=weight, implementation=implementation)
        assert x_new is x


def test_reference_follows_the_formula():
    x, modulation, h, weight = (t.detach().double() for t in inputs(2, 5, 16, 19))
    scale, shift, gate = modulation.chunk(3, dim=1)
    for offset in (shift, None):
        x_new, y = adaln_reference(x, scale, offset, h, gate, weight, eps=1e-2)
        for image in range(2):
            for token in range(5):
                stream = x[image, token] + gate[image] * h[image, token]
                expected = stream / (stream.square().mean() + 1e-2).sqrt() * weight * (1 + scale[image])
                torch.testing.assert_close(x_new[image, token], stream)
                torch.testing.assert_close(y[image, token], expected if offset is None else expected + offset[image])


def test_reference_differentiates_in_fp64():
    arguments = [t.detach().double().requires_grad_() for t in inputs(2, 3, 5, 21)]
    assert torch.autograd.gradcheck(from_projection(adaln_reference), arguments)


def test_operator_contract():
    x, modulation, h, weight = inputs(1, 2, 4, 23)
    scale, shift, gate = (t.detach().requires_grad_() for t in modulation.chunk(3, dim=1))
    dy, rstd = normal(1, 2, 4, seed=24), torch.ones(1, 2, device=DEVICE)
    plain = [t.detach() for t in (x, h, gate, scale, shift, weight)]
    ops = torch.ops.aligntok
    with use_configurations(SMALL):
        torch.library.opcheck(ops.adaln_triton.default, (x, h, gate, scale, shift, weight, 1e-6, torch.float16))
        torch.library.opcheck(ops.adaln_triton_norm.default, (x, scale, None, None, 1e-6, torch.float32))
        torch.library.opcheck(ops.adaln_triton_backward.default, (dy, dy, plain[0], rstd, *plain[1:]))
        bare = (None, dy, plain[0], rstd, None, None, plain[3], None, None)
        torch.library.opcheck(ops.adaln_triton_backward.default, bare)


@pytest.mark.parametrize("h", [True, False])
def test_compiles_without_a_break(h):
    arguments = inputs(2, 5, 12, 25, h=h)
    function = from_projection(adaln, implementation="triton")
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    with use_configurations(SMALL):
        expected, found = (outputs_and_gradients(f, arguments) for f in (function, compiled))
    for name, one in found.items():
        assert torch.equal(one, expected[name]), name


def test_default_on_a_cuda_device_is_triton():
    assert explain("adaln", "cuda").name == "triton"
    assert explain("adaln", "cpu").name != "triton"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 4)}, r"x: expected shape \[B, N, D\]"),
        ({"x": torch.zeros(2, 0, 4)}, "without a zero"),
        ({"x": torch.zeros(2, 3, 4, dtype=torch.int32)}, "x: expected dtype float32"),
        ({"scale": torch.zeros(2, 5)}, r"scale: expected shape \[2, 4\] for x \[2, 3, 4\], got \[2, 5\]"),
        ({"shift": torch.zeros(4)}, "shift: expected shape"),
        ({"h": torch.zeros(2, 3, 4)}, "h and gate: expected both or none"),
        ({"h": torch.zeros(2, 3, 5), "gate": torch.zeros(2, 4)}, "h: expected shape"),
        ({"weight": torch.zeros(4, device="meta")}, "weight: expected on cpu like x, got meta"),
        ({"dtype": torch.int8}, "dtype: expected float32"),
        ({"eps": -1.0}, "eps: expected a number >= 0"),
        ({"x": torch.zeros(2, 3, 4, dtype=torch.float64), "implementation": "triton"}, "fp64 is for the reference"),
    ],
)
def test_refusals(change, message):
    arguments = {"x": torch.zeros(2, 3, 4), "scale": torch.zeros(2, 4)} | change
    with pytest.raises(ValueError, match=message):
        adaln(**arguments)


def test_rows_that_no_program_can_hold_are_for_the_reference():
    x, scale = torch.ones(1, 1, MAX_WIDTH + 1, device=DEVICE), torch.ones(1, MAX_WIDTH + 1, device=DEVICE)
    with pytest.raises(ValueError, match="does not fit"):
        adaln(x, scale, implementation="triton")
    torch.testing.assert_close(adaln(x, scale)[1], torch.full_like(x, 2))
