"""Aspect-ratio buckets: pictures of like shape share batches, so that none is cropped to a square.

A bucket is a size (height, width) whose sides are multiples of 16 and whose ratio lies between 1:2 and 2:1.

    area         about as many pixels in every bucket as in size x size (PixArt, SANA, Lumina-Image-2)
    short_side   the short side is `size` in every bucket (AlignTok's gallery: 512 x 512, 640, 768, 910)

A picture goes to the bucket whose ratio is nearest to its own by |log(r / r')|; where even that one would crop away too
much of it, it fits none, is left out, counted and named. `BucketOrder` gives every batch one bucket, each as often as
it has pictures. Nothing is decoded here: sizes come from the pictures' headers (aligntok.data.picture_sizes). What
trains on them is in aligntok.data.bucket_sources.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from aligntok.data.found import Found
from aligntok.data.images import ImageSet
from aligntok.data.picture_sizes import Sizes, read_sizes
from aligntok.data.sources import Order, generator_for
from aligntok.errors import UserError, near_multiples
from aligntok.runtime.world import World

BucketMode = Literal["area", "short_side"]
STEP = 16  # sides are multiples of it: the tokenizer's downsampling
LIMIT = 2.0  # the longest side over the shortest
KEPT = 0.75  # share of a picture that a crop to its bucket has to leave
UNFITTING, UNREADABLE = "too long or too high for any bucket", "whose size cannot be read"
NONE = -1
_TOGETHER = 1 << 16  # pictures that are compared with the table at once
_PURPOSE = 3  # of random numbers: aligntok.data.sources.generator_for


class Bucket(NamedTuple):
    """A size in pixels."""

    height: int
    width: int

    @property
    def ratio(self) -> float:
        return self.height / self.width


def bucket_table(mode: BucketMode, size: int, step: int | None = None) -> list[Bucket]:
    """The buckets of a mode, from wide to high; for each one its transposed one is there.

    Args:
        mode: area or short_side.
        size: side of the square bucket.
        step: between the sides of one bucket and the next, a multiple of 16; None = 16 for each 256 of `size` (area), a
            quarter of `size` in multiples of 16 (short_side).

    Raises:
        UserError: another mode, or sides that are no multiples of 16.
    """
    if mode not in ("area", "short_side"):
        raise UserError(f"data.buckets is {mode!r}, expected area or short_side")
    parts = 256 / STEP if mode == "area" else 4
    step = max(STEP, round(size / parts / STEP) * STEP) if step is None else step
    for name, value in (("size", size), ("step", step)):
        if value < STEP or value % STEP:
            raise UserError(
                f"the {name} of buckets is {value}, expected a multiple of {STEP}: use {near_multiples(value, STEP)}"
            )
    wide = set()
    for number in range(math.ceil(LIMIT * size / step) + 1):
        if mode == "short_side":
            bucket = Bucket(size, size + number * step)
        else:
            height = size - number * step
            bucket = Bucket(height, round(size**2 / height / STEP) * STEP) if height > 0 else Bucket(1, size)
        if bucket.width <= LIMIT * bucket.height:
            wide.add(bucket)
    return sorted(wide | {Bucket(width, height) for height, width in wide}, key=lambda one: one.ratio)


@dataclass(frozen=True)
class Buckets:
    """The bucket of every picture of a set.

    Args:
        table: the sizes.
        numbers: int64 [pictures], into the table.
    """

    table: list[Bucket]
    numbers: Tensor

    def size(self, index: int) -> Bucket:
        """Of a picture's crop."""
        return self.table[int(self.numbers[index])]

    @property
    def gib(self) -> float:
        """What the crops take as uint8."""
        pixels = torch.tensor([height * width for height, width in self.table])
        return 3 * int(pixels[self.numbers].sum()) / 2**30


def told_sizes(pictures: dict[Bucket, int]) -> str:
    """One line: how many pictures have which size, as width x height."""
    each = ", ".join(f"{count:,} of {size.width} x {size.height}" for size, count in pictures.items())
    return f"{len(pictures)} {'size' if len(pictures) == 1 else 'sizes'}: {each}"


def nearest_bucket(height: int, width: int, table: list[Bucket], kept: float = KEPT) -> int:
    """The number of a picture's bucket in a table, NONE where a crop would leave less of it than the share `kept`."""
    return int(nearest_buckets(torch.tensor([[height, width]]), table, kept))


def nearest_buckets(pixels: Tensor, table: list[Bucket], kept: float = KEPT) -> Tensor:
    """`nearest_bucket`, int64 [N], of pictures of these heights and widths [N, 2]."""
    ratios, numbers = np.array([bucket.ratio for bucket in table]), []
    for part in pixels.double().split(_TOGETHER):
        height, width = part.numpy().T
        distances = np.abs(np.log((height / width)[:, None] / ratios))
        nearest = distances.argmin(1)
        fits = distances[np.arange(len(nearest)), nearest] <= -math.log(kept) + 1e-9
        numbers.append(torch.from_numpy(np.where(fits, nearest, NONE)))
    return torch.cat(numbers)


