"""`flow_step`, guidance and one solver step in place: Triton against eager PyTorch and torch.compile.

    python -m benchmarks.bench_flow_step [--phase forward] [--seconds S] [--csv FILE] [--plot FILE]

Shapes: 256 samples of f16d32 and f16d64 latents at 256 and 512 px. The velocity comes channels-last, as a generator
with patch size 1 gives it; rows = 2 has a null half, guided on the first k channels; ahead = 1 is Heun's first
evaluation.
"""

import sys

import torch
from torch import Tensor

from aligntok.kernels.flow_step import flow_step, flow_step_reference
from benchmarks.harness import run_workloads
from benchmarks.workloads import Workload

DT, GUIDANCE = -1 / 250, 4.0


def make(device: str, dtype: torch.dtype, B: int, d: int, side: int, rows: int, k: int, ahead: int) -> tuple:
    """State, channels-last velocity, guidance, channels, buffer for Heun's prediction."""
    z = torch.randn(B, d, side, side, device=device)
    velocity = torch.randn(rows * B, side, side, d, device=device, dtype=dtype).permute(0, 3, 1, 2)
    return z, velocity, GUIDANCE if rows == 2 else 1.0, k, torch.empty_like(z) if ahead else None


def ours(
    z: Tensor, velocity: Tensor, guidance: float, k: int, ahead: Tensor | None, implementation: str | None = None
) -> tuple[Tensor, ...]:
    """The step, and what it wrote to."""
    flow_step(z, velocity, DT, guidance=guidance, channels=k, ahead=ahead, implementation=implementation)
    return (z,) if ahead is None else (z, ahead)


def reference(z: Tensor, velocity: Tensor, guidance: float, k: int, ahead: Tensor | None) -> tuple[Tensor, ...]:
    """The same in plain PyTorch."""
    flow_step_reference(z, velocity, DT, guidance, k if k < z.shape[1] else None, ahead)
    return (z,) if ahead is None else (z, ahead)


def minimum(itemsize: int, B: int, d: int, side: int, rows: int, k: int, ahead: int) -> tuple[float, None]:
    """Labelled half in, the guided channels of the null half in, z in and out, ahead out."""
    numel = B * d * side * side
    return numel * (itemsize * (1 + (rows - 1) * k / d) + 4 * (2 + ahead)), None


WORKLOADS = [
    Workload(
        "flow_step",
        {"B": 256, "d": d, "side": side, "rows": rows, "k": k, "ahead": ahead},
        {"B": 2},
        make,
        ours,
        reference,
        minimum,
        note=note,
    )
    for d, side, rows, k, ahead, note in (
        (32, 16, 2, 32, 0, "Euler, guidance on all channels"),
        (32, 16, 2, 3, 0, "Euler, guidance on three channels, as in LightningDiT's code"),
        (32, 16, 1, 32, 0, "Euler, no guidance"),
        (32, 16, 2, 32, 1, "Heun's first evaluation"),
        (64, 32, 2, 64, 0, "Euler, f16d64 at 512 px"),
    )
]


if __name__ == "__main__":
    sys.exit(run_workloads(__doc__, WORKLOADS))
