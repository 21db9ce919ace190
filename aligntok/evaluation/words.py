"""The captions of a small set: what generators are asked for, and whether their pictures show it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from aligntok.config import Recipe
from aligntok.data.captions import read_captions
from aligntok.data.images import ImageSet, load_center_crops, split_numbers, told_before
from aligntok.errors import UserError
from aligntok.evaluation.asked import Captions
from aligntok.evaluation.retrieval import CANDIDATES, CaptionMap, fit_caption_map, retrieval_accuracy, same_text
from aligntok.evaluation.text_probes import mean_text_features
from aligntok.models.text_encoder import TextEncoder
from aligntok.runtime.devices import Precision


class Words:
    """The first caption of every picture of a set that has one and can be read; these pictures are counted here.

    `found` asks a linear map from the extractor's features to MiniLM's, fitted on the real pictures that generators are
    trained on, which of ten captions a picture shows (aligntok.evaluation.retrieval).

    Args:
        images: the whole set.

    Attributes:
        crops, labels: of the pictures, uint8 [n, 3, H, W] and [n].
    """

    def __init__(self, images: ImageSet, recipe: Recipe, precision: Precision) -> None:
        texts = read_captions(images, recipe.data.captions, say=told_before).texts
        captioned = [number for number, own in enumerate(texts) if own]
        self.crops, self.labels = load_center_crops(images.subset(captioned), recipe.data.image_size)
        used = [number for number in captioned if images.entries[number].name not in images.skipped]
        self.captions = [texts[number][0] for number in used]
        check_distinct(self.captions)
        trained = torch.zeros(len(images), dtype=torch.bool)
        trained[split_numbers(len(images), recipe.data.held_out)[0]] = True
        self.trained_on = torch.nonzero(trained[used]).flatten()
        self.encoder = TextEncoder(recipe.generator.text.encoder, precision)
        self._texts: Tensor | None = None
        self._map: CaptionMap | None = None

    @property
    def texts(self) -> Tensor:
        """Features [n, D] of the captions, computed once."""
        if self._texts is None:
            self._texts = mean_text_features(self.encoder, self.captions)
        return self._texts

    def asked(self, numbers: Tensor) -> Captions:
        """The captions of pictures by their numbers."""
        return Captions(self.encoder, [self.captions[number] for number in numbers.tolist()])

    def several(self, prompts: Sequence[str], each: int = 1) -> Captions:
        """So many pictures of each prompt, one after the other."""
        return Captions(self.encoder, [prompt for prompt in prompts for _ in range(each)])

    def fit(self, features: Tensor) -> None:
        """Fit the map on features [n, P] of all real pictures, of which it sees those that generators train on."""
        chosen = self.trained_on
        captions = [self.captions[number] for number in chosen.tolist()]
        self._map = fit_caption_map(features.cpu()[chosen], self.texts[chosen], captions)

    def found(self, features: Tensor, numbers: Tensor) -> tuple[float, str]:
        """(share of pictures [n, P] that find their caption among ten, how it was taken); chance is a tenth."""
        assert self._map is not None  # fitted with the reference's features
        captions = [self.captions[number] for number in numbers.tolist()]
        pool = self.texts.double() - self._map.text_mean
        told = retrieval_accuracy(self._map(features), captions, self.captions, pool, CANDIDATES)
        return told.accuracy, f"found: the right caption of {CANDIDATES} out of {told.pool}; {self._map.protocol}"


def check_distinct(captions: Sequence[str]) -> None:
    """UserError where captions are too few to be told apart by `Words.found`."""
    distinct = len(set(map(same_text, captions)))
    if distinct < CANDIDATES:
        raise UserError(
            f"{distinct} distinct captions, expected at least {CANDIDATES}: a picture has to find its own among "
            f"{CANDIDATES}; add pictures with other captions"
        )
