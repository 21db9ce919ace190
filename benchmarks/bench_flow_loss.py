"""`flow_loss`, squared error and direction of the velocity with the gradient in one pass: Triton against PyTorch.

    python -m benchmarks.bench_flow_loss [--phase forward|backward|both|all] [--seconds S] [--csv FILE] [--plot FILE]

Shapes: latents f16d32 and f16d64 at 256 px, batch 1024 over eight GPUs and over one. The velocity comes channels-last,
as a generator with patch size 1 gives it. The baseline reads the same noise from memory, as a training step without the
kernel would have to keep it.
"""

import sys

import torch
from torch import Tensor
from torch.nn import functional as F

from aligntok.kernels._philox import flow_noise, noise_key
from aligntok.kernels.flow_loss import flow_loss
from benchmarks.harness import run_workloads
from benchmarks.workloads import Workload


def make(device: str, dtype: torch.dtype, B: int, d: int, side: int) -> tuple:
    """Channels-last velocity, latents in fp32, key, weight of the direction, and the key's noise for the baseline."""
    velocity = torch.randn(B, side, side, d, device=device, dtype=dtype).permute(0, 3, 1, 2).requires_grad_()
    data, key = torch.randn(B, d, side, side, device=device), noise_key(device)
    return velocity, data, key, 1.0, flow_noise(key, data.shape)


def ours(
    velocity: Tensor, data: Tensor, key: Tensor, weight: float, noise: Tensor, implementation: str | None = None
) -> tuple[Tensor, Tensor]:
    """Through the public function, without the stored noise."""
    return flow_loss(velocity, data, key, weight, implementation=implementation)


def reference(velocity: Tensor, data: Tensor, key: Tensor, weight: float, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Plain PyTorch, from stored noise."""
    velocity, target = velocity.float(), noise - data
    mse = F.mse_loss(velocity, target)
    direction = (1 - F.cosine_similarity(velocity, target, dim=1)).mean()
    return mse + weight * direction, torch.stack([mse, direction]).detach()


def minimum(itemsize: int, B: int, d: int, side: int) -> tuple[float, float]:
    """Forward: velocity and fp32 latents in. Backward: one value like the velocity in, its gradient out."""
    numel = B * d * side * side
    return numel * (4 + itemsize), numel * 2 * itemsize


def planned(itemsize: int, B: int, d: int, side: int) -> tuple[float, float]:
    """The forward pass writes the gradient, too."""
    forward, backward = minimum(itemsize, B, d, side)
    return forward + B * d * side * side * itemsize, backward


WORKLOADS = [
    Workload(
        "flow_loss",
        {"B": B, "d": d, "side": 16},
        {"B": 2},
        make,
        ours,
        reference,
        minimum,
        planned=planned,
        reason="the forward pass writes the gradient, which the backward pass scales: 12 bytes a value in both, where "
        "reading velocity and latents again takes 14",
        note=note,
        cpu={"B": 16},
    )
    for B, d, note in ((128, 32, "f16d32, an eighth of the batch"), (1024, 32, "f16d32"), (1024, 64, "f16d64"))
]


if __name__ == "__main__":
    sys.exit(run_workloads(__doc__, WORKLOADS))
