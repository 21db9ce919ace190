"""Crops: the geometry that every loader of the project shares.

center_crop: ADM's (guided-diffusion image_datasets.py): halve by box filter while the short side is at least twice the
             target, bicubic to the target, cut the middle. Latents, evaluation and generators use it.
random_crop: short side to the target (bicubic), random position. Tokenizer training uses it (taming data/base.py).

Both are a `Window`, a few numbers that a loader can hand to whatever resizes for it. A size is a side of squares, or
(height, width): then the picture is made to cover it, with the same filters, and what is beyond is cut off.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from aligntok.errors import UserError, near_multiples

Size = tuple[int, int]  # height and width in pixels


def check_size(size: int, factor: int, name: str = "data.image_size") -> None:
    """Raise UserError unless images of that side are a whole number of the downsampling `factor`; `name` is its key."""
    if size < factor or size % factor:
        raise UserError(
            f"{name} is {size}, expected a multiple of the tokenizer's downsampling {factor}: "
            f"use {near_multiples(size, factor)}"
        )


@dataclass(frozen=True)
class Window:
    """A crop: halve by box filter `halvings` times, resize to (width, height) by bicubic, cut `size` there."""

    halvings: int
    width: int
    height: int
    left: int
    top: int
    size: Size


def center_window(width: int, height: int, size: int | Size) -> Window:
    """ADM's centre crop of a picture of this width and height."""
    high, wide = _pair(size)
    halvings = 0
    while width >= 2 * wide and height >= 2 * high:
        width, height, halvings = width // 2, height // 2, halvings + 1
    width, height = _cover(width, height, high, wide)
    return Window(halvings, width, height, (width - wide) // 2, (height - high) // 2, (high, wide))


def random_window(width: int, height: int, size: int | Size, u: float, v: float) -> Window:
    """The crop at the relative position (u, v) in [0, 1), left to right and top to bottom."""
    high, wide = _pair(size)
    width, height = _cover(width, height, high, wide)
    return Window(0, width, height, int(u * (width - wide + 1)), int(v * (height - high + 1)), (high, wide))


def window(kind: str, width: int, height: int, size: int | Size, u: float, v: float) -> Window:
    """The crop named "random" or "center"; (u, v) are for the random one."""
    return random_window(width, height, size, u, v) if kind == "random" else center_window(width, height, size)


def cut(image: Image.Image, place: Window) -> Image.Image:
    """RGB picture -> its crop. Only the crop's region is resized: a strip of 60,000 x 1 px costs no more."""
    for _ in range(place.halvings):
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    across, down = image.width / place.width, image.height / place.height
    high, wide = place.size
    right, bottom = place.left + wide, place.top + high
    region = (place.left * across, place.top * down, min(right * across, image.width), min(bottom * down, image.height))
    return image.resize((wide, high), Image.Resampling.BICUBIC, region)


def center_crop(image: Image.Image, size: int | Size) -> Image.Image:
    """RGB picture -> its middle."""
    return cut(image, center_window(*image.size, size))


def random_crop(image: Image.Image, size: int, u: float, v: float) -> Image.Image:
    """RGB picture -> size x size at the relative position (u, v) in [0, 1), left to right and top to bottom."""
    return cut(image, random_window(*image.size, size, u, v))


def to_tensor(image: Image.Image) -> Tensor:
    """RGB picture -> uint8 [3, H, W]."""
    return torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1)


def to_unit_range(images: Tensor) -> Tensor:
    """uint8 [..., 3, H, W] -> float32 in [-1, 1]."""
    return images.float().div(127.5).sub(1)


def _pair(size: int | Size) -> Size:
    return (size, size) if isinstance(size, int) else size


def _cover(width: int, height: int, high: int, wide: int) -> tuple[int, int]:
    """(width, height) scaled until both sides reach (wide, high); of a square that is the short side."""
    scale = max(wide / width, high / height)
    return max(wide, round(width * scale)), max(high, round(height * scale))
