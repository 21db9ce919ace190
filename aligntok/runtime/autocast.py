"""Autocast for meta tensors, which PyTorch does not have, so that memory can be counted without any.

`MetaAutocast` does on the meta device what `torch.autocast` does: matrix products, convolutions and attention take bf16
copies of their inputs (of a weight, one copy for all its uses); LayerNorm and softmax take fp32, as they do on CUDA,
where a GPU is assumed (aligntok.kernels.assume_device).
`autocast_dtype` answers for every device, so that code which asks need not know.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar, Token
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from aligntok.kernels import device_type

_on_meta: ContextVar[torch.dtype | None] = ContextVar("aligntok_meta_autocast", default=None)

# What our networks call of CUDA's lists (PyTorch's "Autocast Op Reference")
_LOWER = frozenset({F.linear, F.conv2d, torch.matmul, Tensor.matmul, Tensor.__matmul__, F.scaled_dot_product_attention})
_FLOAT = frozenset({F.layer_norm, F.softmax, torch.softmax, Tensor.softmax})


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype that autocast is on with for tensors of a device type, or None."""
    if device_type == "meta":
        return _on_meta.get()
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


def without_autocast(device_type: str) -> AbstractContextManager:
    """Inside, autocast is off for a device type. On the meta device nothing: it cannot be told apart there."""
    return nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)


class MetaAutocast(TorchFunctionMode):
    """See the module docstring. Attention becomes one operator, as on a GPU, where PyTorch would take it apart."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.dtype = dtype
        self._copies: dict[int, Tensor] = {}  # of weights, while autocast is on
        self._token: Token[torch.dtype | None] | None = None

    def __enter__(self) -> MetaAutocast:
        self._token = _on_meta.set(self.dtype)
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        assert self._token is not None  # __enter__ has set it
        _on_meta.reset(self._token)
        self._copies.clear()

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.dtype is not None and func in _LOWER:
            args, kwargs = tree_map_only(Tensor, self._lowered, (args, kwargs))
        elif self.dtype is not None and func in _FLOAT and device_type("meta") == "cuda":
            args, kwargs = tree_map_only(Tensor, _in_float, (args, kwargs))
        if func is F.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_flash_attention(*args[:3])[0]
        return func(*args, **kwargs)

    def _lowered(self, tensor: Tensor) -> Tensor:
        if tensor.dtype != torch.float32:
            return tensor
        if not (tensor.is_leaf and tensor.requires_grad) or tensor._is_view():  # as autocast itself decides
            return tensor.to(self.dtype)
        if id(tensor) not in self._copies:
            self._copies[id(tensor)] = tensor.to(self.dtype)
        return self._copies[id(tensor)]


def _in_float(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor
