"""`group_norm_silu`: GroupNorm + SiLU against eager PyTorch and torch.compile, on the CPU.

    python -m benchmarks.bench_group_norm_silu [--dtype bfloat16|float32] [--compile] [--phase ...]

The baseline is the reference of `kernels/group_norm_silu.py` run eagerly on channels-last x, with the fp32
weight and bias that autocast leaves beside bf16 x. All gradients (x, weight, bias) are computed. The sizes:
the quickstart's decoder at batch 32 with 8 groups, and the ends of the 41 M decoder at batch 2 with
32 groups.
"""

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from aligntok.kernels.group_norm_silu import group_norm_silu, group_norm_silu_reference
from benchmarks.harness import Case, Provider, arguments, compare

# batch, channels, height = width, groups
QUICKSTART = ((32, 32, 64, 8), (32, 32, 32, 8), (32, 64, 16, 8), (32, 128, 4, 8))
FULL_SIZE = ((2, 128, 256, 32), (2, 512, 16, 32))
EPS = 1e-6  # the decoder's
# Relative to the largest magnitude. In bf16 the eager path rounds after each of the two operators.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}

Operator = Callable[..., Tensor]


class _Inject(torch.autograd.Function):
    """A scalar whose gradient with respect to y is a given tensor, at no cost in either direction."""

    @staticmethod
    def forward(ctx, y: Tensor, dy: Tensor) -> Tensor:
        ctx.save_for_backward(dy)
        return y.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0], None


def providers(groups: int, with_compiled: bool) -> list[Provider]:
    """The columns: eager reference, the compiled reference if asked for, and the C++ operator."""

    def run(operator: Operator, **options: str) -> Callable[..., tuple[Tensor, Tensor]]:
        def both(x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
            y = operator(x, weight, bias, groups, EPS, **options)
            return _Inject.apply(y, dy), y

        return both

    found = [Provider("eager", run(group_norm_silu_reference))]
    if with_compiled:
        compiled = torch.compile(group_norm_silu_reference, fullgraph=True, dynamic=False)
        found.append(Provider("torch.compile", run(compiled)))
    return [*found, Provider("ours", run(group_norm_silu, implementation="cpp"))]


def case(shape: tuple[int, int, int, int], dtype: torch.dtype) -> Case:
    """Normal activations and gradients, the same for every run."""
    batch, channels, size, groups = shape
    generator = torch.Generator().manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator)

    def image() -> Tensor:
        pixels = normal(batch, channels, size, size).to(dtype)
        return pixels.contiguous(memory_format=torch.channels_last)

    trained = [tensor.requires_grad_() for tensor in (image(), normal(channels), normal(channels))]
    label = f"{batch}x{channels}x{size}x{size}, {groups} groups, {str(dtype).removeprefix('torch.')}"
    return Case(label, (*trained, image()), TOLERANCE[dtype])


def main() -> int:
    """Print the table; exit status 1 if some result was wrong."""
    parser = arguments("GroupNorm + SiLU: C++ operator against PyTorch.")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16", help="of x and y")
    parser.add_argument("--compile", action="store_true", help="add a column for torch.compile")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    parts = [(providers(shape[-1], options.compile), [case(shape, dtype)]) for shape in QUICKSTART + FULL_SIZE]
    return compare(parts, "ours", options)


if __name__ == "__main__":
    sys.exit(main())
