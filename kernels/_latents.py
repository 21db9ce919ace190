"""Latents [B, d, h, w] as the flow kernels address them: [B, d, P] with one stride each, in tiles of pixels x channels.

A generator with patch size 1 gives its velocity channels-last (its tokens are rows of channels), while the latents lie
channel by channel. Both are read where they are: a tile holds some pixels and all channels, and what lies the other way
is turned around on chip.
"""

import torch
from torch import Tensor

from . import _triton
from ._dtypes import DTYPES, check_dtype
from ._triton import Configuration, triton

LIMIT = 4096  # channels of one tile: 32 numbers a thread at 4 warps with a single pixel, the most that fits registers


def configurations(tile: int) -> dict[int, Configuration]:
    """The same on both architectures: the kernels are bound by memory and have no dot."""
    return {arch: {"TILE": tile, "num_warps": 4, "num_stages": 1} for arch in _triton.ARCHITECTURES}


def planes(x: Tensor) -> Tensor:
    """x [B, d, h, w] as [B, d, P]; copied only where its rows of pixels cannot be strung together."""
    return x.flatten(2)


def strides(x: Tensor) -> tuple[int, int, int]:
    """(image, channel, pixel) strides of x [B, d, P], with those of single pixels and channels put right.

    A dimension of size 1 may carry any stride; 1 tells Triton most.
    """
    image, channel, pixel = x.stride()
    return image, channel if x.shape[1] > 1 else 1, pixel if x.shape[2] > 1 else 1


def tiling(config: Configuration, x: Tensor) -> tuple[tuple[int], dict[str, int]]:
    """(grid, meta-parameters) for tiles of about TILE numbers of x [B, d, P]: programs take pixels, image by image."""
    B, d, P = x.shape
    tile = config.pop("TILE")
    channels = max(4, triton.next_power_of_2(d))  # noise is drawn four channels at a time
    pixels = max(1, min(tile // channels, triton.next_power_of_2(P)))
    return (B * triton.cdiv(P, pixels),), {"BLOCK_P": pixels, "BLOCK_C": channels, **config}


def check(name: str, x: Tensor, shape: torch.Size | None = None, dtypes: tuple[torch.dtype, ...] = DTYPES) -> None:
    """Raise ValueError unless x is [B, d, h, w] without a zero, of the given shape and of an accepted dtype."""
    check_dtype(name, x.dtype, dtypes)
    if x.ndim != 4 or x.numel() == 0:
        raise ValueError(f"{name}: expected shape [B, d, h, w] without a zero, got {list(x.shape)}")
    if shape is not None and x.shape != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(x.shape)}")


def unfit(channels: int, tensors: tuple[Tensor, ...], constants: tuple[Tensor, ...]) -> tuple[tuple[str, str], ...]:
    """Reasons against Triton that all three operators share: fp64, too many channels, a gradient that it lacks.

    Args:
        channels: d.
        tensors: floating-point inputs.
        constants: those of them that only the reference differentiates.
    """
    reasons = []
    if any(x.dtype == torch.float64 for x in tensors):
        reasons.append("fp64 is for the reference")
    if channels > LIMIT:
        reasons.append(f"{channels} channels: its tiles hold at most {LIMIT}")
    if torch.is_grad_enabled() and any(x.requires_grad for x in constants):
        reasons.append("an input requires a gradient that only the reference gives")
    return (("triton", "; ".join(reasons)),) if reasons else ()
