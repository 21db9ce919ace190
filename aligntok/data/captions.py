"""Captions of an image set: none, one or several for each picture, as files beside the pictures or as a list.

    beside the pictures   NAME.txt, else NAME.json with a "caption" (img2dataset), in the folder or in the tar
    a list                .jsonl, .json, .parquet, or a folder of .parquet or .txt files (aligntok.data.caption_lists)

Each line of a .txt that is not empty is a caption; what Tux Paint's stamps have behind the first, "fr.utf8=...", are
translations and left out. A string in JSON or Parquet is one caption, whatever lines it has; a list of strings are
several. All runs of white space become one space. What cannot be used is counted and named, as with pictures.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aligntok.data.caption_lists import ACCEPTED, caption_of, read_list
from aligntok.data.found import EXTENSIONS, SHRUNK, Found, is_hidden
from aligntok.data.images import EMBEDDED, ImageSet
from aligntok.data.shards import LONE, CaptionPlace, captions_in
from aligntok.errors import UserError

Say = Callable[[str], None]
Progress = Callable[[int, int], None]
WITHOUT, EMPTY = "without a caption", "with an empty caption"
FOREIGN, UNREADABLE = "whose caption is not UTF-8", "whose caption cannot be read"
UNUSABLE = EMPTY, FOREIGN, UNREADABLE
_READERS = 8  # threads: small files wait for the disk, not for the processor
_TRANSLATION = re.compile(r"[a-z]{2,3}(_[A-Z]{2})?(@\w+)?\.utf8=")


@dataclass
class Captions:
    """The captions of every picture of a set, in its order; [] where there are none."""

    texts: list[list[str]]
    source: str  # how messages call it

    def __len__(self) -> int:
        """Pictures, with and without captions."""
        return len(self.texts)

    @property
    def count(self) -> int:
        return sum(map(len, self.texts))

    @property
    def pictures(self) -> list[int]:
        """Numbers of the pictures that have some."""
        return [number for number, texts in enumerate(self.texts) if texts]

    def subset(self, numbers: list[int]) -> Captions:
        """Those of the chosen pictures, in this order."""
        return Captions([self.texts[number] for number in numbers], self.source)

    def flat(self) -> list[str]:
        """All captions [count]: row r of a table of text features belongs to the r-th of them."""
        return [text for texts in self.texts for text in texts]

    def starts(self) -> Tensor:
        """int64 [pictures + 1]: rows starts[n] ... starts[n + 1] - 1 are the captions of picture n."""
        counts = torch.tensor([0, *map(len, self.texts)], dtype=torch.int64)
        return counts.cumsum(0)

    def fingerprint(self) -> str:
        """Short hash of all captions and of which picture each belongs to."""
        digest = hashlib.sha256()
        for texts in self.texts:
            digest.update(repr(texts).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()[:16]


def read_captions(
    images: ImageSet, source: str | None = None, say: Say | None = None, progress: Progress | None = None
) -> Captions:
    """The captions of all pictures of a set.

    Args:
        images: the whole set; of a part of it, take the captions by Captions.subset.
        source: None = beside the pictures; or a list.
        say: is told how many there are, and what cannot be used and why; None = warnings, and only of the latter.
        progress: called with (done, total) pictures; of a list, with those that have a caption by now.

    Raises:
        UserError: the list cannot be read, or not a single picture has a caption.
    """
    found = Found()
    if source is None:
        texts, called = _beside(images, found, progress), "files beside the pictures"
    else:
        texts, called = read_list(source, [e.name for e in images.entries], found, progress), source
    _name_missing(images, texts, found)
    captions = Captions(texts, called)
    if not captions.count:
        raise _nothing(images, source, found)
    _report(images, captions, found, say)
    return captions


def _nothing(images: ImageSet, source: str | None, found: Found) -> UserError:
    told = "; ".join(line.strip() for line in found.reasons())
    if source is None:
        wanted = f"NAME.txt beside each NAME.jpg, img2dataset's NAME.json, or data.captions: {ACCEPTED}"
    else:
        wanted = (
            "names or keys of these pictures (file_name, path, image or key) beside their captions (caption or text)"
        )
    where = "" if source is None else f" in {source}"
    return UserError(f"no captions{where} for the {len(images)} images of {images.name} ({told}): expected {wanted}")


def _name_missing(images: ImageSet, texts: list[list[str]], found: Found) -> None:
    """Count the pictures without captions, less those whose caption was found and could not be used."""
    unusable = sum(found.counts.get(reason, 0) for reason in UNUSABLE)
    empty = [entry.name for entry, own in zip(images.entries, texts, strict=True) if not own]
    named = {name for reason in UNUSABLE for name in found.examples.get(reason, [])}
    if len(empty) > unusable:
        first, *others = [name for name in empty if name not in named] or empty
        found.leave_out(WITHOUT, first, len(empty) - unusable)
        for name in others[:2]:
            found.leave_out(WITHOUT, name, 0)


def _report(images: ImageSet, captions: Captions, found: Found, say: Say | None) -> None:
    if say is None and not found.counts:
        return
    total, used = len(captions), len(captions.pictures)
    warning = "WARNING: " if total - used >= SHRUNK * total and used < total else ""
    without = f", {total - used:,} without any are left out" if used < total else ""
    line = f"captions: {images.name}: {captions.count:,} captions of {used:,} images, from {captions.source}{without}"
    for told in (warning + line, *found.reasons()):
        (say or warnings.warn)(told)


def _beside(images: ImageSet, found: Found, progress: Progress | None) -> list[list[str]]:
    """Of every picture the captions in the files beside it."""
    texts: list[list[str]] = [[] for _ in images.entries]
    places: dict[Path, list[int]] = {}
    for number, entry in enumerate(images.entries):
        places.setdefault(entry.path if entry.size is not None else entry.path.parent, []).append(number)
    done = 0
    with ThreadPoolExecutor(_READERS) as pool:
        for place, numbers in places.items():
            in_tar = images.entries[numbers[0]].size is not None
            read = _of_tar(images, place, numbers, found) if in_tar else _of_folder(images, place, numbers, found, pool)
            for number, kind, data in read:
                texts[number] = _parse(images.entries[number].name, kind, data, found)
            done += len(numbers)
            if progress is not None:
                progress(done, len(images))
    return texts


Read = Iterator[tuple[int, str, bytes]]  # number of the picture, "txt" or "json", contents


def _of_tar(images: ImageSet, tar: Path, numbers: list[int], found: Found) -> Read:
    places, lone = captions_in(tar, remember=tar != EMBEDDED)
    found.add(lone, f"{tar.name}/")
    wanted: list[tuple[int, CaptionPlace]] = [
        (number, places[images.entries[number].offset]) for number in numbers if images.entries[number].offset in places
    ]
    with open(tar, "rb") as file:
        for number, (kind, offset, size) in sorted(wanted, key=lambda pair: pair[1][1]):
            file.seek(offset)
            yield number, kind, file.read(size)


def _of_folder(images: ImageSet, folder: Path, numbers: list[int], found: Found, pool: ThreadPoolExecutor) -> Read:
    files = [name for name in sorted(os.listdir(folder)) if not is_hidden(name)]
    stems = {Path(name).stem for name in files if Path(name).suffix.lower() in EXTENSIONS}
    there: dict[str, Path] = {}
    for ending in (".json", ".txt"):  # the last one wins
        there |= {Path(name).stem: folder / name for name in files if Path(name).suffix.lower() == ending}
    for stem, file in there.items():
        if file.suffix.lower() == ".txt" and stem not in stems:
            found.leave_out(LONE, file.name)
    wanted = [(number, there.get(images.entries[number].path.stem)) for number in numbers]
    reading = [(number, file) for number, file in wanted if file is not None]
    contents = pool.map(_contents, (file for _, file in reading))
    for (number, file), data in zip(reading, contents, strict=True):
        if isinstance(data, bytes):
            yield number, file.suffix.lower()[1:], data
        else:
            found.leave_out(UNREADABLE, f"{images.entries[number].name} ({data.strerror or data})")


def _contents(file: Path) -> bytes | OSError:
    try:
        return file.read_bytes()
    except OSError as error:
        return error


def _parse(name: str, kind: str, data: bytes, found: Found) -> list[str]:
    """The captions in the file of a picture."""
    try:
        text = data.decode("utf-8-sig")
        texts = _of_json(json.loads(text)) if kind == "json" else _of_lines(text)
    except UnicodeDecodeError:
        found.leave_out(FOREIGN, name)
        return []
    except ValueError:  # JSON of something else, or damaged
        texts = None
    if texts == []:
        found.leave_out(EMPTY, name)
    return texts or []


def _of_lines(text: str) -> list[str]:
    lines = [" ".join(line.split()) for line in text.splitlines() if not _TRANSLATION.match(line)]
    return list(dict.fromkeys(line for line in lines if line))


def _of_json(held: Any) -> list[str] | None:
    """None: nothing of captions."""
    return caption_of(held) if isinstance(held, dict) else None
