"""`joint_attention` over text and image tokens: Triton against eager norms, rotation, concatenation and SDPA.

    python -m benchmarks.bench_joint_attention [--phase forward|backward|both|all] [--seconds S] [--csv FILE]

The baseline is what a model would be written with: q and k of both streams normed and rotated, concatenated, PyTorch's
scaled_dot_product_attention with the mask, and its result split again; eager and compiled. Shapes: a FLUX-type
transformer's blocks of two streams and of one (16 heads of 128, 256 text tokens) at 256 and 512 px, and a tiny model's.
"""

import sys

import torch
from torch import Tensor

from aligntok.kernels.joint_attention import joint_attention, joint_attention_reference
from benchmarks.harness import run_workloads
from benchmarks.workloads import Workload


def spread(B: int, L: int) -> list[int]:
    """Lengths of the texts of a batch: from L down to half of it."""
    return [L - i * L // (2 * B) for i in range(B)]


def make(
    device: str, dtype: torch.dtype, B: int, L: int, N: int, H: int, D: int, streams: int, masked: int
) -> tuple[Tensor | int | None, ...]:
    """Streams, q's scales, k's scales in fp32, tables [L + N, D / 2], L, lengths: in one row, since leaves are."""
    tokens = (L, N) if streams == 2 else (L + N,)
    packed = [torch.randn(B, n, 3, H, D, device=device, dtype=dtype).requires_grad_() for n in tokens]
    weights = [torch.ones(D, device=device).requires_grad_() for _ in range(2 * streams)]
    angles = torch.randn(L + N, D // 2, device=device)
    lengths = torch.tensor(spread(B, L), device=device) if masked else None
    return *packed, *weights, angles.cos(), angles.sin(), L, lengths


def _taken_apart(inputs: tuple) -> tuple[tuple, dict]:
    """What `make` returns as arguments of the operator."""
    *tensors, cos, sin, text_tokens, lengths = inputs
    n = len(tensors) // 3
    return (tensors[:n], tensors[n : 2 * n], tensors[2 * n :], cos, sin), {
        "text_tokens": text_tokens,
        "lengths": lengths,
    }


def ours(*inputs: Tensor, implementation: str | None = None) -> tuple[Tensor, ...]:
    """The results of each stream, through the public function."""
    arguments, options = _taken_apart(inputs)
    return joint_attention(*arguments, **options, implementation=implementation)


def reference(*inputs: Tensor) -> tuple[Tensor, ...]:
    """The results of each stream in plain PyTorch."""
    arguments, options = _taken_apart(inputs)
    return joint_attention_reference(*arguments, **options)


def _sizes(itemsize: int, B: int, L: int, N: int, H: int, D: int, masked: int) -> tuple[float, float, float]:
    """Bytes of a q of all tokens, of the keys that are looked at, and of the tables."""
    row, text = H * D * itemsize, sum(spread(B, L)) if masked else B * L
    return B * (L + N) * row, (text + B * N) * row, (L + N) * D * 4


def minimum(itemsize: int, B: int, L: int, N: int, H: int, D: int, streams: int, masked: int) -> tuple[float, float]:
    """Forward: q, out, and k, v as far as they are looked at. Backward: those and dout in, dqkv out."""
    unit, keys, tables = _sizes(itemsize, B, L, N, H, D, masked)
    return 2 * unit + 2 * keys + tables, 6 * unit + 2 * keys + tables


def planned(itemsize: int, B: int, L: int, N: int, H: int, D: int, streams: int, masked: int) -> tuple[float, float]:
    """The first launch prepares the masked keys as well.

    Forward: k in, k' out; q, k', v in, out out. Backward: q, k in, q', k' out; q, k', v, dout, out in, dq out; k, v,
    q', dout in, dk, dv out.
    """
    unit, keys, tables = _sizes(itemsize, B, L, N, H, D, masked)
    return 4 * unit + 2 * keys + 2 * tables, 13 * unit + 3 * keys + 3 * tables


def flops(B: int, L: int, N: int, H: int, D: int, streams: int, masked: int) -> tuple[float, float]:
    """Two products forward, five backward, with the keys that are looked at."""
    keys = sum(spread(B, L)) if masked else B * L
    product = 2.0 * H * (L + N) * (keys + B * N) * D
    return 2 * product, 5 * product


SHAPES = (  # batch, text, image, heads, width of a head, streams, masked, note
    (32, 256, 256, 16, 128, 2, 1, "256 px, double stream"),
    (32, 256, 256, 16, 128, 1, 1, "256 px, single stream"),
    (32, 256, 1024, 16, 128, 2, 1, "512 px, double stream"),
    (32, 256, 1024, 16, 128, 1, 1, "512 px, single stream"),
    (32, 256, 256, 16, 128, 2, 0, "without a mask"),
    (16, 16, 16, 3, 64, 2, 1, "tiny"),
    (16, 16, 64, 3, 64, 1, 1, "tiny"),
)
WORKLOADS = [
    Workload(
        "joint_attention",
        {"B": B, "L": L, "N": N, "H": H, "D": D, "streams": streams, "masked": masked},
        {"B": 2, "L": min(L, 128), "N": min(N, 128), "H": 1},
        make,
        ours,
        reference,
        minimum,
        flops,
        planned=planned,
        reason="normed and rotated q and k are written and read again, where every program would compute them anew",
        note=note,
    )
    for B, L, N, H, D, streams, masked, note in SHAPES
]


if __name__ == "__main__":
    sys.exit(run_workloads(__doc__, WORKLOADS))
