"""Reading a latent cache (aligntok.data.latent_format) without ever holding more of it than a batch.

The shards are mapped into memory (aligntok.data.mapped) and the rows of a batch are copied out of them, in the order of
the files. The rows of the next batch are announced to the kernel while the present one is trained on.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aligntok.config import DataConfig
from aligntok.data.images import ImageSet, limit_numbers, split_numbers
from aligntok.data.latent_format import Origin, images_fingerprint, make_command, origin_of, read_manifest
from aligntok.data.mapped import DAMAGED, MappedTensor, map_tensors
from aligntok.data.shard_store import MANIFEST, shard_problem
from aligntok.data.sources import Batch, MemorySource, Order, Source
from aligntok.errors import UserError
from aligntok.runtime.world import World

Place = tuple[int, int, int, str]  # position in the batch, shard, row of the shard, tensor


class LatentCache:
    """A finished cache, open for reading.

    Args:
        folder: written by `aligntok cache-latents`.
        tokenizer_fingerprint: of the tokenizer whose latents are wanted; None = whichever made it.
        command: how to make the right cache, for the messages.

    Raises:
        UserError: no cache, an unfinished one, another tokenizer's, or a shard that is missing, of the wrong size or
            has a damaged header, or labels that are no numbers of classes.
    """

    def __init__(
        self, folder: str | Path, tokenizer_fingerprint: str | None = None, command: str | None = None
    ) -> None:
        self.folder = Path(folder)
        self.command = command or make_command(output=folder)
        manifest = read_manifest(self.folder)
        if manifest is None:
            raise UserError(f"no latent cache at {folder}: {MANIFEST} is missing; make one with: {self.command}")
        self.origin = origin_of(manifest)
        if tokenizer_fingerprint not in (None, self.origin.tokenizer):
            raise UserError(
                f"the latent cache {folder} was made by another tokenizer (fingerprint {self.origin.tokenizer}, "
                f"expected {tokenizer_fingerprint}); remove it or name another folder, and make one with: "
                f"{self.command}"
            )
        if not manifest["complete"]:
            raise UserError(f"the latent cache {folder} is unfinished; complete it with: {self.command}")
        self.skipped = torch.tensor([entry["index"] for entry in manifest["skipped"]], dtype=torch.int64)
        self._shards = [self._open(record) for record in manifest["shards"]]
        self._starts = np.cumsum([0] + [record["rows"] for record in manifest["shards"]])
        hashes = [record["sha256"] for record in manifest["shards"]]
        self.fingerprint = hashlib.sha256(repr((self.origin, hashes)).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        """Rows: images that could be read."""
        return int(self._starts[-1])

    def latents(self, rows: Tensor, flip: Tensor) -> Tensor:
        """Normalised latents [B, d, h, w] float32 of rows [B]; of the mirror images where flip [B] is set."""
        bits = np.empty((len(rows), *self.origin.latent_shape), np.uint16)
        for position, shard, offset, name in self._places(rows, flip):
            bits[position] = self._shards[shard][name].rows[offset]
        return torch.from_numpy(bits).view(torch.bfloat16).float()

    def announce(self, rows: Tensor, flip: Tensor) -> None:
        """Ask the kernel to read the latents of these rows from disk; returns before it has."""
        for _, shard, offset, name in self._places(rows, flip):
            self._shards[shard][name].announce(offset, 1)

    def labels(self, rows: Tensor) -> Tensor:
        """Class numbers [B] of rows [B]."""
        return self._numbers("labels", rows)

    def index(self, rows: Tensor) -> Tensor:
        """Numbers [B] of the images, in their set, of rows [B]."""
        return self._numbers("index", rows)

    def rows_of(self, numbers: Tensor) -> Tensor:
        """Rows [B] of images given by their numbers [B], none of which the cache has skipped."""
        assert not torch.isin(numbers, self.skipped).any(), "skipped images have no row"
        return numbers - torch.searchsorted(self.skipped, numbers)

    def training_numbers(self, data: DataConfig) -> Tensor:
        """Numbers of the images that training with `data` uses: neither held out nor unreadable."""
        kept = limit_numbers(self.origin.image_count, data.max_images)
        kept = kept[split_numbers(len(kept), data.held_out)[0]]
        return kept[~torch.isin(kept, self.skipped)]

    def check_data(self, data: DataConfig) -> None:
        """Refuse data settings that the cache cannot serve.

        Raises:
            UserError: another image size, or flips that are not in the cache.
        """
        if data.image_size != self.origin.image_size:
            raise UserError(
                f"the latent cache {self.folder} is of {self.origin.image_size} px images, but data.image_size is "
                f"{data.image_size}: change that, or remove it or name another folder, and make a cache with: "
                f"{self.command}"
            )
        if data.flip and not self.origin.flip:
            raise UserError(
                f"the latent cache {self.folder} has no mirror images, but data.flip is true: set it to false, or name "
                f"another folder and make a cache with: {self.command}"
            )

    def check_images(self, images: ImageSet) -> None:
        """Refuse images that the cache was not made of.

        Raises:
            UserError: names, labels or number differ.
        """
        if images_fingerprint(images) != self.origin.images:
            raise UserError(
                f"the latent cache {self.folder} was made of other images ({self.origin.image_set}, "
                f"{self.origin.image_count} images) than those of data.path ({images.name}, {len(images)} images); "
                f"remove it or name another folder, and make one with: {self.command}"
            )

    def _open(self, record: dict[str, Any]) -> dict[str, MappedTensor]:
        problem = shard_problem(self.folder, record)
        if problem is None:
            try:
                tensors = _map_shard(self.folder / record["file"], record["rows"], self.origin)
            except DAMAGED as error:
                problem = f"has a damaged header ({type(error).__name__}: {error})"
            else:
                self._check_labels(record["file"], tensors["labels"].rows)
                return tensors
        raise UserError(f"{self.folder / record['file']} {problem}; make this shard anew with: {self.command}")

    def _check_labels(self, file: str, labels: np.ndarray) -> None:
        """UserError where a label is no number of a class; nobody else asks before training does."""
        count = len(self.origin.classes)
        wrong = labels[(labels < 0) | (labels >= count)]
        if len(wrong):
            raise UserError(
                f"{self.folder / file} has the label {wrong[0]}, but the cache names {count} classes, 0 to "
                f"{count - 1}: correct the labels of the images and make the cache anew with: {self.command}"
            )

    def _numbers(self, name: str, rows: Tensor) -> Tensor:
        found = np.empty(len(rows), np.int64)
        for position, shard, offset, _ in self._places(rows, torch.zeros(len(rows), dtype=torch.bool)):
            found[position] = self._shards[shard][name].rows[offset]
        return torch.from_numpy(found)

    def _places(self, rows: Tensor, flip: Tensor) -> list[Place]:
        """Where each row lies, in the order of the files."""
        order = np.argsort(rows.numpy(), kind="stable")
        wanted = rows.numpy()[order]
        shards = np.searchsorted(self._starts, wanted, side="right") - 1
        names = np.where(flip.numpy()[order], "flipped", "latents")
        columns = order, shards, wanted - self._starts[shards], names
        return list(zip(*(column.tolist() for column in columns), strict=True))


def _map_shard(file: Path, rows: int, origin: Origin) -> dict[str, MappedTensor]:
    """The tensors of a shard; an exception of `DAMAGED` where its header is not what it was."""
    latents, numbers = ("BF16", [rows, *origin.latent_shape]), ("I64", [rows])
    expected = {"latents": latents, "labels": numbers, "index": numbers} | ({"flipped": latents} if origin.flip else {})
    tensors = map_tensors(file, expected)
    tensors["labels"].announce(0, rows)
    tensors["index"].announce(0, rows)
    return tensors


class CachedLatentSource:
    """Batches of a generator: latents [B, d, h, w] instead of images; `index` is the image's number in the cached set.

    Args:
        numbers: of the images to train on (LatentCache.training_numbers).
    """

    def __init__(
        self,
        cache: LatentCache,
        numbers: Tensor,
        batch_size: int,
        seed: int,
        flip: bool,
        world: World | None = None,
    ) -> None:
        self.cache, self.cache_rows, self.flip = cache, cache.rows_of(numbers), flip
        self.order = Order(len(numbers), batch_size, seed, world)
        self._next: tuple[int, Tensor, Tensor] | None = None

    def __str__(self) -> str:
        return f"their latents from the cache {self.cache.folder}"

    def batch(self, step: int) -> Batch:
        if self._next is None or self._next[0] != step:
            self._next = self._prepare(step)
        _, rows, flip = self._next
        batch = {
            "latents": self.cache.latents(rows, flip),
            "labels": self.cache.labels(rows),
            "index": self.cache.index(rows),
            "flip": flip,
            "rows": self.order.rows,
        }
        self._next = self._prepare(step + 1)
        return batch

    def _prepare(self, step: int) -> tuple[int, Tensor, Tensor]:
        """Choose the rows of a step and have the disk look for them."""
        rows = self.cache_rows[self.order.indices(step)]
        flip = (self.order.uniforms(step)[:, 0] < 0.5) & self.flip
        self.cache.announce(rows, flip)
        return step, rows, flip


class LatentsBeside:
    """The batches of an image source with the cached latents of the same images beside them.

    Args:
        source: centre crops of the pictures `numbers`, in that order.
        numbers: of the pictures in the cached set.

    Raises:
        UserError: a picture that could be read when the cache was made no longer can.
    """

    def __init__(self, source: Source, cache: LatentCache, numbers: Tensor) -> None:
        if isinstance(source, MemorySource) and len(source.images) != len(numbers):
            raise UserError(
                f"{len(numbers) - len(source.images)} images that are in the latent cache {cache.folder} can no longer "
                f"be read: restore them, or remove the cache and make it anew with: {cache.command}"
            )
        self.source, self.cache, self.cache_rows = source, cache, cache.rows_of(numbers)
        self.order = source.order

    def __str__(self) -> str:
        return f"{self.source}, their latents from the cache {self.cache.folder}"

    def batch(self, step: int) -> Batch:
        batch = self.source.batch(step)
        rows = self.cache_rows[batch["index"]]
        self.cache.announce(rows, batch["flip"])
        return batch | {"latents": self.cache.latents(rows, batch["flip"])}
