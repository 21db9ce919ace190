"""adaLN: gated residual, RMSNorm and modulation between two branches of a diffusion transformer.

For the residual stream x [B, N, D], the branch's output h [B, N, D] and per-image vectors gate, scale, shift [B, D],

    x_new = x + gate * h                                               [B, N, D], in x's dtype
    n = x_new * r,  r = 1 / sqrt(mean_d(x_new^2) + eps)                from the rounded x_new
    y = n * weight * (1 + scale) + shift                               [B, N, D], in `dtype`

and backwards, with u = dy * weight * (1 + scale) and sums over the tokens of an image,

    dx = dx_new + r * (u - n * mean_d(u * n)),  dh = gate * dx,  dgate = sum_n dx * h
    dshift = sum_n dy,  dscale = weight * A,  dweight = sum_b (1 + scale) * A,  where A = sum_n dy * n

(RMSNorm: Zhang and Sennrich 2019, arXiv 1910.07467; adaLN-zero: Peebles and Xie 2022, arXiv 2212.09748; as used in
LightningDiT, models/lightningdit.py.) Arithmetic is fp32, fp64 for fp64 x. The forward pass reads x and h once and
writes x_new and y; x_new, h and r [B, N] are kept. The backward pass reads dx_new, dy, x_new and h once and writes dx
and dh.
"""

from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _extension, _triton
from ._dispatch import Unfit, first_derivative_only, register, select
from ._dtypes import DTYPES, check_dtype
from ._triton import Configuration, configuration, launch, operator, tl, triton, wrap_triton

