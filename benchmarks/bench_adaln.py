"""`adaln` between two branches of LightningDiT: Triton against eager PyTorch and torch.compile.

    python -m benchmarks.bench_adaln [--phase forward|backward|both|all] [--seconds S] [--csv FILE] [--plot FILE]

Shapes: LightningDiT-S/B/L/XL and twice XL's width, at 256 tokens and batch 256. The residual stream and the norm's
weight are fp32; the branch's output, y and the modulation, three of six chunks of a projection, are bf16 (autocast).
"""

import sys

import torch
from torch import Tensor

from aligntok.kernels.adaln import adaln, adaln_reference
from benchmarks.harness import run_workloads
from benchmarks.workloads import Workload


def make(device: str, dtype: torch.dtype, B: int, N: int, D: int) -> tuple[Tensor, ...]:
    """x, scale, shift, h, gate, weight: the arguments of `adaln`; x is fp32."""
    modulation = (0.1 * torch.randn(B, 6 * D, device=device, dtype=dtype)).requires_grad_()
    shift, scale, gate = modulation.chunk(6, dim=1)[:3]
    x = torch.randn(B, N, D, device=device).requires_grad_()
    h = torch.randn(B, N, D, device=device, dtype=dtype).requires_grad_()
    weight = (1 + 0.1 * torch.randn(D, device=device)).requires_grad_()
    return x, scale, shift, h, gate, weight


def ours(*inputs: Tensor, implementation: str | None = None) -> tuple[Tensor, Tensor]:
    """(x_new, y) through the public function, y in h's dtype."""
    return adaln(*inputs, dtype=inputs[3].dtype, implementation=implementation)


def reference(*inputs: Tensor) -> tuple[Tensor, Tensor]:
    """(x_new, y) in plain PyTorch, y in h's dtype."""
    x, scale, shift, h, gate, weight = inputs
    return adaln_reference(x, scale, shift, h, gate, weight, dtype=h.dtype)


def minimum(itemsize: int, B: int, N: int, D: int) -> tuple[float, float]:
    """Forward: x, h in, x_new, y out. Backward: dx_new, dy, x_new, h in, dx, dh out. The vectors are read once too."""
    return B * N * D * 2 * (4 + itemsize), B * N * D * (3 * 4 + 3 * itemsize)


WORKLOADS = [
    Workload(
        "adaln",
        {"B": 256, "N": 256, "D": D},
        {"B": 1, "N": 128},
        make,
        ours,
        reference,
        minimum,
        note=note,
        cpu={"B": 16},
    )
    for D, note in ((384, "S"), (768, "B"), (1024, "L"), (1152, "XL"), (2304, "twice XL"))
]


if __name__ == "__main__":
    sys.exit(run_workloads(__doc__, WORKLOADS))
