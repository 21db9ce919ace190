"""What is asked of a generator, picture by picture: classes, or captions that are encoded as they are needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from aligntok.diffusion.condition import Condition
from aligntok.errors import UserError
from aligntok.models.flux_transformer import FluxTransformer
from aligntok.models.generator import Generator
from aligntok.models.lightning_dit import LightningDiT


class CaptionEncoder(Protocol):
    """`aligntok.models.text_encoder.TextEncoder`, as far as it is needed here."""

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Features [n, L, D] and lengths [n]."""

    def fingerprint(self) -> str:
        """Of what decides the features."""


class Captions:
    """A picture for each of `texts`; guidance leads away from `negative`, by default from the empty caption."""

    def __init__(self, encoder: CaptionEncoder, texts: Sequence[str], negative: str = "") -> None:
        self.encoder, self.texts, self.negative = encoder, list(texts), negative
        self._nothing: tuple[Tensor, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def condition(self, start: int, stop: int) -> Condition:
        """Of the pictures from `start` to `stop`."""
        if self._nothing is None:
            self._nothing = self.encoder.encode([self.negative])
        given = self.encoder.encode(self.texts[start:stop])
        null = tuple(part.expand(len(given[0]), *part.shape[1:]) for part in self._nothing)
        return Condition(given, null)


Asked = Tensor | Captions  # class numbers [n], or captions


def check_asked(generator: Generator, asked: Asked) -> None:
    """Refuse classes of a generator that reads captions, captions of one that knows classes, and another encoder's.

    Raises:
        UserError: which of them it is.
    """
    if isinstance(asked, Tensor):
        if generator.text is not None:
            raise UserError(
                "this generator draws what a caption says and knows no classes: draw with aligntok sample --prompt or "
                "--prompts, and measure with aligntok evaluate text-to-image"
            )
        return
    if generator.text is None:
        raise UserError(
            f"this generator knows {len(generator.classes)} classes and reads no captions: give --labels, or a "
            "generator that was trained with generator.condition=text"
        )
    if (found := asked.encoder.fingerprint()) != generator.text.fingerprint:
        raise UserError(
            f"this generator was trained with another text encoder ({generator.text.encoder.name}, fingerprint "
            f"{generator.text.fingerprint}; given {found}): give its own with --text_encoder"
        )


def condition_of(generator: Generator, asked: Asked, start: int, stop: int) -> Condition:
    """Of the pictures from `start` to `stop`; raises UserError for a class out of range."""
    if isinstance(asked, Captions):
        assert isinstance(generator.model, FluxTransformer)  # `check_asked` has seen to it
        return asked.condition(start, stop)
    assert isinstance(generator.model, LightningDiT)
    return Condition.of_labels(asked[start:stop], generator.model.null_class)
