"""The adapter's last layer: activation, projection to the latent, and the distance to the frozen snapshot's latent.

For hidden tokens p [..., C], weight W [d, C], bias b [d] and, where it is given, a snapshot z_0 [..., d],

    z    = act(p) W^T + b             act: GELU (the exact one, x * Phi(x)) or none          [..., d]
    dist = sum((z - z_0)^2)                                                                  []
    e    = dz + 2 * ddist * (z - z_0)
    dp   = (e W) * act'(p),   dW = e^T act(p),   db = sum over tokens of e

(AlignTok, arXiv 2509.25162, sections 4.1 and 4.2; Hendrycks and Gimpel 2016, arXiv 1606.08415.) The forward pass reads
p once and writes z. The backward pass reads p once, with dz (z, z_0), and writes dp: one program walks down a share of
the rows for one block of columns, keeps its part of dW in registers, and leaves it as a partial sum that is added up
afterwards in a fixed order. p may be a view past prefix tokens, and z_0 and dz may lie as [B, d, h, w]: nothing is
copied. Sums are fp32 (fp64 for fp64 p); the distance is that of the rounded z that is returned, so that value and
gradient are those of the path that is not fused.
"""

from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _triton
from ._dispatch import Unfit, first_derivative_only, register, select
from ._dtypes import check_dtype
from ._triton import configuration, dot_precision, launch, operator, tl, triton, wrap_triton

ACTIVATIONS = ("gelu", "none")
LARGEST_D = 128  # dz's tile and dW's accumulator hold all d channels; wider ones would not stay in registers
# Chosen from the machine code (benchmarks.aot), not from timings: no spills. 128 rows share each read of W; sm_80 takes
# narrower columns, since its fragments of W fill more registers.
FORWARD = {
    80: {"BLOCK_M": 128, "BLOCK_C": 32, "num_warps": 8, "num_stages": 3},
    90: {"BLOCK_M": 128, "BLOCK_C": 64, "num_warps": 8, "num_stages": 2},
}
# 16 warps are resident on a multiprocessor in each case, and PROGRAMS fill an A100 (108 of them) or an H100 (132) once.
# sm_90 takes the 64 rows of wgmma. On sm_80 two blocks of 8 warps hide each other's barriers, but a snapshot or more
# than 32 channels need too many registers for two. The next block of rows is loaded while this one is worked on, by the
# source itself, and nothing is left to num_stages.
_SM90 = {"BLOCK_M": 64, "BLOCK_C": 128, "PROGRAMS": 132, "num_warps": 16, "num_stages": 1}
BACKWARD = {80: {"BLOCK_M": 32, "BLOCK_C": 128, "PROGRAMS": 216, "num_warps": 8, "num_stages": 1}, 90: _SM90}
BACKWARD_WIDE = {80: {"BLOCK_M": 32, "BLOCK_C": 128, "PROGRAMS": 108, "num_warps": 16, "num_stages": 1}, 90: _SM90}


