"""data.buckets: which runs can train on pictures of several sizes, and in which sizes their pictures come."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from aligntok.config import DataConfig, Recipe
from aligntok.data.buckets import NONE, STEP, Bucket, Buckets, assign_buckets, bucket_table
from aligntok.data.images import ImageSet
from aligntok.data.picture_sizes import Sizes, read_sizes, save_sizes, saved_sizes
from aligntok.errors import UserError, near_multiples
from aligntok.models.tokenizer import StoredTokenizer
from aligntok.runtime.collectives import gathered, on_main
from aligntok.runtime.world import current
from aligntok.training.monitoring.telemetry import Telemetry

KEPT_IN = "picture_sizes.safetensors"  # in OUTPUT: what a resumed run need not read again


def refuse_buckets(data: DataConfig, trained: str) -> None:
    """UserError where a part that trains on squares is asked for anything else."""
    if data.buckets != "none":
        raise UserError(
            f"data.buckets is {data.buckets}, but {trained} trains on square crops: set data.buckets=none (buckets are "
            f"for generators with generator.condition=text)"
        )


def check_buckets(recipe: Recipe) -> None:
    """Refuse what does not go together with data.buckets; nothing is read.

    Raises:
        UserError: a generator of classes, a latent cache, or DALI.
    """
    data, config = recipe.data, recipe.generator
    if data.buckets == "none":
        return
    if config.condition != "text":
        refuse_buckets(data, f"a generator with generator.condition={config.condition}")
    if config.latents is not None:
        raise UserError(
            f"data.buckets is {data.buckets}, but the latent cache {config.latents} is of square crops: "
            f"set generator.latents=null, or data.buckets=none"
        )
    if data.loader == "dali":
        raise UserError(
            f"data.loader is dali, which is not used for data.buckets={data.buckets}: set data.loader to auto or "
            f"torchvision"
        )


def counted_size(data: DataConfig) -> str:
    """What a plan says of the sizes that it does not count; nothing where all are squares."""
    if data.buckets == "none":
        return ""
    table, side = bucket_table(data.buckets, data.image_size), data.image_size
    most = max(size.height * size.width for size in table) / side**2
    return (
        f" Every size of data.buckets={data.buckets} is counted as {side} x {side}; the largest has {most:.2f} times "
        f"its pixels."
    )


def table_for(data: DataConfig, tokenizer: StoredTokenizer, patch_size: int) -> list[Bucket]:
    """The sizes of a run; nothing but the tokenizer has been read by then.

    Raises:
        UserError: sides that are no whole numbers of patches, or a tokenizer that takes one size only.
    """
    factor = tokenizer.downsample * patch_size
    unit, mode = math.lcm(STEP, factor), data.buckets
    assert mode != "none"
    if data.image_size % unit or data.image_size < unit:
        raise UserError(
            f"data.image_size is {data.image_size}, expected a multiple of {unit} for data.buckets={mode}, the "
            f"tokenizer's downsampling {tokenizer.downsample} and patches of {patch_size}: "
            f"use {near_multiples(data.image_size, unit)}"
        )
    table = bucket_table(mode, data.image_size)
    odd = [side for size in table for side in size if side % factor]
    if odd:
        raise UserError(
            f"data.buckets is {mode}, which at data.image_size={data.image_size} has sides of {odd[0]} px, expected "
            f"multiples of {factor} (downsampling {tokenizer.downsample}, patches of {patch_size}): use "
            f"data.buckets={'short_side' if mode == 'area' else 'area'}, another image_size or patches of 1"
        )
    for size in table:
        _check_grid(tokenizer, size, mode)
    return table


def _check_grid(tokenizer: StoredTokenizer, size: Bucket, mode: str) -> None:
    """UserError where a tokenizer has another size in its weights or statistics."""
    try:
        grid = tokenizer.grid(torch.empty(1, 3, *size, device="meta"))
    except UserError as error:
        raise UserError(f"data.buckets is {mode}, but {error}: set data.buckets=none") from error
    known = tuple(tokenizer.latent_mean.shape[1:])  # of statistics for every position
    if known and known != grid:
        raise UserError(
            f"data.buckets is {mode}, but the tokenizer's latent statistics are of {known[0]} x {known[1]} positions "
            f"alone: set data.buckets=none"
        )


def sort_pictures(
    images: ImageSet, numbers: Tensor, table: list[Bucket], telemetry: Telemetry
) -> tuple[Tensor, ImageSet, Buckets]:
    """The pictures that have a bucket: (their numbers in the whole set, themselves, their buckets).

    Args:
        images: to train on.
        numbers: of them in the whole set.
        table: the sizes.

    Raises:
        UserError: none has one.
    """
    found = assign_buckets(images, table, telemetry.say, sizes=_sizes(images, telemetry))
    fits = found != NONE
    kept = torch.nonzero(fits).flatten().tolist()
    return numbers[fits], images.subset(kept), Buckets(table, found[fits])


def _sizes(images: ImageSet, telemetry: Telemetry) -> Sizes:
    """Of all pictures: those that this run has read before, or read now, a share in every process."""
    file, identity, world = telemetry.folder / KEPT_IN, images.identity(), current()
    known = on_main(lambda: saved_sizes(file, identity))
    if known is not None:
        telemetry.say(f"sizes of {len(images):,} pictures read from {file}, where this run has kept them")
        return known
    share = range(world.rank * len(images) // world.size, (world.rank + 1) * len(images) // world.size)
    with telemetry.bar("sizes of pictures") as update:
        read = Sizes.of_parts(gathered(read_sizes(images.subset(list(share)), update)))
    on_main(lambda: save_sizes(file, read, identity))
    return read
