"""QK-norm and rotary positions: what attention kernels of other libraries want done before they are called.

From the packed projection qkv [B, N, 3, H, D], for every head of q and of k,

    n = x * r,  r = 1 / sqrt(mean_d(x^2) + eps),  u = n * weight               with weights, else u = x
    out[2i]     = u[2i]     * cos[2i]     - u[2i + 1] * sin[2i]                with tables [N, D], else out = u
    out[2i + 1] = u[2i + 1] * cos[2i + 1] + u[2i]     * sin[2i + 1]

and v is copied out: q, k, v [B, N, H, D]. Backwards, the rotation is transposed,

    du[2i]     = dout[2i]     * cos[2i]     + dout[2i + 1] * sin[2i + 1]
    du[2i + 1] = dout[2i + 1] * cos[2i + 1] - dout[2i]     * sin[2i]
    dx = r * (t - n * mean_d(t * n)),  t = du * weight;  dweight = sum du * n

(Su et al. 2021, arXiv 2104.09864, over interleaved pairs as in LightningDiT, models/pos_embed.py; QK-norm: Dehghani et
al. 2023, arXiv 2302.05442, as RMSNorm.) Arithmetic is fp32, fp64 for fp64 qkv, and the result is rounded once. The
forward pass reads qkv once and writes q, k and v. The backward pass reads dq, dk, dv and, for the norm, q and k again,
and writes the packed gradient: nothing is concatenated.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _extension, _triton
from ._dispatch import Unfit, first_derivative_only, register, select
from ._dtypes import DTYPES, check_dtype
from ._triton import Configuration, configuration, launch, operator, tl, triton, wrap_triton

# A program holds a tile of TILE values (tokens x heads x columns, powers of two) of each of q, k and v: at 8 warps one
# 16-byte load a thread in bf16. It keeps the tables and the weights in registers and goes through IMAGES images, so
# that they are read once for all of these; more images would leave too few programs at small batches.
_PINNED = {"TILE": 2048, "IMAGES": 8, "num_warps": 8, "num_stages": 1}
CONFIGURATIONS = {arch: _PINNED for arch in _triton.ARCHITECTURES}
MAX_HEAD_WIDTH = 1024  # half a tile


def _prologue(x: Tensor, weight: Tensor | None, cos: Tensor | None, sin: Tensor | None, eps: float) -> Tensor:
    u = x if x.dtype == torch.float64 else x.float()  # [B, N, H, D]
    if weight is not None:
        u = F.rms_norm(u, u.shape[-1:], weight.to(u.dtype), eps)
    if cos is not None and sin is not None:
        even, odd = u.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack((-odd, even), dim=-1).flatten(-2)
        u = u * cos.to(u.dtype).unsqueeze(1) + turned * sin.to(u.dtype).unsqueeze(1)
    return u.to(x.dtype).contiguous()


def qknorm_rope_reference(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """(q, k, v) in plain PyTorch; see `qknorm_rope`."""
    q, k, v = qkv.unbind(2)
    return _prologue(q, q_weight, cos, sin, eps), _prologue(k, k_weight, cos, sin, eps), v.contiguous()


@triton.jit
def _pairs(x, T: tl.constexpr, HEADS: tl.constexpr, P: tl.constexpr):
    """x [T, HEADS, 2P] as its even and its odd columns [T, HEADS, P], in fp32."""
    return tl.split(tl.reshape(x.to(tl.float32), [T, HEADS, P, 2]))


@triton.jit
def _joined(even, odd, T: tl.constexpr, HEADS: tl.constexpr, P: tl.constexpr):
    """The inverse of `_pairs`."""
    return tl.reshape(tl.join(even, odd), [T, HEADS, 2 * P])


@triton.jit
def _weight(weight, D: tl.constexpr, P: tl.constexpr):
    """Even and odd entries of a vector [D], [1, 1, P] each."""
    column = tl.arange(0, 2 * P)[None, None, :]
    return _pairs(tl.load(weight + column, mask=column < D, other=0.0), 1, 1, P)


@triton.jit
def _table(table, token, N, D: tl.constexpr, T: tl.constexpr, P: tl.constexpr):
    """Even and odd columns of the rows `token` [T, 1, 1] of a table [N, D], [T, 1, P] each."""
    column = tl.arange(0, 2 * P)[None, None, :]
    return _pairs(tl.load(table + token * D + column, mask=(token < N) & (column < D), other=0.0), T, 1, P)


@triton.jit
def _prepared(
    x, weight, cos, sin, eps, NORM: tl.constexpr, D: tl.constexpr,
    T: tl.constexpr, HEADS: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Norm and rotation of a tile x [T, HEADS, 2P]."""
    even, odd = _pairs(x, T, HEADS, P)
    if NORM:
        r = tl.rsqrt(tl.sum(even * even + odd * odd, axis=2, keep_dims=True) / D + eps)
        even, odd = even * r * weight[0], odd * r * weight[1]
    if cos is not None:
        even, odd = even * cos[0] - odd * sin[0], odd * cos[1] + even * sin[1]
    return _joined(even, odd, T, HEADS, P)


