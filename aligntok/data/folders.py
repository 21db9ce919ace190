"""Folders of pictures: a class for each sub-folder, links followed, and nothing left out without a word.

Hidden files and folders, and those that tools make (thumbnails of a NAS, checkpoints of notebooks), are no pictures and
no classes. Pictures that lie beside class folders belong to no class: a few of them are left out and named; where they
are many, only the user can say what is meant.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from aligntok.data.found import EXTENSIONS, Found, is_hidden
from aligntok.errors import UserError

FEW = 0.1  # share of all pictures up to which those beside class folders are taken for strays

# Pictures to a person, which Pillow does not read by itself
_FOREIGN = {".heic", ".heif", ".svg", ".psd", ".raw", ".cr2", ".cr3", ".nef", ".arw", ".dng", ".exr", ".jxl", ".npy"}


def scan_folder(folder: Path, found: Found) -> tuple[list[Path], list[str | None]]:
    """The pictures below a folder in the order of their names, and the class folder of each (None: beside them).

    Args:
        found: takes what is left out, with the reasons.

    Raises:
        UserError: as many pictures lie beside class folders as in them, or nearly so.
    """
    files = sorted(_pictures(folder, found))
    tops = [file.relative_to(folder).parts[0] if file.parent != folder else None for file in files]
    strays = [file for file, top in zip(files, tops, strict=True) if top is None]
    if len(strays) == len(files):
        return files, tops
    if len(strays) > FEW * len(files):
        raise UserError(
            f"{folder} holds {len(strays)} pictures beside sub-folders with {len(files) - len(strays)}: sub-folders "
            f"are classes, and those would have none. Give each class a folder, or name the one that is meant"
        )
    for file in strays:
        found.leave_out("beside the class folders", file.name)
    _name_empty(folder, {top for top in tops if top is not None}, found)
    kept = [(file, top) for file, top in zip(files, tops, strict=True) if top is not None]
    return [file for file, _ in kept], [top for _, top in kept]


def _name_empty(folder: Path, classes: set[str], found: Found) -> None:
    """Sub-folders that are no class because no picture lies in them: the numbers of the classes behind them differ."""
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not is_hidden(path.name) and path.name not in classes:
            found.leave_out("class folders without pictures", path.name + "/", 0)


def _pictures(folder: Path, found: Found) -> Iterator[Path]:
    """Files that end like pictures, through links; a link that leads back above itself is not entered again."""
    ways: dict[str, frozenset[tuple[int, int]]] = {str(folder): frozenset([_identity(folder)])}
    for place, folders, files in os.walk(folder, followlinks=True):
        above = ways.pop(place)
        entered = []
        for name in sorted(folders):
            path = Path(place, name)
            shown = str(path.relative_to(folder)) + "/"
            if is_hidden(name):
                found.leave_out("hidden or a tool's", shown, sum(1 for _ in _endings(path)))
            elif (identity := _identity(path)) in above:
                found.leave_out("a link that leads back above itself", shown, 0)
            else:
                ways[str(path)] = above | {identity}
                entered.append(name)
        folders[:] = entered
        for name in files:
            path = Path(place, name)
            shown = str(path.relative_to(folder))
            suffix = path.suffix.lower()
            if suffix in _FOREIGN:
                found.leave_out(f"{suffix} is not read", shown)
            elif suffix not in EXTENSIONS:
                continue
            elif is_hidden(name):
                found.leave_out("hidden or a tool's", shown)
            elif not path.is_file():
                found.leave_out("a link to nothing", shown)
            else:
                yield path


def _endings(folder: Path) -> Iterator[str]:
    """Names of pictures in a folder that is not entered; links are not followed."""
    for _, _, files in os.walk(folder):
        yield from (name for name in files if Path(name).suffix.lower() in EXTENSIONS)


def _identity(folder: Path) -> tuple[int, int]:
    state = folder.stat()
    return state.st_dev, state.st_ino
