"""The noisy latent of flow matching, its noise drawn on the spot.

For data z_0 [B, d, h, w], times t [B] and a key [2] that stands for the noise z_1 ~ N(0, I) (`_philox`),

    z_t = (1 - t) z_0 + t z_1                                          [B, d, h, w]

in the paper's direction (arXiv 2509.25162, section 3: t = 1 is noise). Arithmetic is fp32, fp64 for fp64 data. z_0 is
read once and z_t written once, in the dtype that the network wants; the noise is never stored: `flow_loss` draws it
again from the same key.
"""

import torch
from torch import Tensor

from . import _latents, _triton
from ._dispatch import register, select
from ._dtypes import DTYPES
from ._latents import planes, strides, tiling
from ._philox import check_key, flow_noise, noise_tile
from ._triton import configuration, launch, operator, tl, triton, wrap_triton

# 2048 numbers a program: 16 a thread, which leaves room for Philox and fills the device at a batch of 64.
CONFIGURATIONS = _latents.configurations(2048)


def flow_interpolate_reference(
    data: Tensor, t: Tensor, key: Tensor, dtype: torch.dtype | None = None, first_image: int = 0
) -> Tensor:
    """(1 - t) data + t noise in plain PyTorch; see `flow_interpolate`."""
    wide = torch.float64 if data.dtype == torch.float64 else torch.float32
    noise = flow_noise(key, data.shape, first_image).to(wide)
    return torch.lerp(data.to(wide), noise, t.to(wide).view(-1, 1, 1, 1)).to(dtype or data.dtype)


@triton.jit
def _kernel(
    data, t, key, z, first_image, d, P, data_image, data_channel, data_pixel, z_image, z_channel, z_pixel,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(P, BLOCK_P)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    pixel = (tl.program_id(0) % blocks) * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    channel = tl.arange(0, BLOCK_C)[None, :]
    inside = (pixel < P) & (channel < d)
    source = data + image * data_image + channel * data_channel + pixel * data_pixel
    clean = tl.load(source, mask=inside, other=0.0).to(tl.float32)  # [BLOCK_P, BLOCK_C]
    time = tl.load(t + image).to(tl.float32)
    noise = noise_tile(key, first_image + image, pixel, P, BLOCK_P, BLOCK_C)
    target = z + image * z_image + channel * z_channel + pixel * z_pixel
    tl.store(target, (1 - time) * clean + time * noise, mask=inside)


@operator("flow_interpolate_triton")
def _interpolate(data: Tensor, t: Tensor, key: Tensor, dtype: torch.dtype, first_image: int) -> Tensor:
    source, key = planes(data), key.contiguous()
    z = torch.empty_like(source, dtype=dtype)
    grid, meta = tiling(configuration("flow_interpolate", CONFIGURATIONS, data.device), source)
    sizes = (first_image, *source.shape[1:], *strides(source), *strides(z))
    launch(wrap_triton(_kernel), grid, source, t.contiguous(), key, z, *sizes, **meta)
    return z.unflatten(2, data.shape[2:])


register("flow_interpolate", triton=_triton.refusal)


def flow_interpolate(
    data: Tensor,
    t: Tensor,
    key: Tensor,
    *,
    dtype: torch.dtype | None = None,
    first_image: int = 0,
    implementation: str | None = None,
) -> Tensor:
    """(1 - t) data + t noise; formula in the module's docstring.

    Args:
        data: z_0 [B, d, h, w], bf16, fp16, fp32 or fp64; strides are free.
        t: [B] in [0, 1], any floating-point dtype; 1 is noise.
        key: [2] int64 on data's device, see `noise_key`.
        dtype: of the result, floating point; None: data's.
        first_image: number of the first image in the batch that the noise is drawn for, where data is a part of it.
        implementation: "auto", "triton" or "reference"; None follows `use_implementation` and ALIGNTOK_KERNELS.

    Returns:
        z_t [B, d, h, w]. Only the reference differentiates (data and t): a gradient wanted there selects it.

    Raises:
        ValueError: an unsupported shape or dtype; a key or times of another shape or device; `implementation` is
            unknown or cannot run here.
    """
    _latents.check("data", data)
    check_key(key, data.device)
    if t.shape != data.shape[:1] or not t.is_floating_point() or t.device != data.device:
        raise ValueError(
            f"t: expected [{data.shape[0]}] floating-point times on {data.device}, "
            f"got {list(t.shape)} {t.dtype} on {t.device}"
        )
    dtype = dtype or data.dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected a floating-point dtype, got {dtype}")
    unfit = _latents.unfit(data.shape[1], (data, t), (data, t))
    if select("flow_interpolate", data.device.type, implementation, unfit) == "triton":
        return _interpolate(data, t, key, dtype, first_image)
    return flow_interpolate_reference(data, t, key, dtype, first_image)
