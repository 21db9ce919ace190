"""flow_interpolate: Triton against the reference, strides, dtypes, the operator's contract, refusals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import DEVICE, TOLERANCE, check_kernel, normal, relative_error

from aligntok.kernels import explain, flow_noise, noise_key
from aligntok.kernels._triton import use_configurations
from aligntok.kernels.flow_interpolate import flow_interpolate, flow_interpolate_reference

SMALL = {"flow_interpolate": {"TILE": 64, "num_warps": 1, "num_stages": 1}}


def triton(data, t, key, dtype=None, **options):
    return flow_interpolate(data, t, key, dtype=dtype, implementation="triton", **options)


def key(seed=0):
    return torch.tensor([seed, 7 * seed + 2**33], device=DEVICE)


def times(count):
    return torch.linspace(0, 1, count, device=DEVICE)


@settings(max_examples=8)
@given(
    batch=st.integers(1, 3),
    channels=st.integers(1, 20),
    side=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    seed=st.integers(0, 1000),
)
def test_against_fp64(batch, channels, side, dtype, seed):
    data = normal(batch, channels, *side, seed=seed, dtype=dtype)
    with use_configurations(SMALL):
        check_kernel(triton, flow_interpolate_reference, [data, times(batch), key(seed)])


def test_time_zero_is_data_and_time_one_is_noise():
    data, k = normal(3, 4, 2, 2, seed=1), key(1)
    z = triton(data, torch.tensor([0.0, 1.0, 0.25], device=DEVICE), k)
    noise = flow_noise(k, data.shape)
    torch.testing.assert_close(z[0], data[0])
    torch.testing.assert_close(z[1], noise[1], rtol=0, atol=1e-5)
    torch.testing.assert_close(z[2], 0.75 * data[2] + 0.25 * noise[2], rtol=0, atol=1e-5)


def test_strides():
    wide = normal(4, 12, 5, 6, seed=2)
    for data in (
        wide.contiguous(memory_format=torch.channels_last),
        wide[::2, 1:9:3],
        wide.transpose(2, 3),
        wide[:1].expand(3, -1, -1, -1),
        wide[..., :1],
    ):
        check_kernel(triton, flow_interpolate_reference, [data, times(len(data)), key(2)])


def test_strided_key_and_times():
    data = normal(2, 3, 2, 2, seed=3)
    wide_key, wide_t = torch.tensor([3, 9, 4, 9], device=DEVICE), times(4)
    found = triton(data, wide_t[::2], wide_key[::2])
    assert torch.equal(found, triton(data, wide_t[::2].clone(), wide_key[::2].clone()))


def test_pinned_configuration_and_output_dtype():
    data, t = normal(2, 32, 9, 9, seed=4), times(2)
    found = triton(data, t, key(4), torch.float16)
    assert found.dtype == torch.float16
    assert relative_error(found, flow_interpolate_reference(data, t, key(4))) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("run", [triton, flow_interpolate], ids=["triton", "reference"])
def test_a_part_of_a_batch_draws_its_part_of_the_noise(run):
    data, t = normal(5, 6, 3, 2, seed=5), times(5)
    whole = run(data, t, key(5))
    for first in (1, 3):
        assert torch.equal(run(data[first:], t[first:], key(5), first_image=first), whole[first:])


def test_operator_contract():
    inputs = (normal(2, 5, 3, 2, seed=5), times(2), key(5), torch.float16, 3)
    torch.library.opcheck(torch.ops.aligntok.flow_interpolate_triton.default, inputs)


def test_compiles_whole():
    def run(data, t):
        return flow_interpolate(data, t, noise_key(DEVICE), implementation="triton")

    data, t = normal(2, 5, 3, 2, seed=6), times(2)
    torch.manual_seed(0)
    expected = run(data, t)
    torch.manual_seed(0)
    torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="aot_eager")(data, t), expected)


def test_a_gradient_of_the_data_comes_from_the_reference():
    data, t = normal(2, 3, 2, 2, seed=7).requires_grad_(), times(2)
    (gradient,) = torch.autograd.grad(flow_interpolate(data, t, key()).sum(), data)
    torch.testing.assert_close(gradient, (1 - t).view(-1, 1, 1, 1).expand_as(data))
    with pytest.raises(ValueError, match="gradient"):
        triton(data, t, key())


def test_default_on_a_cuda_device_is_triton():
    assert explain("flow_interpolate", "cuda").name == "triton"
    assert explain("flow_interpolate", "cpu").name == "reference"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": torch.zeros(2, 3, 4)}, r"\[B, d, h, w\]"),
        ({"data": torch.zeros(2, 0, 4, 4)}, "without a zero"),
        ({"data": torch.zeros(2, 3, 4, 4, dtype=torch.int32)}, "float32"),
        ({"t": torch.zeros(3)}, r"t: expected \[2\]"),
        ({"t": torch.zeros(2, dtype=torch.int64)}, "floating-point"),
        ({"key": torch.zeros(2)}, "noise_key"),
        ({"dtype": torch.int8}, "dtype"),
        ({"data": torch.zeros(2, 3, 4, 4, dtype=torch.float64), "implementation": "triton"}, "fp64"),
        ({"data": torch.zeros(2, 4097, 1, 1), "implementation": "triton"}, "4096"),
    ],
)
def test_refusals(change, message):
    given = {"data": torch.zeros(2, 3, 4, 4), "t": torch.zeros(2), "key": noise_key()} | change
    with pytest.raises(ValueError, match=message):
        flow_interpolate(given.pop("data"), given.pop("t"), given.pop("key"), **given)
