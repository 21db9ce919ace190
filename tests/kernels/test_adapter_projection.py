"""adapter_projection: Triton against the fp64 reference, strides, autocast, the operator's contract, refusals."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import DEVICE, TOLERANCE, assert_close, check_kernel, normal, outputs_and_gradients

from aligntok.kernels import explain
from aligntok.kernels._triton import use_configurations
from aligntok.kernels.adapter_projection import adapter_projection, adapter_projection_reference

SMALL = {
    "adapter_projection_forward": {"BLOCK_M": 16, "BLOCK_C": 16, "num_warps": 1, "num_stages": 1},
    "adapter_projection_backward": {"BLOCK_M": 16, "BLOCK_C": 16, "PROGRAMS": 9, "num_warps": 1, "num_stages": 1},
}


def triton(p, weight, bias, activation="gelu", snapshot=None):
    return adapter_projection(p, weight, bias, activation, snapshot, implementation="triton")


def inputs(*shape, d, dtype=torch.float32, parameters=None, seed=0, snapshot=False):
    """p [*shape], weight and bias with gradients; "gelu"; a snapshot near z, if wanted."""
    C = shape[-1]
    weight = normal(d, C, seed=seed + 1, dtype=parameters or dtype, scale=C**-0.5).requires_grad_()
    bias = normal(d, seed=seed + 2, dtype=parameters or dtype).requires_grad_()
    z0 = normal(*shape[:-1], d, seed=seed + 3, dtype=torch.float32) if snapshot else None
    return [normal(*shape, seed=seed, dtype=dtype, scale=2).requires_grad_(), weight, bias, "gelu", z0]


@settings(max_examples=10)
@given(
    images=st.integers(1, 3),
    tokens=st.integers(1, 23),
    C=st.integers(1, 40),
    d=st.integers(1, 20),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    activation=st.sampled_from(["gelu", "none"]),
    snapshot=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_against_fp64(images, tokens, C, d, dtype, activation, snapshot, seed):
    given = inputs(images, tokens, C, d=d, dtype=dtype, seed=seed, snapshot=snapshot)
    given[3] = activation
    with use_configurations(SMALL):
        check_kernel(triton, adapter_projection_reference, given)


@pytest.mark.parametrize("snapshot", [False, True])
def test_pinned_configuration_over_several_splits(snapshot):
    check_kernel(triton, adapter_projection_reference, inputs(2, 190, 140, d=8, seed=5, snapshot=snapshot))


def test_views_past_prefix_tokens_and_transposed_latents():
    wide = normal(3, 12, 40, seed=1, scale=2)
    _, weight, bias, _, _ = inputs(1, 33, d=5)
    planes = normal(3, 5, 7, seed=2)
    with use_configurations(SMALL):
        for p in (wide[:, 5:, :33], wide[:, 5:, 7:], wide[:, 5:].transpose(0, 1)[:, :, :33], wide[0, :, ::2][:, :33]):
            p = p.detach().requires_grad_()
            own = weight[:, : p.shape[-1]].detach().requires_grad_()  # rows with a stride of their own
            check_kernel(triton, adapter_projection_reference, [p, own, bias])
        snapshot = planes.transpose(1, 2)  # [B, d, N] seen as [B, N, d]
        p = wide[:, 5:, :33].detach().requires_grad_()

        def on_planes(function):
            def run(*arguments):
                z, distance = function(*arguments)
                return z.transpose(1, 2), distance  # so that the gradient of z comes transposed, too

            return run

        check_kernel(on_planes(triton), on_planes(adapter_projection_reference), [p, weight, bias, "gelu", snapshot])
        four = normal(2, 3, 4, 33, seed=3).requires_grad_()
        check_kernel(triton, adapter_projection_reference, [four, weight, bias])
        check_kernel(triton, adapter_projection_reference, [four[0, 0, 0].detach().requires_grad_(), weight, bias])


@pytest.mark.parametrize("unused", [0, 1])
def test_either_output_alone_can_be_differentiated(unused):
    given = inputs(2, 9, 20, d=6, seed=7, snapshot=True)
    with use_configurations(SMALL):
        check_kernel(lambda *a: triton(*a)[1 - unused], lambda *a: adapter_projection_reference(*a)[1 - unused], given)


def test_frozen_tokens_get_no_gradient():
    p, *rest = inputs(2, 9, 20, d=6, seed=8, snapshot=True)
    with use_configurations(SMALL):
        check_kernel(triton, adapter_projection_reference, [p.detach(), *rest])


def test_fp32_parameters_beside_half_precision_tokens():
    given = inputs(2, 9, 20, d=6, dtype=torch.float16, parameters=torch.float32, seed=9, snapshot=True)
    with use_configurations(SMALL):
        check_kernel(triton, adapter_projection_reference, given)
        found = outputs_and_gradients(triton, given)
    dtypes = [x.dtype for x in found.values()]
    half, single = torch.float16, torch.float32
    assert dtypes == [half, single, half, single, single], "z, distance, dp, dW, db"


def test_distance_is_that_of_the_rounded_latent():
    given = inputs(1, 40, 20, d=6, dtype=torch.float16, seed=10, snapshot=True)
    with use_configurations(SMALL):
        z, distance = triton(*given)
    assert distance.item() == pytest.approx((z.double() - given[4].double()).square().sum().item(), rel=1e-5)


def test_large_and_non_finite_tokens():
    """The polynomial behind gelu falls for all arguments, and NaN passes through it."""
    x = torch.cat([torch.linspace(-16, 16, 641), torch.tensor([1e4, -1e4, 6e4, -6e4])]).to(DEVICE)
    eye, zero = torch.eye(16, device=DEVICE)[:1], torch.zeros(1, device=DEVICE)
    p = F.pad(x[:, None], (0, 15)).requires_grad_()
    z = triton(p, eye, zero)
    (slope,) = torch.autograd.grad(z.sum(), p)
    wide = x.double().requires_grad_()
    expected = F.gelu(wide)
    (expected_slope,) = torch.autograd.grad(expected.sum(), wide)
    assert ((z[:, 0] - expected).abs() / expected.abs().clamp_min(1)).max() < 1e-6
    assert (slope[:, 0] - expected_slope).abs().max() < 1e-6
    p = torch.zeros(3, 16, device=DEVICE)
    p[1, 2] = float("nan")
    assert torch.isnan(triton(p, torch.ones(1, 16, device=DEVICE), zero)).flatten().tolist() == [False, True, False]


def test_reference_on_the_cpu_is_the_unfused_path_bit_for_bit():
    p, weight, bias, _, snapshot = (
        x.cpu() if isinstance(x, torch.Tensor) else x for x in inputs(2, 9, 48, d=6, snapshot=True)
    )
    for autocast in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            z, distance = adapter_projection(p, weight, bias, snapshot=snapshot)
            expected = F.linear(F.gelu(p), weight, bias)
            assert z.dtype == expected.dtype and torch.equal(z, expected)
            assert torch.equal(distance / z.numel(), F.mse_loss(z.float(), snapshot))


def test_autocast_decides_on_the_dtype():
    """In fp16: Triton's interpreter has no usable bf16."""
    given = inputs(2, 9, 20, d=6, seed=11, snapshot=True)
    with torch.autocast(DEVICE, dtype=torch.float16), use_configurations(SMALL):
        found = outputs_and_gradients(triton, given)
    assert found["output 0"].dtype == torch.float16 and found["gradient 0"].dtype == torch.float32
    exact = outputs_and_gradients(adapter_projection_reference, given)
    assert_close(found, exact, TOLERANCE[torch.float16])


