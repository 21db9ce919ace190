"""`qknorm_rope`, what SDPA, flash-attn and xformers need before them: Triton against eager PyTorch and torch.compile.

    python -m benchmarks.bench_qknorm_rope [--phase forward|backward|both|all] [--seconds S] [--csv FILE] [--plot FILE]

Shapes: LightningDiT-XL (16 heads of 72) and S (6 heads of 64) at 256 tokens and batch 256, with QK-norm and without
(LightningDiT's default). The weights and the tables are fp32, as under autocast.
"""

import sys

import torch
from torch import Tensor

from aligntok.kernels.qknorm_rope import qknorm_rope, qknorm_rope_reference
from benchmarks.harness import run_workloads
from benchmarks.workloads import Workload


def make(device: str, dtype: torch.dtype, B: int, N: int, H: int, D: int, norm: int) -> tuple[Tensor | None, ...]:
    """qkv, q_weight, k_weight, cos, sin: the arguments of `qknorm_rope`; norm 0 leaves the weights out."""
    qkv = torch.randn(B, N, 3, H, D, device=device, dtype=dtype).requires_grad_()
    weights = [(1 + 0.1 * torch.randn(D, device=device)).requires_grad_() if norm else None for _ in range(2)]
    angles = (3 * torch.randn(N, D // 2, device=device)).repeat_interleave(2, dim=1)
    return qkv, *weights, angles.cos(), angles.sin()


def minimum(itemsize: int, B: int, N: int, H: int, D: int, norm: int) -> tuple[float, float]:
    """Forward: q and k in and out. Backward: dq, dk, dv in, dqkv out; with a norm, q and k in once more."""
    one = B * N * H * D * itemsize
    tables = 2 * N * D * 4
    return 4 * one + tables, (8 if norm else 6) * one + tables


def planned(itemsize: int, B: int, N: int, H: int, D: int, norm: int) -> tuple[float, float]:
    """The forward pass copies v, too."""
    forward, backward = minimum(itemsize, B, N, H, D, norm)
    return forward + 2 * B * N * H * D * itemsize, backward


WORKLOADS = [
    Workload(
        "qknorm_rope",
        {"B": 256, "N": 256, "H": H, "D": D, "norm": norm},
        {"B": 8, "N": 8},
        make,
        qknorm_rope,
        qknorm_rope_reference,
        minimum,
        planned=planned,
        reason="v is copied beside q and k, for attention libraries that want the three laid out alike",
        note=f"{size}{'' if norm else ', no norm'}",
        cpu={"B": 16},
    )
    for H, D, size in ((16, 72, "XL"), (6, 64, "S"))
    for norm in (1, 0)
]


if __name__ == "__main__":
    sys.exit(run_workloads(__doc__, WORKLOADS))
