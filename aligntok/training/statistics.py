"""Latent statistics: per-channel mean and standard deviation of raw latents over training images."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from aligntok import collectives
from aligntok.data.sources import Source
from aligntok.devices import Precision
from aligntok.models.tokenizer import AlignTok
from aligntok.world import current


@torch.no_grad()
def latent_statistics(
    tokenizer: AlignTok,
    source: Source,
    count: int,
    precision: Precision,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """(mean [d], std [d]), float32, of the raw latents of at least `count` crops over all processes.

    Sums are float64.
    """
    total = torch.zeros(tokenizer.latent_channels, dtype=torch.float64)
    squares, seen, values, step = total.clone(), 0, 0, 0
    while seen < count:
        images = source.batch(step)["images"].to(precision.device)
        with precision.autocast():
            latents = tokenizer.raw_latents(images)
        flat = latents.transpose(0, 1).flatten(1).to("cpu", torch.float64)  # [d, B*h*w]
        total += flat.sum(1)
        squares += flat.square().sum(1)
        seen, values, step = seen + len(images) * current().size, values + flat.shape[1], step + 1
        if progress is not None:
            progress(min(seen, count), count)
    total, squares, counted = (collectives.total(x) for x in (total, squares, torch.tensor(values)))
    mean = total / counted
    return mean.float(), (squares / counted - mean.square()).clamp(min=0).sqrt().float()