@pytest.mark.parametrize("snapshot", [False, True])
def test_operator_contract(snapshot):
    p, weight, bias, _, z0 = inputs(2, 5, 10, d=3, seed=12, snapshot=snapshot)
    with use_configurations(SMALL):
        forward = torch.ops.aligntok.adapter_projection_triton.default
        torch.library.opcheck(forward, (p, weight, bias, z0, True, p.dtype))
        z, distance = (x.detach() for x in forward(p, weight, bias, z0, True, p.dtype))
        of_snapshot = (z, z0, distance) if snapshot else (None, None, None)
        frozen = [x.detach() for x in (p, weight, bias, normal(2, 5, 3, seed=13))]
        backward = torch.ops.aligntok.adapter_projection_triton_backward.default
        torch.library.opcheck(backward, (*frozen, *of_snapshot, True, True))


def test_compiles_without_graph_breaks():
    given = inputs(2, 9, 20, d=6, seed=14, snapshot=True)

    def step(p, weight, bias, activation, snapshot):
        z, distance = triton(p, weight, bias, activation, snapshot)
        return z * 2, distance / z.numel()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    with use_configurations(SMALL):
        assert_close(outputs_and_gradients(compiled, given), outputs_and_gradients(step, given), 1e-6)


def test_default_on_a_cuda_device_is_triton():
    assert explain("adapter_projection", "cuda").name == "triton"
    assert explain("adapter_projection", "cpu").name == "reference"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "relu"}, "'gelu' or 'none'"),
        ({"p": torch.zeros(2, 0, 4)}, "without a zero"),
        ({"p": torch.zeros(2, 4, dtype=torch.int32)}, "float32"),
        ({"weight": torch.zeros(3, 5)}, r"\[d, 4\]"),
        ({"bias": torch.zeros(2)}, r"\[3\]"),
        ({"bias": torch.zeros(3, device="meta")}, "like p"),
        ({"snapshot": torch.zeros(2, 4)}, r"\[2, 3\]"),
        ({"snapshot": torch.zeros(2, 3, requires_grad=True)}, "detach"),
        ({"p": torch.zeros(2, 4, dtype=torch.float64)}, "fp64"),
        ({"weight": torch.zeros(129, 4), "bias": torch.zeros(129)}, "at most 128"),
    ],
)
def test_refusals(change, message):
    given = {"p": torch.zeros(2, 4), "weight": torch.zeros(3, 4), "bias": torch.zeros(3)} | change
    given = {n: x.to(DEVICE) if isinstance(x, torch.Tensor) and not x.is_meta else x for n, x in given.items()}
    with pytest.raises(ValueError, match=message):
        adapter_projection(**given, implementation="triton")
