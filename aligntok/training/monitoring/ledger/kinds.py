"""What a recorded operator is: how it is priced, how many kernels it launches, and what part of a step it serves."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from aligntok import kernels
from aligntok.kernels._qknorm_attention_configurations import parts


class Kind(enum.Enum):
    """How an operator is priced and whether a compiler fuses it."""

    PRODUCT = "product"  # of matrices
    CONVOLUTION = "convolution"
    ATTENTION = "attention"  # PyTorch's fused one
    OWN_ATTENTION = "our attention"
    OWN = "our operator"
    POINTWISE = "pointwise"
    ROW = "row reduction"  # over the last dimension: fuses with what surrounds it
    COLUMN = "column reduction"  # over others
    OTHER = "other"  # runs as it is: pooling, lookups, batch norm
    LIST = "on lists"  # of tensors: optimizer and the like
    VIEW = "view"  # touches no memory
    HOST = "host"  # of tensors on the CPU


OWN = (Kind.OWN, Kind.OWN_ATTENTION)
OWN_ATTENTIONS = ("qknorm_attention", "joint_attention")  # beginnings of their operators' names
COMPUTES = (Kind.PRODUCT, Kind.CONVOLUTION, Kind.ATTENTION, Kind.OWN_ATTENTION)
FUSIBLE = (Kind.POINTWISE, Kind.ROW)

ATTENTION_PRODUCTS, LINEAR_PRODUCTS, CONVOLUTIONS = "attention products", "linear products", "convolutions"
CASTS, BIASES, UPDATE, OTHER = "weight casts", "bias gradients", "optimizer, clip, EMA", "other"
ATTENTION, ADALN, ROPE, SWIGLU = "attention operator", "adaLN and norms", "RoPE and QK-norm", "SwiGLU"
GROUP_NORM, LOSSES, ENCODER = "GroupNorm and SiLU", "losses and noise", "encoder, elementwise"
DISCRIMINATOR = "discriminator, elementwise"
GROUPS = (
    *(ATTENTION_PRODUCTS, LINEAR_PRODUCTS, CONVOLUTIONS, ATTENTION, ADALN, ROPE, SWIGLU, GROUP_NORM, ENCODER),
    *(DISCRIMINATOR, LOSSES, CASTS, BIASES, UPDATE, OTHER),
)
# Files (beginnings of their names) -> what their operators that multiply no matrices are for
_PLACES = {
    "kernels/adaln": ADALN,
    "kernels/qknorm": ROPE,
    "kernels/joint_attention": ROPE,
    "models/joint_attention": ROPE,
    "models/attention": ROPE,
    "kernels/swiglu": SWIGLU,
    "kernels/group_norm": GROUP_NORM,
    "models/encoder": ENCODER,
    "models/adapter": ENCODER,
    "kernels/adapter": ENCODER,
    "models/discriminator": DISCRIMINATOR,
    "models/batch_norm": DISCRIMINATOR,
    "kernels/": LOSSES,
    "losses/": LOSSES,
    "diffusion/": LOSSES,
    "training/": LOSSES,
}
# Files that are passed by when the origin of an operator is looked for
_PASSED_BY = ("training/monitoring/", "runtime/", "kernels/_triton", "kernels/_dispatch", "kernels/__init__")
_PACKAGE, _KERNELS = Path(__file__).parents[3], Path(str(kernels.__file__)).parent

_aten = torch.ops.aten
_PRODUCTS = {_aten.mm, _aten.addmm, _aten.bmm, _aten.baddbmm}
CONVOLUTIONS_OF_PYTORCH = {_aten.convolution, _aten.convolution_backward}
_ATTENTION = {_aten._scaled_dot_product_flash_attention, _aten._scaled_dot_product_flash_attention_backward}
_FREE = {
    *(_aten.detach, _aten.alias, _aten._unsafe_view, _aten.empty, _aten.empty_like, _aten.empty_strided),
    *(_aten.new_empty, _aten.new_empty_strided, _aten.lift_fresh, _aten._reshape_alias, _aten.set_),
}
_REDUCTIONS = {
    *(_aten.sum, _aten.mean, _aten.amax, _aten.amin, _aten.max, _aten.min, _aten.linalg_vector_norm, _aten.norm),
    *(_aten.var, _aten.std, _aten.var_mean, _aten.prod, _aten.all, _aten.any, _aten.argmax),
}
_ROWS = {_aten.native_layer_norm, _aten._softmax, _aten._log_softmax, _aten._softmax_backward_data}
# Operators of two passes, each with the outputs that it writes: PyTorch runs them as such, and a compiler fuses each
_PASSES = {
    _aten.native_layer_norm_backward: ((Kind.ROW, (0,)), (Kind.COLUMN, (1, 2))),
    _aten.native_group_norm: ((Kind.COLUMN, (1, 2)), (Kind.POINTWISE, (0,))),
    _aten.native_group_norm_backward: ((Kind.COLUMN, (1, 2)), (Kind.POINTWISE, (0,))),
    _aten.native_batch_norm: ((Kind.COLUMN, (1, 2)), (Kind.POINTWISE, (0,))),
    _aten.native_batch_norm_backward: ((Kind.COLUMN, (1, 2)), (Kind.POINTWISE, (0,))),
}
LONGEST_ROW = 8_192  # numbers that a kernel reduces and goes on with; longer ones it would read twice
# Kernels that an operator launches, where it is not one: read in PyTorch's sources, not measured
_LAUNCHES = {
    _aten._scaled_dot_product_flash_attention_backward: 3,
    _aten.embedding_dense_backward: 5,
    _aten.index_put: 3,
    _aten.sort: 2,
    _aten._local_scalar_dense: 1,
}
_ALONE = {  # neither pointwise nor a reduction
    *(_aten.embedding, _aten.embedding_dense_backward),
    *(_aten.index, _aten.index_put, _aten.index_select, _aten.gather, _aten.scatter_add, _aten.sort),
    *(_aten.max_pool2d_with_indices, _aten.max_pool2d_with_indices_backward, _aten._local_scalar_dense),
    *(_aten.upsample_bilinear2d, _aten.upsample_bicubic2d, _aten.upsample_bilinear2d_backward),
    *(_aten._upsample_bilinear2d_aa, _aten._upsample_bicubic2d_aa, _aten._upsample_bicubic2d_aa_backward),
}


def is_product(func: Any) -> bool:
    """Whether an operator multiplies matrices or convolves."""
    return func.overloadpacket in _PRODUCTS or func.overloadpacket in CONVOLUTIONS_OF_PYTORCH


def kind(func: Any, inputs: Sequence[Tensor], outputs: Sequence[Tensor], args: tuple, kwargs: dict) -> Kind:
    """The kind of an operator of PyTorch, by name and shapes."""
    packet = func.overloadpacket
    if func.is_view or packet in _FREE:
        return Kind.VIEW
    if not any(tensor.is_meta for tensor in (*inputs, *outputs)):
        return Kind.HOST
    for found, names in (
        (Kind.PRODUCT, _PRODUCTS),
        (Kind.CONVOLUTION, CONVOLUTIONS_OF_PYTORCH),
        (Kind.ATTENTION, _ATTENTION),
    ):
        if packet in names:
            return found
    if packet in _REDUCTIONS:
        return Kind.ROW if _is_row(inputs[0], _reduced(func, args, kwargs)) else Kind.COLUMN
    if packet in _ROWS:
        return Kind.ROW
    return Kind.OTHER if packet in _ALONE else Kind.POINTWISE


def passes(func: Any) -> tuple[tuple[Kind, tuple[int, ...]], ...]:
    """(kind, outputs) of each pass of an operator that makes several; () where it is one."""
    return _PASSES.get(func.overloadpacket, ())


def _reduced(func: Any, args: tuple, kwargs: dict) -> set[int] | None:
    """The dimensions that a reduction reduces, as they were given; None = all."""
    names = [argument.name for argument in func._schema.arguments]
    given = dict(zip(names, args, strict=False)) | kwargs
    dims = given.get("dim")
    return None if dims is None or dims == [] else {dims} if isinstance(dims, int) else set(dims)


def _is_row(tensor: Tensor, dims: set[int] | None) -> bool:
    """Whether what is reduced to one number lies together in memory, and is short."""
    if dims is None:
        return False
    inside = {dim % tensor.ndim for dim in dims}
    wide = [d for d in range(tensor.ndim) if tensor.shape[d] > 1]
    kept = [tensor.stride(d) for d in wide if d not in inside]
    reduced = [tensor.stride(d) for d in wide if d in inside]
    short = prod(tensor.shape[d] for d in inside) <= LONGEST_ROW
    return bool(kept) and short and max(reduced, default=0) < min(kept)


def launches(func: Any, found: Kind, args: tuple) -> int:
    """Kernels that an operator of PyTorch launches."""
    if found in (Kind.VIEW, Kind.HOST):
        return 0
    if func.overloadpacket is _aten.convolution_backward:
        return sum(args[-1])  # gradients that are wanted: of the input, the weight, the bias
    return _LAUNCHES.get(func.overloadpacket, 1)


def attention_work(func: Any, inputs: Sequence[Tensor]) -> float:
    """FLOPs that attention executes for each that is counted.

    The backward pass multiplies five times where four are counted: the scores once more; `joint_attention` seven times,
    since its two launches each form scores and their gradient. Heads of D channels are padded: to 64 + 16 for 72 in our
    kernels, to a multiple of 32 in FlashAttention-2.
    """
    name = func.overloadpacket.__name__
    backward, ours = name.endswith("backward"), name.startswith(OWN_ATTENTIONS)
    # Of a packed projection [B, N, 3, H, D], or of q behind the gradient
    D = next(x for x in inputs if x.ndim == 5).shape[-1] if ours else inputs[1 if backward else 0].shape[-1]
    padded = sum(parts(D)) if ours else -(-D // 32) * 32
    products = (7 if name.startswith("joint") else 5) / 4 if backward else 1.0
    return padded / D * products


def operands(tensors: Sequence[Tensor]) -> str:
    """The number type that an operator computes in: fp32 or bf16, which stands for fp16 too."""
    return "fp32" if tensors and all(t.dtype not in (torch.bfloat16, torch.float16) for t in tensors) else "bf16"


def shapes(tensors: Sequence[Tensor]) -> str:
    """Shapes and dtypes of the first three tensors, to print."""
    short = {torch.float32: "f32", torch.bfloat16: "bf16", torch.int64: "i64", torch.float64: "f64", torch.bool: "b"}
    texts = (f"{'x'.join(map(str, t.shape)) or '1'} {short.get(t.dtype, str(t.dtype)[6:])}" for t in tensors[:3])
    return ", ".join(texts)


@dataclass(frozen=True)
class Scope:
    """Where in the project's code an operator is called."""

    place: str  # file below aligntok/ or in kernels/, "" = nowhere
    attention: bool = False  # in a module of attention
    product: bool = False  # it multiplies matrices
    cast: bool = False  # it brings a weight to another number type

    @property
    def of_a_model(self) -> bool:
        """Whether the place says more than which backward pass the operator belongs to."""
        return self.place.startswith(("models/", "kernels/"))


