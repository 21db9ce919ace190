"""`adapter_projection`: the adapter's last layer with the snapshot's distance, against eager PyTorch and torch.compile.

    python -m benchmarks.bench_adapter_projection [--phase forward|backward|both|all] [--seconds S] [--csv FILE]
        [--plot FILE]

Shapes: batch 256 at 256 tokens. C = 1024 is DINOv2 ViT-L, 768 ViT-B, 384 ViT-S, 1152 SigLIP2-So400m; d = 32 latent
channels, or 64. p is bf16 and the parameters are fp32, as autocast leaves them. With a snapshot (Stage 2) the fp32
latents lie as [B, d, h, w], as the snapshot returns them. Without activation p is a view past five prefix tokens: the
single-layer adapter on the encoder's output.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from aligntok.kernels.adapter_projection import adapter_projection, adapter_projection_reference
from benchmarks.harness import run_workloads
from benchmarks.workloads import Outputs, Workload

PREFIX = 5  # class token and four registers of DINOv2


def _parameters(device: str, C: int, d: int) -> tuple[Tensor, Tensor]:
    weight = torch.randn(d, C, device=device) / C**0.5
    return weight.requires_grad_(), torch.zeros(d, device=device).requires_grad_()


def make_mlp(device: str, dtype: torch.dtype, B: int, N: int, C: int, d: int) -> tuple:
    """Hidden tokens [B, N, C] of the two-layer adapter."""
    p = torch.randn(B, N, C, device=device, dtype=dtype).requires_grad_()
    return p, *_parameters(device, C, d), "gelu", None


def make_stage_2(device: str, dtype: torch.dtype, B: int, N: int, C: int, d: int) -> tuple:
    """The same with a snapshot [B, N, d] that is a view of [B, d, N]."""
    snapshot = torch.randn(B, d, N, device=device).transpose(1, 2)
    return *make_mlp(device, dtype, B, N, C, d)[:-1], snapshot


def make_linear(device: str, dtype: torch.dtype, B: int, N: int, C: int, d: int) -> tuple:
    """Encoder tokens past the prefix."""
    p = torch.randn(B, PREFIX + N, C, device=device, dtype=dtype)[:, PREFIX:]
    return p.requires_grad_(), *_parameters(device, C, d), "none", None


def reference(p: Tensor, weight: Tensor, bias: Tensor, activation: str, snapshot: Tensor | None) -> Outputs:
    """The baseline; its casts of the parameters are those of autocast."""
    return adapter_projection_reference(p, weight, bias, activation, snapshot)


def minimum(itemsize: int, B: int, N: int, C: int, d: int) -> tuple[float, float]:
    """Forward: p and fp32 W in, z out. Backward: p, dz and W in, dp and dW out."""
    M, parameters = B * N, 4 * d * (C + 1)
    return M * (C + d) * itemsize + parameters, M * (2 * C + d) * itemsize + 2 * parameters


def minimum_stage_2(itemsize: int, B: int, N: int, C: int, d: int) -> tuple[float, float]:
    """As without a snapshot, with fp32 z0 in both passes and z in the backward pass."""
    forward, backward = minimum(itemsize, B, N, C, d)
    M = B * N
    return forward + M * d * 4, backward + M * d * (4 + itemsize)


def flops(B: int, N: int, C: int, d: int) -> tuple[float, float]:
    """One product forward, two backward."""
    return 2 * B * N * C * d, 4 * B * N * C * d


def _workload(
    C: int,
    d: int,
    make: Callable[..., tuple[Any, ...]] = make_mlp,
    minimum: Callable[..., tuple[float, float]] = minimum,
    note: str = "",
) -> Workload:
    shape = {"B": 256, "N": 256, "C": C, "d": d}
    small = {"B": 8, "C": 256}  # two splits of the rows at d = 32
    return Workload(
        "adapter_projection",
        shape,
        small,
        make,
        adapter_projection,
        reference,
        minimum,
        flops,
        note=note,
        cpu={"B": 16},
    )


WORKLOADS = [
    _workload(1024, 32, note="ViT-L"),
    _workload(1024, 64, note="ViT-L, 64 channels"),
    _workload(1024, 32, make_stage_2, minimum_stage_2, note="ViT-L, Stage 2: snapshot"),
    _workload(1024, 64, make_stage_2, minimum_stage_2, note="ViT-L, 64 channels, Stage 2: snapshot"),
    _workload(1024, 32, make_linear, note="ViT-L, one layer on a view past prefix tokens"),
    _workload(768, 32, note="ViT-B"),
    _workload(384, 32, note="ViT-S"),
    _workload(1152, 32, note="SigLIP2-So400m"),
]


if __name__ == "__main__":
    sys.exit(run_workloads(__doc__, WORKLOADS))
