"""The latent cache on disk: normalised latents of centre crops and of their mirror images.

    cache.json                  what it was made from (Origin), shards with rows, bytes and SHA-256, skipped images
    latents-00000.safetensors   latents [n, d, h, w] bfloat16, flipped (the same, mirrored), labels [n], index [n]
    latents-00000.json          the record of that shard; cache.json is put together from these

Shard k has the readable ones of images k * shard_size ... (k+1) * shard_size - 1, in order; `index` is the number of
the image in its set. bfloat16 keeps 8 significant bits: a cached value differs from what `encode` gives by at most 2^-8
of its magnitude, 0.4 %. `aligntok.commands.cache_latents` writes caches, `aligntok.data.latent_cache` reads them.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from aligntok.data.images import ImageSet
from aligntok.errors import UserError

FORMAT, VERSION = "aligntok.latents", 1
MANIFEST = "cache.json"


@dataclass(frozen=True)
class Origin:
    """Everything that decides what is in a cache. It is written first, so that an unfinished cache has it too."""

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

    @property
    def shards(self) -> int:
        return -(-self.image_count // self.shard_size)

    def numbers(self, shard: int) -> range:
        """Numbers of the images that a shard is made of."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.image_count))

    def fingerprint(self) -> str:
        """Short hash of all of it."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]

    def check(self, wanted: Origin, folder: Path) -> None:
        """Refuse to mix caches.

        Raises:
            UserError: `wanted` would put other numbers into `folder`.
        """
        told = ("image_set",)  # what the folder of the images was called: it decides nothing
        names = [
            f.name for f in fields(Origin) if f.name not in told and getattr(self, f.name) != getattr(wanted, f.name)
        ]
        if not names:
            return
        if "tokenizer" in names:
            what = f"by another tokenizer (fingerprint {self.tokenizer}, given {wanted.tokenizer})"
        elif "images" in names:
            what = (
                f"of other images ({self.image_set}, {self.image_count} images; "
                f"given {wanted.image_set}, {wanted.image_count} images)"
            )
        else:
            what = "with " + ", ".join(f"{n} {getattr(self, n)} (given {getattr(wanted, n)})" for n in names)
        raise UserError(f"{folder} has a cache that was made {what}: give another --output, or remove that folder")


def images_fingerprint(images: ImageSet) -> str:
    """Short hash of the names, labels and classes of an image set and of the places in its tar; pixels are not read."""
    digest = hashlib.sha256(repr(images.classes).encode())
    for entry in images.entries:
        digest.update(repr((entry.name, entry.label, entry.offset, entry.size)).encode())
    return digest.hexdigest()[:16]


def shard_file(number: int) -> str:
    return f"latents-{number:05d}.safetensors"


def record_file(number: int) -> str:
    return f"latents-{number:05d}.json"


def make_command(
    tokenizer: str | Path = "TOKENIZER", images: str = "IMAGES", output: str | Path = "FOLDER", image_size: int = 256
) -> str:
    """The command that makes a cache, for messages."""
    return (
        f"aligntok cache-latents --tokenizer {tokenizer} --images {images} --output {output} --image_size {image_size}"
    )


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """cache.json, or None where there is none.

    Raises:
        UserError: it cannot be read, or is something else.
    """
    file = folder / MANIFEST
    try:
        manifest = json.loads(file.read_text())
        if (manifest["format"], manifest["version"]) == (FORMAT, VERSION):
            return manifest
        found = f"format {manifest['format']!r} version {manifest['version']!r}"
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        found = f"nothing that can be read ({type(error).__name__}: {error})"
    raise UserError(
        f"{file} has {found}, expected {FORMAT!r} version {VERSION}: give another folder, or remove this one"
    )


def origin_of(manifest: dict[str, Any]) -> Origin:
    return Origin(**{f.name: manifest[f.name] for f in fields(Origin)})


def shard_problem(folder: Path, record: dict[str, Any]) -> str | None:
    """What is wrong with a shard at first sight, None where nothing is; its contents are not read."""
    try:
        size = (folder / record["file"]).stat().st_size
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None if size == record["bytes"] else f"has {size} bytes, expected {record['bytes']}"
