"""What is chosen for a GPU by its compute capability, and that it fits there: pretended devices, compiled code."""

import os
import subprocess
import sys

import pytest
import torch

from aligntok.kernels import _dispatch, _triton
from aligntok.kernels._qknorm_attention_configurations import ONE_LAYOUT
from aligntok.kernels._triton import ARCHITECTURES, record_launches
from aligntok.kernels.qknorm_attention import qknorm_attention
from aligntok.models.attention import choose

# What computes heads of 72 channels over 256 tokens: the launches, and the queries at a time in the forward pass
IN_ONE = ["_short_forward_kernel", "_short_backward_kernel"]
IN_THREE = ["_short_forward_kernel", "_prepare_kernel", "_dq_kernel", "_dkv_kernel"]
BY_ARCHITECTURE = {
    80: (IN_ONE, 128),
    86: (IN_ONE, 64),
    89: (IN_ONE, 64),
    90: (IN_ONE, 64),
    100: (IN_THREE, 64),
    120: (IN_ONE, 64),
}


@pytest.fixture
def pretend(monkeypatch):
    """pretend(major, minor): the process has a GPU of that compute capability."""

    def pretended(major: int, minor: int) -> torch.device:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(_triton, "_capability", lambda index: (major, minor))
        monkeypatch.setattr(_dispatch, "_selected", {})
        return torch.device("cuda", 0)

    return pretended


@pytest.mark.parametrize(
    ("capability", "architecture"),
    [
        ((8, 0), 80),
        ((8, 6), 86),
        ((8, 7), 86),
        ((8, 9), 89),
        ((9, 0), 90),
        ((10, 0), 100),
        ((10, 3), 100),
        ((12, 0), 120),
        ((12, 1), 120),
    ],
)
def test_each_device_has_an_architecture_and_the_fused_attention(pretend, capability, architecture):
    assert _triton.architecture(pretend(*capability)) == architecture
    assert choose("auto", "cuda", torch.bfloat16, 72, 256) == "fused"


def test_older_devices_take_pytorchs_attention_and_say_why(pretend):
    device = pretend(7, 5)
    assert "compute capability 8.0" in (_triton.refusal(device) or "")
    assert choose("auto", "cuda", torch.bfloat16, 72, 256) == "sdpa"


def test_an_architecture_takes_its_own_entry_or_that_of_the_one_it_is_like(pretend):
    found = {arch: _triton.pinned({80: "a", 86: "b", 90: "c"}, pretend(*divmod(arch, 10))) for arch in ARCHITECTURES}
    assert found == {80: "a", 86: "b", 89: "b", 90: "c", 100: "c", 120: "b"}


def launched(architecture: int, D: int) -> list[_triton.Launch]:
    """The launches of forward and backward pass over 256 tokens in bf16."""
    with record_launches(architecture) as launches:
        qkv = torch.empty(2, 256, 3, 4, D, dtype=torch.bfloat16, device="meta", requires_grad=True)
        out = qknorm_attention(qkv, implementation="triton")
        torch.autograd.grad(out, qkv, torch.empty_like(out))
    return launches


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_attention_is_launched_as_the_architecture_allows(monkeypatch, architecture):
    monkeypatch.setattr(_triton, "RELEASE", ONE_LAYOUT)
    launches = launched(architecture, 72)
    names, queries = BY_ARCHITECTURE[architecture]
    assert [launch.kernel.__name__ for launch in launches] == names
    assert launches[0].arguments["BLOCK_Q"] == queries


def test_older_compilers_take_several_launches_for_heads_with_a_tail(monkeypatch):
    monkeypatch.setattr(_triton, "RELEASE", (3, 6))
    names = [launch.kernel.__name__ for launch in launched(80, 72)]
    assert names == ["_prepare_kernel", "_long_forward_kernel", "_prepare_kernel", "_dq_kernel", "_dkv_kernel"]
    assert [launch.kernel.__name__ for launch in launched(80, 64)] == IN_ONE


COMPILED = """
import torch
from aligntok.kernels import qknorm_attention
from aligntok.kernels._triton import record_launches
from benchmarks.aot import LIMITS, compile_launch

for arch, dtype, N, D in ((86, torch.bfloat16, 256, 72), (86, torch.float32, 128, 72), (120, torch.bfloat16, 256, 72)):
    with record_launches(arch) as launches:
        qkv = torch.empty(2, N, 3, 4, D, dtype=dtype, device="meta")
        qknorm_attention(qkv, implementation="triton")
    code, _ = compile_launch(launches[0], arch)
    print(code.shared <= LIMITS[arch]["shared_block"], LIMITS[arch]["shared_block"])
"""


def test_what_is_chosen_fits_into_99_kib_of_shared_memory():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILED], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["True 101376"] * 3
