"""The operators' part of `benchmarks.sanitize`: every workload in bf16, small and ragged, judged where it is executed.

A judged run is called twice on the same inputs and gives the same bits; its largest error against the reference in fp64
is at most FACTOR times that of the reference in bf16 (of eager PyTorch, that is). Every kernel is launched with at
least two programs somewhere: one program has nobody to race with.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from aligntok.kernels._triton import record_launches
from benchmarks.aot import workloads_of
from benchmarks.workloads import Workload

FACTOR = 2.0  # accepted error of ours, in errors of eager bf16
# An error of eager below this counts as this: the rounding of one bf16 number, and fp32 sums in another order.
LEAST = {torch.bfloat16: 2.0**-9, torch.float32: 2.0**-20}

# Sizes that no block divides, several blocks long, and single elements; for every way of making an operator's inputs.
RAGGED: dict[str, tuple[dict[str, int], ...]] = {
    "adaln": ({"B": 1, "N": 1, "D": 33}, {"B": 2, "N": 131, "D": 385}, {"B": 3, "N": 37, "D": 2056}),
    "adapter_projection": ({"B": 1, "N": 1, "C": 33, "d": 5}, {"B": 5, "N": 131, "C": 385, "d": 33}),
    "flow_interpolate": ({"B": 1, "d": 3, "side": 1}, {"B": 3, "d": 33, "side": 19}),
    "flow_loss": ({"B": 1, "d": 3, "side": 2}, {"B": 3, "d": 33, "side": 19}),
    "flow_step": (
        {"B": 3, "d": 5, "side": 7, "rows": 2, "k": 3, "ahead": 1},
        {"B": 2, "d": 33, "side": 19, "rows": 2, "k": 33, "ahead": 0},
        {"B": 3, "d": 33, "side": 19, "rows": 1, "k": 33, "ahead": 1},
    ),
    "group_norm_silu": (
        {"B": 2, "C": 12, "side": 7, "groups": 3},
        {"B": 1, "C": 66, "side": 37, "groups": 2},
        {"B": 2, "C": 6, "side": 131, "groups": 1},
    ),
    "joint_attention": (
        {"B": 3, "L": 1, "N": 1, "H": 4, "D": 64, "streams": 2, "masked": 0},
        {"B": 3, "L": 17, "N": 5, "H": 1, "D": 32, "streams": 1, "masked": 1},
        {"B": 2, "L": 131, "N": 77, "H": 1, "D": 128, "streams": 2, "masked": 1},
        {"B": 2, "L": 65, "N": 131, "H": 1, "D": 72, "streams": 1, "masked": 1},
        {"B": 1, "L": 131, "N": 70, "H": 2, "D": 64, "streams": 2, "masked": 0},
    ),
    "lpips_distance": ({"B": 2, "C": 3, "side": 1}, {"B": 3, "C": 70, "side": 19}, {"B": 1, "C": 515, "side": 13}),
    "qknorm_attention": (
        {"B": 1, "N": 1, "H": 2, "D": 64},
        {"B": 2, "N": 17, "H": 1, "D": 32},
        {"B": 1, "N": 131, "H": 2, "D": 72},
        {"B": 1, "N": 255, "H": 1, "D": 128},
        {"B": 1, "N": 257, "H": 1, "D": 48},
        {"B": 1, "N": 300, "H": 2, "D": 72},
        {"B": 1, "N": 300, "H": 1, "D": 96},
    ),
    "qknorm_rope": (
        {"B": 1, "N": 1, "H": 1, "D": 64, "norm": 1},
        {"B": 3, "N": 37, "H": 3, "D": 72, "norm": 1},
        {"B": 1, "N": 131, "H": 2, "D": 48, "norm": 0},
    ),
    "swiglu": ({"M": 1, "H": 1}, {"M": 5, "H": 2731}, {"M": 37, "H": 77}),
}


@dataclass
class Judged:
    """What came of one operator."""

    op: str
    launches: int = 0
    unchecked: int = 0  # launches with more accesses than are kept to look for races
    ratio: float = 0.0  # the largest error of ours, in errors of eager bf16
    where: str = ""
    faults: list[str] = field(default_factory=list)
    programs: dict[str, int] = field(default_factory=dict)  # kernel -> programs of its largest launch


def cases(op: str, ragged_only: bool) -> Iterator[tuple[Workload, dict[str, int]]]:
    """(workload, sizes): ragged ones for every way of making the inputs, and the reduced shape of every workload."""
    made: list[Callable] = []
    for workload in workloads_of(op):
        if workload.make not in made:
            made.append(workload.make)
            yield from ((workload, shape) for shape in RAGGED[op])
        if not ragged_only:
            yield workload, workload.reduced_shape


def _fresh(inputs: Sequence[Any], wide: bool) -> list[Any]:
    """Leaves of their own, in fp64 if wide; a dtype among the inputs is that of the result."""

    def one(x: Any) -> Any:
        if isinstance(x, torch.dtype):
            return torch.float64 if wide else x
        if not isinstance(x, Tensor):
            return x
        if wide and x.is_floating_point():
            return x.detach().double().requires_grad_(x.requires_grad)
        # What gets a gradient is only read, and keeps its strides; the rest an operator may write to.
        return x.detach().requires_grad_() if x.requires_grad else x.clone()

    return [one(x) for x in inputs]


def results(run: Callable, inputs: Sequence[Any], wide: bool = False) -> dict[str, Tensor]:
    """Outputs, and the gradients for cotangents that bf16 can hold."""
    leaves = _fresh(inputs, wide)
    outputs = run(*leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    found = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    wanted = {i: x for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.requires_grad}
    differentiable = [y for y in outputs if y.requires_grad]
    if wanted and differentiable:
        generator = torch.Generator().manual_seed(1)
        cotangents = [torch.randn(y.shape, generator=generator).bfloat16().to(y.dtype) for y in differentiable]
        gradients = torch.autograd.grad(differentiable, list(wanted.values()), cotangents)
        found |= {f"gradient {i}": g for i, g in zip(wanted, gradients, strict=True)}
    return found


def _error(found: Tensor, exact: Tensor) -> float:
    difference = (found.double() - exact.double()).abs().max()
    return (difference / exact.double().abs().max().clamp_min(1e-30)).item()


def ratios(ours: dict[str, Tensor], eager: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Errors of ours in errors of eager, or in LEAST where eager happens to err by less."""
    if ours.keys() != exact.keys():
        raise AssertionError(f"there are {', '.join(ours)}, expected {', '.join(exact)}")
    found = {}
    for name, one in ours.items():
        found[name] = _error(one, exact[name]) / max(_error(eager[name], exact[name]), LEAST[one.dtype])
    return found