def adapter_projection_reference(
    p: Tensor, weight: Tensor, bias: Tensor, activation: str = "gelu", snapshot: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """The same in plain PyTorch; see `adapter_projection`. Under autocast, F.linear decides on the dtype."""
    hidden = F.gelu(p) if activation == "gelu" else p
    z = F.linear(hidden, weight.to(p.dtype), bias.to(p.dtype))
    if snapshot is None:
        return z
    wide = z if z.dtype == torch.float64 else z.float()
    return z, (wide - snapshot.to(wide.dtype)).square().sum()  # F.mse_loss's gradient has no forward mode


@triton.jit
def _upper_tail(t):
    """1 - Phi(t) for t >= 0, as 2^P(t). P is the minimax polynomial of degree 5 for log2(1 - Phi), weighted so that
    gelu and its slope are off by less than 1e-6 anywhere (the tests compare them in fp64); it falls for all t >= 0, so
    that the tail needs no clamp. erff costs more than twice the instructions, which would bound these kernels."""
    P = -0.0005007347790524364
    P = P * t + 0.007285174913704395
    P = P * t - 0.05234865844249725
    P = P * t - 0.45941007137298584
    P = P * t - 1.1510530710220337
    return tl.exp2(P * t - 1.0000017881393433)


@triton.jit
def _gelu(x):
    t = tl.abs(x)
    return tl.maximum(x, 0.0) - t * _upper_tail(t)  # NaN stays NaN: it comes through the tail


@triton.jit
def _gelu_and_slope(x):
    t = tl.abs(x)
    tail = _upper_tail(t)
    density = tl.exp2(t * t * -0.7213475204444817 - 1.3257480647361593)  # exp(-t^2 / 2) / sqrt(2 pi), in powers of 2
    slope = tail - t * density  # at -t; the slope at t is 1 minus it
    return tl.maximum(x, 0.0) - t * tail, tl.where(x > 0, 1 - slope, slope)


@triton.jit
def _offset(row, N, image_stride, token_stride, IMAGES: tl.constexpr):
    """Where rows begin: `row` counts tokens through all images, N an image; without IMAGES one stride is enough."""
    if IMAGES:
        return (row // N).to(tl.int64) * image_stride + (row % N).to(tl.int64) * token_stride
    return row.to(tl.int64) * token_stride


@triton.jit
def _forward_kernel(
    p, weight, bias, z0, z, partials, M, N, C, d,
    p_image, p_token, z0_image, z0_token, z0_channel,
    GELU: tl.constexpr, SNAPSHOT: tl.constexpr, P_IMAGES: tl.constexpr, Z0_IMAGES: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.arange(0, BLOCK_D)
    in_rows, in_channels = row < M, channel < d
    p_row = p + _offset(row, N, p_image, p_token, P_IMAGES)[:, None]  # [BLOCK_M, 1]
    weight_row = weight + channel[None, :] * C  # [1, BLOCK_D]
    accumulator = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    column = tl.arange(0, BLOCK_C)
    p_tile = tl.load(p_row + column[None, :], mask=in_rows[:, None] & (column < C)[None, :], other=0.0)
    for start in range(0, C, BLOCK_C):
        column = start + tl.arange(0, BLOCK_C)
        w_inside = (column < C)[:, None] & in_channels[None, :]
        w = tl.load(weight_row + column[:, None], mask=w_inside, other=0.0)
        following = column + BLOCK_C
        next_p = tl.load(p_row + following[None, :], mask=in_rows[:, None] & (following < C)[None, :], other=0.0)
        dtype = z.dtype.element_ty
        if GELU:
            hidden = _gelu(p_tile.to(tl.float32))
        else:
            hidden = p_tile
        accumulator = tl.dot(hidden.to(dtype), w.to(dtype), accumulator, input_precision=PRECISION)
        p_tile = next_p
    accumulator += tl.load(bias + channel, mask=in_channels, other=0.0).to(tl.float32)[None, :]
    rounded = accumulator.to(z.dtype.element_ty)
    inside = in_rows[:, None] & in_channels[None, :]
    tl.store(z + row.to(tl.int64)[:, None] * d + channel[None, :], rounded, mask=inside)
    if SNAPSHOT:
        z0_row = z0 + _offset(row, N, z0_image, z0_token, Z0_IMAGES)[:, None]
        target = tl.load(z0_row + channel[None, :] * z0_channel, mask=inside, other=0.0).to(tl.float32)
        difference = tl.where(inside, rounded.to(tl.float32) - target, 0.0)
        tl.store(partials + tl.program_id(0), tl.sum(difference * difference))


@triton.jit
def _load_cotangent(
    dz, z, z0, row, end, channel, d, N,
    dz_image, dz_token, dz_channel, z0_image, z0_token, z0_channel,
    SNAPSHOT: tl.constexpr, DZ_IMAGES: tl.constexpr, Z0_IMAGES: tl.constexpr,
):  # fmt: skip
    """Tiles [rows, channels] of what e is made of: dz, z, z_0."""
    inside = (row < end)[:, None] & (channel < d)[None, :]
    dz_row = dz + _offset(row, N, dz_image, dz_token, DZ_IMAGES)[:, None]
    dz_tile = tl.load(dz_row + channel[None, :] * dz_channel, mask=inside, other=0.0)
    if not SNAPSHOT:
        return dz_tile, dz_tile, dz_tile
    z_tile = tl.load(z + row.to(tl.int64)[:, None] * d + channel[None, :], mask=inside, other=0.0)
    z0_row = z0 + _offset(row, N, z0_image, z0_token, Z0_IMAGES)[:, None]
    return dz_tile, z_tile, tl.load(z0_row + channel[None, :] * z0_channel, mask=inside, other=0.0)


@triton.jit
def _cotangent(dz, z, z0, factor, SNAPSHOT: tl.constexpr):
    """e = dz + factor * (z - z_0), fp32."""
    if SNAPSHOT:
        return dz.to(tl.float32) + factor * (z.to(tl.float32) - z0.to(tl.float32))
    return dz.to(tl.float32)


@triton.jit
def _backward_kernel(
    p, weight, dz, z, z0, ddistance, dp, dweight, dbias, M, N, C, d, rows,
    p_image, p_token, dz_image, dz_token, dz_channel, z0_image, z0_token, z0_channel,
    GELU: tl.constexpr, SNAPSHOT: tl.constexpr, INPUT_GRADIENT: tl.constexpr,
    P_IMAGES: tl.constexpr, DZ_IMAGES: tl.constexpr, Z0_IMAGES: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One block of columns through one split of the rows. The loads of the next rows are issued before the work on
    these: they are what the pipeline has in flight."""
    split = tl.program_id(1)
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel = tl.arange(0, BLOCK_D)
    in_columns, in_channels = column < C, channel < d
    dtype = dz.dtype.element_ty
    if INPUT_GRADIENT:
        w_inside = in_channels[:, None] & in_columns[None, :]
        w = tl.load(weight + channel[:, None] * C + column[None, :], mask=w_inside, other=0.0).to(dtype)
    factor = 0.0
    if SNAPSHOT:
        factor = 2 * tl.load(ddistance)
    first, end = split * rows, tl.minimum((split + 1) * rows, M)
    row = first + tl.arange(0, BLOCK_M)
    p_row = p + _offset(row, N, p_image, p_token, P_IMAGES)[:, None]
    p_tile = tl.load(p_row + column[None, :], mask=(row < end)[:, None] & in_columns[None, :], other=0.0)
    dz_tile, z_tile, z0_tile = _load_cotangent(
        dz, z, z0, row, end, channel, d, N, dz_image, dz_token, dz_channel, z0_image, z0_token, z0_channel,
        SNAPSHOT, DZ_IMAGES, Z0_IMAGES,
    )  # fmt: skip
    bias_sum = _cotangent(dz_tile, z_tile, z0_tile, factor, SNAPSHOT)  # [BLOCK_M, BLOCK_D]
    e = bias_sum.to(dtype)
    weight_sum = tl.zeros((BLOCK_D, BLOCK_C), tl.float32)
    for start in range(first, end, BLOCK_M):
        row = start + BLOCK_M + tl.arange(0, BLOCK_M)
        p_row = p + _offset(row, N, p_image, p_token, P_IMAGES)[:, None]
        next_p = tl.load(p_row + column[None, :], mask=(row < end)[:, None] & in_columns[None, :], other=0.0)
        dz_tile, z_tile, z0_tile = _load_cotangent(
            dz, z, z0, row, end, channel, d, N, dz_image, dz_token, dz_channel, z0_image, z0_token, z0_channel,
            SNAPSHOT, DZ_IMAGES, Z0_IMAGES,
        )  # fmt: skip
        if GELU:
            hidden, slope = _gelu_and_slope(p_tile.to(tl.float32))
        else:
            hidden = p_tile
        # As [BLOCK_C, BLOCK_D]: 64 rows or more are what sm_90's wgmma takes, and no warp of sm_80 repeats another's.
        product = tl.dot(tl.trans(hidden.to(dtype)), e, tl.trans(weight_sum), input_precision=PRECISION)
        weight_sum = tl.trans(product)
        if INPUT_GRADIENT:
            gradient = tl.dot(e, w, input_precision=PRECISION)
            if GELU:
                gradient *= slope
            row -= BLOCK_M
            inside = (row < end)[:, None] & in_columns[None, :]
            tl.store(dp + row.to(tl.int64)[:, None] * C + column[None, :], gradient, mask=inside)
        cotangent = _cotangent(dz_tile, z_tile, z0_tile, factor, SNAPSHOT)
        bias_sum += cotangent
        e = cotangent.to(dtype)
        p_tile = next_p
    target = dweight + (split * d + channel).to(tl.int64)[:, None] * C + column[None, :]
    tl.store(target, weight_sum, mask=in_channels[:, None] & in_columns[None, :])
    if tl.program_id(0) == 0:
        tl.store(dbias + split * d + channel, tl.sum(bias_sum, axis=0), mask=in_channels)


def _images(x: Tensor) -> Tensor:
    """x [..., D] as [B, N, D]: a view wherever the strides allow one."""
    return x.reshape(-1, x.shape[-2], x.shape[-1]) if x.ndim > 1 else x.reshape(1, 1, -1)


def _rows(p: Tensor) -> Tensor:
    """p as [B, N, C] with unit stride along C."""
    p = _images(p)
    return p if p.stride(2) == 1 else p.contiguous()


def _needs_two_strides(x: Tensor) -> bool:
    """Whether [B, N, D] cannot be walked through with one stride from token to token."""
    return x.shape[0] > 1 and x.stride(0) != x.shape[1] * x.stride(1)


def _channels(d: int) -> int:
    return max(16, triton.next_power_of_2(d))  # tl.dot takes no less than 16


@operator("adapter_projection_triton")
def _forward(
    p: Tensor, weight: Tensor, bias: Tensor, snapshot: Tensor | None, gelu: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """z in `dtype`, and the distance: [] with a snapshot, else [0]."""
    rows, weight, d = _rows(p), weight.contiguous(), weight.shape[0]
    (B, N, C), z0 = rows.shape, None if snapshot is None else _images(snapshot)
    z = torch.empty((*p.shape[:-1], d), dtype=dtype, device=p.device)
    config = configuration("adapter_projection_forward", FORWARD, p.device)
    programs = triton.cdiv(B * N, config["BLOCK_M"])
    partials = torch.empty(0 if z0 is None else programs, dtype=torch.float32, device=p.device)
    strides = (*rows.stride()[:2], *((0, 0, 0) if z0 is None else z0.stride()))
    launch(
        wrap_triton(_forward_kernel), (programs,), rows, weight, bias, z if z0 is None else z0, z, partials,
        B * N, N, C, d, *strides, GELU=gelu, SNAPSHOT=z0 is not None, P_IMAGES=_needs_two_strides(rows),
        Z0_IMAGES=z0 is not None and _needs_two_strides(z0), PRECISION=dot_precision(dtype), BLOCK_D=_channels(d),
        **config,
    )  # fmt: skip
    return z, partials if z0 is None else partials.sum()


def _splits(M: int, C: int, d: int, config: dict) -> tuple[int, int]:
    """(number of row splits, rows in each): the device filled once, and partial sums small beside p.

    A split's partial dW is d * C fp32 numbers, written and read again. With 32 d rows or more to a split, that is at
    most a sixteenth of what p and dp take in bf16.
    """
    wanted = config["PROGRAMS"] // triton.cdiv(C, config["BLOCK_C"])
    splits = max(1, min(wanted, M // (32 * d)))
    rows = triton.cdiv(triton.cdiv(M, splits), config["BLOCK_M"]) * config["BLOCK_M"]
    return triton.cdiv(M, rows), rows


@operator("adapter_projection_triton_backward")
def _backward(
    p: Tensor,
    weight: Tensor,
    bias: Tensor,
    dz: Tensor,
    z: Tensor | None,
    snapshot: Tensor | None,
    ddistance: Tensor | None,
    gelu: bool,
    input_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dp (empty unless wanted), dweight, dbias; z, snapshot and ddistance come together or not at all."""
    rows, weight, dz, d = _rows(p), weight.contiguous(), _images(dz), weight.shape[0]
    (B, N, C), z0 = rows.shape, None if snapshot is None else _images(snapshot)
    table = BACKWARD if z0 is None and d <= 32 else BACKWARD_WIDE
    config = configuration("adapter_projection_backward", table, p.device)
    splits, share = _splits(B * N, C, d, config)
    programs = (triton.cdiv(C, config["BLOCK_C"]), splits)
    del config["PROGRAMS"]
    dp = torch.empty(p.shape if input_gradient else 0, dtype=p.dtype, device=p.device)
    dweight = torch.empty((splits, d, C), dtype=torch.float32, device=p.device)
    dbias = torch.empty((splits, d), dtype=torch.float32, device=p.device)
    strides = (*rows.stride()[:2], *dz.stride(), *((0, 0, 0) if z0 is None else z0.stride()))
    of_snapshot = (dz, dz, dz) if z0 is None else (z, z0, ddistance)
    launch(
        wrap_triton(_backward_kernel), programs, rows, weight, dz, *of_snapshot, dp, dweight, dbias,
        B * N, N, C, d, share, *strides, GELU=gelu, SNAPSHOT=z0 is not None, INPUT_GRADIENT=input_gradient,
        P_IMAGES=_needs_two_strides(rows), DZ_IMAGES=_needs_two_strides(dz),
        Z0_IMAGES=z0 is not None and _needs_two_strides(z0), PRECISION=dot_precision(dz.dtype), BLOCK_D=_channels(d),
        **config,
    )  # fmt: skip
    return dp, dweight.sum(0).to(weight.dtype), dbias.sum(0).to(bias.dtype)


def _save(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    p, weight, bias, snapshot, ctx.gelu, _ = inputs
    ctx.save_for_backward(p, weight, bias, snapshot, None if snapshot is None else output[0])


def _differentiate(ctx, dz: Tensor, ddistance: Tensor) -> tuple[Tensor | None, ...]:
    p, weight, bias, snapshot, z = ctx.saved_tensors
    of_snapshot = (z, snapshot, None if snapshot is None else ddistance)
    wanted = ctx.needs_input_grad[0]
    dp, dweight, dbias = _backward(p, weight, bias, dz, *of_snapshot, ctx.gelu, wanted)
    return dp if wanted else None, dweight, dbias, None, None, None


_forward.register_autograd(first_derivative_only("adapter_projection", _differentiate), setup_context=_save)
register("adapter_projection", triton=_triton.refusal)


def _compute_dtype(p: Tensor) -> torch.dtype:
    """The dtype that F.linear computes in and returns: p's, or autocast's."""
    device = p.device.type
    if p.dtype == torch.float64 or device == "meta" or not torch.is_autocast_enabled(device):
        return p.dtype
    return torch.get_autocast_dtype(device)


def _check(p: Tensor, weight: Tensor, bias: Tensor, activation: str, snapshot: Tensor | None) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected {' or '.join(map(repr, ACTIVATIONS))}, got {activation!r}")
    tensors = {"p": p, "weight": weight, "bias": bias} | ({} if snapshot is None else {"snapshot": snapshot})
    for name, tensor in tensors.items():
        check_dtype(name, tensor.dtype)
        if tensor.device != p.device:
            raise ValueError(f"{name}: expected on {p.device} like p, got {tensor.device}")
    if p.ndim < 1 or p.numel() == 0:
        raise ValueError(f"p: expected shape [..., C] without a zero, got {list(p.shape)}")
    if weight.ndim != 2 or weight.shape[0] == 0 or weight.shape[1] != p.shape[-1]:
        raise ValueError(f"weight: expected shape [d, {p.shape[-1]}] for p {list(p.shape)}, got {list(weight.shape)}")
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected shape [{weight.shape[0]}], got {list(bias.shape)}")
    if snapshot is None:
        return
    expected = [*p.shape[:-1], weight.shape[0]]
    if list(snapshot.shape) != expected:
        raise ValueError(f"snapshot: expected shape {expected}, that of z, got {list(snapshot.shape)}")
    if snapshot.requires_grad:
        raise ValueError("snapshot: it is frozen and gets no gradient; detach() it")


def _unfit(*tensors: Tensor | None, d: int) -> Unfit:
    if any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors):
        return (("triton", "fp64 is for the reference"),)
    if d > LARGEST_D:
        return (("triton", f"the kernels hold at most {LARGEST_D} latent channels, not {d}"),)
    return ()


@overload
def adapter_projection(
    p: Tensor,
    weight: Tensor,
    bias: Tensor,
    activation: str = ...,
    snapshot: None = ...,
    *,
    implementation: str | None = ...,
) -> Tensor: ...


@overload
def adapter_projection(
    p: Tensor,
    weight: Tensor,
    bias: Tensor,
    activation: str = ...,
    snapshot: Tensor = ...,
    *,
    implementation: str | None = ...,
) -> tuple[Tensor, Tensor]: ...


def adapter_projection(
    p: Tensor,
    weight: Tensor,
    bias: Tensor,
    activation: str = "gelu",
    snapshot: Tensor | None = None,
    *,
    implementation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """act(p) W^T + b and, with a snapshot, the squared distance to it; formulas in the module's docstring.

    Args:
        p: [..., C], bf16, fp16, fp32 or fp64; it may be a view such as tokens[:, prefix:].
        weight: [d, C], cast to the dtype computed in: p's or, under autocast, autocast's.
        bias: [d], like weight.
        activation: "gelu" (exact) or "none".
        snapshot: z_0 [..., d], the frozen latent, of any strides and without gradient; fp32 beside bf16 p is usual.
        implementation: "auto", "triton" or "reference"; None follows `use_implementation` and ALIGNTOK_KERNELS.

    Returns:
        z [..., d] in the dtype computed in; with a snapshot (z, distance), where the distance is sum((z - z_0)^2) over
        all elements of the returned (rounded) z: a scalar, fp32 (fp64 for fp64 p). Gradients have the dtype of what
        they belong to. The Triton implementation differentiates once.

    Raises:
        ValueError: a shape, dtype or device does not fit; the snapshot requires a gradient; an unknown activation;
            `implementation` is unknown or cannot run here.
    """
    _check(p, weight, bias, activation, snapshot)
    unfit = _unfit(p, weight, bias, snapshot, d=weight.shape[0])
    if select("adapter_projection", p.device.type, implementation, unfit) != "triton":
        return adapter_projection_reference(p, weight, bias, activation, snapshot)
    z, distance = _forward(p, weight, bias, snapshot, activation == "gelu", _compute_dtype(p))
    return z if snapshot is None else (z, distance)
