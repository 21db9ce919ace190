"""What a generator is told about the pictures of a batch, a share of it left out for classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from aligntok.data.sources import Batch
from aligntok.diffusion.condition import dropped
from aligntok.models.lightning_dit import LightningDiT
from aligntok.runtime.world import Place

# (batch, which rows of the whole one they are) -> what the network takes behind z_t and t
Conditioning = Callable[[Batch, Place], tuple[Tensor, ...]]


@dataclass(frozen=True)
class ByLabel:
    """Labels [B], with the null class in the place of a share `dropout` of them."""

    null_class: int
    dropout: float

    def __call__(self, batch: Batch, place: Place) -> tuple[Tensor, ...]:
        labels = batch["labels"]
        return dropped((labels,), (labels.new_full((1,), self.null_class),), self.dropout, place)


def by_label(model: LightningDiT) -> ByLabel:
    """As the model's own configuration says."""
    return ByLabel(model.null_class, model.config.label_dropout)


@dataclass(frozen=True)
class ByCaption:
    """Features [B, L, D] and lengths [B] of captions, with the empty string's in the place of a share of them."""

    empty: Tensor  # [L, D], where batches are
    empty_length: int
    dropout: float

    def __call__(self, batch: Batch, place: Place) -> tuple[Tensor, ...]:
        text, lengths = batch["text"], batch["text_lengths"]
        nothing = (self.empty[None].to(text.dtype), lengths.new_full((1,), self.empty_length))
        return dropped((text, lengths), nothing, self.dropout, place)
