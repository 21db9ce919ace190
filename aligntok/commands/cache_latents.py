"""`aligntok cache-latents`: encode an image set once, so that Stage 3 and the generator need no encoder.

Images are decoded by worker processes while the network encodes; the latents of a shard are collected, written with its
record, and forgotten. Under torchrun the processes share the shards out.

Giving the command again continues an interrupted cache, at the loss of the shard in work, and checks a finished one
(aligntok.data.shard_store).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, distributed

from aligntok.data.crop_reader import Crops, read_crops
from aligntok.data.found import unreadable
from aligntok.data.geometry import check_size, to_unit_range
from aligntok.data.images import ImageSet, open_images
from aligntok.data.latent_format import LAYOUT, Origin, images_fingerprint
from aligntok.data.shard_store import MANIFEST, Progress, Record, ShardStore
from aligntok.errors import UserError
from aligntok.models.tokenizer import StoredTokenizer, load_tokenizer
from aligntok.runtime.devices import Precision, choose_precision
from aligntok.runtime.world import World
from aligntok.training.distributed import LONG_TIMEOUT, start
from aligntok.training.monitoring.telemetry import Telemetry

_NAMED = 5  # unreadable images that are named on the screen; cache.json names all


def cache_latents(
    tokenizer: str,
    images: str,
    output: str,
    image_size: int,
    flip: bool,
    shard_size: int,
    batch_size: int,
    workers: int,
    precision: str,
    device: str,
) -> None:
    """Make, continue or check a cache; the options are those of aligntok.config.options.CacheLatentsConfig.

    Raises:
        UserError: no tokenizer or images, a size that does not fit, `output` has another cache, the disk refuses.
    """
    for name, value, least in (("shard_size", shard_size, 1), ("batch_size", batch_size, 1), ("workers", workers, 0)):
        if value < least:
            raise UserError(f"{name} is {value}, expected at least {least}")
    with start(device, LONG_TIMEOUT) as world:
        chosen = choose_precision(device, precision)
        network = load_tokenizer(tokenizer).to(chosen.device).requires_grad_(False)
        telemetry = Telemetry(output, log_every=1)
        found = open_images(images, say=telemetry.say)
        origin = describe(network, found, image_size, flip, chosen.name, shard_size)
        store = ShardStore(Path(output), LAYOUT, origin, telemetry.say)
        writer = Writer(store, origin, network, found, chosen, batch_size, workers)
        manifest = make_together(store, writer.write, writer.summary, world, telemetry, "latents")
        if manifest is not None:
            report(manifest, output, telemetry)


def make_together(
    store: ShardStore,
    write: Callable[[World, Progress], None],
    summarise: Callable[[list[Record]], Record],
    world: World,
    telemetry: Telemetry,
    title: str,
) -> Record | None:
    """Have all processes make their shards; the finished cache.json for the first of them, None for the others.

    Args:
        write: makes a process's shards, except those that are there and sound.
        summarise: see ShardStore.finish.
    """
    store.claim()
    if world.main:
        with telemetry.bar(title) as update:
            write(world, update)
    else:
        write(world, lambda done, total: None)
    if world.size > 1:
        distributed.barrier()
    return store.finish(summarise) if world.main else None


def describe(
    tokenizer: StoredTokenizer, images: ImageSet, image_size: int, flip: bool, precision: str, shard_size: int
) -> Origin:
    """What a cache with these options is made from.

    Raises:
        UserError: the image size is not a multiple of the tokenizer's downsampling.
    """
    check_size(image_size, tokenizer.downsample, "image_size")
    return Origin(
        tokenizer=tokenizer.fingerprint(),
        latent_mean=tokenizer.latent_mean.tolist(),
        latent_std=tokenizer.latent_std.tolist(),
        latent_shape=[tokenizer.latent_channels, *2 * [image_size // tokenizer.downsample]],
        images=images_fingerprint(images),
        image_set=images.name,
        image_count=len(images),
        classes=images.classes,
        image_size=image_size,
        flip=flip,
        precision=precision,
        shard_size=shard_size,
    )


@dataclass
class Writer:
    """Makes the shards of one cache folder."""

    store: ShardStore
    origin: Origin
    tokenizer: StoredTokenizer
    images: ImageSet
    precision: Precision
    batch_size: int
    workers: int

    def write(self, world: World, progress: Progress) -> None:
        """Make this process's shards, except those that are there and sound."""
        missing, done, total = self.store.missing(world, progress)
        plans = [_batches(self.origin.numbers(shard), self.batch_size) for shard in missing]
        crops = read_crops(self.images, self.origin.image_size, [b for plan in plans for b in plan], self.workers)
        for shard, plan in zip(missing, plans, strict=True):
            parts, skipped = [], []
            for numbers, read in zip(plan, crops, strict=False):  # stops with `plan`: the rest is the next shards'
                parts.append(self._encode(read))
                skipped += read.skipped
                done += len(numbers)
                progress(done, total)
            self._save(shard, parts, skipped)

    def summary(self, records: list[Record]) -> Record:
        """What cache.json says of all shards; UserError where not a single image could be read."""
        skipped = [entry for record in records for entry in record["skipped"]]
        count = sum(record["rows"] for record in records)
        if not count:
            first = skipped[0]
            raise UserError(
                f"none of the {self.origin.image_count} images of {self.origin.image_set} could be read; the first, "
                f"{first['name']}: {first['reason']}"
            )
        return {"count": count, **_moments(records), "skipped": skipped}

    @torch.no_grad()
    def _encode(self, read: Crops) -> dict[str, Tensor]:
        """The rows of a shard that come from one batch."""
        labels = [self.images.entries[i].label for i in read.numbers]
        rows = {"labels": torch.tensor(labels, dtype=torch.int64)}
        rows["index"] = torch.tensor(read.numbers, dtype=torch.int64)
        images = to_unit_range(read.pixels.to(self.precision.device, non_blocking=True))
        views = {"latents": images} | ({"flipped": images.flip(-1)} if self.origin.flip else {})
        for name, view in views.items():
            if len(view):
                with self.precision.autocast():
                    rows[name] = self.tokenizer.encode(view).to("cpu", torch.bfloat16).contiguous()
            else:
                rows[name] = torch.empty(0, *self.origin.latent_shape, dtype=torch.bfloat16)
        return rows

    def _save(self, shard: int, parts: list[dict[str, Tensor]], skipped: list[tuple[int, str]]) -> None:
        """Write a shard, then its record: a shard without one counts for nothing."""
        rows = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        moments = torch.stack([_sums(part) for part in parts]).sum(0)
        if not torch.isfinite(moments).all():
            raise UserError(f"latents of {self.origin.image_set} are not finite: this tokenizer cannot be used")
        named = [{"index": i, "name": self.images.entries[i].name, "reason": why} for i, why in skipped]
        self.store.save(shard, rows, len(rows["index"]), skipped=named, moments=moments.tolist())


