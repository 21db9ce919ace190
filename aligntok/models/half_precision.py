"""Networks whose weights are cast to bf16 or fp16: what stays float32, and what inputs are cast to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class KeepsFloat32(nn.Module):
    """A module of which `kept_buffers` change their device, but never their dtype: numbers that bf16 would spoil."""

    kept_buffers: ClassVar[tuple[str, ...]] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # What .to(), .half(), .cuda() and to_empty() come down to
        before = {name: getattr(self, name) for name in self.kept_buffers}
        result = super()._apply(fn, recurse)
        for name, value in before.items():
            now = getattr(self, name)
            if now.dtype != value.dtype:
                setattr(self, name, now.to(value.dtype) if value.is_meta else value.to(now.device))
        return result


def weight_dtype(module: nn.Module) -> torch.dtype:
    """The dtype of a network's weights, which its inputs must have where autocast does not see to it."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
