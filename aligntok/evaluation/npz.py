"""Arrays of an .npz, read without running anything that it holds; what is wrong with the file is a UserError."""

from __future__ import annotations

import lzma
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from aligntok.errors import UserError
from aligntok.runtime.weights import few

_LONGEST_END = 22 + 0xFFFF  # bytes of a zip's last record, with the longest comment


@contextmanager
def damage_of(path: str | Path, what: str) -> Iterator[None]:
    """UserError for whatever a library raises where the file is damaged, absent or not what it says."""
    try:
        yield
    # zipfile itself raises RuntimeError where a flipped bit asks for a password or for an unknown compression; numpy
    # has no memory for what a damaged header announces
    except (
        OSError, EOFError, RuntimeError, ValueError, MemoryError,
        zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error,
    ) as error:  # fmt: skip
        told = " ".join(str(error).split())
        message = f"{path}: {what} cannot be read as .npz ({told}); expected an undamaged file, get or make it again"
        raise UserError(message) from error


def opened(path: str | Path) -> zipfile.ZipFile:
    with damage_of(path, "the file"):
        return zipfile.ZipFile(path)


def require_whole(archive: zipfile.ZipFile, path: str | Path) -> None:
    """UserError where damage hides arrays from zipfile: what a reference lacks decides which numbers there are."""
    with damage_of(path, "the list of its arrays"):
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _LONGEST_END))
            end = file.read()
        (count,) = struct.unpack_from("<H", end, end.rindex(b"PK\5\6") + 10)
        if count not in (len(archive.namelist()), 0xFFFF):  # the latter: it is elsewhere
            raise ValueError(f"{len(archive.namelist())} found of {count}")
        for name in archive.namelist():
            archive.open(name).close()  # the name is compared with the one beside the data


def held_by(archive: zipfile.ZipFile) -> str:
    """What to say that a file holds: the first names."""
    return few(archive.namelist()) or "nothing"


@contextmanager
def member(
    archive: zipfile.ZipFile, name: str, path: str | Path
) -> Iterator[tuple[IO[bytes], tuple[int, ...], np.dtype]]:
    """One array of an .npz behind its header: (file at its first value, shape, dtype)."""
    if f"{name}.npy" not in archive.namelist():
        raise UserError(f"{path} holds {held_by(archive)}, expected {name}.npy")
    with damage_of(path, name):
        file = archive.open(f"{name}.npy")
    with file:
        with damage_of(path, name):
            shape, fortran, dtype = _header(file)
        if fortran or dtype.hasobject:
            raise UserError(f"{path}: {name} is stored by columns or as objects, expected plain rows")
        yield file, shape, dtype


def numbers(archive: zipfile.ZipFile, name: str, path: str | Path) -> Tensor:
    """A whole array as float64; UserError where it is not made of finite numbers."""
    with damage_of(path, name), archive.open(f"{name}.npy") as file:
        dtype = _header(file)[2]
    if dtype.kind not in "fiu":
        raise UserError(f"{path}: {name} is {dtype}, expected numbers; get or make the file again")
    with damage_of(path, name), archive.open(f"{name}.npy") as file:
        value = np.lib.format.read_array(file, allow_pickle=False)
    if not np.isfinite(value).all():
        raise UserError(f"{path}: {name} holds values that are not finite; get or make the file again")
    return torch.from_numpy(value.astype(np.float64))


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """(shape, stored by columns, dtype) of the array that the file begins with."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)
