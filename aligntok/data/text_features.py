"""Features of captions, encoded once: what a table of them gives, and the table in memory.

Row r is the r-th caption of the set (Captions.flat); the captions of picture n are rows starts[n] ... starts[n+1] - 1.
Of a caption only the features of its own tokens are kept, in bfloat16, whose 8 significant bits are within 2^-8 of the
value. The table on disk is aligntok.data.text_cache.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from aligntok.data.captions import Captions
from aligntok.errors import UserError

Progress = Callable[[int, int], None]
Say = Callable[[str], None]
BATCH = 64
_TOKENIZED = 4096  # captions at once, after which it is known whether all will fit
_NAMED, _LETTERS = 3, 40  # captions in a message, and how much of each


class Tokenized(Protocol):
    """Captions as numbers of tokens."""

    @property
    def ids(self) -> list[list[int]]: ...

    @property
    def cut(self) -> list[bool]:
        """Which were longer."""


class Encoder(Protocol):
    """What a text encoder has to have here (aligntok.models.text_encoder)."""

    name: str
    width: int
    tokens: int
    precision: str

    def fingerprint(self) -> str: ...

    def tokenize(self, captions: Sequence[str]) -> Tokenized: ...

    def encode_ids(self, ids: Sequence[list[int]]) -> tuple[Tensor, Tensor]: ...


class TextFeatures(Protocol):
    """A table of the features of a set's captions, in memory or on disk."""

    width: int  # D
    tokens: int  # T
    fingerprint: str  # of encoder and captions
    starts: Tensor  # int64 [pictures + 1]

    @property
    def empty(self) -> tuple[Tensor, int]:
        """Features [T, D] float32 and length of the empty string, which stands for a caption that is dropped."""

    def features(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Features [n, T, D] float32, zero behind each caption's own, and lengths [n] int64, of rows [n]."""

    def announce(self, rows: Tensor) -> None:
        """These rows are wanted next."""

    def rows_of_picture(self, number: int) -> range:
        """The captions of a picture."""


def fingerprint_of(encoder: str, captions: str) -> str:
    """Of a table, from those of its encoder and its captions."""
    return hashlib.sha256(repr((encoder, captions)).encode()).hexdigest()[:16]


class TextTable:
    """Features in memory; of captions that are equal once.

    Args:
        values: bfloat16 [all tokens, D] of the distinct captions, the empty string first.
        offsets: int64 [distinct + 1]: where each begins in `values`.
        which: int64 [rows]: which of the distinct ones each caption is.
        starts: int64 [pictures + 1]: Captions.starts.
        tokens: T.
        fingerprint: see `fingerprint_of`.
    """

    def __init__(
        self, values: Tensor, offsets: Tensor, which: Tensor, starts: Tensor, tokens: int, fingerprint: str
    ) -> None:
        self.values, self.offsets, self.which, self.starts = values, offsets, which, starts
        self.tokens, self.width, self.fingerprint = tokens, values.shape[1], fingerprint

    def __len__(self) -> int:
        """Captions."""
        return len(self.which)

    def __str__(self) -> str:
        return "their captions' features from memory"

    @property
    def empty(self) -> tuple[Tensor, int]:
        features, lengths = self._read(torch.zeros(1, dtype=torch.int64))
        return features[0], int(lengths)

    def features(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return self._read(self.which[rows])

    def announce(self, rows: Tensor) -> None:
        return

    def rows_of_picture(self, number: int) -> range:
        return range(int(self.starts[number]), int(self.starts[number + 1]))

    def _read(self, distinct: Tensor) -> tuple[Tensor, Tensor]:
        begins, ends = self.offsets[distinct].tolist(), self.offsets[distinct + 1].tolist()
        found = torch.zeros(len(distinct), self.tokens, self.width)
        for place, (begin, end) in enumerate(zip(begins, ends, strict=True)):
            found[place, : end - begin] = self.values[begin:end]
        return found, self.offsets[distinct + 1] - self.offsets[distinct]


def encode_captions(
    captions: Captions,
    encoder: Encoder,
    progress: Progress | None = None,
    say: Say | None = None,
    limit_gib: float = 2.0,
    command: str = "aligntok cache-text",
    batch_size: int = BATCH,
) -> TextTable:
    """The features of a small set's captions, in memory.

    Args:
        captions: of the whole set.
        encoder: runs on its own device.
        progress: called with (done, total) distinct captions.
        say: is told how many captions were cut.
        limit_gib: what the features may take, data.memory_limit_gib.
        command: what makes them on disk instead, for the message.
        batch_size: captions encoded at once.

    Raises:
        UserError: they would take more, or are not finite.
    """
    number = {text: i for i, text in enumerate(dict.fromkeys(["", *captions.flat()]))}
    texts, ids, long, total = list(number), list[list[int]](), list[str](), 0
    for start in range(0, len(texts), _TOKENIZED):
        part = texts[start : start + _TOKENIZED]
        tokens = encoder.tokenize(part)
        ids += tokens.ids
        long += [text for text, cut in zip(part, tokens.cut, strict=True) if cut]
        total += sum(map(len, tokens.ids))
        gib = total * encoder.width * 2 / 2**30
        if gib > limit_gib:
            raise UserError(
                f"the features of {captions.count:,} captions take {gib * len(texts) / len(ids):.2f} GiB, more than "
                f"data.memory_limit_gib ({limit_gib:g}): cache them with: {command}, and name its folder as "
                "generator.text.features"
            )
    report_cut(long, len(texts) - 1, encoder, say)
    offsets = torch.tensor([0, *map(len, ids)]).cumsum(0)
    values = torch.empty(total, encoder.width, dtype=torch.bfloat16)
    for place, features in encode_ragged(encoder, ids, batch_size, progress):
        values[offsets[place] : offsets[place + 1]] = features
    which = torch.tensor([number[text] for text in captions.flat()], dtype=torch.int64)
    made = fingerprint_of(encoder.fingerprint(), captions.fingerprint())
    return TextTable(values, offsets, which, captions.starts(), encoder.tokens, made)


def encode_ragged(
    encoder: Encoder, ids: Sequence[list[int]], batch_size: int, progress: Progress | None = None
) -> Iterator[tuple[int, Tensor]]:
    """(which caption, its features [length, D] bfloat16 on the CPU) of all captions, those of a length together.

    Raises:
        UserError: features are not finite.
    """
    order = sorted(range(len(ids)), key=lambda place: -len(ids[place]))  # the longest first: memory runs out at once
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        features, lengths = encoder.encode_ids([ids[place] for place in places])
        rounded = features[:, : int(lengths.max())].to("cpu", torch.bfloat16)
        if not torch.isfinite(rounded).all():
            raise UserError(f"features of {encoder.name} are not finite: take another layer, or precision fp32")
        for place, row, length in zip(places, rounded, lengths.tolist(), strict=True):
            yield place, row[:length]
        if progress is not None:
            progress(start + len(places), len(ids))


def report_cut(long: list[str], total: int, encoder: Encoder, say: Say | None, count: int | None = None) -> None:
    """Say how many captions had more tokens than are kept, and which are the first.

    Args:
        long: those, or the first of them...
        count: ...where there are so many.
    """
    if long and say is not None:
        count = len(long) if count is None else count
        shown = ", ".join(repr(text if len(text) <= _LETTERS else text[:_LETTERS] + "...") for text in long[:_NAMED])
        more = ", ..." if count > _NAMED else ""
        say(f"{count:,} of {total:,} captions have more than {encoder.tokens} tokens and are cut: {shown}{more}")
