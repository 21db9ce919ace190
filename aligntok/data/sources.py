"""Batch sources: `source.batch(step)` is a function of the seed and the step alone.

Data position therefore needs no saving: a resumed run asks for the next step and gets the batch that it would have
got. A batch is a dictionary: images [B, 3, H, W] float32 in [-1, 1], labels [B], index [B] (into the image set),
flip [B], and rows [B], the numbers of its rows in the batch of all processes (aligntok.runtime.world).
"""

from __future__ import annotations

import warnings
from bisect import bisect_left
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotInTime
from functools import partial
from threading import Thread
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from aligntok.config import DataConfig
from aligntok.data.found import SHRUNK, unreadable
from aligntok.data.geometry import Size, cut, to_tensor, to_unit_range, window
from aligntok.data.images import ImageSet
from aligntok.errors import UserError
from aligntok.runtime.world import World

Batch = dict[str, Tensor]
Request = tuple[int, bool, float, float]
_SHOWN = 5  # file names in a message


class Source(Protocol):
    @property
    def order(self) -> Order:
        """Its count is that of the pictures in an epoch: in memory, those that could be read."""

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
        return torch.rand(self.batch_size, 3, generator=generator_for(self.seed, 1, step))[self.rows]

    def _permutation(self, epoch: int) -> Tensor:
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (epoch, torch.randperm(self.count, generator=generator_for(self.seed, 0, epoch)))
        return self._epoch[1]


def generator_for(seed: int, purpose: int, number: int) -> torch.Generator:
    """Independent stream of random numbers for (seed, purpose, number), the same in every process.

    Args:
        purpose: 0 the order of an epoch, 1 flips and crops of a step, 2 its captions (aligntok.data.text_beside), 3 the
            buckets of an epoch (aligntok.data.buckets).
        number: of the epoch or step.
    """
    state = np.random.SeedSequence([seed, purpose, number]).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(state[0]) << 31 | int(state[1]) >> 1)


class InMemory:
    """Crops that were decoded once and lie in memory as uint8; subclasses say where."""

    order: Order
    labels: Tensor
    flip: bool

    def __str__(self) -> str:
        return "decoded once and kept in memory (centre crops within data.memory_limit_gib)"

    def crops(self, step: int, index: Tensor) -> Tensor:
        """Pictures `index` of a step, uint8 [B, 3, H, W]."""
        raise NotImplementedError

    def batch(self, step: int) -> Batch:
        index = self.order.indices(step)
        flip = (self.order.uniforms(step)[:, 0] < 0.5) & self.flip
        return {
            "images": flip_images(to_unit_range(self.crops(step, index)), flip),
            "labels": self.labels[index],
            "index": index,
            "flip": flip,
            "rows": self.order.rows,
        }


class MemorySource(InMemory):
    """Squares in memory."""

    def __init__(
        self, images: Tensor, labels: Tensor, batch_size: int, seed: int, flip: bool, world: World | None = None
    ) -> None:
        self.images, self.labels, self.flip = images, labels, flip
        self.order = Order(len(images), batch_size, seed, world)

    def crops(self, step: int, index: Tensor) -> Tensor:
        return self.images[index]


