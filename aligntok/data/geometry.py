"""Crops: the geometry that every loader of the project shares.

center_crop: ADM's (guided-diffusion image_datasets.py): halve by box filter while the short side is at least twice the
             target, bicubic to the target, cut the middle. Latents, evaluation and generators use it.
random_crop: short side to the target (bicubic), random position. Tokenizer training uses it (taming data/base.py).
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """RGB picture -> size x size."""
    while min(image.size) >= 2 * size:
        image = image.resize((max(1, image.width // 2), max(1, image.height // 2)), Image.Resampling.BOX)
    image = _short_side(image, size)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def random_crop(image: Image.Image, size: int, u: float, v: float) -> Image.Image:
    """RGB picture -> size x size at the relative position (u, v) in [0, 1), left to right and top to bottom."""
    image = _short_side(image, size)
    left, top = int(u * (image.width - size + 1)), int(v * (image.height - size + 1))
    return image.crop((left, top, left + size, top + size))


def to_tensor(image: Image.Image) -> Tensor:
    """RGB picture -> uint8 [3, H, W]."""
    return torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1)


def to_unit_range(images: Tensor) -> Tensor:
    """uint8 [..., 3, H, W] -> float32 in [-1, 1]."""
    return images.float().div(127.5).sub(1)


def _short_side(image: Image.Image, size: int) -> Image.Image:
    scale = size / min(image.size)
    return image.resize(
        (max(size, round(image.width * scale)), max(size, round(image.height * scale))),
        Image.Resampling.BICUBIC,
    )
