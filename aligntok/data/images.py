"""Image sets: a folder or WebDataset tars become a list of labelled pictures that can be read in any order.

A folder with sub-folders has one class per sub-folder, a flat one has the single class "all". For tars see
aligntok.data.shards. A picture that cannot be read never stops a run: it is left out, counted and named.
"""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from aligntok.data.geometry import center_crop, to_tensor
from aligntok.data.shards import EXTENSIONS, Progress, expand_shards, scan_shards
from aligntok.errors import UserError

EMBEDDED = Path(__file__).parent / "fluent-emoji-128.tar"
CROPS = 64  # in a batch of `stream_crops`
DECODERS = 4  # threads; Pillow's decoders release the GIL
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # what Pillow raises for broken files


@dataclass(slots=True)
class Entry:
    """Where one picture lies: a file, or a byte range of a tar."""

    name: str
    path: Path
    label: int
    offset: int = 0
    size: int | None = None

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
        except UNREADABLE as error:
            self.skipped[entry.name] = unreadable_because(error)
            return None


def decode(data: bytes) -> Image.Image:
    """An encoded picture as RGB; raises one of UNREADABLE."""
    return to_rgb(Image.open(io.BytesIO(data)))


def unreadable_because(error: BaseException) -> str:
    """The reason in one line, the same in every run."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image that Pillow knows"  # its own words hold a memory address
    return str(error) or type(error).__name__


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


def to_rgb(image: Image.Image) -> Image.Image:
    """Any picture -> RGB: orientation tag applied, first frame, transparency over white, grey and palette expanded."""
    image = ImageOps.exif_transpose(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    if image.mode.startswith(("I;16", "I", "F")):
        image = _stretch(image)
    return image.convert("RGB")


def _stretch(image: Image.Image) -> Image.Image:
    """16-bit, 32-bit and float grey pictures -> 8 bit; Pillow's own conversion clips everything above 255."""
    grey = image.convert("F")
    low, high = grey.getextrema()
    assert isinstance(low, float) and isinstance(high, float)  # one band
    return grey.point(lambda v: (v - low) * (255.0 / max(high - low, 1e-9)) + 0).convert("L")


def open_images(path: str, max_images: int | None = None, progress: Progress | None = None) -> ImageSet:
    """The pictures of "embedded", a folder, a .tar file, a folder of .tar files, or "shards-{000..127}.tar".

    Args:
        path: where they are.
        max_images: take so many of them, chosen by a fixed shuffle.
        progress: called with (done, total) while tars without an index are scanned.

    Raises:
        UserError: nothing there, or no pictures in it.
    """
    if path == "embedded":
        entries, classes = _entries(*scan_shards([EMBEDDED], remember=False))
    elif "{" in path and not Path(path).expanduser().exists():
        entries, classes = _entries(*scan_shards(expand_shards(path), progress))
    else:
        entries, classes = _open_path(path, Path(path).expanduser(), progress)
    if not entries:
        raise UserError(f"no images in {path}: expected files ending in {', '.join(sorted(EXTENSIONS))}")
    entries = [entries[i] for i in limit_numbers(len(entries), max_images).tolist()]
    return ImageSet("Fluent emoji" if path == "embedded" else Path(path).name, entries, classes)


def _open_path(given: str, path: Path, progress: Progress | None) -> tuple[list[Entry], list[str]]:
    if not path.exists():
        raise UserError(
            f"no images at {given}: the path does not exist; give a folder, .tar files (a folder of them, or "
            f"a pattern like 'shards-{{000..127}}.tar'), or 'embedded'"
        )
    if path.is_file() and path.suffix == ".tar":
        return _entries(*scan_shards([path], progress))
    if not path.is_dir():
        raise UserError(f"{given} is a {path.suffix or 'plain'} file, expected a folder of images or a WebDataset .tar")
    shards, (entries, classes) = sorted(path.glob("*.tar")), _scan_folder(path)
    if shards and entries:
        raise UserError(
            f"{given} holds {len(shards)} .tar files and {len(entries)} images, and only one kind can be used: "
            f"name the tars by a pattern like '{given}/*-{{000..127}}.tar', or move one kind elsewhere"
        )
    return _entries(*scan_shards(shards, progress)) if shards else (entries, classes)


def _entries(rows: list[tuple], classes: list[str]) -> tuple[list[Entry], list[str]]:
    return [Entry(*row) for row in rows], classes


def _scan_folder(folder: Path) -> tuple[list[Entry], list[str]]:
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file())
    classes, tops = ["all"], ["all"] * len(files)
    if files and all(p.parent != folder for p in files):
        tops = [p.relative_to(folder).parts[0] for p in files]
        classes = sorted(set(tops))
    number = {name: i for i, name in enumerate(classes)}
    return [Entry(str(p.relative_to(folder)), p, number[t]) for p, t in zip(files, tops, strict=True)], classes


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

    def cut(index: int) -> Tensor | None:
        picture = images.open(index)
        return None if picture is None else to_tensor(center_crop(picture, size))

    pending: deque[tuple[int, Future[Tensor | None]]] = deque()
    crops: list[Tensor] = []
    labels: list[int] = []
    found, started, done = 0, 0, 0
    with ThreadPoolExecutor(DECODERS) as pool:
        while done < len(images):
            while started < len(images) and len(pending) < batch_size:
                pending.append((started, pool.submit(cut, started)))
                started += 1
            index, future = pending.popleft()
            crop, done = future.result(), done + 1
            if crop is not None:
                crops.append(crop)
                labels.append(images.entries[index].label)
            if crops and (len(crops) == batch_size or done == len(images)):
                found += len(crops)
                yield torch.stack(crops), torch.tensor(labels)
                crops, labels = [], []
            if progress is not None:
                progress(done, len(images))
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
