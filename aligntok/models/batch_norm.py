"""BatchNorm over the batch of all processes, so that several of them compute what one does.

    y = (x - mean) / sqrt(var + eps) * weight + bias          mean and var over every process's rows

PyTorch has it for CUDA; the one here is for gloo on CPUs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from aligntok.runtime import collectives
from aligntok.runtime.world import current


class SynchronisedBatchNorm(nn.BatchNorm2d):
    """nn.BatchNorm2d whose training statistics are those of all processes, which have equally many rows."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        x = input.float()
        mean = collectives.differentiable_mean(x.mean((0, 2, 3)))  # [C]
        centred = x - mean[:, None, None]
        variance = collectives.differentiable_mean(centred.square().mean((0, 2, 3)))
        self._remember(mean.detach(), variance.detach(), x.numel() // x.shape[1] * current().size)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(input.dtype)

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor, count: int) -> None:
        """Move the running statistics, the variance without its bias, as nn.BatchNorm2d does."""
        assert self.num_batches_tracked is not None and self.momentum is not None
        assert self.running_mean is not None and self.running_var is not None
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)


def synchronise(module: nn.Module) -> None:
    """Make every BatchNorm inside `module`, in place, one over all processes; its parameters stay the same objects."""
    if current().size == 1:
        return
    if next(module.parameters()).device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(module)
        return
    for child in module.modules():
        if type(child) is nn.BatchNorm2d:
            child.__class__ = SynchronisedBatchNorm  # another forward over the same state
