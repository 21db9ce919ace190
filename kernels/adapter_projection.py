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
from ._adapter_projection_kernels import _backward_kernel, _forward_kernel
from ._dispatch import Unfit, first_derivative_only, register, select
from ._dtypes import check_dtype
from ._triton import configuration, dot_precision, launch, operator, triton, wrap_triton

ACTIVATIONS = ("gelu", "none")
LARGEST_D = 128  # dz's tile and dW's accumulator hold all d channels; wider ones would not stay in registers
# Chosen from the machine code (benchmarks.aot), not from timings: no spills. 128 rows share each read of W; sm_80 takes
# narrower columns, since its fragments of W fill more registers. On sm_100 the compiler of Triton 3.4 fails where a
# pipelined loop carries a tile of a product from one round to the next (docs/kernels.md).
FORWARD = {
    80: {"BLOCK_M": 128, "BLOCK_C": 32, "num_warps": 8, "num_stages": 3},
    90: {"BLOCK_M": 128, "BLOCK_C": 64, "num_warps": 8, "num_stages": 2},
    100: {"BLOCK_M": 128, "BLOCK_C": 64, "num_warps": 8, "num_stages": 2 if _triton.RELEASE > (3, 4) else 1},
}
# 16 warps are resident on a multiprocessor in each case, and PROGRAMS fill an A100 (108 of them) or an H100 (132) once.
# sm_90 takes the 64 rows of wgmma. On sm_80 two blocks of 8 warps hide each other's barriers, but a snapshot or more
# than 32 channels need too many registers for two. The next block of rows is loaded while this one is worked on, by the
# source itself, and nothing is left to num_stages. Code of 16 warps is spilled on sm_100, and by all but Triton 3.8 on
# sm_90 where it is wide: two blocks of 8 warps are resident instead.
_SM90 = {"BLOCK_M": 64, "BLOCK_C": 128, "PROGRAMS": 132, "num_warps": 16, "num_stages": 1}
_TWO = {"BLOCK_M": 64, "BLOCK_C": 64, "PROGRAMS": 264, "num_warps": 8, "num_stages": 1}
_SM100 = _TWO | {"BLOCK_M": 32}
BACKWARD = {
    80: {"BLOCK_M": 32, "BLOCK_C": 128, "PROGRAMS": 216, "num_warps": 8, "num_stages": 1},
    90: _SM90,
    100: _SM100,
}
BACKWARD_WIDE = {
    80: {"BLOCK_M": 32, "BLOCK_C": 128, "PROGRAMS": 108, "num_warps": 16, "num_stages": 1},
    90: _SM90 if _triton.RELEASE == (3, 8) else _TWO,
    100: _SM100,
}


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
