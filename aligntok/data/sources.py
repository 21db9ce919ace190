"""Batch sources: `source.batch(step)` is a function of the seed and the step alone.

Data position therefore needs no saving: a resumed run asks for the next step and gets the batch that it would have
got. A batch is a dictionary: images [B, 3, H, W] float32 in [-1, 1], labels [B], index [B] (into the image set),
flip [B], and rows [B], the numbers of its rows in the batch of all processes (aligntok.world).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from aligntok.config import DataConfig
from aligntok.data.geometry import center_crop, random_crop, to_tensor, to_unit_range
from aligntok.data.images import ImageSet
from aligntok.errors import UserError
from aligntok.world import World

Batch = dict[str, Tensor]


class Source(Protocol):
    def batch(self, step: int) -> Batch:
        """The batch of one training step."""


class Order:
    """An endless sequence of shuffled epochs, readable from any position.

    Args:
        count: pictures in the set.
        batch_size: pictures per step over all processes; a step may span two epochs.
        seed: of the shuffles, flips and crops.
        world: only this process's rows of every batch are handed out.
    """

    def __init__(self, count: int, batch_size: int, seed: int, world: World | None = None) -> None:
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.rows = torch.tensor((world or World()).rows(batch_size))
        self._epoch: tuple[int, Tensor] | None = None

    def indices(self, step: int) -> Tensor:
        """Picture indices [B] of this process in a step."""
        parts, position, left = [], step * self.batch_size, self.batch_size
        while left:
            epoch, offset = divmod(position, self.count)
            part = self._permutation(epoch)[offset : offset + left]
            parts.append(part)
            position, left = position + len(part), left - len(part)
        return torch.cat(parts)[self.rows]

    def uniforms(self, step: int) -> Tensor:
        """Numbers in [0, 1) [B, 3] of this process in a step: for the flip, and for the place of the crop."""
        return torch.rand(self.batch_size, 3, generator=_generator(self.seed, 1, step))[self.rows]

    def _permutation(self, epoch: int) -> Tensor:
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (epoch, torch.randperm(self.count, generator=_generator(self.seed, 0, epoch)))
        return self._epoch[1]


def _generator(seed: int, purpose: int, number: int) -> torch.Generator:
    """Independent stream for (seed, purpose, number), the same in every process."""
    state = np.random.SeedSequence([seed, purpose, number]).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(state[0]) << 31 | int(state[1]) >> 1)


class MemorySource:
    """Centre crops that were decoded once and lie in memory as uint8."""

    def __init__(
        self, images: Tensor, labels: Tensor, batch_size: int, seed: int, flip: bool, world: World | None = None
    ) -> None:
        self.images, self.labels, self.flip = images, labels, flip
        self.order = Order(len(images), batch_size, seed, world)

    def __str__(self) -> str:
        return "decoded once and kept in memory (centre crops within data.memory_limit_gib)"

    def batch(self, step: int) -> Batch:
        index = self.order.indices(step)
        flip = (self.order.uniforms(step)[:, 0] < 0.5) & self.flip
        return {
            "images": flip_images(to_unit_range(self.images[index]), flip),
            "labels": self.labels[index],
            "index": index,
            "flip": flip,
            "rows": self.order.rows,
        }


class StreamSource:
    """Pictures decoded by worker processes as training goes; random or centre crops.

    An unreadable picture is replaced by another one of its batch, recorded in `images.skipped` and named once to `say`.
    """

    def __init__(
        self,
        images: ImageSet,
        data: DataConfig,
        crop: str,
        batch_size: int,
        seed: int,
        say: Callable[[str], None] = warnings.warn,
        world: World | None = None,
    ) -> None:
        self.images, self.say = images, say
        self.dataset = _Crops(images, data.image_size, crop)
        self.order = Order(len(images), batch_size, seed, world)
        self.data = data
        self._batches: Iterator[Batch] | None = None
        self._next_step = -1
        self._named: set[str] = set()

    def __str__(self) -> str:
        return f"decoded as training goes by {self.data.workers} torchvision workers"

    def batch(self, step: int) -> Batch:
        if self._batches is None or step != self._next_step:
            self._batches = self._start(step)
        self._next_step = step + 1
        batch = next(self._batches) | {"rows": self.order.rows}
        for name, reason in batch.pop("skipped", []):
            if name not in self._named:
                self._named.add(name)
                self.images.skipped[name] = reason
                self.say(f"skipped {name}: {reason} ({len(self._named)} unreadable so far)")
        return batch

    def _start(self, step: int) -> Iterator[Batch]:
        loader = DataLoader(
            self.dataset,
            batch_sampler=_Requests(self.order, step, self.data.flip),
            num_workers=self.data.workers,
            collate_fn=_collate,
            pin_memory=torch.cuda.is_available(),
        )
        return iter(loader)


class _Requests:
    """Endless batches of (index, flip, u, v), one list per step, for DataLoader's batch_sampler."""

    def __init__(self, order: Order, step: int, flip: bool) -> None:
        self.order, self.step, self.flip = order, step, flip

    def __iter__(self) -> Iterator[list[tuple[int, bool, float, float]]]:
        step = self.step
        while True:
            numbers = self.order.uniforms(step).tolist()
            indices = self.order.indices(step).tolist()
            yield [(i, f < 0.5 and self.flip, u, v) for i, (f, u, v) in zip(indices, numbers, strict=True)]
            step += 1


class _Crops(Dataset):
    def __init__(self, images: ImageSet, size: int, crop: str) -> None:
        self.images, self.size, self.crop = images, size, crop

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, request: tuple[int, bool, float, float]) -> Batch | tuple[str, str]:
        index, flip, u, v = request
        picture = self.images.open(index)
        if picture is None:
            name = self.images.entries[index].name
            return name, self.images.skipped[name]
        cut = random_crop(picture, self.size, u, v) if self.crop == "random" else center_crop(picture, self.size)
        image = to_tensor(cut)
        return {
            "images": image.flip(-1) if flip else image,
            "labels": torch.tensor(self.images.entries[index].label),
            "index": torch.tensor(index),
            "flip": torch.tensor(flip),
        }


def _collate(items: list[Batch | tuple[str, str]]) -> Batch:
    good = [item for item in items if isinstance(item, dict)]
    bad = [item for item in items if not isinstance(item, dict)]
    if not good:
        raise UserError(f"a whole batch of images could not be read; the first, {bad[0][0]}: {bad[0][1]}")
    good += good[: len(bad)] if len(good) >= len(bad) else good * len(bad)
    good = good[: len(items)]
    batch = {key: torch.stack([item[key] for item in good]) for key in good[0]}
    batch["images"] = to_unit_range(batch["images"])
    if bad:
        batch["skipped"] = bad
    return batch


def flip_images(images: Tensor, flip: Tensor) -> Tensor:
    """Images [B, 3, H, W] with those marked in `flip` [B] mirrored left to right."""
    return torch.where(flip.view(-1, 1, 1, 1), images.flip(-1), images)
