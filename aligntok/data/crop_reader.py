"""Reading an image set from one end to the other: centre crops in a given order, decoded ahead by worker processes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from aligntok.data.geometry import center_crop, to_tensor
from aligntok.data.images import ImageSet


@dataclass
class Crops:
    """One batch of centre crops, without the images that could not be read."""

    pixels: Tensor  # uint8 [B, 3, S, S]
    numbers: list[int]  # [B], in the image set
    skipped: list[tuple[int, str]]  # (number, reason)


def read_crops(images: ImageSet, size: int, batches: list[range], workers: int) -> Iterator[Crops]:
    """The centre crops of `batches` of images, in that order, read ahead by worker processes."""

    def collate(items: list[tuple[int, Tensor | str]]) -> Crops:
        good = [(number, found) for number, found in items if isinstance(found, Tensor)]
        pixels = [found for _, found in good] or [torch.empty(3, size, size, dtype=torch.uint8)]
        skipped = [(number, found) for number, found in items if isinstance(found, str)]
        return Crops(torch.stack(pixels)[: len(good)], [number for number, _ in good], skipped)

    return iter(
        DataLoader(
            _CenterCrops(images, size),
            batch_sampler=map(list, batches),
            num_workers=min(workers, os.cpu_count() or 1),
            collate_fn=collate,
        )
    )


class _CenterCrops(Dataset):
    """Number -> (number, crop, or the reason why there is none)."""

    def __init__(self, images: ImageSet, size: int) -> None:
        self.images, self.size = images, size

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number: int) -> tuple[int, Tensor | str]:
        picture = self.images.open(number)
        if picture is None:
            return number, self.images.skipped[self.images.entries[number].name]
        return number, to_tensor(center_crop(picture, self.size))
