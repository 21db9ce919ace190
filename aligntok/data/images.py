"""Image sets: a folder or WebDataset tars become a list of labelled pictures that can be read in any order.

A folder with sub-folders has one class per sub-folder, a flat one has the single class "all" (aligntok.data.folders).
For tars see aligntok.data.shards. What is not used is counted and named (aligntok.data.found), and a picture that
cannot be read never stops a run: it is left out, counted and named as well.
"""

from __future__ import annotations

import hashlib
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from aligntok.data.decoding import decode, unreadable_because
from aligntok.data.folders import scan_folder
from aligntok.data.found import EXTENSIONS, Found, is_hidden
from aligntok.data.geometry import Size, center_crop, to_tensor
from aligntok.data.shards import Progress, expand_shards, scan_shards
from aligntok.errors import UserError

EMBEDDED = Path(__file__).parent / "fluent-emoji-128.tar"
CROPS = 64  # in a batch of `stream_crops`
DECODERS = 4  # threads; Pillow's decoders release the GIL


@dataclass(slots=True)
class Entry:
    """Where one picture lies: a file, or a byte range of a tar."""

    name: str
    path: Path
    label: int
    offset: int = 0
    size: int | None = None

    def length(self) -> int:
        """Bytes of the encoded picture, -1 for a file that is gone."""
        try:
            return self.path.stat().st_size if self.size is None else self.size
        except OSError:
            return -1

    def read_bytes(self) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read() if self.size is None else file.read(self.size)


@dataclass
class ImageSet:
    """Pictures with labels; `skipped` collects the names and reasons of those that could not be read."""

    name: str
    entries: list[Entry]
    classes: list[str]
    skipped: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def labels(self) -> Tensor:
        return torch.tensor([entry.label for entry in self.entries])

    def identity(self) -> str:
        """Short hash of what the set is, wherever it lies: names, sizes in bytes, labels, classes, in their order."""
        digest = hashlib.sha256(repr(self.classes).encode())
        with ThreadPoolExecutor(DECODERS) as pool:  # a network's file system answers several at a time
            for entry, size in zip(self.entries, pool.map(Entry.length, self.entries, chunksize=256), strict=True):
                digest.update(repr((entry.name, entry.label, size)).encode())
        return digest.hexdigest()[:16]

    def subset(self, indices: list[int]) -> ImageSet:
        """The chosen pictures; skipped ones are reported to the same record."""
        return ImageSet(self.name, [self.entries[i] for i in indices], self.classes, self.skipped)

    def split(self, held_out: float) -> tuple[ImageSet, ImageSet]:
        """(training, held-out) by a fixed shuffle, the same for every seed; `held_out` is the share of the second."""
        training, kept = split_numbers(len(self), held_out)
        return self.subset(training.tolist()), self.subset(kept.tolist())

    def open(self, index: int) -> Image.Image | None:
        """The picture as RGB, or None where it is unreadable (then it is recorded in `skipped`)."""
        entry = self.entries[index]
        try:
            return decode(entry.read_bytes())
        except (OSError, UserError) as error:
            self.skipped[entry.name] = unreadable_because(error)
            return None


def split_numbers(count: int, held_out: float) -> tuple[Tensor, Tensor]:
    """Numbers of the (training, held-out) pictures of a set of `count`; see ImageSet.split.

    Raises:
        UserError: no picture is left to train on.
    """
    if not 0 <= held_out < 1 or round(held_out * count) >= count:
        raise UserError(f"data.held_out is {held_out} of {count} images, which leaves none to train on: use less")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    kept = torch.zeros(count, dtype=torch.bool)
    kept[order[: round(held_out * count)]] = True
    return torch.nonzero(~kept).flatten(), torch.nonzero(kept).flatten()


def limit_numbers(count: int, limit: int | None) -> Tensor:
    """Numbers of the pictures that are used where at most `limit` of `count` are wanted."""
    if limit is not None and limit < 1:
        raise UserError(f"data.max_images is {limit}, expected at least 1")
    if limit is None or limit >= count:
        return torch.arange(count)
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:limit].sort().values


def open_images(
    path: str, max_images: int | None = None, progress: Progress | None = None, say: Callable[[str], None] | None = None
) -> ImageSet:
    """The pictures of "embedded", a folder, a .tar file, a folder of .tar files, or "shards-{000..127}.tar".

    Args:
        path: where they are.
        max_images: take so many of them, chosen by a fixed shuffle.
        progress: called with (done, total) while tars without an index are scanned.
        say: is told how many were found and used, and what was left out and why; None = warnings, and only of what
            was left out.

    Raises:
        UserError: nothing there, no pictures in it, or labels that are no numbers of classes.
    """
    found = Found()
    if path == "embedded":
        entries, classes = _of_tars([EMBEDDED], found, remember=False)
    elif "{" in path and not Path(path).expanduser().exists():
        entries, classes = _of_tars(expand_shards(path), found, progress)
    else:
        entries, classes = _open_path(path, Path(path).expanduser(), found, progress)
    name = "Fluent emoji" if path == "embedded" else Path(path).expanduser().resolve().name
    images = ImageSet(name, entries, classes)
    taken = limit_numbers(len(entries), max_images).tolist()
    _report(images, found, len(taken), say)
    if not entries:
        told = "; ".join(f"{count} {reason}" for reason, count in found.counts.items())
        ends = f"expected files ending in {', '.join(sorted(EXTENSIONS))}"
        raise UserError(f"no images in {path}: {f'left out: {told}; ' if told else ''}{ends}")
    return images.subset(taken)


