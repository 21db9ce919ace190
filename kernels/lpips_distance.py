"""One layer of LPIPS: the weighted squared difference of two channel-normalised feature maps.

For fx, fy [B, C, H, W] and head [C], with |f| the norm over the channels of a pixel,

    u = f / (|f| + 1e-10)
    distance = mean over H, W of  sum_c head_c (ux_c - uy_c)^2                                  [B]
    dfx = (g - (f / |f|) sum_c g_c ux_c) / (|f| + 1e-10),  g = 2 head (ux - uy) ddistance / (H W)

(Zhang et al. 2018, arXiv 1801.03924, equation 1.) f / |f| counts as 0 for the zero vector. Arithmetic is fp32, fp64 for
fp64 features. Forward reads both maps once and writes partial sums, added up in fixed order; backward reads both maps
once, computes the norms again and writes dfx, and dfy only if it is wanted: nothing else is saved. The Triton
implementation does so on GPUs, the C++ one on CPUs.
"""

import torch
from torch import Tensor

from . import _extension, _triton
from ._dispatch import first_derivative_only, register, select
from ._dtypes import DTYPES, short
from ._triton import configuration, launch, operator, tl, triton, wrap_triton

EPSILON = 1e-10  # added to the norm, as in the `lpips` package (normalize_tensor)
# Whole pixels per program, TILE values of each map: 32 a thread, four 16-byte loads from each map in bf16. One pixel
# has to fit, so more channels than TILE make the tile larger.
CONFIGURATIONS = {arch: {"TILE": 4096, "num_warps": 4, "num_stages": 1} for arch in _triton.ARCHITECTURES}


def lpips_distance_reference(fx: Tensor, fy: Tensor, head: Tensor) -> Tensor:
    """The distance in plain PyTorch; see `lpips_distance`. vector_norm has gradient 0 at 0, where sqrt(sum of squares)
    would give NaN."""
    wide = torch.float64 if fx.dtype == torch.float64 else torch.float32
    fx, fy, head = fx.to(wide), fy.to(wide), head.to(wide)
    fx = fx / (torch.linalg.vector_norm(fx, dim=1, keepdim=True) + EPSILON)
    fy = fy / (torch.linalg.vector_norm(fy, dim=1, keepdim=True) + EPSILON)
    return torch.einsum("bchw,c->bhw", (fx - fy).square(), head).mean(dim=(1, 2))


