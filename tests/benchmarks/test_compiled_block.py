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
