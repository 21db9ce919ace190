"""Atomic writing: a file or folder is either the old one or the new one, whatever interrupts.

Everything is written beside its destination, flushed to disk and renamed; a failure (full disk, missing permission)
removes the unfinished copy, leaves the previous one as it was and says so. A killed process leaves hidden copies
behind, `.NAME.XXXXXXXX.tmp` and `.NAME.XXXXXXXX.old`; `remove_unfinished` clears them up.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
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
    """Write `NAME.safetensors` and `NAME.json` files as one atomic folder; raises UserError when the disk refuses."""
    from safetensors.torch import save

    with unfinished_folder(folder) as unfinished:
        for name, state in tensors.items():
            data = save({k: v.detach().cpu().contiguous() for k, v in state.items()})
            (unfinished / f"{name}.safetensors").write_bytes(data)
        for name, document in documents.items():
            (unfinished / f"{name}.json").write_bytes(json.dumps(document, indent=1).encode())


@contextmanager
def unfinished_folder(folder: str | Path) -> Iterator[Path]:
    """A hidden folder to fill, which takes the place of `folder` when the block ends well.

    Raises:
        UserError: the disk is full or not writable; an older `folder` is untouched.
    """
    folder = Path(folder)
    unfinished, retired = _beside(folder, "tmp"), _beside(folder, "old")
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        for file in unfinished.iterdir():
            _flush(file)
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
