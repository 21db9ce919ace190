"""Outputs of frozen networks: looked up where the crops repeat, computed where they do not.

Stage 1 needs encoder features, Stage 2 the latents of its snapshot, Stage 3 and the generator the tokenizer's
latents. All of them come from networks that do not change during the stage. With centre crops and flips there are two
outputs a picture, so they are computed once: in memory (`tabulate`) or in a latent cache, whose batches bring them
along (`latents_in_batch`). With random crops the network runs in the loop (`FrozenNetwork`). All are called the same
way: batch in, tensor out.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

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
    mirrors = (False, True) if source.flip else (False,)
    total = len(mirrors) * len(source.images)
    rows: list[Tensor] = []
    for mirrored in mirrors:
        outputs = []
        for start in range(0, len(source.images), batch_size):
            images = to_unit_range(source.images[start : start + batch_size])
            images = (images.flip(-1) if mirrored else images).to(precision.device)
            with precision.autocast():
                outputs.append(network(images).to("cpu", dtype))
            if progress is not None:
                progress(len(rows) * len(source.images) + start + len(images), total)
        rows.append(torch.cat(outputs))
    return FrozenTable(torch.stack(rows))
