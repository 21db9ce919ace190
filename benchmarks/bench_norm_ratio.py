"""`norm_ratio`, the adaptive weight from two lists of gradients: the C++ operator against eager PyTorch, torch.compile.

    python -m benchmarks.bench_norm_ratio [--seconds S] [--threads N] [--csv FILE] [--plot FILE]

"torch._foreach_norm" is what gradient clipping uses: multi-tensor as well, but in several launches. The sizes: the
weight of the 41 M decoder's last convolution (what training passes), and two lists of 24 tensors with 8 M elements.
"""

import sys

import torch
from torch import Tensor

from aligntok.kernels.norm_ratio import norm_ratio, norm_ratio_reference
from benchmarks.harness import Case, Parts, Provider, arguments, compare
from benchmarks.machine import DEVICE

DELTA, LIMIT = 1e-4, 1e4
# label -> shapes of each list
SHAPES: dict[str, list[tuple[int, ...]]] = {
    "3x128x3x3": [(3, 128, 3, 3)],
    "24 tensors, 8 M": [(128, 128, 3, 3)] * 12 + [(256, 256, 3, 3)] * 9 + [(512, 256, 3, 3)] + [(512,)] * 2,
}
TOLERANCE = 2e-5  # eager norms are sums of 8 M squares in fp32


def _halves(tensors: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Tensor]]:
    return list(tensors[: len(tensors) // 2]), list(tensors[len(tensors) // 2 :])


def eager(*tensors: Tensor) -> Tensor:
    """The reference."""
    return norm_ratio_reference(*_halves(tensors), DELTA, LIMIT)


def foreach(*tensors: Tensor) -> Tensor:
    """Multi-tensor norms of PyTorch."""
    a, b = (torch.linalg.vector_norm(torch.stack(torch._foreach_norm(half))) for half in _halves(tensors))
    return (a / (b + DELTA)).clamp(max=LIMIT)


def ours(*tensors: Tensor) -> Tensor:
    """The C++ operator."""
    return norm_ratio(*_halves(tensors), delta=DELTA, limit=LIMIT, implementation="cpp")


def case(label: str) -> Case:
    """Gradients of a realistic size, the same for every run."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator).mul(1e-3).to(DEVICE) for shape in SHAPES[label] * 2]
    return Case(f"{label} float32", tuple(tensors), TOLERANCE)


def comparisons() -> Parts:
    """Providers and cases of the table."""
    providers = [
        Provider("eager", eager),
        Provider("torch._foreach_norm", foreach),
        Provider("torch.compile", torch.compile(eager, fullgraph=True, dynamic=False)),
        Provider("ours", ours),
    ]
    return [(providers, [case(label) for label in SHAPES])]


def main() -> int:
    """Print the table; exit status 1 if some result was wrong."""
    options = arguments(__doc__).parse_args()
    return compare(comparisons(), "ours", options)


if __name__ == "__main__":
    sys.exit(main())