@triton.jit
def _turned_back(x, cos, sin, T: tl.constexpr, HEADS: tl.constexpr, P: tl.constexpr):
    """Even and odd columns of the tile x [T, HEADS, 2P], through the transposed rotation."""
    even, odd = _pairs(x, T, HEADS, P)
    if cos is not None:
        even, odd = even * cos[0] + odd * sin[1], odd * cos[1] - even * sin[0]
    return even, odd


@triton.jit
def _adjoint(
    upstream, x, weight, total, cos, sin, eps, D: tl.constexpr,
    T: tl.constexpr, HEADS: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Gradient of the tile x, and `total`, the sums for the weight's even and odd entries, with this tile added."""
    even, odd = _turned_back(upstream, cos, sin, T, HEADS, P)
    n_even, n_odd = _pairs(x, T, HEADS, P)
    r = tl.rsqrt(tl.sum(n_even * n_even + n_odd * n_odd, axis=2, keep_dims=True) / D + eps)
    n_even, n_odd = n_even * r, n_odd * r
    total = (total[0] + even * n_even, total[1] + odd * n_odd)
    even, odd = even * weight[0], odd * weight[1]
    mean = tl.sum(even * n_even + odd * n_odd, axis=2, keep_dims=True) / D
    even, odd = r * (even - n_even * mean), r * (odd - n_odd * mean)
    return _joined(even, odd, T, HEADS, P), total


@triton.jit
def _forward_kernel(
    qkv, q_weight, k_weight, cos, sin, q, k, v, B, N, tokens, heads, eps,
    qkv_batch, qkv_token, qkv_part, qkv_head,
    H: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr,
    IMAGES: tl.constexpr, T: tl.constexpr, HEADS: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    NORM: tl.constexpr = q_weight is not None
    program = tl.program_id(0)
    first = program // (tokens * heads) * IMAGES
    token = ((program // heads % tokens) * T + tl.arange(0, T)).to(tl.int64)[:, None, None]
    head = (program % heads) * HEADS + tl.arange(0, HEADS)[None, :, None]
    column = tl.arange(0, 2 * P)[None, None, :]
    inside = (token < N) & (head < H) & (column < D)
    q_scale, k_scale, cos_pair, sin_pair = None, None, None, None
    if NORM:
        q_scale, k_scale = _weight(q_weight, D, P), _weight(k_weight, D, P)
    if cos is not None:
        cos_pair, sin_pair = _table(cos, token, N, D, T, P), _table(sin, token, N, D, T, P)
    for step in range(0, tl.minimum(IMAGES, B - first)):
        image = first.to(tl.int64) + step
        row = image * qkv_batch + token * qkv_token + head * qkv_head
        queries = tl.load(qkv + row * UNIT + column, mask=inside, other=0.0)  # [T, HEADS, 2P]
        row += qkv_part
        keys = tl.load(qkv + row * UNIT + column, mask=inside, other=0.0)
        row += qkv_part
        values = tl.load(qkv + row * UNIT + column, mask=inside, other=0.0)
        target = ((image * N + token) * H + head) * D + column
        tl.store(v + target, values, mask=inside)
        tl.store(q + target, _prepared(queries, q_scale, cos_pair, sin_pair, eps, NORM, D, T, HEADS, P), mask=inside)
        tl.store(k + target, _prepared(keys, k_scale, cos_pair, sin_pair, eps, NORM, D, T, HEADS, P), mask=inside)


@triton.jit
def _store_sums(partial, sums, D: tl.constexpr, P: tl.constexpr):
    """Sum [T, HEADS, P] pairs over tokens and heads and write them as one row [D]."""
    even, odd = tl.sum(tl.sum(sums[0], axis=0), axis=0), tl.sum(tl.sum(sums[1], axis=0), axis=0)  # [P]
    column = tl.arange(0, 2 * P)
    tl.store(partial + column, tl.reshape(tl.join(even, odd), [2 * P]), mask=column < D)


@triton.jit
def _backward_kernel(
    dq, dk, dv, qkv, q_weight, k_weight, cos, sin, dqkv, partials, B, N, tokens, heads, eps,
    dq_batch, dq_token, dq_head, dk_batch, dk_token, dk_head, dv_batch, dv_token, dv_head,
    qkv_batch, qkv_token, qkv_part, qkv_head,
    H: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr,
    IMAGES: tl.constexpr, T: tl.constexpr, HEADS: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    NORM: tl.constexpr = q_weight is not None
    program = tl.program_id(0)
    first = program // (tokens * heads) * IMAGES
    token = ((program // heads % tokens) * T + tl.arange(0, T)).to(tl.int64)[:, None, None]
    head = ((program % heads) * HEADS + tl.arange(0, HEADS)).to(tl.int64)[None, :, None]
    column = tl.arange(0, 2 * P)[None, None, :]
    inside = (token < N) & (head < H) & (column < D)
    q_scale, k_scale, cos_pair, sin_pair = None, None, None, None
    if NORM:
        q_scale, k_scale = _weight(q_weight, D, P), _weight(k_weight, D, P)
        zeros = tl.zeros([T, HEADS, P], tl.float32)
        q_sums, k_sums = (zeros, zeros), (zeros, zeros)
    if cos is not None:
        cos_pair, sin_pair = _table(cos, token, N, D, T, P), _table(sin, token, N, D, T, P)
    for step in range(0, tl.minimum(IMAGES, B - first)):
        image = first.to(tl.int64) + step
        address = (image * dq_batch + token * dq_token + head * dq_head) * UNIT + column
        q_upstream = tl.load(dq + address, mask=inside, other=0.0)
        address = (image * dk_batch + token * dk_token + head * dk_head) * UNIT + column
        k_upstream = tl.load(dk + address, mask=inside, other=0.0)
        address = (image * dv_batch + token * dv_token + head * dv_head) * UNIT + column
        v_upstream = tl.load(dv + address, mask=inside, other=0.0)
        if NORM:
            row = image * qkv_batch + token * qkv_token + head * qkv_head
            queries = tl.load(qkv + row * UNIT + column, mask=inside, other=0.0)
            row += qkv_part
            keys = tl.load(qkv + row * UNIT + column, mask=inside, other=0.0)
        target = dqkv + ((image * N + token) * 3 * H + head) * D + column
        tl.store(target + 2 * H * D, v_upstream, mask=inside)
        if NORM:
            q_gradient, q_sums = _adjoint(q_upstream, queries, q_scale, q_sums, cos_pair, sin_pair, eps, D, T, HEADS, P)
            tl.store(target, q_gradient, mask=inside)
            k_gradient, k_sums = _adjoint(k_upstream, keys, k_scale, k_sums, cos_pair, sin_pair, eps, D, T, HEADS, P)
            tl.store(target + H * D, k_gradient, mask=inside)
        else:
            even, odd = _turned_back(q_upstream, cos_pair, sin_pair, T, HEADS, P)
            tl.store(target, _joined(even, odd, T, HEADS, P), mask=inside)
            even, odd = _turned_back(k_upstream, cos_pair, sin_pair, T, HEADS, P)
            tl.store(target + H * D, _joined(even, odd, T, HEADS, P), mask=inside)
    if NORM:
        partial = partials + program.to(tl.int64) * 2 * D
        _store_sums(partial, q_sums, D, P)
        _store_sums(partial + D, k_sums, D, P)


def _strided(x: Tensor) -> Tensor:
    """x with unit stride in its columns; copied only where it has another."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _units(*tensors: Tensor) -> tuple[int, list[int]]:
    """(UNIT, strides): all strides but the unit ones of the columns, in units of 8 values where 8 divides them.

    The kernels multiply by UNIT again. That is how the compiler learns that addresses are multiples of 16 bytes, even
    for heads of 72.
    """
    strides = [s for x in tensors for s in x.stride()[:-1]]
    unit = 8 if all(s % 8 == 0 for s in strides) else 1
    return unit, [s // unit for s in strides]


def _blocks(kernel: str, B: int, N: int, H: int, D: int, device: torch.device) -> tuple[int, int, int, Configuration]:
    """(programs, blocks of tokens, blocks of heads, the kernel's constants and options)."""
    config = configuration(kernel, CONFIGURATIONS, device)
    tile, columns = config.pop("TILE"), max(2, triton.next_power_of_2(D))
    per_head_block = max(1, min(triton.next_power_of_2(H), tile // columns))
    per_token_block = max(1, min(triton.next_power_of_2(N), tile // (per_head_block * columns)))
    tokens, heads = triton.cdiv(N, per_token_block), triton.cdiv(H, per_head_block)
    constants = {"H": H, "D": D, "T": per_token_block, "HEADS": per_head_block, "P": columns // 2}
    return triton.cdiv(B, config["IMAGES"]) * tokens * heads, tokens, heads, constants | config


@operator("qknorm_rope_triton")
def _forward(
    qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor | None, sin: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    B, N, _, H, D = qkv.shape
    qkv = _strided(qkv)
    vectors = [t if t is None else t.contiguous() for t in (q_weight, k_weight, cos, sin)]
    q, k, v = (torch.empty((B, N, H, D), dtype=qkv.dtype, device=qkv.device) for _ in range(3))
    programs, *blocks, config = _blocks("qknorm_rope_forward", B, N, H, D, qkv.device)
    unit, strides = _units(qkv)
    sizes = (B, N, *blocks, eps, *strides)
    launch(wrap_triton(_forward_kernel), (programs,), qkv, *vectors, q, k, v, *sizes, UNIT=unit, **config)
    return q, k, v


@operator("qknorm_rope_triton_backward")
def _backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    qkv: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
) -> list[Tensor]:
    """dqkv, and with a norm, for which `qkv` is needed, the gradients of its weights."""
    B, N, H, D = dq.shape
    upstream = [_strided(t) for t in (dq, dk, dv)]
    qkv = None if qkv is None else _strided(qkv)
    vectors = [t if t is None else t.contiguous() for t in (q_weight, k_weight, cos, sin)]
    dqkv = torch.empty((B, N, 3, H, D), dtype=dq.dtype, device=dq.device)
    programs, *blocks, config = _blocks("qknorm_rope_backward", B, N, H, D, dq.device)
    unit, strides = _units(*upstream) if qkv is None else _units(*upstream, qkv)
    strides += [0, 0, 0, 0] if qkv is None else []
    partials = None if qkv is None else torch.empty((programs, 2, D), dtype=torch.float32, device=dq.device)
    tensors = (*upstream, qkv, *vectors, dqkv, partials)
    sizes = (B, N, *blocks, eps, *strides)
    launch(wrap_triton(_backward_kernel), (programs,), *tensors, *sizes, UNIT=unit, **config)
    if partials is None:
        return [dqkv]
    assert q_weight is not None and k_weight is not None  # the norm that qkv was kept for
    q_sum, k_sum = partials.sum(0).unbind(0)
    return [dqkv, q_sum.to(q_weight.dtype, copy=True), k_sum.to(k_weight.dtype, copy=True)]


def _keep(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    """Save qkv only where a norm needs it."""
    qkv, q_weight, k_weight, cos, sin, ctx.eps = inputs
    ctx.save_for_backward(None if q_weight is None else qkv, q_weight, k_weight, cos, sin)


def _gradients(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
    dqkv, *weights = _backward(dq, dk, dv, *ctx.saved_tensors, ctx.eps)
    return dqkv, *(weights or (None, None)), None, None, None


_forward.register_autograd(first_derivative_only("qknorm_rope", _gradients), setup_context=_keep)


register("qknorm_rope", triton=_triton.refusal, cpp=_extension.cpu_refusal)


def _check_pair(names: str, pair: tuple[Tensor | None, Tensor | None], shape: list[int], qkv: Tensor) -> None:
    given = [tensor for tensor in pair if tensor is not None]
    if not given:
        return
    if len(given) < len(pair):
        raise ValueError(f"{names}: expected both or none of them")
    for tensor in given:
        if tensor.dtype not in DTYPES or list(tensor.shape) != shape or tensor.device != qkv.device:
            raise ValueError(
                f"{names}: expected floating-point tensors of shape {shape} on {qkv.device} for qkv {list(qkv.shape)}, "
                f"got {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            )


def _unfit(qkv: Tensor, weights: tuple[Tensor | None, ...], tables: tuple[Tensor | None, ...]) -> Unfit:
    if torch.is_grad_enabled() and any(table is not None and table.requires_grad for table in tables):
        return tuple((name, "the gradient of the tables is for the reference") for name in ("triton", "cpp"))
    if any(tensor is not None and tensor.dtype == torch.float64 for tensor in (qkv, *weights, *tables)):
        return (("triton", "fp64 is for the reference"),)
    if qkv.shape[-1] > MAX_HEAD_WIDTH:
        return (("triton", f"heads wider than {MAX_HEAD_WIDTH} do not fit in the registers"),)
    return ()


def qknorm_rope(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    *,
    eps: float = 1e-6,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v for attention from the packed projection; formulas in the module's docstring.

    Args:
        qkv: [B, N, 3, H, D] without a zero, bf16, fp16, fp32 or fp64, best with unit stride in D.
        q_weight: scales of q's norm [D] in any of the dtypes. None, together with `k_weight`: no norm.
        k_weight: of k's norm, as `q_weight`.
        cos: table [N, D], D even. None, together with `sin`: no rotation. Only the reference differentiates
            the tables: a gradient wanted there selects it.
        sin: table [N, D].
        eps: >= 0, added to the mean square.
        implementation: "auto", "triton", "cpp" or "reference"; None follows `use_implementation` and
            ALIGNTOK_KERNELS.

    Returns:
        q, k, v [B, N, H, D] in qkv's dtype: contiguous from Triton, as attention kernels want them, and with the
        heads outside in memory from C++, as batched matrix products do. Their gradients may have any strides. Both
        differentiate once.

    Raises:
        ValueError: a shape, dtype or device does not fit; one of a pair is missing; an odd D with tables;
            `implementation` is unknown or cannot run here.
    """
    check_dtype("qkv", qkv.dtype)
    if qkv.ndim != 5 or qkv.shape[2] != 3 or qkv.numel() == 0:
        raise ValueError(f"qkv: expected shape [B, N, 3, H, D] without a zero, got {list(qkv.shape)}")
    N, D = qkv.shape[1], qkv.shape[4]
    _check_pair("q_weight and k_weight", (q_weight, k_weight), [D], qkv)
    _check_pair("cos and sin", (cos, sin), [N, D], qkv)
    if cos is not None and D % 2:
        raise ValueError(f"qkv: expected an even head width to rotate, got {D}")
    if not eps >= 0:
        raise ValueError(f"eps: expected a number >= 0, got {eps}")
    unfit = _unfit(qkv, (q_weight, k_weight), (cos, sin))
    name = select("qknorm_rope", qkv.device.type, implementation, unfit)
    if name == "triton":
        return _forward(qkv, q_weight, k_weight, cos, sin, eps)
    if name == "cpp":
        return torch.ops.aligntok.qknorm_rope.default(qkv, q_weight, k_weight, cos, sin, eps)
    return qknorm_rope_reference(qkv, q_weight, k_weight, cos, sin, eps)
