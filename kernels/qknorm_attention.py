"""Self-attention from one packed projection, with QK-norm and rotary positions inside.

For qkv [B, N, 3, H, D], per batch and head,

    q' = rope(rms_norm(q) * q_weight),  k' = rope(rms_norm(k) * k_weight)          [N, D]
    out = softmax(q' k'^T / sqrt(D)) v                                              [B, N, H * D]

rms_norm(x) = x / sqrt(mean(x^2) + eps) over D in fp32; rope turns the pairs of neighbouring channels (2i, 2i + 1) by
the angles of the tables. With P the softmax and dO the gradient of the result,

    dv = P^T dO,  dS = P * (dO v^T - rowsum(dO * out)),  dq' = dS k' / sqrt(D),  dk' = dS^T q' / sqrt(D)

and dq, dk follow through the rotation and the norm in the same kernel. Nothing is transposed, concatenated or copied:
results and gradients are written where the neighbouring projections read them.

Forward, up to SHORT tokens one program owns a (batch, head): k' and v are prepared once and stay on the chip. Beyond,
k' is prepared by a launch of its own, since each of the N / BLOCK programs of a head would otherwise repeat that for
every tile. Backward, up to SHORT tokens one program owns a (batch, head) as well, in three phases: q' and k', then dq,
then dk and dv, since all of it at once needs more registers than there are (docs/decisions.md). Beyond, and where those
phases in one launch would spill, each is a launch. No atomics: a weight's gradient is summed per program and block,
then over them in a fixed order.

A head of 72 channels is 64 + 8 and not 128: see `parts`.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import _triton
from ._dispatch import first_derivative_only, register, select
from ._dtypes import check_dtype
from ._qknorm_attention_configurations import HEAD_WIDTHS, configured, fits_on_chip, parts, whole_head
from ._qknorm_attention_kernels import (
    _dkv_kernel,
    _dq_kernel,
    _long_forward_kernel,
    _prepare_kernel,
    _short_backward_kernel,
    _short_forward_kernel,
)
from ._triton import dot_precision, launch, operator, triton, wrap_triton

EPS = 1e-6
LOG2_E = 1 / math.log(2)


def qknorm_attention_reference(
    qkv: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    eps: float = EPS,
) -> Tensor:
    """The same in plain PyTorch with its scaled_dot_product_attention; see `qknorm_attention`."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [B, H, N, D] each
    q, k = _prepared(q, q_weight, cos, sin, eps), _prepared(k, k_weight, cos, sin, eps)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _prepared(x: Tensor, weight: Tensor | None, cos: Tensor | None, sin: Tensor | None, eps: float) -> Tensor:
    """rope(rms_norm(x) * weight) for x [B, H, N, D], in fp32 (fp64 for fp64), rounded to x's dtype."""
    dtype, D = x.dtype, x.shape[-1]
    wide = torch.promote_types(dtype, torch.float32)
    if weight is not None:
        x = F.rms_norm(x.to(wide), (D,), weight.to(wide), eps)
    if cos is not None and sin is not None:
        wide_cos, wide_sin = (t if t.shape[-1] == D else t.repeat_interleave(2, dim=-1) for t in (cos, sin))
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
        x = x * wide_cos + torch.stack((-odd, even), dim=-1).flatten(-2) * wide_sin
    return x.to(dtype)


