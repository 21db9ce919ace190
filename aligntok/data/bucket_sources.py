"""Batches of pictures of one size each (aligntok.data.buckets), from memory or decoded as training goes.

Both are sources like those of aligntok.data.sources, with `sizes` beside: how many pictures have which size. The
streamed one decodes with Pillow in worker processes: DALI's graph cuts squares.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from aligntok.config import DataConfig
from aligntok.data.buckets import Bucket, BucketOrder, Buckets
from aligntok.data.images import ImageSet, each_crop
from aligntok.data.sources import InMemory, StreamSource
from aligntok.runtime.world import World


class BucketsInMemory(InMemory):
    """Crops in memory, those of a size together.

    `index` counts the pictures that could be read, as with MemorySource.

    Args:
        images: all in a bucket; those that cannot be read are recorded in its `skipped`.
        buckets: of the pictures.
        progress: called with (pictures done, all pictures).
        batch_size, seed, flip, world: as of MemorySource.

    Raises:
        UserError: not a single picture could be read.
    """

    order: BucketOrder

    def __init__(
        self,
        images: ImageSet,
        buckets: Buckets,
        batch_size: int,
        seed: int,
        flip: bool,
        world: World | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.flip = flip
        self.parts, readable = _decode(images, buckets, progress)  # bucket -> uint8 [n, 3, H, W]
        self.buckets, self.labels = buckets.numbers[readable], images.labels[readable]
        self.places = torch.empty_like(self.buckets)  # of every picture, in its part
        for number, crops in self.parts.items():
            self.places[self.buckets == number] = torch.arange(len(crops))
        self.order = BucketOrder(self.buckets, batch_size, seed, world)
        self.sizes = sizes_of(self.order, buckets.table)

    def crops(self, step: int, index: Tensor) -> Tensor:
        return self.parts[self.order.bucket(step)][self.places[index]]


class BucketStream(StreamSource):
    """Centre crops that worker processes make with Pillow as training goes; see StreamSource."""

    def __init__(
        self,
        images: ImageSet,
        buckets: Buckets,
        data: DataConfig,
        batch_size: int,
        seed: int,
        say: Callable[[str], None],
        world: World | None = None,
    ) -> None:
        order = BucketOrder(buckets.numbers, batch_size, seed, world)
        super().__init__(images, data, "center", batch_size, seed, say, world, order, buckets.size)
        self.sizes = sizes_of(order, buckets.table)


def sizes_of(order: BucketOrder, table: list[Bucket]) -> dict[Bucket, int]:
    """How many pictures have which size."""
    return {table[number]: count for number, count in order.pictures.items()}


def _decode(
    images: ImageSet, buckets: Buckets, progress: Callable[[int, int], None] | None
) -> tuple[dict[int, Tensor], Tensor]:
    """(bucket -> crops [n, 3, H, W] of its readable pictures, which of all pictures those are, bool [N])."""
    parts = {
        number: torch.empty(count, 3, *buckets.table[number], dtype=torch.uint8)
        for number, count in enumerate(torch.bincount(buckets.numbers).tolist())
        if count
    }
    filled, readable = dict.fromkeys(parts, 0), torch.zeros(len(images), dtype=torch.bool)
    for index, crop in each_crop(images, buckets.size):
        if crop is not None:
            number = int(buckets.numbers[index])
            parts[number][filled[number]] = crop
            filled[number], readable[index] = filled[number] + 1, True
        if progress is not None:
            progress(index + 1, len(images))
    return {number: crops[: filled[number]] for number, crops in parts.items() if filled[number]}, readable
