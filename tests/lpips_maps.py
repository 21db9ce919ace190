"""Inputs for the tests of `lpips_distance`, whatever implementation they are about."""

import torch
from kernel_checks import normal
from torch import Tensor

LAST = torch.channels_last


def inputs(*shape: int, dtype=torch.float32, seed: int = 0, gradients: str = "xy") -> list[Tensor]:
    """Two maps in channels-last memory and positive weights of the channels."""
    fx, fy = (normal(*shape, seed=seed + i, dtype=dtype).contiguous(memory_format=LAST) for i in range(2))
    head = normal(shape[1], seed=seed + 2).abs()
    return [fx.requires_grad_("x" in gradients), fy.requires_grad_("y" in gradients), head]


def with_zero_vectors(zeros: str) -> tuple[list[Tensor], Tensor]:
    """Inputs whose map "x", "y" or both has two pixels without a value; which pixels are the others."""
    tensors = inputs(2, 20, 4, 3)
    rest = torch.ones(2, 1, 4, 3, dtype=torch.bool, device=tensors[0].device)
    rest[0, :, 1, 2] = rest[1, :, 3, 0] = False
    with torch.no_grad():
        for name, f in zip("xy", tensors[:2], strict=True):
            if name in zeros:
                f.mul_(rest)
    return tensors, rest


def other_layouts(fx: Tensor, fy: Tensor, head: Tensor) -> list[list[Tensor]]:
    """The same values, once with `fx` a slice and once with `fy` strided otherwise; the weights strided."""
    B, C, H, W = fx.shape
    sliced = torch.empty(B, 2 * C, H, 2 * W, device=fx.device)[:, ::2, :, ::2].copy_(fx.detach()).requires_grad_()
    wide = torch.stack([head, head], 1)[:, 1]
    dense = [f.detach().contiguous().requires_grad_() for f in (fx, fy)]
    return [[sliced, dense[1], wide], [dense[0], fy, wide]]