def _unit_stride(x: Tensor) -> Tensor:
    """x, copied only where its last dimension is not dense."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _dense(table: Tensor | None) -> Tensor | None:
    return None if table is None else table.contiguous()


def _common(qkv: Tensor, eps: float, cos: Tensor | None, sin: Tensor | None, *others: Tensor) -> dict[str, Any]:
    """What every kernel takes, by name; `ALIGN` divides the strides of qkv's rows and of the others'."""
    _, N, _, H, D = qkv.shape
    stride_b, stride_n, stride_3, stride_h, _ = qkv.stride()
    vector = 16 // qkv.element_size()
    aligned = all(s % vector == 0 for x in (qkv, *others) for s in x.stride()[:-1])
    MAIN, TAIL = parts(D)
    return {
        "qkv": qkv,
        "cos": cos,
        "sin": sin,
        "N": N,
        "H": H,
        "stride_b": stride_b,
        "stride_n": stride_n,
        "stride_3": stride_3,
        "stride_h": stride_h,
        "eps": eps,
        "factor": D**-0.5 * LOG2_E,
        "D": D,
        "MAIN": MAIN,
        "TAIL": TAIL,
        "ROPE": 0 if cos is None else 2 * cos.shape[1] // D,
        "ALIGN": vector if aligned else 1,
    }


def _partials(weight: Tensor | None, rows: int, qkv: Tensor) -> Tensor:
    """Room for the sums of each program, [rows, D]; nothing where there are no weights."""
    return torch.empty((0 if weight is None else rows, qkv.shape[4]), dtype=torch.float32, device=qkv.device)


@operator("qknorm_attention_triton")
def _forward(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """out [B, N, H * D] and the base-2 logarithms of the softmax's denominators [B, H, N]."""
    qkv = _unit_stride(qkv)
    B, N, _, H, D = qkv.shape
    out = torch.empty((B, N, H * D), dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty((B, H, N), dtype=torch.float32, device=qkv.device)
    weights = {"q_weight": q_weight, "k_weight": k_weight}
    common = _common(qkv, eps, _dense(cos), _dense(sin))
    results = {"out": out, "lse": lse, "PRECISION": dot_precision(qkv.dtype)}
    if fits_on_chip(N, D, qkv.element_size()) and whole_head("short_forward", qkv):
        config = configured("short_forward", qkv)
        blocks = {"EVEN": N % config["BLOCK_K"] == 0, "BLOCKS": triton.cdiv(N, config["BLOCK_K"])}
        launch(wrap_triton(_short_forward_kernel), (B * H,), **common, **weights, **results, **blocks, **config)
        return out, lse
    keys = torch.empty((1, B, H, N, D), dtype=qkv.dtype, device=qkv.device)
    config = configured("prepare", qkv)
    grid = (B * H * triton.cdiv(N, config["BLOCK"]), 1)
    launch(wrap_triton(_prepare_kernel), grid, prepared=keys, **common, **weights, **config)
    config = configured("long_forward", qkv)
    programs = B * H * triton.cdiv(N, config["BLOCK_Q"])
    inputs = {"prepared": keys, "q_weight": q_weight, "EVEN": N % config["BLOCK_K"] == 0}
    launch(wrap_triton(_long_forward_kernel), (programs,), **common, **inputs, **results, **config)
    return out, lse


@operator("qknorm_attention_triton_backward")
def _backward(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """dqkv, and the gradients [2, D] of both weights in fp32 (zeros without weights)."""
    qkv, dout = _unit_stride(qkv), _unit_stride(dout)
    B, N, _, H, D = qkv.shape
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    prepared = torch.empty((2, B, H, N, D), dtype=qkv.dtype, device=qkv.device)
    weights = {"q_weight": q_weight, "k_weight": k_weight}
    common = _common(qkv, eps, _dense(cos), _dense(sin), dout) | {"prepared": prepared}
    dout_b, dout_n, _ = dout.stride()
    upstream = {"lse": lse, "dout": dout, "dout_b": dout_b, "dout_n": dout_n, "scale": D**-0.5}
    results = {"dqkv": dqkv, "delta": torch.empty_like(lse), "PRECISION": dot_precision(qkv.dtype)}
    if whole_head("short_backward", qkv):
        config = configured("short_backward", qkv)
        dq_weight = _partials(q_weight, B * H * triton.cdiv(N, config["DQ_Q"]), qkv)
        dk_weight = _partials(q_weight, B * H * triton.cdiv(N, config["DKV_K"]), qkv)
        results |= {"dq_weight": dq_weight, "dk_weight": dk_weight}
        inputs = {**weights, "out": out, "EVEN": N % config["DQ_K"] == 0}
        launch(wrap_triton(_short_backward_kernel), (B * H,), **common, **inputs, **upstream, **results, **config)
        return dqkv, torch.stack((dq_weight.sum(0), dk_weight.sum(0)))
    config = configured("prepare", qkv)
    grid = (B * H * triton.cdiv(N, config["BLOCK"]), 2)
    launch(wrap_triton(_prepare_kernel), grid, **common, **weights, **config)
    config = configured("dq", qkv)
    programs = B * H * triton.cdiv(N, config["BLOCK_Q"])
    dq_weight = _partials(q_weight, programs, qkv)
    inputs = {"q_weight": q_weight, "out": out, "EVEN": N % config["BLOCK_K"] == 0}
    launch(wrap_triton(_dq_kernel), (programs,), dweight=dq_weight, **common, **inputs, **upstream, **results, **config)
    config = configured("dkv", qkv)
    programs = B * H * triton.cdiv(N, config["BLOCK_K"])
    dk_weight = _partials(q_weight, programs, qkv)
    inputs = {"k_weight": k_weight, "dweight": dk_weight}
    launch(wrap_triton(_dkv_kernel), (programs,), **common, **inputs, **upstream, **results, **config)
    return dqkv, torch.stack((dq_weight.sum(0), dk_weight.sum(0)))


def _setup_context(ctx, inputs, output) -> None:
    qkv, q_weight, k_weight, cos, sin, eps = inputs
    ctx.save_for_backward(qkv, *output, q_weight, k_weight, cos, sin)
    ctx.mark_non_differentiable(output[1])
    ctx.eps = eps


def _autograd(ctx, dout: Tensor, _dlse: Tensor | None) -> tuple:
    saved = ctx.saved_tensors  # to be asked for once: activation checkpointing refuses a second time
    q_weight, k_weight = saved[3:5]
    dqkv, dweights = _backward(dout, *saved, ctx.eps)
    if q_weight is None:
        return dqkv, None, None, None, None, None
    return dqkv, dweights[0].to(q_weight.dtype), dweights[1].to(k_weight.dtype), None, None, None


_forward.register_autograd(first_derivative_only("qknorm_attention", _autograd), setup_context=_setup_context)
register("qknorm_attention", triton=_triton.refusal)


def qknorm_attention(
    qkv: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    eps: float = EPS,
    implementation: str | None = None,
) -> Tensor:
    """Non-causal self-attention with QK-norm and RoPE from the packed projection; formulas in the module's docstring.

    Args:
        qkv: [B, N, 3, H, D], bf16, fp16, fp32 or fp64; any strides (copied only where D is not dense).
        q_weight, k_weight: [D] scales of the RMSNorm of q and k, in qkv's dtype or fp32. None for both: no norm.
        cos, sin: rotary tables without gradient, [N, D / 2] with one column for each pair of channels, or [N, D] with
            every value twice, as LightningDiT's `rope_table` makes them. The Triton kernels read the narrow form in
            16-byte pieces and the wide one value by value. None for both: no rotation.
        eps: of the RMSNorm.
        implementation: "auto", "triton" or "reference"; None follows `use_implementation` and ALIGNTOK_KERNELS.

    Returns:
        [B, N, H * D] in qkv's dtype, ready for the output projection. The Triton implementation differentiates once,
        in qkv and the weights.

    Raises:
        ValueError: shapes or dtypes that do not fit; one weight or one table without the other; `implementation` is
            unknown or cannot run here.
    """
    _check(qkv, q_weight, k_weight, cos, sin)
    unfit = _unfit(qkv.dtype, qkv.shape[4])
    if select("qknorm_attention", qkv.device.type, implementation, unfit) == "triton":
        return _forward(qkv, q_weight, k_weight, cos, sin, eps)[0]
    with sdpa_kernel(SDPBackend.MATH):  # the others have neither forward mode nor second derivatives
        return qknorm_attention_reference(qkv, q_weight, k_weight, cos, sin, eps=eps)


def _unfit(dtype: torch.dtype, D: int) -> tuple[tuple[str, str], ...]:
    if dtype == torch.float64:
        return (("triton", "fp64 is for the reference"),)
    if D not in HEAD_WIDTHS:
        return (("triton", f"heads of {D} channels have no kernel, those of {', '.join(map(str, HEAD_WIDTHS))} have"),)
    return ()


def _check(
    qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor | None, sin: Tensor | None
) -> None:
    check_dtype("qkv", qkv.dtype)
    if qkv.ndim != 5 or qkv.shape[2] != 3 or qkv.numel() == 0:
        raise ValueError(f"qkv: expected shape [B, N, 3, H, D] without a zero, got {list(qkv.shape)}")
    N, D = qkv.shape[1], qkv.shape[4]
    if (q_weight is None) != (k_weight is None) or (cos is None) != (sin is None):
        raise ValueError("q_weight and k_weight, and cos and sin: give both or neither")
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is not None and (weight.shape != (D,) or weight.dtype not in (qkv.dtype, torch.float32)):
            given = f"{list(weight.shape)} in {weight.dtype}"
            raise ValueError(f"{name}: expected shape [{D}] in {qkv.dtype} or torch.float32, got {given}")
    for name, table in (("cos", cos), ("sin", sin)):
        if table is not None and (D % 2 or table.shape not in ((N, D), (N, D // 2)) or table.requires_grad):
            raise ValueError(
                f"{name}: expected a table [{N}, {D // 2}] or [{N}, {D}] without gradient, got {list(table.shape)}"
            )
    if cos is not None and sin is not None and cos.shape != sin.shape:
        raise ValueError(f"cos and sin: expected one shape, got {list(cos.shape)} and {list(sin.shape)}")
