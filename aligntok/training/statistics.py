"""Latent statistics: mean and standard deviation of raw latents over training images, per channel or per element."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from aligntok.data.sources import Source
from aligntok.models.tokenizer import StoredTokenizer
from aligntok.runtime import collectives
from aligntok.runtime.devices import Precision
from aligntok.runtime.world import current


@torch.no_grad()
def latent_statistics(
    tokenizer: StoredTokenizer,
    source: Source,
    count: int,
    precision: Precision,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """(mean, std), float32, shaped like the tokenizer's statistics, of the raw latents of at least `count` crops.

    The crops are those of all processes; sums are float64.
    """
    shape = tokenizer.latent_mean.shape
    reduced = (0, 2, 3) if len(shape) == 1 else (0,)
    total = torch.zeros(shape, dtype=torch.float64)
    squares, seen, values, step = total.clone(), 0, 0, 0
    while seen < count:
        images = source.batch(step)["images"].to(precision.device)
        with precision.autocast():
            latents = tokenizer.raw_latents(images)
        latents = latents.to("cpu", torch.float64)  # [B, d, h, w]
        total += latents.sum(reduced)
        squares += latents.square().sum(reduced)
        seen, values = seen + len(images) * current().size, values + latents.numel() // total.numel()
        step += 1
        if progress is not None:
            progress(min(seen, count), count)
    total, squares, counted = (collectives.total(x) for x in (total, squares, torch.tensor(values)))
    mean = total / counted
    return mean.float(), (squares / counted - mean.square()).clamp(min=0).sqrt().float()
