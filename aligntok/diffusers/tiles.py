"""Large pictures in tiles that overlap, blended linearly where they do."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor


def in_tiles(function: Callable[[Tensor], Tensor], x: Tensor, grid: tuple[int, int], tile: int, overlap: int) -> Tensor:
    """`function` of tiles of `x`, put together.

    Args:
        function: maps [B, C, a * h, a * w] to [B, C', b * h, b * w] for some whole a and b, the same for all sizes.
        x: [B, C, a * H, a * W].
        grid: (H, W): the cells that a tile's corners are counted in.
        tile: cells along a side of a tile.
        overlap: cells that neighbours share, less than `tile`.
    """
    step = x.shape[-1] // grid[1]
    total: Tensor | None = None
    weights = torch.zeros(())
    for top, left in product(*(_starts(cells, tile, overlap) for cells in grid)):
        bottom, right = min(top + tile, grid[0]), min(left + tile, grid[1])
        made = function(x[..., top * step : bottom * step, left * step : right * step])
        scale = made.shape[-1] // (right - left)
        if total is None:
            total = made.new_zeros(*made.shape[:-2], grid[0] * scale, grid[1] * scale, dtype=torch.float32)
            weights = torch.zeros_like(total[:1, :1])
        ramp = _ramp(made.shape[-2], overlap * scale)[:, None] * _ramp(made.shape[-1], overlap * scale)
        ramp = ramp.to(made.device)
        place = (..., slice(top * scale, bottom * scale), slice(left * scale, right * scale))
        total[place] += made.float() * ramp
        weights[place] += ramp
    assert total is not None  # a grid has cells
    return total / weights


def _starts(cells: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin: all of full size where there is room, the last one at the end."""
    if cells <= tile:
        return [0]
    return [*range(0, cells - tile, tile - overlap), cells - tile]


def _ramp(length: int, overlap: int) -> Tensor:
    """Weights that rise over the overlap from the edges, never to 0."""
    distance = torch.arange(length)
    nearest = torch.minimum(distance, distance.flip(0)) + 1
    return (nearest / (overlap + 1)).clamp(max=1.0)
