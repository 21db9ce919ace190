"""What operators cost, seen from below: `Flops` counts their FLOPs, `Meter` what they allocate as well.

Both are dispatch modes for tensors on the meta device, whose operators have shapes to count by and nothing to run.
Formulas are those of PyTorch's FlopCounterMode, and of our own operators that contain matrix products; elementwise work
is not counted. Our formulas are registered with FlopCounterMode too, for whoever counts on real tensors.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import (
    flop_registry,
    register_flop_formula,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

import aligntok.kernels  # noqa: F401 (registers the operators below)

_ops = torch.ops.aligntok


def _attention_flops(qkv: Tensor, products: int) -> int:
    """Of `products` matrix products of N x N with D, for qkv [B, N, 3, H, D]."""
    batch, tokens, _, heads, width = qkv.shape
    return 2 * products * batch * heads * tokens**2 * width


def _joint_flops(streams: Sequence[Tensor], products: int) -> int:
    """The same over the tokens of all streams [B, N_i, 3, H, D] together; what a mask leaves out is counted too."""
    batch, _, _, heads, width = streams[0].shape
    return 2 * products * batch * heads * sum(stream.shape[1] for stream in streams) ** 2 * width


def _projection_backward_flops(p: Tensor, weight: Tensor, *others: Any) -> int:
    """Of the gradients at the weight and, where the last argument says so, at the input p [B, N, C]."""
    return 2 * p.numel() * weight.shape[0] * (2 if others[-1] else 1)


# Our operators that hold matrix products, and attention, whose backward pass is charged what the mathematics needs,
# without the scores that it computes again.
_FORMULAS: dict[Any, Callable[..., int]] = {
    _ops.qknorm_attention_triton: lambda qkv, *_, **__: _attention_flops(qkv, 2),
    _ops.qknorm_attention_triton_backward: lambda dout, qkv, *_, **__: _attention_flops(qkv, 4),
    _ops.joint_attention_triton: lambda streams, *_, **__: _joint_flops(streams, 2),
    _ops.joint_attention_triton_backward: lambda douts, streams, *_, **__: _joint_flops(streams, 4),
    _ops.adapter_projection_triton: lambda p, weight, *_, **__: 2 * p.numel() * weight.shape[0],
    _ops.adapter_projection_triton_backward: lambda *arguments, **_: _projection_backward_flops(*arguments),
    torch.ops.aten._scaled_dot_product_flash_attention: lambda q, *_, **__: 4 * q.numel() * q.shape[-2],
    torch.ops.aten._scaled_dot_product_flash_attention_backward: lambda _, q, *__, **___: 8 * q.numel() * q.shape[-2],
}


def formula_of(func: Any) -> Callable[..., int] | None:
    """FLOPs of an operator from its arguments, where PyTorch's formula is not taken: ours, and attention."""
    return _FORMULAS.get(func.overloadpacket)


class Flops(TorchDispatchMode):
    """Counts the FLOPs of all operators inside: `flops`."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        formula = formula_of(func)
        if formula is not None:
            self.flops += formula(*args, **kwargs)
        elif func.overloadpacket in flop_registry:
            self.flops += flop_registry[func.overloadpacket](*args, **kwargs, out_val=result)
        return result


class Meter(Flops):
    """Also follows every storage that operators allocate, from its allocation to its release.

    Args:
        before: tensors whose storages were there before and are not counted: weights, the batch.
    """

    def __init__(self, before: Iterable[Tensor]) -> None:
        super().__init__()
        self._before = {tensor.untyped_storage()._cdata for tensor in before}
        self.live = self.saved = self.peak_live = self.peak_saved = 0  # bytes
        self._sizes: dict[int, int] = {}  # storages allocated inside, by address
        self._holders: dict[int, int] = {}  # how many saved tensors lie in a storage

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        for tensor in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._sizes and storage._cdata not in self._before:
                    self._allocated(storage)
        return result

    def _allocated(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._sizes[key] = size
        self.live += size
        self.peak_live = max(self.peak_live, self.live)
        weakref.finalize(storage, self._released, key)

    def _released(self, key: int) -> None:
        self.live -= self._sizes.pop(key)

    def gradient(self, parameter: nn.Parameter) -> None:
        """A parameter's gradient is complete: it is counted elsewhere."""
        assert parameter.grad is not None
        key = parameter.grad.untyped_storage()._cdata
        self.live -= self._sizes.get(key, 0)
        self._sizes[key] = 0

    def pack(self, tensor: Tensor) -> _Saved:
        """Hook: autograd saves a tensor."""
        key = tensor.untyped_storage()._cdata
        size = self._sizes.get(key, 0)
        holders = self._holders.get(key, 0)
        self._holders[key] = holders + 1
        if not holders:
            self.saved += size
            self.peak_saved = max(self.peak_saved, self.saved)
        held = _Saved(tensor)
        weakref.finalize(held, self._dropped, key, size)
        return held

    def _dropped(self, key: int, size: int) -> None:
        self._holders[key] -= 1
        if not self._holders[key]:
            del self._holders[key]
            self.saved -= size


class _Saved:
    """A tensor that autograd has saved."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


# What PyTorch's counter does not know: the CPU's fused attention, and our operators that contain matrix products.
@register_flop_formula(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu)
def _cpu_attention(q: tuple, k: tuple, v: tuple, *_: object, **__: object) -> int:
    return sdpa_flop_count(q, k, v)


@register_flop_formula(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward)
def _cpu_attention_backward(dout: tuple, q: tuple, k: tuple, v: tuple, *_: object, **__: object) -> int:
    return sdpa_backward_flop_count(dout, q, k, v)


def _heads(qkv: tuple) -> tuple[int, int, int, int]:
    B, N, _, H, D = qkv
    return B, H, N, D


@register_flop_formula(_ops.qknorm_attention_triton)
def _attention(qkv: tuple, *_: object, **__: object) -> int:
    return sdpa_flop_count(*[_heads(qkv)] * 3)


@register_flop_formula(_ops.qknorm_attention_triton_backward)
def _attention_backward(dout: tuple, qkv: tuple, *_: object, **__: object) -> int:
    return sdpa_backward_flop_count(*[_heads(qkv)] * 4)


def _joint(streams: list[tuple]) -> tuple[int, int, int, int]:
    B, _, _, H, D = streams[0]
    return B, H, sum(stream[1] for stream in streams), D


@register_flop_formula(_ops.joint_attention_triton)
def _joint_attention(streams: list[tuple], *_: object, **__: object) -> int:
    return sdpa_flop_count(*[_joint(streams)] * 3)


@register_flop_formula(_ops.joint_attention_triton_backward)
def _joint_attention_backward(douts: list[tuple], streams: list[tuple], *_: object, **__: object) -> int:
    return sdpa_backward_flop_count(*[_joint(streams)] * 4)


@register_flop_formula(_ops.adapter_projection_triton)
def _projection(p: tuple, weight: tuple, *_: object, **__: object) -> int:
    return 2 * prod(p) * weight[0]


@register_flop_formula(_ops.adapter_projection_triton_backward)
def _projection_backward(p: tuple, weight: tuple, *others: object, **_: object) -> int:
    return 2 * prod(p) * weight[0] * (2 if others[-1] else 1)
