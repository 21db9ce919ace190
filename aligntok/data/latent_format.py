"""The latent cache on disk: normalised latents of centre crops and of their mirror images.

    cache.json                  what it was made from (Origin), shards with rows, bytes and SHA-256, skipped images
    latents-00000.safetensors   latents [n, d, h, w] bfloat16, flipped (the same, mirrored), labels [n], index [n]
    latents-00000.json          the record of that shard; cache.json is put together from these

Shard k has the readable ones of images k * shard_size ... (k+1) * shard_size - 1, in order; `index` is the number of
the image in its set. bfloat16 keeps 8 significant bits: a cached value differs from what `encode` gives by at most 2^-8
of its magnitude, 0.4 %. `aligntok.commands.cache_latents` writes caches, `aligntok.data.latent_cache` reads them, and
`aligntok.data.shard_store` has what they share with other caches.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from aligntok.data.images import ImageSet
from aligntok.data.shard_store import Layout, Record, ShardedOrigin, origin_from

FORMAT, VERSION = "aligntok.latents", 1
LAYOUT = Layout(FORMAT, VERSION, "latents")
shard_file, record_file, read_manifest = LAYOUT.shard_file, LAYOUT.record_file, LAYOUT.read_manifest


@dataclass(frozen=True)
class Origin(ShardedOrigin):
    """Everything that decides what is in a cache."""

    tokenizer: str  # AlignTok.fingerprint()
    latent_mean: list[float]  # [d], of the tokenizer
    latent_std: list[float]
    latent_shape: list[int]  # d, h, w
    images: str  # images_fingerprint()
    image_set: str
    image_count: int  # unreadable ones included
    classes: list[str]
    image_size: int
    flip: bool  # whether mirror images are there
    precision: str
    shard_size: int

    TOLD = ("image_set",)  # what the folder of the images was called

    @property
    def row_count(self) -> int:
        return self.image_count

    def told_apart(self, wanted: Origin, names: list[str]) -> str:
        if "tokenizer" in names:
            return f"by another tokenizer (fingerprint {self.tokenizer}, given {wanted.tokenizer})"
        if "images" in names:
            return (
                f"of other images ({self.image_set}, {self.image_count} images; "
                f"given {wanted.image_set}, {wanted.image_count} images)"
            )
        return super().told_apart(wanted, names)


def images_fingerprint(images: ImageSet) -> str:
    """Short hash of the names, labels and classes of an image set and of the places in its tar; pixels are not read."""
    digest = hashlib.sha256(repr(images.classes).encode())
    for entry in images.entries:
        digest.update(repr((entry.name, entry.label, entry.offset, entry.size)).encode())
    return digest.hexdigest()[:16]


def make_command(
    tokenizer: str | Path = "TOKENIZER", images: str = "IMAGES", output: str | Path = "FOLDER", image_size: int = 256
) -> str:
    """The command that makes a cache, for messages."""
    return (
        f"aligntok cache-latents --tokenizer {tokenizer} --images {images} --output {output} --image_size {image_size}"
    )


def origin_of(manifest: Record) -> Origin:
    return origin_from(Origin, manifest)
