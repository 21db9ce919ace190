"""`group_norm_silu`: GroupNorm + SiLU against eager PyTorch and torch.compile.

    python -m benchmarks.bench_group_norm_silu [--phase forward|backward|both|all] [--csv FILE] [--plot FILE]
    on a CPU also [--dtype bfloat16|float32] [--compile]

The baseline is the reference of `kernels/group_norm_silu.py` run eagerly on channels-last x, with the fp32
weight and bias that autocast leaves beside bf16 x. All gradients (x, weight, bias) are computed. The sizes on a GPU:
the 41 M decoder at 256 px and batch 8, 32 groups. On a CPU, with the C++ operator: the quickstart's decoder at batch 32
with 8 groups, and the ends of the 41 M decoder at batch 2 with 32 groups.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from aligntok.kernels import group_norm_silu
from aligntok.kernels.group_norm_silu import WHOLE, group_norm_silu_reference
from benchmarks.harness import Case, Provider, arguments, compare, run_workloads
from benchmarks.machine import CUDA
from benchmarks.workloads import Workload

# batch, channels, height = width, groups
CPU_SHAPES = ((32, 32, 64, 8), (32, 32, 32, 8), (32, 64, 16, 8), (32, 128, 4, 8), (2, 128, 256, 32), (2, 512, 16, 32))
EPS = 1e-6  # the decoder's
# Relative to the largest magnitude. In bf16 the eager path rounds after each of the two operators.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


def make(device: str, dtype: torch.dtype, B: int, C: int, side: int, groups: int) -> tuple[Any, ...]:
    """x in channels-last memory, fp32 weight and bias, groups and eps."""
    x = torch.randn(B, C, side, side, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(C, device=device), torch.randn(C, device=device)
    return x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), groups, EPS


def minimum(itemsize: int, B: int, C: int, side: int, groups: int) -> tuple[float, float]:
    """Forward: x in, y out. Backward: x and dy in, dx out."""
    values = B * C * side * side * itemsize
    return 2 * values, 3 * values


def planned(itemsize: int, B: int, C: int, side: int, groups: int) -> tuple[float, float]:
    """As the minimum where one program holds a group. In larger ones every input is read twice."""
    values = B * C * side * side * itemsize
    fits = side * side * C // groups <= min(config["LARGEST"] for config in WHOLE.values())
    return (2 * values, 3 * values) if fits else (3 * values, 5 * values)


# Reduced: the same width of a group, few groups and no more pixels than keep the group on its side of the limit.
_ONE_READ, _TWO_READS = "a group fits one program", "a group exceeds one program"
WORKLOADS = [
    Workload(
        "group_norm_silu",
        {"B": 8, "C": C, "side": side, "groups": 32},
        {"B": 1, "C": 2 * C // 32 if fits else 64, "side": small, "groups": 2 if fits else 2048 // C},
        make,
        group_norm_silu,
        group_norm_silu_reference,
        minimum,
        planned=planned,
        reason="" if fits else "a group exceeds what one program holds, so that its inputs are read twice",
        note=_ONE_READ if fits else _TWO_READS,
    )
    for C, side, small, fits in (
        (512, 16, 16, True),
        (512, 32, 32, True),
        (512, 64, 40, False),
        (256, 128, 48, False),
        (256, 256, 48, False),
        (128, 256, 72, False),
    )
]


def _cpu_part(
    shape: tuple[int, int, int, int], dtype: torch.dtype, compiled: bool
) -> tuple[list[Provider], list[Case]]:
    """Providers and case of one row of the CPU's table."""
    columns: dict[str, Callable[..., Tensor]] = {"eager": group_norm_silu_reference}
    if compiled:
        columns["torch.compile"] = torch.compile(group_norm_silu_reference, fullgraph=True, dynamic=False)
    columns["ours"] = lambda *inputs: group_norm_silu(*inputs, implementation="cpp")
    batch, channels, side, groups = shape
    label = f"{batch}x{channels}x{side}x{side}, {groups} groups, {str(dtype).removeprefix('torch.')}"
    case = Case(label, make("cpu", dtype, *shape), TOLERANCE[dtype])
    return [Provider(name, run) for name, run in columns.items()], [case]


def main() -> int:
    """Print the CPU's table; exit status 1 if some result was wrong."""
    parser = arguments(__doc__)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16", help="of x and y")
    parser.add_argument("--compile", action="store_true", help="add a column for torch.compile")
    options = parser.parse_args()
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    return compare([_cpu_part(shape, dtype, options.compile) for shape in CPU_SHAPES], "ours", options)


if __name__ == "__main__":
    sys.exit(run_workloads(__doc__, WORKLOADS) if CUDA else main())