@triton.jit
def _tile(P, C, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """The image of a program; start, offsets and mask of its ROWS whole pixels; the channels."""
    chunks = tl.cdiv(P, ROWS)
    image = (tl.program_id(0) // chunks).to(tl.int64)
    first = tl.program_id(0) % chunks * ROWS
    row, channel = tl.arange(0, ROWS), tl.arange(0, CHANNELS)
    offset = row[:, None] * C + channel[None, :]
    inside = (row < P - first)[:, None] & (channel < C)[None, :]
    return image, (image * P + first) * C, offset, inside, channel


@triton.jit
def _norm(f):
    return tl.sqrt(tl.sum(f * f, 1))[:, None]


@triton.jit
def _gradient(f, u, norm, g, epsilon):
    """Of f, given g, that of u = f / (norm + epsilon). At the zero vector the norm has gradient 0."""
    direction = f * (1 / tl.where(norm > 0, norm, 1.0))
    return (g - direction * tl.sum(g * u, 1)[:, None]) * (1 / (norm + epsilon))


@triton.jit
def _forward_kernel(fx, fy, head, partials, P, C, epsilon, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    _, start, offset, inside, channel = _tile(P, C, ROWS, CHANNELS)
    x = tl.load(fx + start + offset, mask=inside, other=0.0).to(tl.float32)  # [ROWS, CHANNELS]
    y = tl.load(fy + start + offset, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(head + channel, mask=channel < C, other=0.0).to(tl.float32)[None, :]
    difference = x * (1 / (_norm(x) + epsilon)) - y * (1 / (_norm(y) + epsilon))
    tl.store(partials + tl.program_id(0), tl.sum(w * difference * difference) / P)


@triton.jit
def _backward_kernel(
    fx,
    fy,
    head,
    upstream,
    dfx,
    dfy,
    P,
    C,
    epsilon,
    upstream_stride,
    BOTH: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    image, start, offset, inside, channel = _tile(P, C, ROWS, CHANNELS)
    x = tl.load(fx + start + offset, mask=inside, other=0.0).to(tl.float32)  # [ROWS, CHANNELS]
    y = tl.load(fy + start + offset, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(head + channel, mask=channel < C, other=0.0).to(tl.float32)[None, :]
    x_norm, y_norm = _norm(x), _norm(y)
    ux, uy = x * (1 / (x_norm + epsilon)), y * (1 / (y_norm + epsilon))
    g = 2 * (tl.load(upstream + image * upstream_stride) / P) * w * (ux - uy)
    tl.store(dfx + start + offset, _gradient(x, ux, x_norm, g, epsilon), mask=inside)
    if BOTH:
        tl.store(dfy + start + offset, _gradient(y, uy, y_norm, -g, epsilon), mask=inside)


def _blocks(f: Tensor) -> tuple[dict, int]:
    """ROWS, CHANNELS and options; the number of programs for one image."""
    config = configuration("lpips_distance", CONFIGURATIONS, f.device)
    channels = triton.next_power_of_2(int(f.shape[1]))
    rows = max(1, config.pop("TILE") // channels)
    return {"ROWS": rows, "CHANNELS": channels, **config}, triton.cdiv(f.shape[2] * f.shape[3], rows)


@operator("lpips_distance_triton")
def _forward(fx: Tensor, fy: Tensor, head: Tensor) -> Tensor:
    fx, fy = (f.contiguous(memory_format=torch.channels_last) for f in (fx, fy))
    B, C, P = fx.shape[0], fx.shape[1], fx.shape[2] * fx.shape[3]
    config, chunks = _blocks(fx)
    partials = torch.empty(B, chunks, dtype=torch.float32, device=fx.device)
    arguments = (fx, fy, head.contiguous(), partials, P, C, EPSILON)
    launch(wrap_triton(_forward_kernel), (B * chunks,), *arguments, **config)
    return partials.sum(1)


@operator("lpips_distance_triton_backward")
def _backward(fx: Tensor, fy: Tensor, head: Tensor, upstream: Tensor, both: bool) -> list[Tensor]:
    """[dfx], or [dfx, dfy] if both are wanted."""
    fx, fy = (f.contiguous(memory_format=torch.channels_last) for f in (fx, fy))
    B, C, P = fx.shape[0], fx.shape[1], fx.shape[2] * fx.shape[3]
    config, chunks = _blocks(fx)
    gradients = [torch.empty_like(f, memory_format=torch.channels_last) for f in ((fx, fy) if both else (fx,))]
    arguments = (fx, fy, head.contiguous(), upstream, gradients[0], gradients[-1], P, C, EPSILON, upstream.stride(0))
    launch(wrap_triton(_backward_kernel), (B * chunks,), *arguments, BOTH=both, **config)
    return gradients


def _gradients(ctx, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    both = ctx.needs_input_grad[1]
    dfx, *dfy = _backward(*ctx.saved_tensors, upstream, both)
    return dfx, dfy[0] if both else None, None


_forward.register_autograd(
    first_derivative_only("lpips_distance", _gradients),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)
register("lpips_distance", triton=_triton.refusal, cpp=_extension.cpu_refusal)


def _check(fx: Tensor, fy: Tensor, head: Tensor) -> None:
    if fx.dtype not in DTYPES or fy.dtype != fx.dtype:
        accepted = ", ".join(map(short, DTYPES))
        raise ValueError(f"fx, fy: expected one dtype of {accepted}, got {fx.dtype} and {fy.dtype}")
    if fx.ndim != 4 or fy.shape != fx.shape or fx.numel() == 0:
        shapes = f"{list(fx.shape)} and {list(fy.shape)}"
        raise ValueError(f"fx, fy: expected two equal shapes [B, C, H, W] without a zero, got {shapes}")
    if head.shape != fx.shape[1:2] or not head.is_floating_point():
        raise ValueError(f"head: expected floating-point numbers [{fx.shape[1]}], got {head.dtype} {list(head.shape)}")
    if not fx.device == fy.device == head.device:
        raise ValueError(f"expected all on one device, got {fx.device}, {fy.device} and {head.device}")


def lpips_distance(fx: Tensor, fy: Tensor, head: Tensor, *, implementation: str | None = None) -> Tensor:
    """The distance of two feature maps, per image; formulas in the module's docstring.

    Args:
        fx: [B, C, H, W] without empty dimensions, bf16, fp16, fp32 or fp64, best in channels-last memory; other layouts
            are copied into it.
        fy: like fx, with its dtype. Either may go without a gradient, which then is not computed.
        head: [C], any floating-point dtype. Its gradient is for the reference.
        implementation: "auto", "triton", "cpp" or "reference"; None follows `use_implementation` and ALIGNTOK_KERNELS.

    Returns:
        distances [B], fp32 (fp64 for fp64 features). Triton and C++ implementations differentiate once. In fp16 the
        gradient at a zero vector, which is divided by 1e-10, can pass the largest number and become infinite.

    Raises:
        ValueError: a shape, dtype or device does not fit; `implementation` is unknown or cannot run here.
    """
    _check(fx, fy, head)
    reason = None
    if fx.dtype == torch.float64 or head.dtype == torch.float64:
        reason = "fp64 is for the reference"
    elif head.requires_grad and torch.is_grad_enabled():
        reason = "the gradient of head is for the reference"
    unfit = tuple((name, reason) for name in ("triton", "cpp") if reason)
    name = select("lpips_distance", fx.device.type, implementation, unfit)
    if name == "reference":
        return lpips_distance_reference(fx, fy, head)
    fx, fy = (f.contiguous(memory_format=torch.channels_last) for f in (fx, fy))
    if fy.requires_grad and not fx.requires_grad:
        fx, fy = fy, fx  # symmetric, and the first one's gradient is always computed
    return _forward(fx, fy, head) if name == "triton" else torch.ops.aligntok.lpips_distance.default(fx, fy, head)
