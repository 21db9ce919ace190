"""WebDataset tars: which pictures they hold and where the bytes of each lie, so that any can be read at once.

In a tar, `KEY.cls` is the label of `KEY.jpg` and of `KEY.input.jpg`; a key may have dots. A sample has one picture:
`KEY.jpg` before `KEY.WORD.jpg`, then the first. Names of the classes are optional: {"classes": [...]}, or the list
alone, in a JSON file beside a single tar (same name, .json) or in `classes.json` beside several. `KEY.txt`, or
img2dataset's `KEY.json`, has the captions (aligntok.data.captions).

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
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from aligntok.data.found import EXTENSIONS, Found, is_hidden
from aligntok.errors import UserError
from aligntok.runtime.assets import cache_folder
from aligntok.runtime.files import write_bytes

Progress = Callable[[int, int], None]
Row = tuple[str, Path, int, int, int]  # name, tar, label, offset, size: the fields of images.Entry
CaptionPlace = tuple[str, int, int]  # "txt" or "json", offset, size
_VERSION = 3
_SHOWN = 3  # names in a message
LONE = "caption files without a picture"


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
    paths: list[Path], found: Found, progress: Progress | None = None, remember: bool = True
) -> tuple[list[Row], list[str]]:
    """(rows, class names) of all pictures of some tars, in their order.

    Args:
        paths: the tars. With more than one, a picture's name begins with its tar's.
        found: takes what is left out, with the reasons.
        progress: called with (done, total) tars.
        remember: use and write the indices.

    Raises:
        UserError: a tar cannot be read, or a label is no number of a class.
    """
    rows: list[Row] = []
    for done, path in enumerate(paths, 1):
        prefix = "" if len(paths) == 1 else f"{path.name}/"
        held = _indexed(path) if remember else _scan(path)
        rows += [(prefix + name, path, label, offset, size) for name, label, offset, size in held["pictures"]]
        found.add(Found(held["counts"], held["examples"]), prefix)
        if progress is not None:
            progress(done, len(paths))
    listing = paths[0].with_suffix(".json") if len(paths) == 1 else paths[0].with_name("classes.json")
    names = read_class_names(listing, required=len(paths) > 1) if listing.is_file() else None
    return rows, _classes(rows, names, listing)


def captions_in(path: Path, remember: bool = True) -> tuple[dict[int, CaptionPlace], Found]:
    """Where the captions of a tar's pictures lie, by the offset of the picture; files of captions without a picture.

    Args:
        remember: use and write the index.

    Raises:
        UserError: the tar cannot be read.
    """
    held = _indexed(path) if remember else _scan(path)
    pairs = zip(held["pictures"], held["captions"], strict=True) if held["captions"] else ()
    places = {row[2]: (str(place[0]), int(place[1]), int(place[2])) for row, place in pairs if place}
    return places, Found(*held["lone_captions"])


def _indexed(path: Path) -> dict[str, Any]:
    """What `_scan` finds in one tar, from its index, which is written where there is none that is true."""
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
            return found
    held = _scan(path)
    data = json.dumps(mark | held, separators=(",", ":")).encode()
    for place in places:
        try:
            write_bytes(place, data)
        except UserError:
            continue  # neither place can be written: the tar is scanned again next time
        break
    return held


def _cached(path: Path) -> Path:
    mark = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    return cache_folder() / "tar-indices" / f"{path.stem}-{mark}.index.json"


def _scan(path: Path) -> dict[str, Any]:
    """Of a tar: "pictures", [name, label, offset, size] each, and "counts" and "examples" of what is left out;
    "captions", a CaptionPlace or null for each picture, [] where there are none; "lone_captions", without a picture.
    """
    pictures: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    captions: dict[str, CaptionPlace] = {}
    found = Found()
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                stem, dot, end = member.name.rpartition(".")
                suffix = dot + end.lower()
                if suffix in EXTENSIONS and any(map(is_hidden, member.name.removeprefix("./").split("/"))):
                    found.leave_out("hidden or a tool's", member.name)
                elif suffix in EXTENSIONS and member.isreg():
                    pictures[member.name] = (member.offset_data, member.size)
                elif suffix in EXTENSIONS and not member.isdir():
                    found.leave_out("a link inside a tar", member.name)
                elif suffix == ".cls" and member.isreg():
                    labels[stem] = _label(tar, member, path)
                elif suffix == ".txt" or (suffix == ".json" and stem not in captions):
                    if member.isreg() and not any(map(is_hidden, member.name.removeprefix("./").split("/"))):
                        captions[stem] = (suffix[1:], member.offset_data, member.size)
                tar.members = []  # type: ignore[attr-defined]  # missing in typeshed; tarfile keeps all of them otherwise
    except (OSError, tarfile.TarError) as error:
        raise UserError(f"{path} is not a WebDataset tar that can be read: {error}") from error
    rows = []
    for name in _one_for_each_sample(pictures, found):
        label = next((labels[key] for key in _keys(name) if key in labels), None if labels else 0)
        if label is None:
            found.leave_out("without a label, where others have one", name)
        else:
            rows.append([name, label, *pictures[name]])
    places = [next((captions[key] for key in _keys(str(row[0])) if key in captions), None) for row in rows]
    lone = _lone(captions, pictures)
    return {
        "pictures": rows,
        "counts": found.counts,
        "examples": found.examples,
        "captions": places if any(places) else [],
        "lone_captions": [lone.counts, lone.examples],
    }


def _lone(captions: dict[str, CaptionPlace], pictures: Iterable[str]) -> Found:
    """The .txt files that belong to no picture; a .json may hold anything."""
    known = {key for name in pictures for key in _keys(name)}
    found = Found()
    for key, (kind, _, _) in captions.items():
        if kind == "txt" and key not in known:
            found.leave_out(LONE, f"{key}.txt")
    return found


def _keys(name: str) -> Iterator[str]:
    """What a label of a picture may be called after: "a/b.c.png" -> "a/b.c", "a/b"."""
    folder, slash, stem = name.rpartition("/")
    while "." in stem:
        stem = stem.rpartition(".")[0]
        yield folder + slash + stem


def _one_for_each_sample(names: Iterable[str], found: Found) -> list[str]:
    """The names, one for each sample."""
    chosen: dict[str, str] = {}
    for name in names:
        sample, part = _sample(name)
        before = chosen.get(sample)
        if before is None:
            chosen[sample] = name
            continue
        better = not part and _sample(before)[1]
        used, other = (name, before) if better else (before, name)
        found.leave_out("second pictures of a sample", f"{other} (used: {used})")
        chosen[sample] = used
    return list(chosen.values())


def _sample(name: str) -> tuple[str, str]:
    """(key, part) of a picture: "KEY.jpg" -> "KEY", ""; "KEY.input.jpg" -> "KEY", "input"; "v1.2.png" -> "v1.2", ""."""
    stem = next(_keys(name))
    key, _, part = stem.rpartition(".")
    if key.rpartition("/")[2] and re.fullmatch(r"[A-Za-z][A-Za-z_]*", part):
        return key, part
    return stem, ""


def _label(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> int:
    content = tar.extractfile(member)
    assert content is not None  # a regular file has one
    text = content.read(64).strip()
    if not text.isdigit():
        shown = text.decode(errors="replace")
        raise UserError(f"{path}: {member.name} holds {shown!r}, expected the number of a class: 0, 1, 2, ...")
    return int(text)


def read_class_names(file: Path, required: bool = True) -> list[str] | None:
    """The names of the classes in a JSON file: {"classes": [...]}, or the list alone.

    Args:
        required: whether the file is one of class names and nothing else; else other JSON objects give None.

    Raises:
        UserError: it is none of that.
    """
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as JSON ({error}): expected the names of the classes") from error
    if isinstance(held, dict):
        if "classes" not in held and not required:
            return None
        held = held.get("classes")
    if not isinstance(held, list) or not held or not all(isinstance(name, str) and name for name in held):
        raise UserError(
            f'{file} holds no names of classes: expected {{"classes": ["cat", "dog", ...]}}, the name of class 0 first'
        )
    return held


def _classes(rows: list[Row], names: list[str] | None, listing: Path) -> list[str]:
    count = max((row[2] for row in rows), default=0) + 1
    if names is None:
        return ["all"] if count == 1 else [f"class {i}" for i in range(count)]
    if len(names) < count:
        first = next(index for index, row in enumerate(rows) if row[2] >= len(names))
        name = rows[first][0]
        raise UserError(
            f"{listing} names {len(names)} classes, 0 to {len(names) - 1}, but the label of {name} is "
            f"{rows[first][2]}: add the missing names, or correct the label"
        )
    return names