def scope(frame: FrameType | None, product: bool, cast: bool) -> Scope:
    """The scope of an operator by the frames that called it; modules are looked at for products only."""
    attention = False
    while frame is not None:
        if product and not attention:
            attention = "Attention" in type(frame.f_locals.get("self")).__name__
        place = _place(frame.f_code.co_filename)
        if place:
            return Scope(place, attention, product, cast)
        frame = frame.f_back
    return Scope("", attention, product, cast)


@cache
def _place(file: str) -> str:
    path = Path(file)
    for root, prefix in ((_PACKAGE, ""), (_KERNELS, "kernels/")):
        if path.is_relative_to(root):
            place = prefix + path.relative_to(root).as_posix()
            return "" if place.startswith(_PASSED_BY) else place
    return ""


def group(found: Kind, func: Any, where: Scope, backward: bool) -> str:
    """The group of an operator; one of GROUPS."""
    if found in (Kind.ATTENTION, Kind.OWN_ATTENTION):
        return ATTENTION
    if found is Kind.CONVOLUTION:
        return CONVOLUTIONS
    if found is Kind.PRODUCT:
        return ATTENTION_PRODUCTS if where.attention else LINEAR_PRODUCTS
    if where.cast:
        return CASTS
    if found is Kind.COLUMN and backward and not where.place.startswith("kernels/") and where.product:
        return BIASES
    if func.overloadpacket.__name__.startswith("native_layer_norm"):
        return ADALN
    return next((name for start, name in _PLACES.items() if where.place.startswith(start)), OTHER)


def size(tensor: Tensor) -> int:
    """Bytes of a tensor's elements, those of an expanded dimension once."""
    extents = zip(tensor.shape, tensor.stride(), strict=True)
    return prod(n if stride else min(n, 1) for n, stride in extents) * tensor.element_size()
