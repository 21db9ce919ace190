"""Atomic writing: a file or folder is either the old one or the new one, whatever interrupts.

Everything is written beside its destination, flushed to disk and renamed; a failure (full disk, missing permission)
removes the unfinished copy, leaves the previous one as it was and says so.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from aligntok.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write one file atomically, making its folder where needed; raises UserError when the disk refuses."""
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_bytes(data)
        _flush(unfinished)
        os.replace(unfinished, path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise UserError(
            f"could not write {path}: {error.strerror or error}; what was there before is untouched"
        ) from error


def write_folder(
    folder: str | Path, tensors: dict[str, dict[str, Tensor]], documents: dict[str, dict[str, Any]]
) -> None:
    """Write `NAME.safetensors` and `NAME.json` files as one atomic folder; raises UserError when the disk refuses."""
    from safetensors.torch import save

    files = {}
    for name, state in tensors.items():
        files[f"{name}.safetensors"] = save({k: v.detach().cpu().contiguous() for k, v in state.items()})
    for name, document in documents.items():
        files[f"{name}.json"] = json.dumps(document, indent=1).encode()
    write_folder_bytes(folder, files)


def write_folder_bytes(folder: str | Path, files: dict[str, bytes]) -> None:
    """Write a folder of files atomically; an older folder of that name is replaced only at the end.

    Raises:
        UserError: the disk is full or not writable; the older folder is untouched.
    """
    folder = Path(folder)
    unfinished = folder.with_name(f".{folder.name}.{uuid4().hex[:8]}.tmp")
    retired = folder.with_name(f".{folder.name}.{uuid4().hex[:8]}.old")
    try:
        unfinished.mkdir(parents=True)
        for name, data in files.items():
            (unfinished / name).write_bytes(data)
            _flush(unfinished / name)
        if folder.exists():
            os.replace(folder, retired)
        os.replace(unfinished, folder)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if retired.exists() and not folder.exists():
            os.replace(retired, folder)
        raise UserError(
            f"could not write {folder}: {error.strerror or error}; what was there before is untouched"
        ) from error
    shutil.rmtree(retired, ignore_errors=True)


def _flush(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
