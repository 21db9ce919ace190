"""qknorm_attention: Triton against the fp64 reference in its short and long forms, all switches, strides, refusals."""

import ast
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import DEVICE, TOLERANCE, check_kernel, normal

import aligntok.kernels
from aligntok.kernels import explain, qknorm_attention
from aligntok.kernels._qknorm_attention_configurations import HEAD_WIDTHS, SHORT, parts
from aligntok.kernels.qknorm_attention import qknorm_attention_reference
from aligntok.models.lightning_dit import rope_table


def triton(*inputs):
    return qknorm_attention(*inputs, implementation="triton")


def tables(N: int, D: int, narrow: bool) -> list[torch.Tensor]:
    """Rotary tables of N tokens in a row, [N, D] or [N, D / 2]."""
    found = [table.to(DEVICE) for table in rope_table((1, N), D, N)]
    return [table[:, ::2] for table in found] if narrow else found


def inputs(B, N, H, D, seed, dtype=torch.float32, norm=True, rope=True, narrow=True):
    """qkv, two weights or none, two tables or none."""
    qkv = normal(B, N, 3, H, D, seed=seed, dtype=dtype).requires_grad_()
    weights = [None, None]
    if norm:
        weights = [(1 + 0.3 * normal(D, seed=seed + 1 + i)).requires_grad_() for i in range(2)]
    return [qkv, *weights, *(tables(N, D, narrow) if rope else [None, None])]


# fp32: logits of some units go through exp, so that an ulp of theirs is a few ulps of the result
LOOSE = {torch.float32: 1e-4, torch.float16: 2 * TOLERANCE[torch.float16]}


@settings(max_examples=14)
@given(
    N=st.integers(1, 90),
    D=st.sampled_from(HEAD_WIDTHS),
    heads=st.integers(1, 2),
    switches=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    seed=st.integers(0, 1000),
)
def test_short_form_against_fp64(N, D, heads, switches, dtype, seed):
    norm, rope, narrow = switches
    arguments = inputs(1, N, heads, D, seed, dtype, norm, rope, narrow)
    check_kernel(triton, qknorm_attention_reference, arguments, LOOSE[dtype])


@pytest.mark.parametrize(
    ("N", "D", "dtype", "norm"),
    [
        (SHORT, 72, torch.float16, True),
        (SHORT - 3, 64, torch.float16, False),
        (SHORT // 2, 128, torch.float32, True),
        (SHORT + 37, 72, torch.float16, True),
        (SHORT // 2 + 5, 64, torch.float32, True),
        (2 * SHORT, 32, torch.float16, False),
    ],
)
def test_production_lengths_against_fp64(N, D, dtype, norm):
    arguments = inputs(1, N, 1, D, 7, dtype, norm, rope=norm)
    check_kernel(triton, qknorm_attention_reference, arguments, LOOSE[dtype])


@pytest.mark.parametrize(("B", "N", "H"), [(2, 20, 3), (1, SHORT + 5, 2)])
def test_strided_inputs_and_gradients(B, N, H):
    wide = normal(B, N, 3, H, 40, seed=3)
    qkv, others = wide[:, :, :, 1:, 4:36].requires_grad_(), inputs(1, N, 1, 32, 4)[1:]
    check_kernel(triton, qknorm_attention_reference, [qkv, *others], 1e-4)
    if N > SHORT:  # what follows reaches the kernels through the same lines, and takes minutes at this length
        return
    dense = wide[..., :32].transpose(3, 4).contiguous().transpose(3, 4).requires_grad_()  # D is not dense
    check_kernel(triton, qknorm_attention_reference, [dense, *others], 1e-4)

    def transposed(function):
        return lambda *arguments: function(*arguments).transpose(1, 2)

    check_kernel(transposed(triton), transposed(qknorm_attention_reference), [qkv, *others], 1e-4)


def test_large_logits_do_not_overflow():
    qkv = normal(1, 33, 3, 1, 64, seed=5, scale=30).requires_grad_()
    check_kernel(triton, qknorm_attention_reference, [qkv, None, None, None, None], 1e-3)


def test_a_head_of_72_is_not_padded_to_128():
    assert parts(72) == (64, 16) and parts(64) == (64, 0) and parts(128) == (128, 0) and parts(96) == (64, 32)


@pytest.mark.parametrize("operator", ["qknorm_attention", "joint_attention"])
def test_no_argument_stands_in_anothers_place(operator):
    """Kernels are launched by keyword; where functions hand on what they were given, every name is in its own place."""
    folder = Path(aligntok.kernels.__path__[0])
    files = (operator, f"_{operator}_kernels", "_qknorm_attention_blocks", "_qknorm_attention_tiles")
    nodes = [node for file in files for node in ast.walk(ast.parse((folder / f"{file}.py").read_text()))]
    parameters = {f.name: [a.arg for a in f.args.args] for f in nodes if isinstance(f, ast.FunctionDef)}
    calls = [node for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    launches = [call for call in calls if call.func.id == "launch"]
    assert launches and all(len(call.args) == 2 for call in launches)
    for call in calls:
        names = parameters.get(call.func.id, [])
        for place, argument in enumerate(call.args):
            if isinstance(argument, ast.Name) and argument.id in names:
                assert names.index(argument.id) == place, f"{argument.id} in line {call.lineno}: {ast.unparse(call)}"


@pytest.mark.parametrize("norm", [False, True])
def test_operator_contract(norm):
    arguments = inputs(1, 10, 2, 32, 6, norm=norm)
    torch.library.opcheck(torch.ops.aligntok.qknorm_attention_triton.default, (*arguments, 1e-6))


def test_default_on_a_cuda_device_is_triton():
    assert explain("qknorm_attention", "cuda").name == "triton"
    assert explain("qknorm_attention", "cpu").name == "reference"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(1, 4, 2, 1, 32)}, r"\[B, N, 3, H, D\]"),
        ({0: torch.zeros(1, 4, 3, 1, 32, dtype=torch.int32)}, "dtype"),
        ({1: None}, "both or neither"),
        ({1: torch.ones(31)}, r"q_weight: expected shape \[32\]"),
        ({3: torch.ones(4, 30), 4: torch.ones(4, 30)}, "cos: expected a table"),
    ],
)
def test_refusals(change, message):
    arguments = inputs(1, 4, 1, 32, 8)
    for index, value in change.items():
        arguments[index] = value if value is None else value.to(DEVICE)
    with pytest.raises(ValueError, match=message):
        triton(*arguments)


def test_other_head_widths_are_refused_by_name():
    with pytest.raises(ValueError, match="heads of 20 channels"):
        triton(*inputs(1, 4, 1, 20, 9, rope=False))
    with pytest.raises(ValueError, match="fp64"):
        triton(*inputs(1, 4, 1, 32, 9, torch.float64, norm=False, rope=False))
