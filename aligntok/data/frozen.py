"""Outputs of frozen networks: looked up where the crops repeat, computed where they do not.

Stage 1 needs encoder features, Stage 2 the latents of its snapshot, Stage 3 and the generator the tokenizer's
latents. All of them come from networks that do not change during the stage. With centre crops and flips there are two
outputs a picture, so they are computed once: in memory (`tabulate`) or in a latent cache, whose batches bring them
along (`latents_in_batch`). With random crops the network runs in the loop (`FrozenNetwork`). All are called the same
way: batch in, tensor out.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from aligntok.data.bucket_sources import BucketsInMemory
from aligntok.data.geometry import to_unit_range
from aligntok.data.sources import Batch, MemorySource
from aligntok.runtime.devices import Precision

FrozenOutput = Callable[[Batch], Tensor]


class FrozenTable:
    """values [F, N, ...]: output for picture n as it is (row 0) and mirrored (row 1, absent where flips are off)."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def __call__(self, batch: Batch) -> Tensor:
        rows = self.values[batch["flip"].long().cpu(), batch["index"].cpu()]
        return rows.to(batch["images"].device, non_blocking=True).float()


class BucketTables:
    """Outputs of pictures of several sizes: a table for the pictures of each."""

    def __init__(self, tables: dict[int, FrozenTable], source: BucketsInMemory) -> None:
        self.tables, self.source = tables, source

    def __call__(self, batch: Batch) -> Tensor:
        index = batch["index"].cpu()
        table = self.tables[int(self.source.buckets[index[0]])]  # all of a batch have the same
        return table(batch | {"index": self.source.places[index]})


class FrozenNetwork:
    """Runs `network` on the batch's images without gradients."""

    def __init__(self, network: Callable[[Tensor], Tensor], precision: Precision) -> None:
        self.network, self.precision = network, precision

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Tensor:
        with self.precision.autocast():
            return self.network(batch["images"]).float()


def latents_in_batch(batch: Batch) -> Tensor:
    """Normalised latents [B, d, h, w] that a source of aligntok.data.latent_cache has put into the batch."""
    return batch["latents"]


@torch.no_grad()
def tabulate(
    network: Callable[[Tensor], Tensor],
    source: MemorySource,
    precision: Precision,
    dtype: torch.dtype = torch.float32,
    progress: Callable[[int, int], None] | None = None,
    batch_size: int = 64,
) -> FrozenTable:
    """Table of network(image) over every picture of a source and, where it flips, its mirror image."""
    return _table(network, source.images, source.flip, precision, dtype, progress, batch_size)


@torch.no_grad()
def tabulate_buckets(
    network: Callable[[Tensor], Tensor],
    source: BucketsInMemory,
    precision: Precision,
    progress: Callable[[int, int], None] | None = None,
) -> BucketTables:
    """As `tabulate`, of pictures of several sizes."""
    done, every = 0, (2 if source.flip else 1) * sum(map(len, source.parts.values()))
    tables = {}
    for number, images in source.parts.items():
        tell = None if progress is None else partial(_further, progress, done, every)
        tables[number] = _table(network, images, source.flip, precision, torch.float32, tell, 64)
        done += (2 if source.flip else 1) * len(images)
    return BucketTables(tables, source)


def _further(progress: Callable[[int, int], None], before: int, every: int, done: int, total: int) -> None:
    """A part's progress as that of all of them."""
    progress(before + done, every)


def _table(
    network: Callable[[Tensor], Tensor],
    pixels: Tensor,
    flip: bool,
    precision: Precision,
    dtype: torch.dtype,
    progress: Callable[[int, int], None] | None,
    batch_size: int,
) -> FrozenTable:
    """Of pictures of one size, uint8 [n, 3, H, W]."""
    mirrors = (False, True) if flip else (False,)
    rows: list[Tensor] = []
    for mirrored in mirrors:
        outputs = []
        for start in range(0, len(pixels), batch_size):
            images = to_unit_range(pixels[start : start + batch_size])
            images = (images.flip(-1) if mirrored else images).to(precision.device)
            with precision.autocast():
                outputs.append(network(images).to("cpu", dtype))
            if progress is not None:
                progress(len(rows) * len(pixels) + start + len(images), len(mirrors) * len(pixels))
        rows.append(torch.cat(outputs))
    return FrozenTable(torch.stack(rows))