def told_before(line: str) -> None:
    """For `say`: of a set that the same command has opened already."""


def _report(images: ImageSet, found: Found, taken: int, say: Callable[[str], None] | None) -> None:
    if say is None and not found.counts:
        return
    for line in found.lines(images.name, len(images), taken):
        (say or warnings.warn)(line)


def _open_path(given: str, path: Path, found: Found, progress: Progress | None) -> tuple[list[Entry], list[str]]:
    if not path.exists():
        raise UserError(
            f"no images at {given}: the path does not exist; give a folder, .tar files (a folder of them, or "
            f"a pattern like 'shards-{{000..127}}.tar'), or 'embedded'"
        )
    if path.is_file() and path.suffix == ".tar":
        return _of_tars([path], found, progress)
    if not path.is_dir():
        raise UserError(f"{given} is a {path.suffix or 'plain'} file, expected a folder of images or a WebDataset .tar")
    shards = sorted(shard for shard in path.glob("*.tar") if not is_hidden(shard.name))
    files, tops = scan_folder(path, found)
    if shards and files:
        raise UserError(
            f"{given} holds {len(shards)} .tar files and {len(files)} images, and only one kind can be used: "
            f"name the tars by a pattern like '{given}/*-{{000..127}}.tar', or move one kind elsewhere"
        )
    return _of_tars(shards, found, progress) if shards else _of_folder(path, files, tops)


def _of_tars(
    paths: list[Path], found: Found, progress: Progress | None = None, remember: bool = True
) -> tuple[list[Entry], list[str]]:
    rows, classes = scan_shards(paths, found, progress, remember)
    return [Entry(*row) for row in rows], classes


def _of_folder(folder: Path, files: list[Path], tops: list[str | None]) -> tuple[list[Entry], list[str]]:
    classes = sorted({top or "all" for top in tops})
    number = {name: i for i, name in enumerate(classes)}
    names = (file.relative_to(folder).as_posix() for file in files)
    return [Entry(n, file, number[top or "all"]) for n, file, top in zip(names, files, tops, strict=True)], classes


def stream_crops(
    images: ImageSet, size: int, batch_size: int = CROPS, progress: Callable[[int, int], None] | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches (uint8 [B, 3, size, size], labels [B]) of every readable picture, in order; the last may be smaller.

    Decoded as they are asked for: memory holds two batches, whatever the set's size.

    Args:
        images: the set; pictures that cannot be read are recorded in its `skipped`.
        size: side of the centre crop.
        batch_size: pictures per batch.
        progress: called with (pictures done, all pictures) after every picture.

    Raises:
        UserError: not a single picture could be read.
    """
    crops: list[Tensor] = []
    labels: list[int] = []
    for index, crop in each_crop(images, lambda _: size, batch_size):
        if crop is not None:
            crops.append(crop)
            labels.append(images.entries[index].label)
        if crops and (len(crops) == batch_size or index + 1 == len(images)):
            yield torch.stack(crops), torch.tensor(labels)
            crops, labels = [], []
        if progress is not None:
            progress(index + 1, len(images))


def each_crop(
    images: ImageSet, size: Callable[[int], int | Size], ahead: int = CROPS
) -> Iterator[tuple[int, Tensor | None]]:
    """(number, its centre crop as uint8 [3, H, W], or None where it is unreadable) of every picture, in order.

    Args:
        images: the set; pictures that cannot be read are recorded in its `skipped`.
        size: of a picture's crop, by its number.
        ahead: pictures that are decoded before they are asked for.

    Raises:
        UserError: not a single picture could be read.
    """

    def cut(index: int) -> Tensor | None:
        picture = images.open(index)
        return None if picture is None else to_tensor(center_crop(picture, size(index)))

    pending: deque[Future[Tensor | None]] = deque()
    found, started = False, 0
    with ThreadPoolExecutor(DECODERS) as pool:
        for index in range(len(images)):
            while started < len(images) and len(pending) < ahead:
                pending.append(pool.submit(cut, started))
                started += 1
            crop = pending.popleft().result()
            found |= crop is not None
            yield index, crop
    if not found:
        name, reason = next(iter(images.skipped.items()))
        raise UserError(f"none of the {len(images)} images of {images.name} could be read; the first, {name}: {reason}")


def load_center_crops(
    images: ImageSet, size: int, progress: Callable[[int, int], None] | None = None
) -> tuple[Tensor, Tensor]:
    """(uint8 [N, 3, size, size], labels [N]) of every readable picture, decoded once, in order.

    Raises:
        UserError: not a single picture could be read.
    """
    pixels, labels = zip(*stream_crops(images, size, progress=progress), strict=True)
    return torch.cat(pixels), torch.cat(labels)
