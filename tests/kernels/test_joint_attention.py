"""joint_attention: Triton against the fp64 reference over ragged streams and masks, what is masked, refusals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import DEVICE, TOLERANCE, check_kernel, normal, outputs_and_gradients
from torch import Tensor

from aligntok.kernels import explain, joint_attention
from aligntok.kernels._qknorm_attention_configurations import HEAD_WIDTHS
from aligntok.kernels.joint_attention import joint_attention_reference
from aligntok.kernels.qknorm_attention import qknorm_attention_reference

# As in test_qknorm_attention.py
LOOSE = {torch.float32: 1e-4, torch.float16: 2 * TOLERANCE[torch.float16]}


def inputs(B, L, N, H, D, streams, seed, lengths=None, dtype=torch.float32) -> list[Tensor | None]:
    """The streams, q's scales, k's scales, two tables, lengths: in one row, since `check_kernel` looks for leaves."""
    tokens = [L, N] if streams == 2 else [L + N]
    packed = [normal(B, n, 3, H, D, seed=seed + i, dtype=dtype).requires_grad_() for i, n in enumerate(tokens)]
    scales = [(1 + 0.3 * normal(D, seed=seed + 2 + i)).requires_grad_() for i in range(2 * streams)]
    angles = normal(L + N, D // 2, seed=seed + 6, scale=3)
    given_lengths = None if lengths is None else torch.tensor(lengths, device=DEVICE)
    return [*packed, *scales, angles.cos(), angles.sin(), given_lengths]


def called(function, L, **options):
    """`function` of a row of inputs."""

    def call(*row):
        *tensors, cos, sin, lengths = row
        n = len(tensors) // 3
        parts = tensors[:n], tensors[n : 2 * n], tensors[2 * n :]
        return function(*parts, cos, sin, text_tokens=L, lengths=lengths, **options)

    return call


def triton(L):
    return called(joint_attention, L, implementation="triton")


def check(L, row, tolerance):
    check_kernel(triton(L), called(joint_attention_reference, L), row, tolerance)


@settings(max_examples=6)
@given(
    L=st.integers(1, 40),
    N=st.integers(1, 20),
    D=st.sampled_from(HEAD_WIDTHS),
    batch=st.integers(1, 2),
    streams=st.integers(1, 2),
    shares=st.none() | st.tuples(st.floats(0, 1), st.floats(0, 1)),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    seed=st.integers(0, 1000),
)
def test_ragged_streams_and_masks_against_fp64(L, N, D, batch, streams, shares, dtype, seed):
    lengths = None if shares is None else [round(share * L) for share in shares[:batch]]
    check(L, inputs(batch, L, N, 3 - batch, D, streams, seed, lengths, dtype), LOOSE[dtype])


@pytest.mark.parametrize(
    ("L", "N", "D", "streams", "length", "dtype"),
    [
        (136, 130, 128, 2, 77, torch.float16),
        (128, 64, 64, 1, None, torch.float16),
        (16, 64, 64, 2, 0, torch.float16),
    ],
)
def test_several_blocks_against_fp64(L, N, D, streams, length, dtype):
    check(L, inputs(1, L, N, 1, D, streams, 7, None if length is None else [length], dtype), LOOSE[dtype])


@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_what_is_masked_changes_nothing_and_gets_no_gradient(implementation, streams):
    L, N, lengths = 40, 5, [0, 34]
    row = inputs(2, L, N, 1, 32, streams, 1, lengths)
    run = called(joint_attention, L, implementation=implementation)
    found = outputs_and_gradients(run, row)
    for b, length in enumerate(lengths):
        dk, dv = found["gradient 0"][b, length:L, 1:].unbind(1)
        assert dk.count_nonzero() == dv.count_nonzero() == 0
        assert found["gradient 0"][b, length:L, 0].count_nonzero() > 0  # a masked token has a result of its own
        with torch.no_grad():
            row[0][b, length:L, 1:] = 1e4
    assert all(one.isfinite().all() for one in found.values())
    for one, other in zip(run(*row), [found[f"output {i}"] for i in range(streams)], strict=True):
        assert torch.equal(one, other)


def test_lengths_of_either_width_and_beyond_the_text():
    row = inputs(2, 6, 5, 1, 32, 2, 2, [3, 6])
    expected = triton(6)(*row)
    for lengths in (torch.tensor([3, 6], dtype=torch.int32), torch.tensor([3, 9])):
        for one, other in zip(triton(6)(*row[:-1], lengths.to(DEVICE)), expected, strict=True):
            assert torch.equal(one, other)


def test_one_stream_is_two_with_the_same_scales():
    L = 37
    one = inputs(2, L, 21, 1, 64, 1, 3, [5, 37])
    whole, q_scale, k_scale, *others = one
    two = [whole[:, :L], whole[:, L:], q_scale, q_scale, k_scale, k_scale, *others]
    assert torch.equal(triton(L)(*one)[0], torch.cat(triton(L)(*two), dim=1))


def test_without_a_mask_it_is_qknorm_attention():
    row = inputs(1, 5, 7, 2, 32, 1, 4)
    expected = qknorm_attention_reference(*row[:5])
    torch.testing.assert_close(
        joint_attention_reference(row[:1], row[1:2], row[2:3], *row[3:5], text_tokens=5)[0], expected
    )


def test_a_long_reference_takes_other_kernels_and_keeps_results_gradients_and_tangents():
    L, N = 200, 100
    row = inputs(2, L, N, 1, 32, 2, 15, [0, 130])
    reference = called(joint_attention, L, implementation="reference")
    check_kernel(reference, called(joint_attention_reference, L), row, 1e-4)
    text, *others = (one.detach() for one in row)
    tangent = torch.func.jvp(lambda text: reference(text, *others), (text,), (torch.ones_like(text),))[1]
    step = 1e-3 * torch.ones_like(text)
    above, below = reference(text + step, *others), reference(text - step, *others)
    for one, up, down in zip(tangent, above, below, strict=True):
        torch.testing.assert_close(one, (up - down) / 2e-3, atol=2e-3, rtol=2e-2)


@pytest.mark.parametrize("streams", [1, 2])
def test_strided_inputs_and_gradients(streams):
    """Slices of a wider projection, whose rows begin anywhere; gradients of results that were transposed."""
    B, L, N, H, D = 1, 5, 9, 2, 32
    row = inputs(B, L, N, H, D, streams, 5, [2])
    for i, n in enumerate([L, N] if streams == 2 else [L + N]):
        wide = normal(B, n, 9 * H * D + i, seed=i)
        row[i] = wide[..., i : 3 * H * D + i].unflatten(2, (3, H, D)).requires_grad_()
    check(L, row, 1e-4)

    def transposed(function):
        return lambda *row: [one.transpose(1, 2) for one in function(*row)]

    row[0] = row[0].detach().transpose(3, 4).contiguous().transpose(3, 4).requires_grad_()  # D is not dense
    check_kernel(transposed(triton(L)), transposed(called(joint_attention_reference, L)), row, 1e-4)


def test_one_result_alone_has_its_gradients():
    def image_alone(function):
        return lambda *row: function(*row)[1]

    row = inputs(1, 5, 7, 1, 32, 2, 6, [3])
    check_kernel(image_alone(triton(5)), image_alone(called(joint_attention_reference, 5)), row, 1e-4)


def test_large_logits_do_not_overflow():
    row = inputs(1, 33, 40, 1, 64, 2, 8, [20])
    for scale in row[2:6]:
        scale.data *= 6
    check(33, row, 1e-3)


def test_results_are_contiguous_and_of_the_streams_dtype():
    for implementation in ("triton", "reference"):
        row = inputs(2, 5, 7, 2, 32, 2, 9, dtype=torch.float16)
        for one in called(joint_attention, 5, implementation=implementation)(*row):
            assert one.is_contiguous() and one.dtype == torch.float16


@pytest.mark.parametrize(("streams", "lengths"), [(1, [2]), (2, None)])
def test_operator_contract(streams, lengths):
    *tensors, cos, sin, lengths = inputs(1, 4, 6, 2, 32, streams, 10, lengths)
    parts = tensors[:streams], tensors[streams : 2 * streams], tensors[2 * streams :]
    operator = torch.ops.aligntok.joint_attention_triton.default
    torch.library.opcheck(operator, (*parts, cos, sin, lengths, 4, 1e-6))


def test_default_on_a_cuda_device_is_triton():
    assert explain("joint_attention", "cuda").name == "triton"
    assert explain("joint_attention", "cpu").name == "reference"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(1, 4, 2, 1, 32)}, r"streams: expected shape \[B, N, 3, H, D\]"),
        ({0: torch.zeros(1, 4, 3, 1, 32, dtype=torch.int32)}, "dtype"),
        ({1: torch.zeros(1, 4, 3, 2, 32)}, "differ in the tokens alone"),
        ({1: torch.zeros(1, 6, 3, 1, 32, dtype=torch.float16)}, "differ in the tokens alone"),
        ({0: torch.zeros(1, 5, 3, 1, 32)}, "text_tokens: expected 5"),
        ({2: torch.ones(31)}, r"q_weights: expected shape \[32\]"),
        ({5: torch.ones(32, dtype=torch.float16)}, "k_weights: .* all in torch.float32 or"),
        ({6: torch.ones(10, 32)}, r"cos: expected a table \[10, 16\]"),
        ({7: torch.ones(9, 16)}, "sin: expected a table"),
        ({8: torch.ones(2, dtype=torch.int64)}, r"lengths: expected shape \[1\]"),
        ({8: torch.ones(1)}, "lengths: .* int32 or int64"),
        ({8: torch.ones(1, dtype=torch.int64, device="meta")}, "one device"),
    ],
)
def test_refusals(change, message):
    row = inputs(1, 4, 6, 1, 32, 2, 11)
    for index, value in change.items():
        row[index] = value if value.is_meta else value.to(DEVICE)
    with pytest.raises(ValueError, match=message):
        triton(4)(*row)


def test_refusals_of_numbers_that_do_not_fit_together():
    (whole, q_scale, k_scale, cos, sin, _) = inputs(1, 4, 6, 1, 32, 1, 12)
    for streams, tokens, message in (((), 4, "got 0 streams"), ((whole,), 10, "1 to 9 of 10"), ((whole,), 0, "1 to 9")):
        with pytest.raises(ValueError, match=message):
            joint_attention(streams, (q_scale,), (k_scale,), cos, sin, text_tokens=tokens)
    with pytest.raises(ValueError, match="k_weights: expected one for each of 1 streams, got 2"):
        joint_attention((whole,), (q_scale,), (k_scale, k_scale), cos, sin, text_tokens=4)


def test_other_head_widths_and_fp64_are_refused_by_name():
    with pytest.raises(ValueError, match="heads of 20 channels"):
        triton(4)(*inputs(1, 4, 1, 1, 20, 2, 13))
    with pytest.raises(ValueError, match="fp64"):
        triton(4)(*[x if x is None else x.double() for x in inputs(1, 4, 1, 1, 32, 2, 14)])
