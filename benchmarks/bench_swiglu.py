"""`swiglu` from the packed projection: Triton against eager PyTorch and torch.compile.

    python -m benchmarks.bench_swiglu [--phase forward|backward|both|all] [--seconds S] [--csv FILE] [--plot FILE]

Shapes: LightningDiT-S/B/L/XL at 256 tokens and batch 256. L's hidden width of 2730 is no multiple of 8, so that its
rows cannot be read in 16-byte pieces.
"""

import sys

import torch
from torch import Tensor

from aligntok.kernels import swiglu
from aligntok.kernels.swiglu import swiglu_reference
from benchmarks.harness import run_workloads
from benchmarks.workloads import Workload


def make(device: str, dtype: torch.dtype, M: int, H: int) -> tuple[Tensor]:
    """A packed projection [M, 2H]."""
    return (torch.randn(M, 2 * H, device=device, dtype=dtype).requires_grad_(),)


def minimum(itemsize: int, M: int, H: int) -> tuple[float, float]:
    """Forward: packed in, y out. Backward: packed and dy in, dpacked out."""
    return 3 * M * H * itemsize, 5 * M * H * itemsize


WORKLOADS = [
    Workload(
        "swiglu", {"M": 65536, "H": H}, {"M": 64}, make, swiglu, swiglu_reference, minimum, note=note, cpu={"M": 4096}
    )
    for H, note in ((1024, "S"), (2048, "B"), (2730, "L: rows not 16-byte aligned"), (3072, "XL"))
]


if __name__ == "__main__":
    sys.exit(run_workloads(__doc__, WORKLOADS))
