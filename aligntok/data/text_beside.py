"""The batches of any source with the features of a caption of each picture beside them.

Which of a picture's captions a row gets is a function of the seed, the step and the row's place in the batch of all
processes, so that one process and several train on the same captions, and a resumed run on those that it would have
had.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aligntok.data.bucket_sources import BucketsInMemory
from aligntok.data.images import ImageSet
from aligntok.data.latent_cache import CachedLatentSource, LatentsBeside
from aligntok.data.sources import Batch, MemorySource, Source, generator_for
from aligntok.data.text_features import TextFeatures

_PURPOSE = 2


class TextBeside:
    """A source whose batches have "text" [B, T, D] float32, zero behind a caption's own, and "text_lengths" [B] int64.

    Args:
        source: of pictures or latents, each of which has a caption.
        text: features of the captions of the whole set.
        pictures: int64, the number in the whole set of each picture that the source's "index" counts; None = "index" is
            that number already, as with CachedLatentSource. See `pictures_of`.
        seed: of the choice among a picture's captions.
    """

    def __init__(self, source: Source, text: TextFeatures, pictures: Tensor | None, seed: int) -> None:
        self.source, self.text, self.pictures, self.seed = source, text, pictures, seed
        self.order = source.order

    def __str__(self) -> str:
        return f"{self.source}, {self.text}"

    def batch(self, step: int) -> Batch:
        batch = self.source.batch(step)
        features, lengths = self.text.features(self._rows(step, batch["index"], batch["rows"]))
        self.text.announce(self._rows(step + 1, _coming(self.source, step + 1), self.order.rows))
        return batch | {"text": features, "text_lengths": lengths}

    def _rows(self, step: int, index: Tensor, rows: Tensor) -> Tensor:
        """Of each picture, the row of one of its captions."""
        numbers = index.cpu() if self.pictures is None else self.pictures[index.cpu()]
        first = self.text.starts[numbers]
        count = self.text.starts[numbers + 1] - first
        assert (count > 0).all(), "pictures without a caption are left out of training"
        drawn = torch.rand(self.order.batch_size, generator=generator_for(self.seed, _PURPOSE, step))[rows.cpu()]
        return first + (drawn.double() * count).long()


def _coming(source: Source, step: int) -> Tensor:
    """The "index" of a batch before it is there; unreadable pictures may still be replaced."""
    if isinstance(source, LatentsBeside):
        return _coming(source.source, step)
    positions = source.order.indices(step)
    return source.cache.index(source.cache_rows[positions]) if isinstance(source, CachedLatentSource) else positions


def pictures_of(source: Source, images: ImageSet, numbers: Tensor) -> Tensor:
    """Numbers in the whole set of the pictures that a source's "index" counts.

    Args:
        source: made of `images`; what lies in memory counts readable pictures only.
        images: a part of the whole set.
        numbers: of the pictures of `images` in the whole set.
    """
    inner = source.source if isinstance(source, LatentsBeside) else source
    if not isinstance(inner, MemorySource | BucketsInMemory):
        return numbers
    return numbers[torch.tensor([entry.name not in images.skipped for entry in images.entries])]
