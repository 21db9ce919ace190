"""The flow-matching loss of a predicted velocity, with its gradient written in the same pass.

For a prediction v [B, d, h, w], data z_0 of the same shape and the key [2] that stands for the noise z_1 (`_philox`),

    u = z_1 - z_0                                                        the target velocity
    mse = mean (v - u)^2
    direction = mean_p (1 - cos_p),   cos_p = <v, u> / (max(|v|, eps) max(|u|, eps))      over channels, at each pixel p
    loss = mse + w direction
    dloss/dv = (2 (v - u) - w d (u / |u| - cos_p v / |v|) / |v|) / (B d h w)

(arXiv 2509.25162 for the target, LightningDiT's transport.py for the direction; eps = 1e-8 as in F.cosine_similarity).
Arithmetic is fp32, fp64 for fp64 input. The forward pass reads v and z_0 once, draws the noise again and writes the
gradient without its last factor, which would underflow in fp16; the backward pass multiplies by that and by the
gradient of the loss. Partial sums are written per program and added in a fixed order.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _latents, _triton
from ._dispatch import first_derivative_only, register, select
from ._latents import planes, strides, tiling
from ._philox import check_key, flow_noise, noise_tile
from ._triton import configuration, launch, operator, tl, triton, wrap_triton

EPSILON = 1e-8  # default of F.cosine_similarity
# 2048 numbers a program: 16 a thread for v and for the target, both alive until the cosine is known.
CONFIGURATIONS = _latents.configurations(2048)
# 2048 numbers a program of the backward pass: two 16-byte loads a thread in bf16.
SCALE_CONFIGURATIONS = {arch: {"BLOCK": 2048, "num_warps": 4, "num_stages": 1} for arch in _triton.ARCHITECTURES}


def flow_loss_reference(
    velocity: Tensor, data: Tensor, key: Tensor, direction_weight: float, first_image: int = 0
) -> tuple[Tensor, Tensor]:
    """Loss [] and parts [2] (mse, direction) in plain PyTorch; see `flow_loss`."""
    wide = torch.float64 if torch.float64 in (velocity.dtype, data.dtype) else torch.float32
    velocity, target = velocity.to(wide), flow_noise(key, data.shape, first_image).to(wide) - data.to(wide)
    mse = (velocity - target).square().mean()  # F.mse_loss's gradient has no forward mode
    direction = (1 - F.cosine_similarity(velocity, target, dim=1, eps=EPSILON)).mean()
    return mse + direction_weight * direction, torch.stack([mse, direction]).detach()


@triton.jit
def _loss_kernel(
    velocity, data, key, gradient, partials, first_image, d, P, per_number, per_pixel, direction_weight, pull,
    v_image, v_channel, v_pixel, data_image, data_channel, data_pixel, g_image, g_channel, g_pixel,
    EPSILON: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(P, BLOCK_P)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    pixel = (tl.program_id(0) % blocks) * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    channel = tl.arange(0, BLOCK_C)[None, :]
    inside = (pixel < P) & (channel < d)
    source = velocity + image * v_image + channel * v_channel + pixel * v_pixel
    v = tl.load(source, mask=inside, other=0.0).to(tl.float32)  # [BLOCK_P, BLOCK_C]
    source = data + image * data_image + channel * data_channel + pixel * data_pixel
    clean = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    u = tl.where(inside, noise_tile(key, first_image + image, pixel, P, BLOCK_P, BLOCK_C) - clean, 0.0)

    v_squared = tl.sum(v * v, axis=1, keep_dims=True)  # [BLOCK_P, 1]
    v_inverse = tl.rsqrt(tl.maximum(v_squared, EPSILON * EPSILON))  # 1 / max(|v|, eps)
    u_inverse = tl.rsqrt(tl.maximum(tl.sum(u * u, axis=1, keep_dims=True), EPSILON * EPSILON))
    cosine = tl.sum(v * u, axis=1, keep_dims=True) * v_inverse * u_inverse
    along_u = pull * u_inverse * v_inverse
    along_v = pull * cosine * v_inverse * tl.rsqrt(tl.maximum(v_squared, 1e-37))  # times v: 0 where v is
    difference = v - u
    target = gradient + image * g_image + channel * g_channel + pixel * g_pixel
    tl.store(target, 2 * difference - along_u * u + along_v * v, mask=inside)

    mse = tl.sum(difference * difference) * per_number
    direction = tl.sum(tl.where(pixel < P, 1 - cosine, 0.0)) * per_pixel
    row = partials + tl.program_id(0) * 3
    tl.store(row, mse + direction_weight * direction)
    tl.store(row + 1, mse)
    tl.store(row + 2, direction)


@triton.jit
def _scale_kernel(gradient, dloss, dv, numel, per_number, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < numel
    factor = tl.load(dloss) * per_number
    tl.store(dv + index, tl.load(gradient + index, mask=inside, other=0.0).to(tl.float32) * factor, mask=inside)


@operator("flow_loss_triton")
def _forward(
    velocity: Tensor, data: Tensor, key: Tensor, direction_weight: float, first_image: int
) -> tuple[Tensor, Tensor, Tensor]:
    v, source, key = planes(velocity), planes(data), key.contiguous()
    gradient = torch.empty_like(v)  # dense, in v's order of strides
    grid, meta = tiling(configuration("flow_loss", CONFIGURATIONS, velocity.device), v)
    partials = torch.empty((*grid, 3), dtype=torch.float32, device=velocity.device)
    d, P = v.shape[1:]
    per_number, per_pixel = 1 / v.numel(), d / v.numel()
    numbers = (first_image, d, P, per_number, per_pixel, direction_weight, direction_weight * d)
    sizes = (*numbers, *strides(v), *strides(source), *strides(gradient))
    launch(wrap_triton(_loss_kernel), grid, v, source, key, gradient, partials, *sizes, EPSILON=EPSILON, **meta)
    return partials[:, 0].sum(), partials[:, 1:].sum(0), gradient.unflatten(2, velocity.shape[2:])


@operator("flow_loss_triton_backward")
def _backward(gradient: Tensor, dloss: Tensor) -> Tensor:
    dv = torch.empty_like(gradient)
    config = configuration("flow_loss_backward", SCALE_CONFIGURATIONS, gradient.device)
    numel = gradient.numel()
    grid = (triton.cdiv(numel, config["BLOCK"]),)
    launch(wrap_triton(_scale_kernel), grid, gradient, dloss, dv, numel, 1 / numel, **config)
    return dv


def _save(ctx, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, parts, gradient = output
    ctx.mark_non_differentiable(parts, gradient)
    ctx.set_materialize_grads(False)  # or autograd fills a tensor of zeros for the saved gradient's own gradient
    ctx.save_for_backward(gradient)


def _velocity_gradient(ctx, dloss: Tensor, _dparts: None, _dgradient: None) -> tuple[Tensor, None, None, None, None]:
    return _backward(*ctx.saved_tensors, dloss), None, None, None, None


_forward.register_autograd(first_derivative_only("flow_loss", _velocity_gradient), setup_context=_save)
register("flow_loss", triton=_triton.refusal)


def flow_loss(
    velocity: Tensor,
    data: Tensor,
    key: Tensor,
    direction_weight: float,
    *,
    first_image: int = 0,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean squared error of a predicted velocity, and of its direction; formulas in the module's docstring.

    Args:
        velocity: prediction v [B, d, h, w], bf16, fp16, fp32 or fp64; strides are free, channels-last is read as it is.
        data: z_0 like velocity, of any of these dtypes.
        key: [2] int64 on their device: that of `flow_interpolate`.
        direction_weight: w; 0 leaves the direction term out of the loss.
        first_image: number of the first image in its batch, as in `flow_interpolate`.
        implementation: "auto", "triton" or "reference"; None follows `use_implementation` and ALIGNTOK_KERNELS.

    Returns:
        loss [] and parts [2] (mse, direction), fp32 (fp64 for fp64 input). Only the loss carries a gradient. The
        Triton implementation differentiates velocity, once; a gradient wanted of data selects the reference.

    Raises:
        ValueError: an unsupported shape or dtype; different shapes or devices; `implementation` is unknown or cannot
            run here.
    """
    _latents.check("velocity", velocity)
    _latents.check("data", data, velocity.shape)
    check_key(key, data.device)
    if velocity.device != data.device:
        raise ValueError(f"velocity and data: expected one device, got {velocity.device} and {data.device}")
    unfit = _latents.unfit(data.shape[1], (velocity, data), (data,))
    if select("flow_loss", data.device.type, implementation, unfit) == "triton":
        return _forward(velocity, data, key, direction_weight, first_image)[:2]
    return flow_loss_reference(velocity, data, key, direction_weight, first_image)