def assign_buckets(
    images: ImageSet,
    table: list[Bucket],
    say: Callable[[str], None],
    progress: Callable[[int, int], None] | None = None,
    kept: float = KEPT,
    sizes: Sizes | None = None,
) -> Tensor:
    """The bucket of every picture, int64 [N]; NONE for those that are left out, which `say` is told of.

    Args:
        progress: called with (done, total) pictures.
        kept: see `nearest_bucket`.
        sizes: of the pictures; None = they are read.

    Raises:
        UserError: not a single picture fits a bucket.
    """
    sizes = read_sizes(images, progress) if sizes is None else sizes
    readable = sizes.pixels.all(1)
    buckets = nearest_buckets(torch.where(readable[:, None], sizes.pixels, 1), table, kept)
    buckets[~readable] = NONE
    found = Found()
    for number in torch.nonzero(buckets == NONE).flatten().tolist():
        name, (height, width) = images.entries[number].name, sizes.pixels[number].tolist()
        if height:
            found.leave_out(UNFITTING, f"{name} ({width} x {height})")
        else:
            found.leave_out(UNREADABLE, f"{name} ({sizes.reasons[number]})")
    used = int((buckets != NONE).sum())
    if not used:
        told = "; ".join(line.strip() for line in found.reasons())
        raise UserError(f"none of the {len(images)} images of {images.name} fits a bucket ({told}): crop them")
    say(f"buckets: {images.name}: {used:,} of {len(images):,} images in {len(buckets[buckets != NONE].unique())} sizes")
    for line in found.reasons():
        say(line)
    return buckets


class BucketOrder(Order):
    """An endless sequence of shuffled epochs in which every batch has pictures of one bucket only.

    An epoch has L = count // batch_size batches, at least one. Which bucket a batch has is drawn by systematic
    sampling: of a bucket with n pictures an epoch has n L / count batches, rounded up or down at random, in random
    order. Each bucket is a sequence of shuffled epochs of its own, that goes on where its last batch ended.

    Args:
        buckets: int64 [count], the bucket of every picture of the set.
        batch_size: pictures per step over all processes.
        seed: of the order; flips and crops are those of Order.
        world: only this process's rows of every batch are handed out.
    """

    def __init__(self, buckets: Tensor, batch_size: int, seed: int, world: World | None = None) -> None:
        assert len(buckets) and (buckets >= 0).all(), "pictures without a bucket are left out of training"
        super().__init__(len(buckets), batch_size, seed, world)
        self.used = buckets.unique()  # numbers of the buckets that have pictures
        self._members = [torch.nonzero(buckets == number).flatten() for number in self.used]
        seeds = [np.random.SeedSequence([seed, _PURPOSE, int(n)]).generate_state(1)[0] for n in self.used]
        self._orders = [
            Order(len(members), batch_size, int(own), world) for members, own in zip(self._members, seeds, strict=True)
        ]
        self._ends = torch.tensor([len(members) for members in self._members]).cumsum(0)
        self.pictures = {int(n): len(members) for n, members in zip(self.used, self._members, strict=True)}
        self.length = max(1, self.count // batch_size)  # batches of an epoch
        self._before = [torch.zeros(len(self.used), dtype=torch.int64)]  # batches of each bucket before each epoch
        self._schedule: tuple[int, Tensor] | None = None

    def bucket(self, step: int) -> int:
        """The bucket of a step's batch."""
        return int(self.used[self._of(step)[0]])

    def indices(self, step: int) -> Tensor:
        place, number = self._of(step)
        return self._members[place][self._orders[place].indices(number)]

    def _of(self, step: int) -> tuple[int, int]:
        """(which of `used`, how many batches it had before this one)."""
        epoch, position = divmod(step, self.length)
        while len(self._before) <= epoch:
            counts = torch.bincount(self._epoch_schedule(len(self._before) - 1), minlength=len(self.used))
            self._before.append(self._before[-1] + counts)
        schedule = self._epoch_schedule(epoch)
        place = int(schedule[position])
        return place, int(self._before[epoch][place] + (schedule[:position] == place).sum())

    def _epoch_schedule(self, epoch: int) -> Tensor:
        """int64 [L]: which of `used` each batch of an epoch has."""
        if self._schedule is None or self._schedule[0] != epoch:
            random = generator_for(self.seed, _PURPOSE, epoch)
            start = torch.randint(self.count, (), generator=random)
            points = (torch.arange(self.length) * self.count + start) // self.length
            drawn = torch.searchsorted(self._ends, points, right=True)
            self._schedule = (epoch, drawn[torch.randperm(self.length, generator=random)])
        return self._schedule[1]