def report(manifest: Record, output: str, telemetry: Telemetry) -> None:
    """What is in the cache, and what is not."""
    skipped = manifest["skipped"]
    for entry in skipped[:_NAMED]:
        telemetry.say(f"skipped {entry['name']}: {entry['reason']}")
    if len(skipped) > _NAMED:
        telemetry.say(f"... and {len(skipped) - _NAMED} more unreadable images, all named in {MANIFEST}")
    if skipped:
        telemetry.say(unreadable(len(skipped), manifest["count"] + len(skipped)))
    gib = sum(shard["bytes"] for shard in manifest["shards"]) / 2**30
    mean, std = torch.tensor(manifest["mean"]), torch.tensor(manifest["std"])
    telemetry.say(
        f"{output}: latents of {manifest['count']} images{' and their mirror images' if manifest['flip'] else ''}, "
        f"{len(skipped)} skipped, {len(manifest['shards'])} shards, {gib:.2f} GiB; channel means {mean.min():.2f} to "
        f"{mean.max():.2f}, standard deviations {std.min():.2f} to {std.max():.2f}"
    )


def _batches(numbers: range, size: int) -> list[range]:
    return [numbers[start : start + size] for start in range(0, len(numbers), size)]


def _sums(rows: dict[str, Tensor]) -> Tensor:
    """[3, d] float64: sum, sum of squares and number of the latents' values, per channel."""
    sums = []
    for values in (rows[name].double() for name in ("latents", "flipped") if name in rows):
        squares, count = values.square().sum((0, 2, 3)), torch.full(values.shape[1:2], values[:, 0].numel())
        sums.append(torch.stack([values.sum((0, 2, 3)), squares, count]))
    return torch.stack(sums).sum(0)


def _moments(records: list[Record]) -> dict[str, list[float]]:
    """Mean and standard deviation of every channel of the cached latents, near 0 and 1 if the statistics are right."""
    sums, squares, count = torch.tensor([record["moments"] for record in records], dtype=torch.float64).sum(0)
    mean = sums / count
    return {"mean": mean.tolist(), "std": (squares / count - mean.square()).clamp(min=0).sqrt().tolist()}