def judge_case(judged: Judged, workload: Workload, shape: dict[str, int]) -> None:
    """Run a workload twice, compare, and write what was found into `judged`."""
    label = workload.sized(shape)
    inputs = workload.make("cpu", workload.dtype, **shape)

    def ours(*leaves: Any) -> Any:
        return workload.ours(*leaves, implementation="triton")

    try:
        found, again = results(ours, inputs), results(ours, inputs)
    except Exception as error:  # a fault of the kernel: the next shape may run all the same
        judged.faults.append(f"{label}: {type(error).__name__}: {' '.join(str(error).split())}")
        return
    judged.faults += [f"{label}: {n} differs in a second run" for n in found if not torch.equal(found[n], again[n])]
    exact = results(workload.reference, inputs, wide=True)
    for name, ratio in ratios(found, results(workload.reference, inputs), exact).items():
        if not ratio <= FACTOR:  # NaN: memory that nobody wrote
            judged.faults.append(f"{label}: {name} errs {ratio:.2f} times as much as eager bf16, {FACTOR} is accepted")
        if not ratio <= judged.ratio:
            judged.ratio, judged.where = ratio, f"{name}, {label}"


@contextmanager
def watched(programs: dict[str, int]) -> Iterator[None]:
    """Inside, `programs` gets the largest number of programs that each kernel is launched with."""
    from triton.runtime.jit import JITFunction

    run = JITFunction.run

    def counted(self: Any, *arguments: Any, grid: Any, **options: Any) -> Any:
        size = 1
        for extent in grid:
            size *= extent
        programs[self.__name__] = max(size, programs.get(self.__name__, 0))
        return run(self, *arguments, grid=grid, **options)

    JITFunction.run = counted
    try:
        yield
    finally:
        JITFunction.run = run


def judge(op: str, session: Any, architectures: Sequence[int], ragged_only: bool) -> Judged:
    """Every case of an operator with the block sizes of every architecture, in an open session of ttsem."""
    judged, before, unchecked = Judged(op), session.launches, session.races_unchecked
    with watched(judged.programs):
        for architecture in architectures:
            torch.manual_seed(0)
            with record_launches(architecture):  # no launch on real tensors is recorded, but configured for it
                for workload, shape in cases(op, ragged_only):
                    judge_case(judged, workload, shape)
    judged.launches = session.launches - before
    judged.unchecked = session.races_unchecked - unchecked
    judged.faults += [
        f"{kernel} was never launched with two programs" for kernel, n in judged.programs.items() if n < 2
    ]
    return judged
