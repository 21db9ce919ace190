"""`lpips_distance` of two feature maps: Triton against eager PyTorch and torch.compile.

    python -m benchmarks.bench_lpips_distance [--phase forward|backward|both|all] [--csv FILE] [--plot FILE]

Shapes: the five maps that LPIPS takes from VGG16 for images of 256x256 px, at batch 8. As in training the first map
needs a gradient and the second does not.
"""

import sys

import torch
from torch import Tensor

from aligntok.kernels.lpips_distance import lpips_distance, lpips_distance_reference
from benchmarks.harness import run_workloads
from benchmarks.workloads import Workload


def make(device: str, dtype: torch.dtype, B: int, C: int, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Two maps as they leave a ReLU, in channels-last memory, and the weights of the channels."""

    def features() -> Tensor:
        maps = torch.randn(B, C, side, side, device=device, dtype=dtype).relu()
        return maps.contiguous(memory_format=torch.channels_last)

    return features().requires_grad_(), features(), torch.rand(C, device=device)


def minimum(itemsize: int, B: int, C: int, side: int) -> tuple[float, float]:
    """Forward: both maps in. Backward: both maps in, one gradient out."""
    values = B * C * side * side
    return 2 * values * itemsize, 3 * values * itemsize


WORKLOADS = [
    Workload(
        "lpips_distance",
        {"B": 8, "C": C, "side": side},
        {"B": 1, "side": 16},
        make,
        lpips_distance,
        lpips_distance_reference,
        minimum,
    )
    for C, side in ((64, 256), (128, 128), (256, 64), (512, 32), (512, 16))
]


if __name__ == "__main__":
    sys.exit(run_workloads(__doc__, WORKLOADS))
