"""What pictures are asked for, as a network and guidance take it: labels of classes, or features of captions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from aligntok.errors import UserError
from aligntok.runtime.world import Place


@dataclass(frozen=True)
class Condition:
    """Of some pictures: what the network takes behind z and t, and the same where nothing is asked for.

    `given` and `null` are as long; each holds tensors with the pictures as their first dimension. For LightningDiT
    (labels [B],), for text to image (features [B, L, D], lengths [B]).
    """

    given: tuple[Tensor, ...]
    null: tuple[Tensor, ...]

    @classmethod
    def of_labels(cls, labels: Tensor, null_class: int) -> Condition:
        """Classes [B] of a generator that knows 0..null_class - 1; `null_class` itself asks for nothing.

        Raises:
            UserError: a label out of range.
        """
        wrong = labels[(labels < 0) | (labels > null_class)]
        if len(wrong):
            raise UserError(
                f"label {int(wrong[0])} is out of range: this generator knows 0..{null_class - 1}, "
                f"and {null_class} for no label"
            )
        return cls((labels,), (torch.full_like(labels, null_class),))

    def __len__(self) -> int:
        """Pictures."""
        return len(self.given[0])

    def to(self, device: torch.device | str) -> Condition:
        return Condition(*(tuple(x.to(device) for x in part) for part in (self.given, self.null)))

    @cached_property
    def guided(self) -> tuple[Tensor, ...]:
        """Both in a row, what is asked for first; made once for all steps of a sampler."""
        return tuple(torch.cat(pair) for pair in zip(self.given, self.null, strict=True))


def dropped(
    given: Iterable[Tensor], null: Iterable[Tensor], probability: float, place: Place | None = None
) -> tuple[Tensor, ...]:
    """`given`, rows at `place` of a batch (None = all of it), a share of them replaced by those of `null`, for
    classifier-free guidance. Of `null` there may be one row for all."""
    given = tuple(given)
    place = place or Place(0, len(given[0]), len(given[0]))
    chosen = place.of(torch.rand(place.batch_size, device=given[0].device)) < probability
    pairs = zip(given, null, strict=True)
    return tuple(torch.where(chosen.view(-1, *[1] * (x.ndim - 1)), nothing, x) for x, nothing in pairs)
