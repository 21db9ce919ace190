"""Which loader gives a run its batches, chosen once and said aloud.

memory       centre crops that fit into data.memory_limit_gib: decoded once, looked up afterwards
DALI         everything else, where it can be had and most images are JPEG (aligntok.data.dali)
torchvision  worker processes with Pillow, everywhere else, and for pictures of several sizes (data.buckets)
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import torch

from aligntok.config import DataConfig
from aligntok.data.bucket_sources import BucketsInMemory, BucketStream
from aligntok.data.buckets import Buckets
from aligntok.data.dali import DaliSource
from aligntok.data.dali_graph import refusal
from aligntok.data.found import unreadable
from aligntok.data.images import ImageSet, load_center_crops
from aligntok.data.sources import MemorySource, Source, StreamSource
from aligntok.errors import UserError
from aligntok.runtime.world import World

Say = Callable[[str], None]
Bar = Callable[[str], AbstractContextManager[Callable[..., None]]]
JPEG_SHARE = 0.5  # below it most of the work is not DALI's, and Pillow's is shared out better over processes
_NAMED = 5  # unreadable images that are named one by one


def build_source(
    images: ImageSet,
    data: DataConfig,
    crop: str,
    batch_size: int,
    seed: int,
    say: Say,
    bar: Bar,
    world: World | None = None,
    device: torch.device | str = "cpu",
) -> Source:
    """The source that fits; `say` is told which and why.

    Args:
        images: what to read.
        data: size, flips, limits, and data.loader for streamed images.
        crop: "random" or "center".
        batch_size: over all processes.
        seed: of order, flips and crops.
        say: gets lines for the user.
        bar: makes a progress bar from its title, as a context manager of an update(done, total) function.
        world: this process and the others.
        device: where training runs; DALI decodes there if it is a CUDA device.

    Raises:
        UserError: data.loader asks for DALI, which cannot be had here.
    """
    loader, why = choose_loader(images, data)
    gib = len(images) * 3 * data.image_size**2 / 2**30
    if crop == "center" and gib <= data.memory_limit_gib:
        with bar("reading images") as update:
            pixels, labels = load_center_crops(images, data.image_size, update)
        report_skipped(images, say)
        say(f"loader: memory ({gib:.2f} GiB of centre crops, within data.memory_limit_gib)")
        return MemorySource(pixels, labels, batch_size, seed, data.flip, world)
    streamed = "random crops never repeat" if crop == "random" else f"{gib:.1f} GiB exceed data.memory_limit_gib"
    say(f"images are decoded as training goes ({streamed}); frozen networks run in the loop")
    name_skipped = say if world is None or world.main else partial(_say_as, world.rank)
    if loader == "dali":
        place = "GPU" if torch.device(device).type == "cuda" else f"CPU, {max(1, data.workers)} threads"
        say(f"loader: DALI on the {place} ({why})")
        return DaliSource(images, data, crop, batch_size, seed, device, name_skipped, world)
    say(f"loader: torchvision, {data.workers} worker processes with Pillow ({why})")
    return StreamSource(images, data, crop, batch_size, seed, name_skipped, world)


def build_bucket_source(
    images: ImageSet,
    buckets: Buckets,
    data: DataConfig,
    batch_size: int,
    seed: int,
    say: Say,
    bar: Bar,
    world: World | None = None,
) -> BucketsInMemory | BucketStream:
    """The source of centre crops in their buckets' sizes that fits; `say` is told which and why.

    Args: as of `build_source`, and the buckets of the images.
    """
    gib = buckets.gib
    if gib <= data.memory_limit_gib:
        with bar("reading images") as update:
            source = BucketsInMemory(images, buckets, batch_size, seed, data.flip, world, update)
        report_skipped(images, say)
        say(f"loader: memory ({gib:.2f} GiB of centre crops, within data.memory_limit_gib)")
        return source
    why = "as data.loader says" if data.loader == "torchvision" else "DALI is not used with data.buckets"
    exceeds = f"{gib:.1f} GiB exceed data.memory_limit_gib"
    say(f"images are decoded as training goes ({exceeds}); frozen networks run in the loop")
    say(f"loader: torchvision, {data.workers} worker processes with Pillow ({why})")
    name_skipped = say if world is None or world.main else partial(_say_as, world.rank)
    return BucketStream(images, buckets, data, batch_size, seed, name_skipped, world)


def _say_as(rank: int, message: str) -> None:
    """Pictures that another process than the first has met and skipped: no other process knows of them."""
    print(f"process {rank}: {message}", file=sys.stderr, flush=True)


def choose_loader(images: ImageSet, data: DataConfig) -> tuple[str, str]:
    """("dali" or "torchvision", why) for streamed images.

    Raises:
        UserError: data.loader is "dali", which cannot be had here.
    """
    if data.loader not in ("auto", "dali", "torchvision"):
        raise UserError(f"data.loader is {data.loader!r}, expected auto, dali or torchvision")
    if data.loader == "torchvision":
        return "torchvision", "as data.loader says"
    reason = refusal()
    if data.loader == "dali":
        if reason is not None:
            raise UserError(f"data.loader is dali, but {reason}; or use data.loader=auto")
        return "dali", "as data.loader says"
    if reason is not None:
        return "torchvision", reason
    share = sum(entry.name.lower().endswith((".jpg", ".jpeg")) for entry in images.entries) / len(images)
    if share < JPEG_SHARE:
        return "torchvision", f"{share:.0%} of the images are JPEG, and DALI pays for those"
    return "dali", f"{share:.0%} of the images are JPEG"


def report_skipped(images: ImageSet, say: Say) -> None:
    """Name the pictures of a set that could not be read, and say how many they are."""
    skipped = [entry.name for entry in images.entries if entry.name in images.skipped]
    for name in skipped[:_NAMED]:
        say(f"skipped {name}: {images.skipped[name]}")
    if len(skipped) > _NAMED:
        say(f"... and {len(skipped) - _NAMED} more unreadable images")
    if skipped:
        say(unreadable(len(skipped), len(images)))
