"""A text encoder without weights: a word is a token, its features random numbers that are always the same."""

import hashlib
from collections.abc import Sequence
from types import SimpleNamespace

import torch
from torch import Tensor


class WordEncoder:
    """One token for each word after one for the beginning."""

    name, precision = "words", "fp32"

    def __init__(self, width: int = 8, tokens: int = 6, layer: int = -1) -> None:
        self.width, self.tokens, self.layer = width, tokens, layer
        self.encoded: list[int] = []  # captions in each call
        self._numbers: dict[str, int] = {}

    def fingerprint(self) -> str:
        return hashlib.sha256(repr((self.width, self.tokens, self.layer)).encode()).hexdigest()[:16]

    def tokenize(self, captions: Sequence[str]) -> SimpleNamespace:
        whole = [[0, *(int(hashlib.sha256(w.encode()).hexdigest()[:6], 16) for w in c.split())] for c in captions]
        return SimpleNamespace(ids=[ids[: self.tokens] for ids in whole], cut=[len(ids) > self.tokens for ids in whole])

    def encode_ids(self, ids: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        self.encoded.append(len(ids))
        features = torch.zeros(len(ids), self.tokens, self.width)
        for row, numbers in zip(features, ids, strict=True):
            for place, number in enumerate(numbers):
                row[place] = torch.randn(self.width, generator=torch.Generator().manual_seed(number + self.layer + 2))
        return features, torch.tensor([len(numbers) for numbers in ids])

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        return self.encode_ids(self.tokenize(captions).ids)
