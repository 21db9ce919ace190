"""Atomic writing: a file or folder is either the old one or the new one, whatever interrupts.

Everything is written beside its destination, flushed to disk and renamed; a failure (full disk, missing permission)
removes the unfinished copy, leaves the previous one as it was and says so. A folder takes the place only of one that
holds nothing else: what somebody keeps there is never removed. A killed process leaves hidden copies behind,
`.NAME.XXXXXXXX.tmp` and `.NAME.XXXXXXXX.old`; `remove_unfinished` clears them up.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from aligntok.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

_LEFT_BEHIND = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{8}\.(?P<kind>tmp|old)")


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write one file atomically, making its folder where needed; raises UserError when the disk refuses."""
    with unfinished_file(path) as unfinished:
        unfinished.write_bytes(data)


def read_document(file: Path) -> dict[str, Any]:
    """The object in a JSON file that a run keeps for itself; empty where there is none yet.

    Raises:
        UserError: something else lies there.
    """
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as JSON ({error}): remove it") from error
    if not isinstance(found, dict):
        raise UserError(f"{file} holds a {type(found).__name__} in JSON, expected an object: remove it")
    return found


@contextmanager
def unfinished_file(path: str | Path) -> Iterator[Path]:
    """A hidden name to write under, which takes the place of `path` when the block ends well; else it is removed.

    Raises:
        UserError: the disk is full or not writable; an older `path` is untouched.
    """
    path = Path(path)
    unfinished = _beside(path, "tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield unfinished
        _flush(unfinished)
        os.replace(unfinished, path)
    except OSError as error:
        raise _refused(path, error) from error
    finally:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)


def write_folder(
    folder: str | Path, tensors: dict[str, dict[str, Tensor]], documents: dict[str, dict[str, Any]]
) -> None:
    """Write `NAME.safetensors` and `NAME.json` files as one atomic folder.

    Raises:
        UserError: the disk refuses, or `folder` exists and is something else: a file, a folder with other files, or one
            whose config.json says another `format`. It is left as it was.
    """
    from safetensors.torch import save

    if "config" in documents:
        _check_format(Path(folder) / "config.json", documents["config"].get("format"))
    with unfinished_folder(folder) as unfinished:
        for name, state in tensors.items():
            data = save({k: v.detach().cpu().contiguous() for k, v in state.items()})
            (unfinished / f"{name}.safetensors").write_bytes(data)
        for name, document in documents.items():
            (unfinished / f"{name}.json").write_bytes(json.dumps(document, indent=1).encode())


def check_destination(folder: str | Path, names: Iterable[str] | None = None) -> None:
    """Refuse a place for a new folder that is not free to be taken.

    Args:
        names: what the new folder will hold; an existing one may hold nothing else. None = it may hold anything.

    Raises:
        UserError: a file, or a folder with other entries, of which the first are named.
    """
    folder = Path(folder)
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{folder} is a file, and a folder is to be written there: give another place")
    entries = sorted(entry.name for entry in folder.iterdir())
    if others := [] if names is None else [name for name in entries if name not in set(names)]:
        told = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        raise UserError(f"{folder} holds other files ({told}), which would be removed: give another place")


def _check_format(file: Path, wanted: str | None) -> None:
    """Refuse to replace a config.json that says another format than `wanted`, or that cannot be read."""
    if not file.exists():
        return
    try:
        found = json.loads(file.read_text()).get("format")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{file} cannot be read ({error}), so it is not replaced: give another place") from error
    if found != wanted:
        raise UserError(f"{file} says format {found!r}, and {wanted!r} is to be written there: give another place")


@contextmanager
def unfinished_folder(folder: str | Path, replaces_any: bool = False) -> Iterator[Path]:
    """A hidden folder to fill, which takes the place of `folder`, or of what it links to, when the block ends well.

    Args:
        replaces_any: take the place of an older `folder` that holds files of other names, too.

    Raises:
        UserError: the disk is full or not writable; `folder` is a file, or holds entries that the new one does not
            have. What was there is untouched.
    """
    folder = Path(os.path.realpath(folder))  # a link to another disk stays one
    check_destination(folder)
    unfinished, retired = _beside(folder, "tmp"), _beside(folder, "old")
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        for entry in unfinished.rglob("*"):
            (_flush_names if entry.is_dir() else _flush)(entry)
        check_destination(folder, None if replaces_any else [file.name for file in unfinished.iterdir()])
        if folder.exists():
            os.replace(folder, retired)
        os.replace(unfinished, folder)
        _flush_names(folder.parent)
    except OSError as error:
        if retired.exists() and not folder.exists():
            os.replace(retired, folder)
        raise _refused(folder, error) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        if folder.exists():
            shutil.rmtree(retired, ignore_errors=True)


def remove_unfinished(folder: str | Path, wanted: Callable[[str], bool]) -> None:
    """Clear away what killed writers have left in `folder` for names that are `wanted`.

    A folder that was moved aside and never replaced is put back: it is the last good one.
    """
    folder = Path(folder)
    for path in folder.iterdir() if folder.is_dir() else ():
        found = _LEFT_BEHIND.fullmatch(path.name)
        if found is None or not wanted(found["name"]):
            continue
        if found["kind"] == "old" and not (folder / found["name"]).exists():
            with suppress(FileNotFoundError):  # another process of this run was faster
                os.replace(path, folder / found["name"])
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def digest(path: str | Path) -> str:
    """SHA-256 of a file, read in pieces."""
    value = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 22):
            value.update(piece)
    return value.hexdigest()


def _beside(path: Path, kind: str) -> Path:
    path = Path(os.path.abspath(path))  # "." has no name
    return path.with_name(f".{path.name}.{uuid4().hex[:8]}.{kind}")


def _refused(path: Path, error: OSError) -> UserError:
    return UserError(f"could not write {path}: {error.strerror or error}; what was there before is untouched")


def _flush(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _flush_names(folder: Path) -> None:
    """Make a rename durable: names live in their folder, which is flushed on its own (Windows does not allow it)."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