class StreamSource:
    """Pictures decoded by worker processes (Pillow) as training goes; random or centre crops.

    An unreadable picture is replaced by the next readable one of its batch, recorded in `images.skipped` and named once
    to `say`.

    Args:
        order: None = Order.
        size: of the crop of a picture, by its number; None = squares of data.image_size.
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
        order: Order | None = None,
        size: Callable[[int], Size] | None = None,
    ) -> None:
        self.images, self.data = images, data
        self.order = Order(len(images), batch_size, seed, world) if order is None else order
        self.skips = Skips(images, say)
        # what each worker is reading now, -1 for nothing: a stalled one can then be asked for its file
        self.reading = torch.full((max(1, data.workers),), -1).share_memory_()
        self.dataset = _Crops(images, size or partial(_square, data.image_size), crop, self.reading)
        self._batches: Iterator[dict[str, Any]] | None = None
        self._next_step = -1

    def __str__(self) -> str:
        return f"decoded as training goes by {self.data.workers} torchvision workers"

    def batch(self, step: int) -> Batch:
        if self._batches is None or step != self._next_step:
            self._batches = self._start(step)
        self._next_step = step + 1
        batch = self._fetch(self._batches, step) | {"rows": self.order.rows}
        self.skips.add(batch.pop("skipped"))
        return batch

    def _start(self, step: int) -> Iterator[dict[str, Any]]:
        self.reading.fill_(-1)
        loader = DataLoader(
            self.dataset,
            batch_sampler=_Requests(self.order, step, self.data.flip),
            num_workers=self.data.workers,
            collate_fn=_collate,
            pin_memory=torch.cuda.is_available(),
        )
        return iter(loader)

    def _fetch(self, batches: Iterator[dict[str, Any]], step: int) -> dict[str, Any]:
        limit = self.data.stall_timeout
        if not limit:
            return next(batches)
        fetched: Future[dict[str, Any]] = Future()
        Thread(target=_run_into, args=(fetched, partial(next, batches)), daemon=True).start()
        try:
            return fetched.result(limit)
        except NotInTime as error:
            if fetched.done():  # the dataset's own
                raise
            names = [self.images.entries[i].name for i in self.reading.tolist() if i >= 0]
            raise stalled("torchvision workers", limit, step, names) from error


def _run_into(future: Future, work: Callable[[], Any]) -> None:
    try:
        future.set_result(work())
    except BaseException as error:
        future.set_exception(error)


def stalled(loader: str, seconds: float, step: int, names: list[str]) -> UserError:
    """What to raise when a loader has delivered nothing for too long; `names` are the files that it waits for."""
    shown = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
    return UserError(
        f"{loader} delivered no images for step {step} within {seconds:g} s, waiting for {shown or 'no file'}: "
        f"check the disk or network behind data.path, or raise data.stall_timeout (0 = wait for ever)"
    )


class Skips:
    """Unreadable pictures of a stream: recorded in the image set and named once each."""

    def __init__(self, images: ImageSet, say: Callable[[str], None]) -> None:
        self.images, self.say = images, say
        self._named: set[str] = set()

    def add(self, skipped: list[tuple[str, str]]) -> None:
        """Take in (name, reason) of the pictures that a batch lacks."""
        for name, reason in skipped:
            if name not in self._named:
                self._named.add(name)
                self.images.skipped[name] = reason
                count, total = len(self._named), len(self.images)
                self.say(f"skipped {name}: {reason} ({count} unreadable so far)")
                if count - 1 < SHRUNK * total <= count:
                    self.say(unreadable(count, total))


def stand_ins(readable: list[bool]) -> list[int]:
    """For every row of a batch the row whose picture it shows: its own, or the next readable one, round the end."""
    good = [row for row, fine in enumerate(readable) if fine]
    return [good[bisect_left(good, row) % len(good)] for row in range(len(readable))]


def whole_batch_unreadable(skipped: list[tuple[str, str]]) -> UserError:
    """There is nothing to put in the place of unreadable pictures."""
    name, reason = skipped[0]
    return UserError(f"a whole batch of images could not be read; the first, {name}: {reason}")


class _Requests:
    """Endless batches of (index, flip, u, v), one list per step, for DataLoader's batch_sampler."""

    def __init__(self, order: Order, step: int, flip: bool) -> None:
        self.order, self.step, self.flip = order, step, flip

    def __iter__(self) -> Iterator[list[Request]]:
        step = self.step
        while True:
            yield requests(self.order, step, self.flip)
            step += 1


def requests(order: Order, step: int, flip: bool) -> list[Request]:
    """(picture, mirrored, u, v) for every row of this process in a step."""
    numbers, indices = order.uniforms(step).tolist(), order.indices(step).tolist()
    return [(i, f < 0.5 and flip, u, v) for i, (f, u, v) in zip(indices, numbers, strict=True)]


def _square(side: int, index: int) -> Size:
    return side, side


class _Crops(Dataset):
    def __init__(self, images: ImageSet, size: Callable[[int], Size], crop: str, reading: Tensor) -> None:
        self.images, self.size, self.crop, self.reading = images, size, crop, reading

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, request: Request) -> Batch | tuple[str, str]:
        index, flip, u, v = request
        worker = get_worker_info()
        self.reading[worker.id if worker else 0] = index
        picture = self.images.open(index)
        self.reading[worker.id if worker else 0] = -1
        if picture is None:
            name = self.images.entries[index].name
            return name, self.images.skipped[name]
        image = to_tensor(cut(picture, window(self.crop, *picture.size, self.size(index), u, v)))
        return {
            "images": image.flip(-1) if flip else image,
            "labels": torch.tensor(self.images.entries[index].label),
            "index": torch.tensor(index),
            "flip": torch.tensor(flip),
        }


def _collate(items: list[Batch | tuple[str, str]]) -> dict[str, Any]:
    skipped = [item for item in items if not isinstance(item, dict)]
    if len(skipped) == len(items):
        raise whole_batch_unreadable(skipped)
    readable = {row: item for row, item in enumerate(items) if isinstance(item, dict)}
    shown = [readable[row] for row in stand_ins([row in readable for row in range(len(items))])]
    batch: dict[str, Any] = {key: torch.stack([item[key] for item in shown]) for key in shown[0]}
    batch["images"] = to_unit_range(batch["images"])
    return batch | {"skipped": skipped}


def flip_images(images: Tensor, flip: Tensor) -> Tensor:
    """Images [B, 3, H, W] with those marked in `flip` [B] mirrored left to right."""
    return torch.where(flip.view(-1, 1, 1, 1), images.flip(-1), images)
