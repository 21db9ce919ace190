"""The text cache on disk: features of the captions of an image set, of each caption's own tokens only.

    cache.json               what it was made from (Origin), shards with rows, tokens, bytes and SHA-256
    text-00000.safetensors   features [tokens, D] bfloat16; offsets [n+1]: where the features of each row begin;
                             picture [n], the number of its picture in the set; letters [bytes], the captions in UTF-8;
                             letter_offsets [n+1]
    text-00000.json          the record of that shard

Row 0 is the empty string, of picture -1; row r is the r-th caption in the order of the pictures (Captions.flat, from 1
on). Shard k has rows k * shard_size ... `aligntok.commands.cache_text` writes caches, `aligntok.data.text_cache` reads
them.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from aligntok.config import TextEncoderConfig
from aligntok.data.shard_store import Layout, ShardedOrigin

LAYOUT = Layout("aligntok.text", 1, "text", ("file", "rows", "tokens", "letters", "bytes", "sha256"))


@dataclass(frozen=True)
class Origin(ShardedOrigin):
    """Everything that decides what is in a cache."""

    encoder: str  # TextEncoder.fingerprint()
    encoder_name: str
    revision: str | None
    layer: int  # as it was asked for
    tokens: int  # of a caption at most
    width: int  # D
    images: str  # images_fingerprint()
    image_set: str
    image_count: int  # without captions included
    captions: str  # Captions.fingerprint()
    caption_count: int
    source: str  # of the captions
    precision: str
    shard_size: int

    TOLD = ("image_set", "encoder_name", "revision", "layer", "source")  # the fingerprints decide

    @property
    def row_count(self) -> int:
        return self.caption_count + 1

    def told_apart(self, wanted: Origin, names: list[str]) -> str:
        if "encoder" in names:
            return f"by another text encoder ({self.encoder_told()}; given {wanted.encoder_told()})"
        if "images" in names:
            return (
                f"of other images ({self.image_set}, {self.image_count} images; "
                f"given {wanted.image_set}, {wanted.image_count} images)"
            )
        if "captions" in names:
            return (
                f"of other captions ({self.caption_count} from {self.source}; "
                f"given {wanted.caption_count} from {wanted.source})"
            )
        return super().told_apart(wanted, names)

    def encoder_told(self) -> str:
        """For a person."""
        return (
            f"{self.encoder_name}, layer {self.layer}, at most {self.tokens} tokens, {self.precision}, "
            f"fingerprint {self.encoder}"
        )

    def differs(self, wanted: TextEncoderConfig) -> str | None:
        """How an encoder that is asked for is another one; None where it is the same as far as its names tell.

        Folders and names of the hub are compared by their last part: a model may lie elsewhere now.
        """
        if Path(self.encoder_name).name != Path(wanted.name).name:
            return f"of {self.encoder_name}, but text.encoder.name is {wanted.name}"
        if None not in (self.revision, wanted.revision) and self.revision != wanted.revision:
            return f"of revision {self.revision}, but text.encoder.revision is {wanted.revision}"
        if self.layer != wanted.layer:
            return f"of layer {self.layer}, but text.encoder.layer is {wanted.layer}"
        if self.tokens != wanted.tokens:
            return f"of at most {self.tokens} tokens, but text.encoder.tokens is {wanted.tokens}"
        return None


def make_command(
    images: str = "IMAGES",
    output: str | Path = "FOLDER",
    captions: str | None = None,
    encoder: TextEncoderConfig | None = None,
) -> str:
    """The command that makes a cache, for messages."""
    words = ["aligntok", "cache-text", "--images", images, "--output", str(output)]
    words += [] if captions is None else ["--captions", captions]
    if encoder is not None:
        words += ["--encoder", encoder.name, "--tokens", str(encoder.tokens)]
        words += [] if encoder.layer == -1 else ["--layer", str(encoder.layer)]
        words += [] if encoder.revision is None else ["--revision", encoder.revision]
    return shlex.join(words)
