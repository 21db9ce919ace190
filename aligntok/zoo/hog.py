"""Histograms of oriented gradients, one of the features that MAETok's shallow decoders predict.

Central differences per colour channel (0 at the border), their direction without sign in 9 bins over 180 degrees, their
length added up per bin over cells of 8 x 8 px, each cell's histogram divided by its length: Dalal and Triggs 2005 with
blocks of one cell. A patch of 16 px has 2 x 2 cells x 9 bins x 3 channels = 108 numbers, as in MaskFeat, whose Sobel
filter and Gaussian window are left out here: in this form the numbers are those of scikit-image's `hog`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from aligntok.errors import UserError

BINS = 9
CELL = 8  # px
EPS = 1e-5  # under the root of a cell's norm, squared, as in scikit-image


def hog(images: Tensor, patch_size: int = 16) -> Tensor:
    """Images [B, 3, H, W] in [-1, 1] -> [B, N, 3 * (patch_size / 8)^2 * 9], float32, rows of patches first.

    Within a patch: channel, row and column of the cell, bin.
    """
    if patch_size % CELL or images.shape[-2] % patch_size or images.shape[-1] % patch_size:
        raise UserError(
            f"HOG needs sides that are multiples of patch_size = {patch_size} and this one of {CELL} px, "
            f"got {list(images.shape[-2:])}"
        )
    images = (images.float() + 1) / 2
    rows, columns = torch.zeros_like(images), torch.zeros_like(images)
    rows[..., 1:-1, :] = images[..., 2:, :] - images[..., :-2, :]
    columns[..., 1:-1] = images[..., 2:] - images[..., :-2]
    angle = torch.rad2deg(torch.atan2(rows, columns)) % 180.0
    bins = (angle * (BINS / 180)).long().clamp_(max=BINS - 1)
    lengths = torch.hypot(rows, columns)
    weights = torch.zeros(*images.shape, BINS, device=images.device).scatter_(-1, bins[..., None], lengths[..., None])
    cells = F.avg_pool2d(weights.permute(0, 1, 4, 2, 3).flatten(1, 2), CELL)  # [B, 3 * 9, H/8, W/8]
    cells = cells.unflatten(1, (images.shape[1], BINS))
    cells = cells / (cells.square().sum(2, keepdim=True) + EPS**2).sqrt()
    side = patch_size // CELL
    grid = (images.shape[-2] // patch_size, side, images.shape[-1] // patch_size, side)
    parts = cells.reshape(len(images), images.shape[1], BINS, *grid)
    return parts.permute(0, 3, 5, 1, 4, 6, 2).reshape(len(images), grid[0] * grid[2], -1)


def hog_width(patch_size: int) -> int:
    """Numbers per patch."""
    return 3 * math.prod((patch_size // CELL,) * 2) * BINS
