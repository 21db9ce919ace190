"""torch.compile's way on a GPU, as far as code: kernels that are not interpreted, so a process of its own."""

import os
import re
import subprocess
import sys

import pytest


@pytest.fixture(scope="module")
def printed(tmp_path_factory) -> tuple[str, dict[str, str]]:
    """What the command says of LightningDiT-S's block with QK-norm, and the code that it writes."""
    folder = tmp_path_factory.mktemp("code")
    command = [sys.executable, "-m", "benchmarks.compiled_block", "--size", "S", "--batch", "2", "--qk-norm"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [*command, "--code", str(folder)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, {file.stem: file.read_text() for file in folder.iterdir()}


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_fused_operators_become_their_kernels_without_copies(printed, direction):
    text, _ = printed
    (launches,) = re.findall(rf"fused, {direction}: \d+ launches, no copies\n((?:  .*\n)+)", text)
    kernels = re.findall(r"^  (\w+_kernel)_\d+$", launches, re.MULTILINE)
    assert sorted(kernels) == sorted([f"_short_{direction}_kernel", *3 * [f"_{direction}_kernel"]])  # 2 adaLN, SwiGLU
    assert launches.count("extern_kernels.") == (5 if direction == "forward" else 10)


def test_the_code_is_for_a_gpu_and_compiles_as_python(printed):
    _, code = printed
    assert set(code) == {"reference_forward", "reference_backward", "fused_forward", "fused_backward"}
    for text in code.values():
        compile(text, "generated", "exec")
        assert "empty_strided_cuda(" in text and "empty_strided_cpu(" not in text


JOINT = """
import torch
from aligntok.kernels import assume_device, joint_attention
from benchmarks.compiled_block import compile_for_gpu

for tokens in ((32, 64), (96,)):
    n = len(tokens)
    wide = [torch.zeros(2, N, 9 * 2 * 64, dtype=torch.bfloat16, requires_grad=True) for N in tokens]
    scales = [torch.ones(64, requires_grad=True) for _ in range(2 * n)]

    def attended(*x):
        streams = [one[..., : 3 * 2 * 64].unflatten(2, (3, 2, 64)) for one in x[:n]]
        return joint_attention(streams, x[n : 2 * n], x[2 * n : 3 * n], *x[3 * n : -1], text_tokens=32, lengths=x[-1])

    with assume_device("cuda"):
        found = compile_for_gpu(attended, (*wide, *scales, *torch.ones(2, 96, 32), torch.tensor([3, 32])), 90)
    for one in found:
        print(n, *(name for name in one.launches if "joint" in name), one.copies)
"""


def test_joint_attention_reads_slices_where_they_lie_and_copies_nothing():
    """Its kernels choose among pointers, which torch's search for what they write has to see through."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", JOINT], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    forward = "_joint_prepare_kernel_0 _joint_forward_kernel_1 {}"
    backward = "_joint_prepare_kernel_0 _joint_dq_kernel_1 _joint_dkv_kernel_2 {}"
    assert done.stdout.splitlines() == [f"{n} {launches}" for n in (2, 1) for launches in (forward, backward)]
