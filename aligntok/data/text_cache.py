"""Reading a text cache (aligntok.data.text_format) without ever holding more of it than a batch.

The shards are mapped into memory and the rows of a batch are copied out of them, in the order of the files. What is
held is one number for each picture.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from aligntok.config import TextEncoderConfig
from aligntok.data.images import ImageSet
from aligntok.data.latent_format import images_fingerprint
from aligntok.data.mapped import DAMAGED, MappedTensor, map_tensors
from aligntok.data.shard_store import MANIFEST, Record, origin_from, shard_problem
from aligntok.data.text_format import LAYOUT, Origin, make_command
from aligntok.errors import UserError


class TextCache:
    """A finished cache, open for reading: a TextFeatures (aligntok.data.text_features).

    Args:
        folder: written by `aligntok cache-text`.
        encoder: whose features are wanted; None = whichever made it. Names are compared, not weights: whoever has the
            encoder can compare its fingerprint with `encoder_fingerprint`.
        command: how to make the right cache, for the messages.

    Attributes:
        width, tokens: D and T.
        fingerprint: of the contents.
        encoder_fingerprint: TextEncoder.fingerprint() of the encoder that made it.
        starts: int64 [pictures + 1]: rows starts[n] ... starts[n + 1] - 1 are the captions of picture n.

    Raises:
        UserError: no cache, an unfinished one, another encoder's, or a shard that is missing, of the wrong size, or
            damaged.
    """

    def __init__(
        self, folder: str | Path, encoder: TextEncoderConfig | None = None, command: str | None = None
    ) -> None:
        self.folder = Path(folder)
        self.command = command or make_command(output=folder, encoder=encoder)
        manifest = LAYOUT.read_manifest(self.folder)
        if manifest is None:
            raise UserError(f"no text cache at {folder}: {MANIFEST} is missing; make one with: {self.command}")
        self.origin = origin_from(Origin, manifest)
        if encoder is not None and (difference := self.origin.differs(encoder)):
            raise UserError(
                f"the text cache {folder} holds features {difference}: change that, or remove the cache or name "
                f"another folder, and make one with: {self.command}"
            )
        if not manifest["complete"]:
            raise UserError(f"the text cache {folder} is unfinished; complete it with: {self.command}")
        self.width, self.tokens = self.origin.width, self.origin.tokens
        self.encoder_fingerprint = self.origin.encoder
        self._shards = [self._open(record) for record in manifest["shards"]]
        self._begins = np.cumsum([0] + [record["rows"] for record in manifest["shards"]])
        self.starts = self._captions_before()
        hashes = [record["sha256"] for record in manifest["shards"]]
        # Not of what is for people alone: the same cache made again, of captions that lie elsewhere now, is the same
        told = (self.origin.encoder, self.origin.images, self.origin.tokens, hashes)
        self.fingerprint = hashlib.sha256(repr(told).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        """Captions."""
        return self.origin.caption_count

    def __str__(self) -> str:
        return f"their captions' features from the cache {self.folder}"

    @property
    def empty(self) -> tuple[Tensor, int]:
        """Features [T, D] float32 and length of the empty string."""
        features, lengths = self.features(torch.tensor([-1]))
        return features[0], int(lengths)

    def features(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Features [n, T, D] float32, zero behind each caption's own, and lengths [n] int64, of rows [n]."""
        features = torch.zeros(len(rows), self.tokens, self.width)
        lengths = torch.zeros(len(rows), dtype=torch.int64)
        for position, tensors, begin, end in self._places(rows):
            bits = torch.from_numpy(np.array(tensors["features"].rows[begin:end]))
            features[position, : end - begin] = bits.view(torch.bfloat16)
            lengths[position] = end - begin
        return features, lengths

    def announce(self, rows: Tensor) -> None:
        """Ask the kernel to read the features of these rows from disk; returns before it has."""
        for _, tensors, begin, end in self._places(rows):
            tensors["features"].announce(begin, end - begin)

    def rows_of_picture(self, number: int) -> range:
        """The captions of a picture."""
        return range(int(self.starts[number]), int(self.starts[number + 1]))

    def captions(self, rows: Tensor) -> list[str]:
        """What the captions of rows [n] say."""
        found = [""] * len(rows)
        for position, tensors, begin, end in self._places(rows, "letter_offsets"):
            found[position] = tensors["letters"].rows[begin:end].tobytes().decode()
        return found

    def check_images(self, images: ImageSet | str) -> None:
        """Refuse images that the cache was not made of.

        Args:
            images: the whole set, or its images_fingerprint().

        Raises:
            UserError: names, labels or number differ.
        """
        given = images if isinstance(images, str) else images_fingerprint(images)
        if given != self.origin.images:
            told = "" if isinstance(images, str) else f" ({images.name}, {len(images)} images)"
            raise UserError(
                f"the text cache {self.folder} was made of other images ({self.origin.image_set}, "
                f"{self.origin.image_count} images) than those of data.path{told}; remove it or name another "
                f"folder, and make one with: {self.command}"
            )

    def _open(self, record: Record) -> dict[str, MappedTensor]:
        """The tensors of a shard."""
        problem = shard_problem(self.folder, record)
        if problem is None:
            try:
                return _map_shard(self.folder / record["file"], record, self.origin)
            except DAMAGED as error:
                problem = f"is damaged ({type(error).__name__}: {error})"
        raise UserError(f"{self.folder / record['file']} {problem}; make this shard anew with: {self.command}")

    def _captions_before(self) -> Tensor:
        pictures = np.concatenate([shard["picture"].rows for shard in self._shards])[1:]
        counts = np.bincount(pictures, minlength=self.origin.image_count)
        return torch.from_numpy(np.cumsum(np.append(0, counts)))

    def _places(self, rows: Tensor, offsets: str = "offsets") -> list[tuple[int, dict[str, MappedTensor], int, int]]:
        """(position in the batch, shard, begin, end) of each row, by file and place; row -1 is the empty string."""
        order = np.argsort(rows.numpy(), kind="stable")
        wanted = rows.numpy()[order] + 1
        shards = np.searchsorted(self._begins, wanted, side="right") - 1
        inside = (wanted - self._begins[shards]).tolist()
        found = []
        for position, number, row in zip(order.tolist(), shards.tolist(), inside, strict=True):
            begin, end = self._shards[number][offsets].rows[row : row + 2].tolist()
            found.append((position, self._shards[number], begin, end))
        return found


def _map_shard(file: Path, record: Record, origin: Origin) -> dict[str, MappedTensor]:
    """The tensors of a shard; an exception of `DAMAGED` where header, offsets or pictures are not what they were."""
    rows = record["rows"]
    tensors = map_tensors(
        file,
        {
            "features": ("BF16", [record["tokens"], origin.width]),
            "offsets": ("I64", [rows + 1]),
            "picture": ("I64", [rows]),
            "letters": ("U8", [record["letters"]]),
            "letter_offsets": ("I64", [rows + 1]),
        },
    )
    letters = record["letters"]
    for name, end, least, most in (
        ("offsets", record["tokens"], 1, origin.tokens),
        ("letter_offsets", letters, 0, letters),
    ):
        offsets = tensors[name].rows
        lengths = np.diff(offsets)
        if [offsets[0], offsets[-1]] != [0, end] or (lengths < least).any() or (lengths > most).any():
            raise ValueError(f"its {name} lead elsewhere")
    pictures = tensors["picture"].rows
    if (np.diff(pictures) < 0).any() or pictures[0] < -1 or pictures[-1] >= origin.image_count:
        raise ValueError("its captions belong to pictures that are not there")
    return tensors
