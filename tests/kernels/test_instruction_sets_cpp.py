"""adaln, lpips_distance, qknorm_rope and swiglu in C++ on older instruction sets, run on this processor."""

import os
import subprocess
import sys

import torch

CHECK = """
import torch
from aligntok.kernels import adaln, lpips_distance, qknorm_rope, swiglu
found = torch.backends.cpu.get_cpu_capability().replace("NO AVX", "DEFAULT")  # as torch 2.8 calls it
assert found == "{capability}", found
TRAINED = {{lpips_distance: 2, qknorm_rope: 3}}
generator = torch.Generator().manual_seed(0)
for dtype, tolerance in [(torch.bfloat16, 2**-6), (torch.float16, 2**-9), (torch.float32, 4e-6)]:
    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)
    cases = [
        (swiglu, [normal(3, 70, 74)]),
        (lpips_distance, [normal(3, 37, 9, 8), normal(3, 37, 9, 8), normal(37).abs()]),
        (adaln, [normal(2, 70, 37), normal(2, 37), normal(2, 37), normal(2, 70, 37), normal(2, 37), normal(37)]),
        (qknorm_rope, [normal(2, 35, 3, 3, 38), normal(38), normal(38), normal(35, 38), normal(35, 38)]),
    ]
    for op, inputs in cases:
        found = []
        for implementation, kind in [("cpp", lambda t: t), ("reference", torch.Tensor.double)]:
            leaves = [kind(tensor).requires_grad_(i < TRAINED.get(op, 9)) for i, tensor in enumerate(inputs)]
            outputs = op(*leaves, implementation=implementation)
            outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
            wanted = [leaf for leaf in leaves if leaf.requires_grad]
            found.append([*outputs, *torch.autograd.grad(outputs, wanted, [y.detach() for y in outputs])])
        for one, other in zip(*found, strict=True):
            assert (one.double() - other).abs().max() < tolerance * other.abs().max(), (op, dtype)
"""


def test_same_results():
    with_avx2 = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    processes = []
    for capability in ("DEFAULT", "AVX2") if with_avx2 else ("DEFAULT",):
        environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability.lower()}
        script = CHECK.format(capability=capability)
        processes.append(subprocess.Popen([sys.executable, "-c", script], env=environment))
    assert [process.wait() for process in processes] == [0] * len(processes)
