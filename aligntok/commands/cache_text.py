"""`aligntok cache-text`: the features of all captions of an image set, once, so that training needs no text encoder.

What is not there or damaged is made, by all processes that torchrun starts; what is sound stays
(aligntok.data.shard_store).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from aligntok.commands.cache_latents import make_together
from aligntok.config import TextEncoderConfig
from aligntok.data.captions import Captions, read_captions
from aligntok.data.images import ImageSet, open_images
from aligntok.data.latent_format import images_fingerprint
from aligntok.data.shard_store import Progress, Record, ShardStore
from aligntok.data.text_features import Encoder, encode_ragged, report_cut
from aligntok.data.text_format import LAYOUT, Origin
from aligntok.errors import UserError
from aligntok.models.text_encoder import TextEncoder
from aligntok.runtime.devices import choose_precision
from aligntok.runtime.world import World
from aligntok.training.distributed import LONG_TIMEOUT, start
from aligntok.training.monitoring.telemetry import Telemetry

_LONG = 3  # captions of a shard that are named where they were cut


def cache_text(
    images: str,
    output: str,
    captions: str | None,
    encoder: str,
    revision: str | None,
    layer: int,
    tokens: int,
    shard_size: int,
    batch_size: int,
    precision: str,
    device: str,
) -> None:
    """Make, continue or check a cache; the options are those of aligntok.config.options.CacheTextConfig.

    Raises:
        UserError: no images, captions or encoder, `output` has another cache, the disk refuses.
    """
    for name, value in (("tokens", tokens), ("shard_size", shard_size), ("batch_size", batch_size)):
        if value < 1:
            raise UserError(f"{name} is {value}, expected at least 1")
    with start(device, LONG_TIMEOUT) as world:
        chosen = choose_precision(device, precision)
        telemetry = Telemetry(output, log_every=1)
        found = open_images(images, say=telemetry.say)
        with telemetry.bar("captions") as update:
            read = read_captions(found, captions, telemetry.say, update)
        config = TextEncoderConfig(name=encoder, revision=revision, layer=layer, tokens=tokens)
        network = TextEncoder(config, chosen)
        origin = describe(config, network, found, read, shard_size)
        store = ShardStore(Path(output), LAYOUT, origin, telemetry.say)
        writer = Writer(store, origin, network, read, batch_size)
        manifest = make_together(store, writer.write, _summary, world, telemetry, "text features")
        if manifest is not None:
            report(manifest, network, output, telemetry)


def describe(
    config: TextEncoderConfig, encoder: Encoder, images: ImageSet, captions: Captions, shard_size: int
) -> Origin:
    """What a cache with these options is made from."""
    return Origin(
        encoder=encoder.fingerprint(),
        encoder_name=config.name,
        revision=config.revision,
        layer=config.layer,
        tokens=config.tokens,
        width=encoder.width,
        images=images_fingerprint(images),
        image_set=images.name,
        image_count=len(images),
        captions=captions.fingerprint(),
        caption_count=captions.count,
        source=captions.source,
        precision=encoder.precision,
        shard_size=shard_size,
    )


@dataclass
class Writer:
    """Makes the shards of one cache folder."""

    store: ShardStore
    origin: Origin
    encoder: Encoder
    captions: Captions
    batch_size: int

    def __post_init__(self) -> None:
        self.texts = ["", *self.captions.flat()]
        counts = torch.tensor(list(map(len, self.captions.texts)))
        self.pictures = torch.cat([torch.tensor([-1]), torch.arange(len(counts)).repeat_interleave(counts)])

    def write(self, world: World, progress: Progress) -> None:
        """Make this process's shards, except those that are there and sound."""
        missing, done, total = self.store.missing(world, progress)
        for shard in missing:
            before = done

            def update(encoded: int, _: int, before: int = before) -> None:
                progress(before + encoded, total)

            self._save(shard, update)
            done += len(self.origin.numbers(shard))

    def _save(self, shard: int, progress: Progress) -> None:
        numbers = self.origin.numbers(shard)
        texts = self.texts[numbers.start : numbers.stop]
        tokens = self.encoder.tokenize(texts)
        offsets = _offsets([len(ids) for ids in tokens.ids])
        features = torch.empty(int(offsets[-1]), self.origin.width, dtype=torch.bfloat16)
        for place, row in encode_ragged(self.encoder, tokens.ids, self.batch_size, progress):
            features[offsets[place] : offsets[place + 1]] = row
        letters = [text.encode() for text in texts]
        rows = {
            "features": features,
            "offsets": offsets,
            "picture": self.pictures[numbers.start : numbers.stop].clone(),
            "letters": torch.from_numpy(np.frombuffer(bytearray(b"".join(letters)), np.uint8)),
            "letter_offsets": _offsets([len(text) for text in letters]),
        }
        long = [text for text, cut in zip(texts, tokens.cut, strict=True) if cut]
        about = {"tokens": len(features), "letters": len(rows["letters"]), "cut": len(long), "long": long[:_LONG]}
        self.store.save(shard, rows, len(texts), **about)


def _offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0)


def _summary(records: list[Record]) -> Record:
    long = [text for record in records for text in record["long"]]
    return {"cut": sum(record["cut"] for record in records), "long": long[:_LONG]}


def report(manifest: Record, encoder: Encoder, output: str, telemetry: Telemetry) -> None:
    """What is in the cache, and what was cut."""
    report_cut(manifest["long"], manifest["caption_count"], encoder, telemetry.say, manifest["cut"])
    gib = sum(shard["bytes"] for shard in manifest["shards"]) / 2**30
    tokens = sum(shard["tokens"] for shard in manifest["shards"]) / sum(shard["rows"] for shard in manifest["shards"])
    telemetry.say(
        f"{output}: features of {manifest['caption_count']:,} captions of {manifest['image_set']}, {tokens:.1f} tokens "
        f"each of {manifest['width']} numbers, {len(manifest['shards'])} shards, {gib:.2f} GiB"
    )
