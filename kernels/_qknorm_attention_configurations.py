"""Tiles and warps of `qknorm_attention`'s kernels by width, length and architecture, and which form runs."""

from typing import Any

import torch
from torch import Tensor

from . import _triton
from ._triton import Configuration, configuration, triton

HEAD_WIDTHS = (32, 48, 64, 72, 96, 128)  # of the kernels; any even width works in the reference
SHORT = 256  # tokens up to which a program owns a whole (batch, head)
ON_CHIP = 80 * 1024  # bytes: k' and v of 256 tokens of 64 + 16 columns; tiles and scratch come on top of it
ANY = 2**62  # tokens


def parts(D: int) -> tuple[int, int]:
    """(MAIN, TAIL): D's largest power of two, and the rest padded to a power of two >= 16 (0: no rest).

    Triton's tiles have sides that are powers of two; 72 as 64 + 16 has 80 columns where one tile has 128.
    """
    main = 1 << (D.bit_length() - 1)
    return main, max(16, triton.next_power_of_2(D - main)) if D > main else 0


def tiles(q: int, k: int, warps: int, stages: int = 1) -> Configuration:
    """Tiles of a kernel with queries and keys."""
    return {"BLOCK_Q": q, "BLOCK_K": k, "num_warps": warps, "num_stages": stages}


def row_block(block: int, warps: int) -> Configuration:
    """Rows at a time of the kernel that prepares them."""
    return {"BLOCK": block, "num_warps": warps, "num_stages": 1}


def phases(dq: tuple[int, int], dkv: tuple[int, int], rows: int = 64, warps: int = 8, stages: int = 2) -> Configuration:
    """Tiles (queries, keys) of dq and of dk and dv, and the rows that are prepared at a time."""
    sides = {"BLOCK": rows, "DQ_Q": dq[0], "DQ_K": dq[1], "DKV_Q": dkv[0], "DKV_K": dkv[1]}
    return sides | {"num_warps": warps, "num_stages": stages}


# Rows (MAIN + TAIL up to, N up to, by architecture); the first that fits is taken. None: not in one launch, since no
# tiles were found that leave nothing spilled. Chosen from the machine code (benchmarks.aot) of every compiler and
# architecture in docs/kernels.md, not from timings.
CONFIGURATIONS: dict[str, list[tuple[int, int, dict[int, Configuration | None]]]] = {
    "short_forward": [
        (64, 256, {80: tiles(64, 64, 4), 90: tiles(64, 64, 4)}),
        (80, 256, {80: tiles(128, 32, 8), 86: tiles(64, 32, 4), 90: tiles(64, 64, 4)}),
        (128, 256, {80: tiles(64, 64, 4), 90: tiles(64, 64, 4)}),
    ],
    "prepare": [(128, ANY, {80: row_block(64, 4), 90: row_block(64, 4)})],
    "long_forward": [
        (80, ANY, {80: tiles(128, 64, 8, 2), 90: tiles(128, 64, 8, 2)}),
        (128, ANY, {80: tiles(128, 32, 8, 2), 90: tiles(128, 64, 8, 2)}),
    ],
    "dq": [
        (64, ANY, {80: tiles(128, 64, 8, 2), 90: tiles(128, 64, 8, 2)}),
        (80, ANY, {80: tiles(128, 32, 8, 2), 90: tiles(128, 64, 8, 2)}),
        (128, ANY, {80: tiles(64, 64, 8, 2), 90: tiles(64, 64, 8, 2)}),
    ],
    "dkv": [
        (64, ANY, {80: tiles(32, 64, 4, 2), 90: tiles(64, 64, 4, 2)}),
        (80, ANY, {80: tiles(16, 64, 4, 1), 90: tiles(64, 64, 8, 2)}),
        (128, ANY, {80: tiles(64, 64, 8, 2), 90: tiles(64, 64, 8, 2)}),
    ],
    # Eight warps throughout; one stage where the addresses of a second would be spilled
    "short_backward": [
        (64, 64, {80: phases((64, 32), (32, 64)), 90: phases((64, 64), (64, 64))}),
        (
            64,
            256,
            {
                80: phases((128, 32), (32, 128)),
                90: phases((128, 64), (64, 64)),
                100: phases((128, 64), (64, 64), stages=1),
            },
        ),
        (
            80,
            64,
            {
                80: phases((64, 32), (16, 64)),
                86: phases((64, 32), (16, 64), stages=1),
                90: phases((64, 64), (64, 64)),
                100: None,
            },
        ),
        (
            80,
            256,
            {
                80: phases((128, 32), (16, 128)),
                86: phases((128, 32), (16, 128), stages=1),
                90: phases((128, 32), (32, 64)),
                100: None,
            },
        ),
        (128, 256, {80: phases((64, 32), (32, 64)), 90: phases((64, 64), (32, 64)), 100: None}),
    ],
}
# Before Triton 3.8, whose compilers' code of a few of them spills 8 to 56 bytes: instead of the rows (kernel, MAIN +
# TAIL, N), found by compiling with 3.4 and 3.6 (docs/kernels.md).
WITH_OLDER: dict[tuple[str, int, int], dict[int, Configuration]] = {
    ("short_forward", 64, 256): {120: tiles(64, 32, 4)},
    ("long_forward", 80, ANY): {100: tiles(128, 32, 8, 2)},
    ("dkv", 64, ANY): {120: tiles(32, 64, 4)},
    ("dkv", 128, ANY): {86: tiles(32, 64, 8)},
    ("short_backward", 64, 64): {86: phases((64, 32), (32, 64), stages=1)},
    ("short_backward", 64, 256): {80: phases((128, 32), (32, 128), stages=1)},
}
# Before this release the compiler lays q's tail out twice, and the tiles of a whole head are spilled.
ONE_LAYOUT = (3, 8)
# fp32 runs on the ordinary cores (tf32 on request): tiles that fit in registers, not tuned further.
FLOAT32 = dict.fromkeys(CONFIGURATIONS, tiles(32, 32, 4)) | {
    "prepare": row_block(32, 4),
    "short_backward": phases((32, 32), (32, 32), 32, 4, 1),
}


def table(kernel: str, qkv: Tensor) -> dict[int, Any]:
    """The configurations of a kernel by architecture, for the number type, width and length of qkv."""
    width, N = sum(parts(qkv.shape[4])), qkv.shape[1]
    if qkv.dtype == torch.float32:
        return dict.fromkeys(_triton.ARCHITECTURES, FLOAT32[kernel])
    row = next(row for row in CONFIGURATIONS[kernel] if width <= row[0] and N <= row[1])
    return row[2] | WITH_OLDER.get((kernel, *row[:2]), {}) if _triton.RELEASE < ONE_LAYOUT else row[2]


def configured(kernel: str, qkv: Tensor) -> Configuration:
    """The pinned configuration of a kernel for qkv."""
    return configuration(f"qknorm_attention_{kernel}", table(kernel, qkv), qkv.device)


def whole_head(kernel: str, qkv: Tensor) -> bool:
    """Whether a program of `kernel` can own a whole (batch, head) of qkv on its device, with this compiler."""
    _, tail = parts(qkv.shape[4])
    if qkv.shape[1] > SHORT or (tail and qkv.dtype != torch.float32 and _triton.RELEASE < ONE_LAYOUT):
        return False
    return _triton.pinned(table(kernel, qkv), qkv.device) is not None


def fits_on_chip(N: int, D: int, itemsize: int) -> bool:
    """Whether k' and v of a head fit on the chip beside the tiles that pass by."""
    return N <= SHORT and 2 * N * sum(parts(D)) * itemsize <= ON_CHIP
