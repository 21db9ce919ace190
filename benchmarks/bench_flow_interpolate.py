"""`flow_interpolate`, the noisy latent with its noise drawn in the kernel: Triton against PyTorch.

    python -m benchmarks.bench_flow_interpolate [--phase forward] [--seconds S] [--csv FILE] [--plot FILE]

Shapes: latents f16d32 and f16d64 at 256 px, batch 1024 over eight GPUs and over one; z_t in bf16, as autocast wants it.
The baseline reads the same noise from memory, where it was put before the clock started: what a training step without
the kernel pays for drawing and storing it is left out, in the baseline's favour.
"""

import sys

import torch
from torch import Tensor

from aligntok.kernels._philox import flow_noise, noise_key
from aligntok.kernels.flow_interpolate import flow_interpolate
from benchmarks.harness import run_workloads
from benchmarks.workloads import Workload


def make(device: str, dtype: torch.dtype, B: int, d: int, side: int) -> tuple:
    """Latents in fp32, times, key, dtype of the result, and the key's noise for the baseline."""
    data, key = torch.randn(B, d, side, side, device=device), noise_key(device)
    return data, torch.rand(B, device=device), key, dtype, flow_noise(key, data.shape)


def ours(
    data: Tensor, t: Tensor, key: Tensor, dtype: torch.dtype, noise: Tensor, implementation: str | None = None
) -> Tensor:
    """Through the public function, without the stored noise."""
    return flow_interpolate(data, t, key, dtype=dtype, implementation=implementation)


def reference(data: Tensor, t: Tensor, key: Tensor, dtype: torch.dtype, noise: Tensor) -> Tensor:
    """Plain PyTorch, from stored noise."""
    return torch.lerp(data, noise, t.view(-1, 1, 1, 1)).to(dtype)


def minimum(itemsize: int, B: int, d: int, side: int) -> tuple[float, None]:
    """fp32 latents in, z_t out."""
    return B * d * side * side * (4 + itemsize), None


WORKLOADS = [
    Workload(
        "flow_interpolate",
        {"B": B, "d": d, "side": 16},
        {"B": 2},
        make,
        ours,
        reference,
        minimum,
        note=note,
        cpu={"B": 16},
    )
    for B, d, note in ((128, 32, "f16d32, an eighth of the batch"), (1024, 32, "f16d32"), (1024, 64, "f16d64"))
]


if __name__ == "__main__":
    sys.exit(run_workloads(__doc__, WORKLOADS))
