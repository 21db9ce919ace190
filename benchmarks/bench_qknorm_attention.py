"""`qknorm_attention` from the packed projection: Triton against eager norms, rotation and SDPA, and others.

    python -m benchmarks.bench_qknorm_attention [--phase forward|backward|both|all] [--seconds S] [--csv FILE]

The baseline norms and rotates q and k eagerly and calls scaled_dot_product_attention. Further columns put the fused
prologue `qknorm_rope` before SDPA, flash-attn and xformers, where they can be imported. Shapes: LightningDiT-XL/1 (16
heads of 72), B/1 and S/1 (heads of 64) at 256 px, shorter and longer sequences, heads of 128.
"""

import itertools
import sys
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from aligntok.kernels import qknorm_attention
from aligntok.kernels._qknorm_attention_configurations import SHORT, fits_on_chip
from aligntok.kernels.qknorm_attention import qknorm_attention_reference
from aligntok.models.attention import Rope, attention, refusal
from aligntok.models.lightning_dit import rope_table
from benchmarks.aot import compile_launch, launches_of
from benchmarks.harness import run_workloads
from benchmarks.machine import DEVICE
from benchmarks.workloads import Outputs, Workload

EPS = 1e-6


def make(device: str, dtype: torch.dtype, B: int, N: int, H: int, D: int) -> tuple[Tensor, ...]:
    """qkv [B, N, 3, H, D], both weights [D] in fp32, tables [N, D / 2]."""
    qkv = torch.randn(B, N, 3, H, D, device=device, dtype=dtype).requires_grad_()
    weights = [torch.ones(D, device=device).requires_grad_() for _ in range(2)]
    tables = rope_table((1, N), D, N)
    return qkv, *weights, *(table[:, ::2].contiguous().to(device) for table in tables)


def minimum(itemsize: int, B: int, N: int, H: int, D: int) -> tuple[float, float]:
    """In units of one of q, k, v, out or dout of all heads, and the fp32 tables.

    Forward: qkv in, out out. Backward: qkv, dout, out in, dqkv out.
    """
    unit, tables = B * N * H * D * itemsize, N * D * 4
    return 4 * unit + tables, 8 * unit + tables


def planned(itemsize: int, B: int, N: int, H: int, D: int) -> tuple[float, float]:
    """In the same units; the tables are read once per launch.

    Forward: qkv in, out out, and where a head does not fit on the chip k' out and in once more. Backward in one launch:
    qkv, dout, out in, dqkv out, and q', k' out and in. In three: q, k in, q', k' out; q, k', v, dout, out in, dq out;
    k, q', v, dout in, dk, dv out.
    """
    unit, tables = B * N * H * D * itemsize, N * D * 4
    forward = 4 * unit + tables if fits_on_chip(N, D, itemsize) else 6 * unit + 2 * tables
    return forward, 12 * unit + tables if N <= SHORT else 16 * unit + 3 * tables


def flops(B: int, N: int, H: int, D: int) -> tuple[float, float]:
    """Two products forward, five backward."""
    product = 2.0 * B * H * N * N * D
    return 2 * product, 5 * product


def _behind_the_prologue(backend: str) -> Callable[..., Outputs] | str:
    """A provider: `qknorm_rope`, then another library's attention; or why it cannot run."""

    def run(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rope = Rope(cos.repeat_interleave(2, dim=1), sin.repeat_interleave(2, dim=1), cos, sin)
        return attention(qkv, q_weight, k_weight, rope, EPS, backend)

    return refusal(backend, DEVICE, torch.bfloat16, 64) or run


PROVIDERS = {f"qknorm_rope + {name}": _behind_the_prologue(name) for name in ("sdpa", "flash-attn", "xformers")}
SHAPES = (  # batch, tokens, heads, width of a head, note
    (32, 256, 16, 72, "XL/1"),
    (64, 256, 12, 64, "B/1"),
    (64, 256, 6, 64, "S/1"),
    (32, 256, 8, 128, ""),
    (128, 64, 16, 72, ""),
    (128, 64, 12, 64, ""),
    (128, 64, 8, 128, ""),
    (8, 1024, 16, 72, "512 px"),
    (8, 1024, 12, 64, ""),
    (8, 1024, 8, 128, ""),
    (2, 4096, 16, 72, "1024 px"),
    (2, 4096, 12, 64, ""),
    (2, 4096, 8, 128, ""),
)
WORKLOADS = [
    Workload(
        "qknorm_attention",
        {"B": B, "N": N, "H": H, "D": D},
        {"B": 1, "H": 2, "N": min(N, 2 * SHORT)},
        make,
        qknorm_attention,
        qknorm_attention_reference,
        minimum,
        flops,
        planned=planned,
        reason="normed and rotated q and k are written and read again, where every program would compute them anew",
        note=note,
        providers=PROVIDERS,
    )
    for B, N, H, D, note in SHAPES
]


def padding_comparison(arch: int) -> list[dict[str, int | str]]:
    """Tensor-core instructions and FLOPs of XL/1's kernels with heads of 72 as 64 + 16 and as one tile of 128 columns.

    The padded variant is compiled for this comparison only.
    """
    rows = []
    for launch in itertools.chain.from_iterable(launches_of(WORKLOADS[0], arch)):
        padded = replace(launch, arguments=launch.arguments | {"MAIN": 128, "TAIL": 0})
        for name, variant in (("64 + 16", launch), ("padded to 128", padded)):
            code, _ = compile_launch(variant, arch)
            found: dict[str, int | str] = {"kernel": code.kernel, "arch": arch, "heads of 72 as": name}
            rows.append(found | {"hmma": code.hmma, "hgmma": code.hgmma, "spilled_bytes": code.spilled_bytes})
    return rows


if __name__ == "__main__":
    sys.exit(run_workloads(__doc__, WORKLOADS))
