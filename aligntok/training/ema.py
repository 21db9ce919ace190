"""Exponential moving average of weights: torch.optim.swa_utils with a warmed-up decay.

decay_n = min(decay, (1 + n) / (10 + n))      n: updates so far, so that short runs do not average in their first
weights
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

Tensors = tuple[Tensor, ...] | list[Tensor]


def build_ema(module: nn.Module, decay: float) -> AveragedModel:
    """An averaged copy of `module`; call `.update_parameters(module)` after every step."""

    @torch.no_grad()
    def average(averaged: Tensors, current: Tensors, count: Tensor | int) -> None:
        n = int(ema.n_averaged)  # `count` is a copy of it on the weights' device, which would be waited for
        torch._foreach_lerp_(averaged, current, 1 - min(decay, (1 + n) / (10 + n)))

    ema = AveragedModel(module, multi_avg_fn=average)
    ema.requires_grad_(False)
    return ema


@torch.no_grad()
def adopt(module: nn.Module, ema: AveragedModel) -> None:
    """Replace the weights of `module` by their averages."""
    for own, averaged in zip(module.parameters(), ema.module.parameters(), strict=True):
        own.copy_(averaged)
