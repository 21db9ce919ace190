"""SwiGLU's elementwise half: silu(gate) * value from one packed projection.

For packed [..., 2H] = (gate, value),

    y = gate * sigmoid(gate) * value                                   [..., H]
    dgate = dy * value * s * (1 + gate * (1 - s)),  s = sigmoid(gate)
    dvalue = dy * gate * s

(Shazeer 2020, arXiv 2002.05202.) Arithmetic is fp32, fp64 for fp64 input. The forward pass reads the packed
projection once and writes y; the backward pass reads it once more with dy and writes the packed gradient: nothing
else is saved, and no half is copied out.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _extension, _triton
from ._dispatch import first_derivative_only, register, select
from ._dtypes import check_dtype
from ._triton import configuration, launch, operator, tl, triton, wrap_triton

# One row's block of columns per program: 1024 values are 8 a thread at 4 warps, one 16-byte load each in bf16.
CONFIGURATIONS = {arch: {"BLOCK": 1024, "num_warps": 4, "num_stages": 1} for arch in _triton.ARCHITECTURES}


def swiglu_reference(packed: Tensor) -> Tensor:
    """silu(gate) * value in plain PyTorch; see `swiglu`."""
    gate, value = packed.chunk(2, dim=-1)
    return F.silu(gate) * value


@triton.jit
def _forward_kernel(packed, y, H, row_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < H
    source = packed + row * row_stride + column
    gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(source + H, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * H + column, gate * tl.sigmoid(gate) * value, mask=inside)


@triton.jit
def _backward_kernel(packed, dy, dpacked, H, row_stride, dy_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < H
    source = packed + row * row_stride + column
    gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(source + H, mask=inside, other=0.0).to(tl.float32)
    upstream = tl.load(dy + row * dy_stride + column, mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(gate)
    target = dpacked + row * 2 * H + column
    tl.store(target, upstream * value * s * (1 + gate * (1 - s)), mask=inside)
    tl.store(target + H, upstream * gate * s, mask=inside)


def _rows(x: Tensor) -> Tensor:
    """x as [rows, columns] with unit column stride; copied only where its strides do not allow that."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


@operator("swiglu_triton")
def _forward(packed: Tensor) -> Tensor:
    rows = _rows(packed)
    M, H = rows.shape[0], rows.shape[1] // 2
    y = torch.empty((*packed.shape[:-1], H), dtype=packed.dtype, device=packed.device)
    config = configuration("swiglu_forward", CONFIGURATIONS, packed.device)
    launch(wrap_triton(_forward_kernel), (M, triton.cdiv(H, config["BLOCK"])), rows, y, H, rows.stride(0), **config)
    return y


@operator("swiglu_triton_backward")
def _backward(packed: Tensor, dy: Tensor) -> Tensor:
    rows, upstream = _rows(packed), _rows(dy)
    M, H = upstream.shape
    dpacked = torch.empty(packed.shape, dtype=packed.dtype, device=packed.device)
    config = configuration("swiglu_backward", CONFIGURATIONS, packed.device)
    strides = (rows.stride(0), upstream.stride(0))
    grid = (M, triton.cdiv(H, config["BLOCK"]))
    launch(wrap_triton(_backward_kernel), grid, rows, upstream, dpacked, H, *strides, **config)
    return dpacked


_forward.register_autograd(
    first_derivative_only("swiglu", lambda ctx, dy: _backward(*ctx.saved_tensors, dy)),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]),
)


register("swiglu", triton=_triton.refusal, cpp=_extension.cpu_refusal)


def swiglu(packed: Tensor, *, implementation: str | None = None) -> Tensor:
    """silu(gate) * value; formulas in the module's docstring.

    Args:
        packed: [..., 2H], gate first, bf16, fp16, fp32 or fp64; rows may be strided.
        implementation: "auto", "triton", "cpp" or "reference"; None follows `use_implementation` and
            ALIGNTOK_KERNELS.

    Returns:
        y [..., H] in packed's dtype. The Triton and C++ implementations differentiate once.

    Raises:
        ValueError: an odd last dimension or an empty tensor; an unsupported dtype; `implementation` is unknown or
            cannot run here.
    """
    check_dtype("packed", packed.dtype)
    if packed.ndim < 1 or packed.shape[-1] % 2 or packed.numel() == 0:
        raise ValueError(f"packed: expected shape [..., 2H] without a zero, got {list(packed.shape)}")
    unfit = (("triton", "fp64 is for the reference"),) if packed.dtype == torch.float64 else ()
    name = select("swiglu", packed.device.type, implementation, unfit)
    if name == "triton":
        return _forward(packed)
    if name == "cpp":
        return torch.ops.aligntok.swiglu.default(packed)
    return swiglu_reference(packed)
