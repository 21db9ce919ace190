"""Lists of captions: rows that name a picture and say what is on it, in the layouts that are about.

    .jsonl, .ndjson   one object a line
    .json             a list of objects; COCO's captions ("images" and "annotations"); {"NAME": "caption" or [several]}
    .parquet, and a folder of them (LAION's and img2dataset's tables)
    a folder of .txt  named like the pictures

Of an object, or of a table's columns, the first of `NAMES` names the picture and the first of `CAPTIONS` has its
caption, or a list of several; capitals do not matter. A picture is named by its path within the set, or by the end of
it, or by a longer path that ends so ("train2014/a.jpg" for a.jpg), or by its key, the same without the ending of the
file. Rows that name the same picture add captions to it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from os.path import splitext
from pathlib import Path
from typing import Any

from aligntok.data.found import EXTENSIONS, Found, is_hidden
from aligntok.errors import UserError
from aligntok.runtime.weights import in_short

ACCEPTED = "a .jsonl, .json (COCO's too) or .parquet file, or a folder of .parquet or .txt files"
NAMES = ("file_name", "filename", "file", "path", "image_path", "image", "key", "__key__")
CAPTIONS = ("caption", "captions", "text")
NO_PICTURE, SEVERAL = "rows that name no picture of the set", "rows whose name fits several pictures"
AGAIN, NOTHING = "rows that say the same again", "rows without a caption"
NO_NAME, FOREIGN = "rows without the name of a picture", "rows that are not UTF-8"
NO_OBJECT = "rows that are no JSON objects"
_AMBIGUOUS = -1
_EVERY = 1000  # rows between two words of progress
Progress = Callable[[int, int], None]
Row = tuple[str, Any, list[str] | None]  # where it stands, name of the picture, captions


def read_list(source: str, names: list[str], found: Found, progress: Progress | None = None) -> list[list[str]]:
    """The captions [pictures] of each picture, [] for none.

    Args:
        source: the list.
        names: of the pictures, in their order.
        found: takes what cannot be used, with the reasons.
        progress: called now and then with (pictures that have a caption by now, all pictures).

    Raises:
        UserError: no such list, or one that cannot be read.
    """
    texts: list[list[str]] = [[] for _ in names]
    pictures, captioned = _Pictures(names), 0
    for read, (where, name, captions) in enumerate(_rows(source, found)):
        if progress is not None and read % _EVERY == 0:
            progress(captioned, len(names))
        number = pictures.find(str(name)) if name not in (None, "") else None
        shown = f"{name} ({where})"
        if name in (None, ""):
            found.leave_out(NO_NAME, where)
        elif number is None:
            found.leave_out(NO_PICTURE, shown)
        elif number == _AMBIGUOUS:
            found.leave_out(SEVERAL, shown)
        elif not captions:
            found.leave_out(NOTHING, shown)
        elif all(caption in texts[number] for caption in captions):
            found.leave_out(AGAIN, shown)
        else:
            captioned += not texts[number]
            texts[number] += [caption for caption in captions if caption not in texts[number]]
    if progress is not None:
        progress(captioned, len(names))
    return texts


def caption_of(row: dict[str, Any]) -> list[str] | None:
    """The captions in an object; None where it has no place for them."""
    lower = {str(key).lower(): value for key, value in row.items()}
    held = next((lower[key] for key in CAPTIONS if key in lower), _AMBIGUOUS)
    return None if held is _AMBIGUOUS else clean(held)


def clean(held: Any) -> list[str]:
    """The captions in a value: a string is one, a list are several; white space in one space, empty ones left out."""
    values = held if isinstance(held, list | tuple) else [held]
    texts = (" ".join(value.split()) for value in values if isinstance(value, str))
    return list(dict.fromkeys(text for text in texts if text))


class _Pictures:
    """Numbers of pictures by all that they may be called."""

    def __init__(self, names: list[str]) -> None:
        self.whole = {_plain(name): number for number, name in enumerate(names)}

    def find(self, name: str) -> int | None:
        """A picture's number; None where there is none, _AMBIGUOUS where there are several."""
        name = _plain(name)
        is_key = splitext(name)[1].lower() not in EXTENSIONS
        for table in (self.keys, self.ends_of_keys) if is_key else (self.whole, self.ends):
            if name in table:
                return table[name]
        whole = self.keys if is_key else self.whole
        return next((whole[end] for end in _ends(name) if end in whole), None)

    @cached_property
    def keys(self) -> dict[str, int]:
        return _unique((_key(name), number) for name, number in self.whole.items())

    @cached_property
    def ends(self) -> dict[str, int]:
        return _unique((end, number) for name, number in self.whole.items() for end in _ends(name))

    @cached_property
    def ends_of_keys(self) -> dict[str, int]:
        return _unique((end, number) for name, number in self.whole.items() for end in _ends(_key(name)))


