"""Heights and widths of a set's pictures from their headers, and the file from which a resumed run takes them."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from aligntok.data.decoding import orientation, unreadable_because
from aligntok.data.geometry import Size
from aligntok.data.images import Entry, ImageSet
from aligntok.runtime.files import write_bytes

_HEAD = 1 << 16  # bytes that hold most headers
_READERS = 8
_TOLD = 4096  # pictures between two reports of progress


@dataclass(frozen=True)
class Sizes:
    """Of every picture of a set.

    Args:
        pixels: int32 [pictures, 2], height and width; 0 where there are none.
        reasons: why not, by the picture's number.
    """

    pixels: Tensor
    reasons: dict[int, str]

    @classmethod
    def of_parts(cls, parts: list[Sizes]) -> Sizes:
        """Of a set from those of its parts, in order."""
        reasons: dict[int, str] = {}
        start = 0
        for part in parts:
            reasons |= {start + number: reason for number, reason in part.reasons.items()}
            start += len(part.pixels)
        return cls(torch.cat([part.pixels for part in parts]), reasons)


def read_sizes(images: ImageSet, progress: Callable[[int, int], None] | None = None) -> Sizes:
    """Of every picture; `progress` is called with (done, total)."""
    pixels, reasons = torch.zeros(len(images), 2, dtype=torch.int32), {}
    with ThreadPoolExecutor(_READERS) as pool:
        for start in range(0, len(images), _TOLD):
            part = images.entries[start : start + _TOLD]
            for number, found in enumerate(pool.map(picture_size, part), start):
                if isinstance(found, str):
                    reasons[number] = found
                else:
                    pixels[number, 0], pixels[number, 1] = found
            if progress is not None:
                progress(start + len(part), len(images))
    return Sizes(pixels, reasons)


def picture_size(entry: Entry) -> Size | str:
    """Height and width of a picture as it is shown, from its header; or why it has none."""
    try:
        with open(entry.path, "rb") as file:
            file.seek(entry.offset)
            head = file.read(_HEAD if entry.size is None else min(_HEAD, entry.size))
        try:
            return _size(head)
        except Exception:  # a header longer than that, or none: whoever has all of it can tell
            return _size(entry.read_bytes())
    except Exception as error:  # Pillow's parsers raise many kinds
        return unreadable_because(error)


def _size(data: bytes) -> Size:
    with Image.open(io.BytesIO(data)) as image:
        width, height = image.size
        # a PNG would be decoded in search of a tag behind its pixels, where hardly any has one
        upright = image.format == "PNG" and not any("exif" in str(key) for key in image.info)
        turned = not upright and orientation(image) in (5, 6, 7, 8)
        return (width, height) if turned else (height, width)


def save_sizes(file: Path, sizes: Sizes, identity: str) -> None:
    """Write them, atomically, as those of the set with this ImageSet.identity()."""
    from safetensors.torch import save

    told = {"images": identity, "reasons": json.dumps(sizes.reasons)}
    write_bytes(file, save({"pixels": sizes.pixels}, metadata=told))


def saved_sizes(file: Path, identity: str) -> Sizes | None:
    """What `save_sizes` wrote of the same set; None where there is no such file, or it cannot be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as stored:
            told = stored.metadata() or {}
            if told.get("images") != identity:
                return None
            reasons = {int(number): reason for number, reason in json.loads(told["reasons"]).items()}
            return Sizes(stored.get_tensor("pixels"), reasons)
    except (OSError, SafetensorError, ValueError, KeyError):
        return None
