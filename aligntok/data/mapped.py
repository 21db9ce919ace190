"""Tensors of .safetensors files mapped into memory: read row by row, and announced to the kernel before they are.

Pages of the files belong to the kernel, which drops them when somebody else needs the memory. The rows of a batch are
announced together before the first of them is touched, so that the disk works on all of them at once.
"""

from __future__ import annotations

import json
import math
import mmap
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_CAN_ANNOUNCE = hasattr(mmap, "MADV_WILLNEED")  # everywhere but on Windows
_KINDS = {"BF16": np.uint16, "I64": np.int64, "U8": np.uint8}  # bfloat16, which numpy has not, as its bits
DAMAGED = ValueError, KeyError, TypeError, AttributeError  # what `map_tensors` raises


@dataclass(frozen=True)
class MappedTensor:
    """One tensor of a mapped file."""

    file: mmap.mmap
    begin: int  # of its bytes in the file
    row_bytes: int
    rows: np.ndarray  # [n, ...]

    def announce(self, first: int, count: int) -> None:
        """Ask the kernel to read `count` rows from `first` on, where the system can be asked."""
        if _CAN_ANNOUNCE and count:
            begin = self.begin + first * self.row_bytes
            page = begin - begin % mmap.PAGESIZE
            self.file.madvise(mmap.MADV_WILLNEED, page, begin - page + count * self.row_bytes)


def map_tensors(file: Path, expected: dict[str, tuple[str, list[int]]]) -> dict[str, MappedTensor]:
    """The tensors of a file.

    Args:
        expected: name -> (BF16, I64 or U8; shape).

    Raises:
        ValueError, KeyError, TypeError or AttributeError: its header does not say what is expected.
    """
    with open(file, "rb") as opened:
        mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    data = 8 + int.from_bytes(mapped[:8], "little")
    if data > len(mapped):
        raise ValueError(f"it is said to have {data} bytes")
    header = json.loads(mapped[8:data])
    tensors = {}
    for name, (kind, shape) in expected.items():
        begin, end = header[name]["data_offsets"]
        row_bytes = math.prod(shape[1:]) * np.dtype(_KINDS[kind]).itemsize
        told = [header[name]["dtype"], header[name]["shape"], end]
        if told != [kind, shape, begin + shape[0] * row_bytes] or begin < 0:
            raise ValueError(f"{name} is said to be {header[name]}")
        rows = np.ndarray(shape, _KINDS[kind], mapped, data + begin)
        tensors[name] = MappedTensor(mapped, data + begin, row_bytes, rows)
    if _CAN_ANNOUNCE:  # reading ahead of a row would fetch others that nobody has asked for
        mapped.madvise(mmap.MADV_RANDOM)
    return tensors