# BLOCK_D -> block sizes. A thread holds 8 neighbouring columns (one 16-byte load in bf16, two in fp32), so that a row
# takes BLOCK_D / 256 warps. Forward: ROWS rows at once keep enough loads in flight and share one read of the
# modulation. Backward: rows one after another, because the sums over them fill the registers; a program covers CHUNK
# rows, so that its partial sums (12 bytes a column, written and read again) are 4 % of what its rows move (18 bytes a
# value).
_FORWARD = {width: {"ROWS": 4, "num_warps": width // 256, "num_stages": 1} for width in (512, 1024, 2048, 4096)}
_BACKWARD = {width: {"ROWS": 1, "CHUNK": 32, "num_warps": width // 256, "num_stages": 1} for width in _FORWARD}
CONFIGURATIONS = {
    "adaln_forward": {arch: _FORWARD for arch in _triton.ARCHITECTURES},
    "adaln_backward": {arch: _BACKWARD for arch in _triton.ARCHITECTURES},
}
MAX_WIDTH = max(_FORWARD)  # a whole row stays in registers


def adaln_reference(
    x: Tensor,
    scale: Tensor,
    shift: Tensor | None = None,
    h: Tensor | None = None,
    gate: Tensor | None = None,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """(x_new, y) in plain PyTorch; see `adaln`."""
    arithmetic = torch.float64 if x.dtype == torch.float64 else torch.float32
    if h is not None:
        assert gate is not None  # `adaln` has checked it
        x = (x + gate.unsqueeze(1) * h).to(x.dtype)
    weight = None if weight is None else weight.to(arithmetic)
    y = F.rms_norm(x.to(arithmetic), x.shape[-1:], weight, eps)  # [B, N, D]
    y = y * (1 + scale.to(arithmetic)).unsqueeze(1)
    if shift is not None:
        y = y + shift.to(arithmetic).unsqueeze(1)
    return x, y.to(dtype or x.dtype)


@triton.jit
def _modulation(scale, weight, column, inside):
    """weight * (1 + scale) [BLOCK_D] in fp32."""
    factor = 1 + tl.load(scale + column, mask=inside, other=0.0).to(tl.float32)
    if weight is not None:
        factor *= tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    return factor


@triton.jit
def _forward_kernel(
    x, h, gate, scale, shift, weight, x_new, y, rstd, N, D, chunks, eps,
    x_batch, x_row, h_batch, h_row, gate_row, scale_row, shift_row,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    image = (program // chunks).to(tl.int64)
    row = ((program % chunks) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    inside_column = column < D
    inside = (row < N)[:, None] & inside_column[None, :]
    token = image * N + row
    target = token[:, None] * D + column[None, :]
    value = tl.load(x + image * x_batch + row[:, None] * x_row + column[None, :], mask=inside, other=0.0)
    value = value.to(tl.float32)  # [ROWS, BLOCK_D]
    if h is not None:
        branch = tl.load(h + image * h_batch + row[:, None] * h_row + column[None, :], mask=inside, other=0.0)
        factor = tl.load(gate + image * gate_row + column, mask=inside_column, other=0.0).to(tl.float32)
        rounded = (value + factor[None, :] * branch.to(tl.float32)).to(x_new.dtype.element_ty)
        tl.store(x_new + target, rounded, mask=inside)
        value = rounded.to(tl.float32)
    r = tl.rsqrt(tl.sum(value * value, axis=1) / D + eps)  # [ROWS]
    tl.store(rstd + token, r, mask=row < N)
    result = value * r[:, None] * _modulation(scale + image * scale_row, weight, column, inside_column)[None, :]
    if shift is not None:
        offset = tl.load(shift + image * shift_row + column, mask=inside_column, other=0.0).to(tl.float32)
        result += offset[None, :]
    tl.store(y + target, result, mask=inside)


@triton.jit
def _backward_kernel(
    dx_new, dy, x_new, rstd, h, gate, scale, weight, dx, dh, partials, N, D, chunks,
    dx_new_batch, dx_new_row, dy_batch, dy_row, x_batch, x_row, h_batch, h_row, gate_row, scale_row,
    SHIFT: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    image = (program // chunks).to(tl.int64)
    first = (program % chunks) * CHUNK
    column = tl.arange(0, BLOCK_D)
    inside_column = column < D
    modulation = _modulation(scale + image * scale_row, weight, column, inside_column)[None, :]
    if h is not None:
        factor = tl.load(gate + image * gate_row + column, mask=inside_column, other=0.0).to(tl.float32)[None, :]
    normed_sum = tl.zeros([ROWS, BLOCK_D], tl.float32)  # of dy * n
    shift_sum = tl.zeros([ROWS, BLOCK_D], tl.float32)  # of dy
    gate_sum = tl.zeros([ROWS, BLOCK_D], tl.float32)  # of dx * h
    for start in range(0, CHUNK, ROWS):
        row = (first + start + tl.arange(0, ROWS)).to(tl.int64)
        inside = (row < N)[:, None] & inside_column[None, :]
        token = image * N + row
        target = token[:, None] * D + column[None, :]
        # All loads before the reduction over the row: nothing passes its barrier.
        upstream = tl.load(dy + image * dy_batch + row[:, None] * dy_row + column[None, :], mask=inside, other=0.0)
        value = tl.load(x_new + image * x_batch + row[:, None] * x_row + column[None, :], mask=inside, other=0.0)
        r = tl.load(rstd + token, mask=row < N, other=0.0)[:, None]
        if dx_new is not None:
            address = dx_new + image * dx_new_batch + row[:, None] * dx_new_row + column[None, :]
            direct = tl.load(address, mask=inside, other=0.0).to(tl.float32)
        if h is not None:
            branch = tl.load(h + image * h_batch + row[:, None] * h_row + column[None, :], mask=inside, other=0.0)
        upstream, n = upstream.to(tl.float32), value.to(tl.float32) * r
        normed_sum += upstream * n
        if SHIFT:
            shift_sum += upstream
        u = upstream * modulation
        result = r * (u - n * (tl.sum(u * n, axis=1) / D)[:, None])
        if dx_new is not None:
            result += direct
        tl.store(dx + target, result, mask=inside)
        if h is not None:
            gate_sum += result * branch.to(tl.float32)
            tl.store(dh + target, result * factor, mask=inside)
    partial = partials + program.to(tl.int64) * (1 + SHIFT + (h is not None)) * D + column
    tl.store(partial, tl.sum(normed_sum, axis=0), mask=inside_column)
    if SHIFT:
        tl.store(partial + D, tl.sum(shift_sum, axis=0), mask=inside_column)
    if h is not None:
        tl.store(partial + (1 + SHIFT) * D, tl.sum(gate_sum, axis=0), mask=inside_column)


Given = TypeVar("Given", Tensor, Tensor | None)


def _strided(x: Given) -> Given:
    """x with unit stride in its columns; copied only where it has another."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def _strides(*tensors: Tensor | None) -> list[int]:
    """Strides of the tensors but the unit one of the columns; zeros for a missing [B, N, D]."""
    return [s for x in tensors for s in ((0, 0) if x is None else x.stride()[:-1])]


def _configuration(kernel: str, D: int, device: torch.device) -> Configuration:
    block = triton.next_power_of_2(D)
    width = min(max(block, min(_FORWARD)), MAX_WIDTH)
    by_arch = {arch: by_width[width] for arch, by_width in CONFIGURATIONS[kernel].items()}
    return configuration(kernel, by_arch, device) | {"BLOCK_D": block}


def _run_forward(
    kernel: Any,
    x: Tensor,
    h: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor | None,
    weight: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """(x_new, y, rstd); x_new is None without h."""
    B, N, D = x.shape
    x, scale = _strided(x), _strided(scale)
    h, gate, shift, weight = (_strided(t) for t in (h, gate, shift, weight))
    y = torch.empty((B, N, D), dtype=dtype, device=x.device)
    x_new = None if h is None else torch.empty((B, N, D), dtype=x.dtype, device=x.device)
    rstd = torch.empty((B, N), dtype=torch.float32, device=x.device)
    config = _configuration("adaln_forward", D, x.device)
    chunks = triton.cdiv(N, config["ROWS"])
    vectors = [0 if t is None else t.stride(0) for t in (gate, scale, shift)]
    tensors = (x, h, gate, scale, shift, weight, x_new, y, rstd)
    launch(kernel, (B * chunks,), *tensors, N, D, chunks, eps, *_strides(x, h), *vectors, **config)
    return x_new, y, rstd


@operator("adaln_triton")
def _forward(
    x: Tensor,
    h: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    weight: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    x_new, y, rstd = _run_forward(wrap_triton(_forward_kernel), x, h, gate, scale, shift, weight, eps, dtype)
    assert x_new is not None  # with h there is one
    return x_new, y, rstd


@operator("adaln_triton_norm")
def _norm_forward(
    x: Tensor, scale: Tensor, shift: Tensor | None, weight: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return _run_forward(wrap_triton(_forward_kernel), x, None, None, scale, shift, weight, eps, dtype)[1:]


@operator("adaln_triton_backward")
def _backward(
    dx_new: Tensor | None,
    dy: Tensor,
    x_new: Tensor,
    rstd: Tensor,
    h: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor | None,
    weight: Tensor | None,
) -> list[Tensor]:
    """dx, dscale, then those that exist of dshift, dh, dgate, dweight."""
    B, N, D = dy.shape
    dy, x_new, scale = _strided(dy), _strided(x_new), _strided(scale)
    dx_new, h, gate, weight = (_strided(t) for t in (dx_new, h, gate, weight))
    dx = torch.empty((B, N, D), dtype=x_new.dtype, device=dy.device)
    dh = None if h is None else torch.empty((B, N, D), dtype=h.dtype, device=dy.device)
    config = _configuration("adaln_backward", D, dy.device)
    chunks = triton.cdiv(N, config["CHUNK"])
    sums = 1 + (shift is not None) + (h is not None)
    partials = torch.empty((B, chunks, sums, D), dtype=torch.float32, device=dy.device)
    vectors = [0 if t is None else t.stride(0) for t in (gate, scale)]
    tensors = (dx_new, dy, x_new, rstd, h, gate, scale, weight, dx, dh, partials)
    sizes = (N, D, chunks, *_strides(dx_new, dy, x_new, h), *vectors)
    launch(wrap_triton(_backward_kernel), (B * chunks,), *tensors, *sizes, SHIFT=shift is not None, **config)
    normed, *others = partials.sum(1).unbind(1)  # [B, D] each
    gradients = [dx, (normed if weight is None else normed * weight).to(scale.dtype, copy=True)]
    if shift is not None:
        gradients.append(others[0].to(shift.dtype, copy=True))
    if h is not None:
        assert dh is not None and gate is not None
        gradients += [dh, others[-1].to(gate.dtype, copy=True)]
    if weight is not None:
        gradients.append(((1 + scale.float()) * normed).sum(0).to(weight.dtype))
    return gradients


def _keep(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    """Save what the backward pass needs: x_new, h, rstd, and the vectors."""
    *tensors, _, dtype = inputs
    (x, h, gate, scale, shift, weight) = tensors if len(tensors) == 6 else (tensors[0], None, None, *tensors[1:])
    ctx.save_for_backward(x if h is None else output[0], output[-1], h, gate, scale, shift, weight)
    ctx.dtype = dtype
    ctx.set_materialize_grads(False)  # no dx_new is no read of dx_new


def _gradients(ctx: Any, dx_new: Tensor | None, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of x, h, gate, scale, shift, weight."""
    x_new, rstd, h, gate, scale, shift, weight = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros(x_new.shape, dtype=ctx.dtype, device=x_new.device)
    found = iter(_backward(dx_new, dy, x_new, rstd, h, gate, scale, shift, weight))
    dx, dscale = next(found), next(found)
    dshift = None if shift is None else next(found)
    of_branch = (None, None) if h is None else (next(found), next(found))
    return dx, *of_branch, dscale, dshift, None if weight is None else next(found)


def _norm_gradients(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    dx, _dh, _dgate, *vectors = _gradients(ctx, None, dy)
    return dx, *vectors, None, None


def _all_gradients(ctx: Any, dx_new: Tensor | None, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    return *_gradients(ctx, dx_new, dy), None, None


_forward.register_autograd(first_derivative_only("adaln", _all_gradients), setup_context=_keep)
_norm_forward.register_autograd(first_derivative_only("adaln", _norm_gradients), setup_context=_keep)


register("adaln", triton=_triton.refusal, cpp=_extension.cpu_refusal)


def _check_tensor(name: str, tensor: Tensor | None, shape: list[int], x: Tensor) -> None:
    if tensor is None:
        return
    check_dtype(name, tensor.dtype)
    if list(tensor.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape} for x {list(x.shape)}, got {list(tensor.shape)}")
    if tensor.device != x.device:
        raise ValueError(f"{name}: expected on {x.device} like x, got {tensor.device}")


def _unfit(dtype: torch.dtype | None, x: Tensor, *others: Tensor | None) -> Unfit:
    if torch.float64 in (dtype, x.dtype, *(tensor.dtype for tensor in others if tensor is not None)):
        return tuple((name, "fp64 is for the reference") for name in ("triton", "cpp"))
    if x.shape[-1] > MAX_WIDTH:
        return (("triton", f"a row of more than {MAX_WIDTH} values does not fit in the registers"),)
    return ()


def adaln(
    x: Tensor,
    scale: Tensor,
    shift: Tensor | None = None,
    h: Tensor | None = None,
    gate: Tensor | None = None,
    weight: Tensor | None = None,
    *,
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Gated residual, RMSNorm and modulation; formulas in the module's docstring.

    Args:
        x: residual stream [B, N, D] without a zero, bf16, fp16, fp32 or fp64.
        scale: [B, D]; rows may be strided, such as a chunk of one [B, 6D] projection.
        shift: [B, D] as `scale`, or None for none.
        h: output of the branch before [B, N, D] in any of the dtypes, or None: x is not changed.
        gate: [B, D] as `scale`; given if and only if `h` is.
        weight: of the norm [D], or None for ones.
        eps: >= 0, added to the mean square.
        dtype: of y; None is x's. Under autocast x is fp32 and y best in the autocast dtype.
        implementation: "auto", "triton", "cpp" or "reference"; None follows `use_implementation` and
            ALIGNTOK_KERNELS.

    Returns:
        x_new [B, N, D] in x's dtype (x itself without `h`), and y [B, N, D] in `dtype`. Each gradient has the dtype of
        its input. The Triton and C++ implementations differentiate once.

    Raises:
        ValueError: a shape, dtype or device does not fit; only one of `h` and `gate` is given; `implementation` is
            unknown or cannot run here.
    """
    if x.ndim != 3 or x.numel() == 0:
        raise ValueError(f"x: expected shape [B, N, D] without a zero, got {list(x.shape)}")
    if (h is None) != (gate is None):
        raise ValueError("h and gate: expected both or none of them")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype: expected float32, bfloat16, float16, float64 or None, got {dtype}")
    if not eps >= 0:
        raise ValueError(f"eps: expected a number >= 0, got {eps}")
    B, N, D = x.shape
    for name, tensor, shape in (("x", x, [B, N, D]), ("scale", scale, [B, D]), ("shift", shift, [B, D]),
                                ("h", h, [B, N, D]), ("gate", gate, [B, D]), ("weight", weight, [D])):  # fmt: skip
        _check_tensor(name, tensor, shape, x)
    name = select("adaln", x.device.type, implementation, _unfit(dtype, x, scale, shift, h, gate, weight))
    dtype = dtype or x.dtype
    if name == "cpp":
        x_new, y, _ = torch.ops.aligntok.adaln.default(x, h, gate, scale, shift, weight, eps, dtype)
        return x if h is None else x_new, y
    if name == "triton":
        if h is not None:
            return _forward(x, h, gate, scale, shift, weight, eps, dtype)[:2]
        return x, _norm_forward(x, scale, shift, weight, eps, dtype)[0]
    return adaln_reference(x, scale, shift, h, gate, weight, eps, dtype)
