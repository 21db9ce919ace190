"""flow_loss: Triton against the fp64 reference and its gradient, strides, a zero velocity, contract, refusals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import DEVICE, TOLERANCE, assert_close, check_kernel, normal, outputs_and_gradients
from torch.nn import functional as F

from aligntok.kernels import explain, flow_noise, noise_key
from aligntok.kernels._triton import use_configurations
from aligntok.kernels.flow_loss import flow_loss, flow_loss_reference

SMALL = {
    "flow_loss": {"TILE": 64, "num_warps": 1, "num_stages": 1},
    "flow_loss_backward": {"BLOCK": 64, "num_warps": 1, "num_stages": 1},
}


def triton(velocity, data, key, weight):
    return flow_loss(velocity, data, key, weight, implementation="triton")


def key(seed=0):
    return torch.tensor([seed, 7 * seed + 2**33], device=DEVICE)


@settings(max_examples=7)
@given(
    batch=st.integers(1, 2),
    channels=st.integers(1, 20),
    side=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    weight=st.sampled_from([0.0, 1.0, 0.3]),
    seed=st.integers(0, 1000),
)
def test_against_fp64(batch, channels, side, dtype, weight, seed):
    velocity = normal(batch, channels, *side, seed=seed, dtype=dtype).requires_grad_()
    data = normal(batch, channels, *side, seed=seed + 1)
    with use_configurations(SMALL):
        check_kernel(triton, flow_loss_reference, [velocity, data, key(seed), weight])


def test_formula():
    velocity, data = normal(2, 8, 3, 3, seed=1), normal(2, 8, 3, 3, seed=2)
    target = flow_noise(key(1), data.shape) - data
    for run in (flow_loss, triton):
        loss, (mse, direction) = run(velocity, data, key(1), 0.5)
        assert mse.item() == pytest.approx(F.mse_loss(velocity, target).item(), rel=1e-5)
        assert direction.item() == pytest.approx(1 - F.cosine_similarity(velocity, target).mean().item(), rel=1e-5)
        assert loss.item() == pytest.approx((mse + 0.5 * direction).item(), rel=1e-6)
        _, parts = run(2 * target, data, key(1), 1.0)
        assert parts[0].item() == pytest.approx(target.square().mean().item(), rel=1e-5)
        assert parts[1].item() == pytest.approx(0, abs=1e-6)


CHANGES = {
    "channels-last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "sliced": lambda x: x[::2, 1:9:3],
    "transposed": lambda x: x.transpose(2, 3),
    "expanded": lambda x: x[:1].expand(2, -1, -1, -1),
    "one column": lambda x: x[..., :1],
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_strides(change):
    velocity, data = normal(2, 12, 3, 4, seed=3).requires_grad_(), change(normal(2, 12, 3, 4, seed=4))
    inputs = [velocity, data, key(3), 1.0]
    check_kernel(
        lambda v, *rest: triton(change(v), *rest), lambda v, *rest: flow_loss_reference(change(v), *rest), inputs
    )


def test_the_gradient_lies_as_the_velocity_does():
    velocity = normal(2, 8, 3, 3, seed=5).contiguous(memory_format=torch.channels_last).requires_grad_()
    (gradient,) = torch.autograd.grad(triton(velocity, normal(2, 8, 3, 3, seed=6), key(), 1.0)[0], velocity)
    assert gradient.stride() == velocity.stride()


def test_a_velocity_of_zero_or_nearly():
    data = normal(1, 8, 2, 2, seed=7)
    zero = torch.zeros_like(data)
    check_kernel(triton, flow_loss_reference, [zero.clone().requires_grad_(), data, key(7), 1.0])
    check_kernel(triton, flow_loss_reference, [(zero + 1e-9).requires_grad_(), data, key(7), 1.0])


def test_pinned_configuration():
    velocity = normal(2, 32, 9, 9, seed=8, dtype=torch.float16).requires_grad_()
    check_kernel(triton, flow_loss_reference, [velocity, normal(2, 32, 9, 9, seed=9), key(8), 1.0])


def test_small_gradients_do_not_underflow_in_fp16():
    data = normal(4, 8, 16, 16, seed=10)
    velocity = (0.1 * data).half().requires_grad_()
    loss = triton(velocity, data, key(10), 0.0)[0] * 2**16  # as a loss scaler does
    (gradient,) = torch.autograd.grad(loss, velocity)
    target = flow_noise(key(10), data.shape) - data
    expected = 2 * (velocity.detach().float() - target) * 2**16 / data.numel()
    torch.testing.assert_close(gradient.float(), expected, rtol=2e-3, atol=2e-2)


def test_only_the_loss_has_a_gradient():
    velocity, data = normal(1, 4, 2, 2, seed=11).requires_grad_(), normal(1, 4, 2, 2, seed=12)
    for run in (flow_loss, triton):
        loss, parts = run(velocity, data, key(), 1.0)
        assert loss.requires_grad and not parts.requires_grad
    data.requires_grad_()
    assert len(outputs_and_gradients(lambda *x: flow_loss(*x, key(), 1.0)[0], [velocity, data])) == 3
    with pytest.raises(ValueError, match="gradient"):
        triton(velocity, data, key(), 1.0)


@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_the_parts_of_a_batch_have_the_loss_of_the_whole(implementation):
    velocity, data = normal(6, 5, 3, 2, seed=17).requires_grad_(), normal(6, 5, 3, 2, seed=18)

    def shared_out(velocity, data):
        pairs = zip(velocity.split(2), data.split(2), (0, 2, 4), strict=True)
        losses = [flow_loss(v, d, key(17), 1.0, first_image=f, implementation=implementation)[0] for v, d, f in pairs]
        return sum(losses) / 3

    def whole(velocity, data):
        return flow_loss(velocity, data, key(17), 1.0, implementation=implementation)[0]

    found, expected = (outputs_and_gradients(run, [velocity, data]) for run in (shared_out, whole))
    assert_close(found, expected, TOLERANCE[torch.float32])


def test_operator_contract():
    velocity, data = normal(2, 5, 3, 2, seed=13).requires_grad_(), normal(2, 5, 3, 2, seed=14)
    torch.library.opcheck(torch.ops.aligntok.flow_loss_triton.default, (velocity, data, key(), 0.5, 3))
    upstream = torch.tensor(2.0, device=DEVICE)
    torch.library.opcheck(torch.ops.aligntok.flow_loss_triton_backward.default, (data, upstream))


def test_compiles_whole():
    def run(velocity, data):
        return flow_loss(velocity, data, key(15), 1.0, implementation="triton")

    inputs = [normal(2, 5, 3, 2, seed=15).requires_grad_(), normal(2, 5, 3, 2, seed=16)]
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(outputs_and_gradients(compiled, inputs), outputs_and_gradients(run, inputs))


def test_default_on_a_cuda_device_is_triton():
    assert explain("flow_loss", "cuda").name == "triton"
    assert explain("flow_loss", "cpu").name == "reference"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"velocity": torch.zeros(2, 3, 4)}, r"\[B, d, h, w\]"),
        ({"velocity": torch.zeros(2, 3, 4, 4, dtype=torch.int32)}, "float32"),
        ({"data": torch.zeros(2, 3, 4, 5)}, r"data: expected shape \[2, 3, 4, 4\]"),
        ({"key": torch.zeros(2)}, "noise_key"),
        ({"velocity": torch.zeros(2, 3, 4, 4, dtype=torch.float64), "implementation": "triton"}, "fp64"),
    ],
)
def test_refusals(change, message):
    given = {"velocity": torch.zeros(2, 3, 4, 4), "data": torch.zeros(2, 3, 4, 4), "key": noise_key()} | change
    with pytest.raises(ValueError, match=message):
        flow_loss(given.pop("velocity"), given.pop("data"), given.pop("key"), 1.0, **given)
