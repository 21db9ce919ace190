"""A workload: one operator at one production shape, described once for the benchmarks and for the hardware report.

`bench_<op>.py` lists its workloads in WORKLOADS. The benchmark runs them on the machine at hand; the hardware report
compiles the kernels that they launch for GPUs that are not there, and counts their traffic in Triton's interpreter.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Outputs = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Workload:
    """One operator at one shape.

    Attributes:
        op: name of the operator, which is that of its file in kernels/.
        shape: sizes by name, in the order of the label, such as {"M": 65536, "C": 1024, "d": 32}.
        reduced: sizes that replace some of `shape` for Triton's interpreter and for a CPU.
        make: make(device, dtype, **shape) -> inputs; those that a training step differentiates require a gradient.
            Works on "meta" too, and fills real tensors with numbers of a realistic size.
        ours: ours(*inputs, implementation=...) -> outputs, through the public function.
        reference: reference(*inputs) -> outputs in plain PyTorch: the baseline.
        minimum: minimum(itemsize, **shape) -> bytes that any implementation's (forward, backward) pass must move: every
            input read once and every output written once. None in place of a number: there is no such pass.
        planned: as minimum, with what our kernels write and read again beside it; None: nothing.
        reason: why they do.
        flops: flops(**shape) -> FLOPs of the tensor cores in the (forward, backward) pass; 0 where there is no dot.
        dtype: of the large tensors.
        tolerance: accepted relative difference between the two in `dtype`.
        note: what a reader of the report should know about this shape.
        cpu: sizes that replace some of `shape` where the benchmark runs on a CPU; none: `reduced` there too.
        providers: further columns of the benchmark: name -> (function like `reference`, or the reason against it).
    """

    op: str
    shape: dict[str, int]
    reduced: dict[str, int]
    make: Callable[..., tuple[Any, ...]]
    ours: Callable[..., Outputs]
    reference: Callable[..., Outputs]
    minimum: Callable[..., tuple[float, float | None]]
    flops: Callable[..., tuple[float, float]] = field(default=lambda **shape: (0.0, 0.0))
    planned: Callable[..., tuple[float, float | None]] | None = None
    reason: str = ""
    dtype: torch.dtype = torch.bfloat16
    tolerance: float = 3e-2
    note: str = ""
    cpu: dict[str, int] = field(default_factory=dict)
    providers: dict[str, "Callable[..., Outputs] | str"] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Such as "M=65536 C=1024 d=32 bfloat16"."""
        return self.sized(self.shape)

    def sized(self, shape: dict[str, int]) -> str:
        """The label with other sizes."""
        sizes = " ".join(f"{name}={size}" for name, size in shape.items())
        return f"{sizes} {str(self.dtype).removeprefix('torch.')}"

    @property
    def reduced_shape(self) -> dict[str, int]:
        """`shape` with the reduced sizes put in."""
        return self.shape | self.reduced

    @property
    def cpu_shape(self) -> dict[str, int]:
        """`shape` with the sizes for a CPU put in."""
        return self.shape | (self.cpu or self.reduced)

    def plan(self, itemsize: int, **shape: int) -> tuple[float, float | None]:
        """Bytes that our kernels are meant to move: the minimum, or `planned`."""
        return (self.planned or self.minimum)(itemsize, **shape)

    def differentiable(self) -> bool:
        """Whether the operator has a backward pass at all."""
        return self.minimum(2, **self.shape)[1] is not None
