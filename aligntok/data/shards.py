"""WebDataset tars: which pictures they hold and where the bytes of each lie, so that any can be read at once.

In a tar, `KEY.cls` is the label of `KEY.jpg`. Names of the classes are optional: {"classes": [...]} in a JSON file
beside a single tar (same name, .json) or in `classes.json` beside several.

A tar is scanned once. Its index is kept in `NAME.tar.index.json` beside it, or, where that folder cannot be written,
in the cache folder ($ALIGNTOK_CACHE, by default ~/.cache/aligntok). An index holds the tar's size and time of
modification and is used only while both still agree.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aligntok.errors import UserError
from aligntok.runtime.assets import cache_folder
from aligntok.runtime.files import write_bytes

EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
Progress = Callable[[int, int], None]
Row = tuple[str, Path, int, int, int]  # name, tar, label, offset, size: the fields of images.Entry
_VERSION = 1
_SHOWN = 3  # names in a message


def expand_shards(pattern: str) -> list[Path]:
    """The tars of a brace pattern: "a-{000..127}.tar" (padded as written), "{train,val}.tar", or both.

    Raises:
        UserError: not a pattern of .tar files, or some of them are missing.
    """
    parts = re.split(r"\{([^{}]*)\}", str(Path(pattern).expanduser()))
    choices = [_alternatives(part, pattern) if i % 2 else [part] for i, part in enumerate(parts)]
    paths = [Path("".join(combination)) for combination in itertools.product(*choices)]
    if any(path.suffix != ".tar" for path in paths):
        raise UserError(f"{pattern} is a pattern of files that do not end in .tar; expected WebDataset tars")
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        shown = ", ".join(missing[:_SHOWN]) + (", ..." if len(missing) > _SHOWN else "")
        raise UserError(
            f"{len(missing)} of the {len(paths)} tars of {pattern} do not exist ({shown}): correct the range"
        )
    return paths


def _alternatives(inside: str, pattern: str) -> list[str]:
    span = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
    if span is None and "," in inside:
        return inside.split(",")
    if span is None or int(span[1]) > int(span[2]):
        raise UserError(f"{{{inside}}} in {pattern} is no range: expected {{000..127}} or {{train,val}}")
    return [str(number).zfill(len(span[1])) for number in range(int(span[1]), int(span[2]) + 1)]


def scan_shards(
    paths: list[Path], progress: Progress | None = None, remember: bool = True
) -> tuple[list[Row], list[str]]:
    """(rows, class names) of all pictures of some tars, in their order.

    Args:
        paths: the tars. With more than one, a picture's name begins with its tar's.
        progress: called with (done, total) tars.
        remember: use and write the indices.

    Raises:
        UserError: a tar cannot be read.
    """
    rows: list[Row] = []
    for done, path in enumerate(paths, 1):
        prefix = "" if len(paths) == 1 else f"{path.name}/"
        pictures = _indexed(path) if remember else _scan(path)
        rows += [(prefix + name, path, label, offset, size) for name, label, offset, size in pictures]
        if progress is not None:
            progress(done, len(paths))
    listing = paths[0].with_suffix(".json") if len(paths) == 1 else paths[0].with_name("classes.json")
    return rows, _class_names(listing, max((row[2] for row in rows), default=0) + 1)


def _indexed(path: Path) -> list[list[Any]]:
    """The pictures of one tar from its index; scans the tar and writes the index where there is none that is true."""
    try:
        state = path.stat()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    mark = {"version": _VERSION, "size": state.st_size, "mtime_ns": state.st_mtime_ns}
    places = [path.with_name(path.name + ".index.json"), _cached(path)]
    for place in places:
        try:
            found = json.loads(place.read_bytes())
        except (OSError, ValueError):
            continue
        if isinstance(found, dict) and all(found.get(key) == value for key, value in mark.items()):
            return found["pictures"]
    pictures = _scan(path)
    data = json.dumps(mark | {"pictures": pictures}, separators=(",", ":")).encode()
    for place in places:
        try:
            write_bytes(place, data)
        except UserError:
            continue  # neither place can be written: the tar is scanned again next time
        break
    return pictures


def _cached(path: Path) -> Path:
    mark = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    return cache_folder() / "tar-indices" / f"{path.stem}-{mark}.index.json"


def _scan(path: Path) -> list[list[Any]]:
    """[name, label, offset, size] of every picture of a tar."""
    pictures: dict[str, tuple[str, int, int]] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                folder, slash, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                key = folder + slash + stem
                if not member.isreg():
                    continue
                if "." + extension.lower() in EXTENSIONS:
                    pictures[key] = (member.name, member.offset_data, member.size)
                elif extension == "cls":
                    labels[key] = _label(tar, member)
                tar.members = []  # type: ignore[attr-defined]  # missing in typeshed; tarfile keeps all of them otherwise
    except (OSError, tarfile.TarError, ValueError) as error:
        raise UserError(f"{path} is not a WebDataset tar that can be read: {error}") from error
    return [[name, labels.get(key, 0), offset, size] for key, (name, offset, size) in pictures.items()]


def _label(tar: tarfile.TarFile, member: tarfile.TarInfo) -> int:
    content = tar.extractfile(member)
    assert content is not None  # a regular file has one
    return int(content.read())


def _class_names(listing: Path, count: int) -> list[str]:
    if listing.is_file():
        names = json.loads(listing.read_text()).get("classes", [])
        if len(names) >= count:
            return names
    return ["all"] if count == 1 else [f"class {i}" for i in range(count)]