def _plain(name: str) -> str:
    return name.replace("\\", "/").removeprefix("./")


def _key(name: str) -> str:
    return splitext(name)[0]


def _ends(name: str) -> Iterator[str]:
    """What a path ends with: "a/b/c" -> "b/c", "c"."""
    while "/" in name:
        name = name.partition("/")[2]
        yield name


def _unique(pairs: Iterable[tuple[str, int]]) -> dict[str, int]:
    found: dict[str, int] = {}
    for name, number in pairs:
        found[name] = number if found.setdefault(name, number) == number else _AMBIGUOUS
    return found


def _rows(source: str, found: Found) -> Iterator[Row]:
    """The rows of a list, whichever its layout."""
    path = Path(source).expanduser()
    if not path.exists():
        raise UserError(f"no captions at {source}: the path does not exist; data.captions takes {ACCEPTED}")
    if path.is_dir():
        yield from _of_folder(path, source, found)
    elif path.suffix.lower() in (".jsonl", ".ndjson"):
        yield from _of_lines(path, found)
    elif path.suffix.lower() == ".json":
        yield from _of_json(path)
    elif path.suffix.lower() == ".parquet":
        yield from _of_parquet(path)
    else:
        raise UserError(f"{source} is a {path.suffix or 'plain'} file; data.captions takes {ACCEPTED}")


def _of_folder(folder: Path, source: str, found: Found) -> Iterator[Row]:
    files = sorted(file for file in folder.rglob("*") if not is_hidden(file.name))
    tables = [file for file in files if file.suffix.lower() == ".parquet"]
    texts = [file for file in files if file.suffix.lower() == ".txt"]
    if not tables and not texts:
        raise UserError(f"{source} holds no .parquet and no .txt files; data.captions takes {ACCEPTED}")
    for table in tables:
        yield from _of_parquet(table)
    for file in () if tables else texts:
        name = file.relative_to(folder).as_posix()
        try:
            lines = file.read_bytes().decode("utf-8-sig").splitlines()
        except UnicodeDecodeError:
            found.leave_out(FOREIGN, name)
            continue
        yield name, _key(name), clean(lines)


def _of_lines(path: Path, found: Found) -> Iterator[Row]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            where = f"line {number}"
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError:
                found.leave_out(FOREIGN, where)
                continue
            except ValueError:
                row = None
            if isinstance(row, dict):
                yield where, _name_of(row), caption_of(row)
            else:
                found.leave_out(NO_OBJECT, where)


def _of_json(path: Path) -> Iterator[Row]:
    try:
        held = json.loads(path.read_bytes().decode("utf-8-sig"))
        if isinstance(held, dict) and {"images", "annotations"} <= held.keys():
            names = {image["id"]: image["file_name"] for image in held["images"]}
            rows: list[tuple[Any, list[str] | None]] = [
                (names.get(one["image_id"]), clean(one["caption"])) for one in held["annotations"]
            ]
        elif isinstance(held, dict):
            rows = [(name, caption_of(own) if isinstance(own, dict) else clean(own)) for name, own in held.items()]
        else:
            rows = [(_name_of(row), caption_of(row)) for row in held]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} holds no captions that can be read ({in_short(error)}): expected a list of objects, COCO's "
            "captions, or names with their captions"
        ) from error
    yield from ((f"row {number}", name, captions) for number, (name, captions) in enumerate(rows, 1))


def _of_parquet(path: Path) -> Iterator[Row]:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise UserError(
            f"{path} needs pyarrow, which cannot be imported ({in_short(error)}): pip install 'aligntok[t2i]'"
        ) from error
    try:
        table = ParquetFile(path)
        columns = {name.lower(): name for name in reversed(table.schema_arrow.names)}
        name, caption = (next((columns[n] for n in known if n in columns), None) for known in (NAMES, CAPTIONS))
        if name is None or caption is None:
            raise UserError(
                f"{path} has the columns {', '.join(table.schema_arrow.names)}: expected one of {', '.join(NAMES)} and "
                f"one of {', '.join(CAPTIONS)}"
            )
        number = 0
        for batch in table.iter_batches(columns=[name, caption]):
            for row in batch.to_pylist():
                number += 1
                yield f"row {number} of {path.name}", _name_of(row), caption_of(row)
    except UserError:
        raise
    except Exception as error:  # pyarrow raises its own and OSError
        raise UserError(f"{path} cannot be read as Parquet ({in_short(error)})") from error


def _name_of(row: dict[str, Any]) -> Any:
    """What a row calls its picture; datasets' images are objects with a path."""
    lower = {str(key).lower(): value for key, value in row.items()}
    held = next((lower[key] for key in NAMES if lower.get(key) is not None), None)
    return held.get("path") if isinstance(held, dict) else held
