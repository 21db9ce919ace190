"""Count the bytes that kernels and eager PyTorch move.

Kernels: Triton's interpreter runs a workload at its reduced shape (in fp16 for bf16, which it lacks) while every load
and store is written down: `total` counts each access, `unique` each address once per launch, which is what has to come
from device memory when the cache holds the rest. Eager PyTorch: every operator that is no view is charged its inputs
and outputs, on meta tensors at the production shape, attention as one operator like PyTorch's flash kernels.
torch.compile: what Inductor's scheduler for the CPU says of the code that it generates at the reduced shape.

    TRITON_INTERPRET=1 python -m benchmarks.traffic swiglu [--no-compiled]     prints JSON for the hardware report
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from triton.runtime import interpreter

from aligntok.runtime.autocast import MetaAutocast
from benchmarks.aot import workloads_of
from benchmarks.workloads import Workload


@dataclass
class LaunchTraffic:
    """Bytes of one kernel launch; addresses are kept until `unique` is asked for."""

    kernel: str
    total: int = 0
    flops: int = 0  # of tl.dot, padding included
    _addresses: dict[str, dict[int, list[numpy.ndarray]]] = field(default_factory=lambda: {"load": {}, "store": {}})

    def add(self, kind: str, pointers: Any, mask: Any) -> None:
        """Write down one load or store."""
        itemsize = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        touched = pointers.data[mask.data.astype(bool)].ravel()
        self.total += touched.size * itemsize
        self._addresses[kind].setdefault(itemsize, []).append(numpy.unique(touched))

    @property
    def unique(self) -> int:
        """Bytes with every address counted once as loaded and once as stored."""
        return sum(
            numpy.unique(numpy.concatenate(parts)).size * itemsize
            for by_size in self._addresses.values()
            for itemsize, parts in by_size.items()
        )


@contextmanager
def recorded_traffic() -> Iterator[list[LaunchTraffic]]:
    """Collect the traffic of every kernel that the interpreter runs inside the block."""
    launches: list[LaunchTraffic] = []
    builder, run = interpreter.interpreter_builder, interpreter.GridExecutor.__call__
    load, store, dot = builder.create_masked_load, builder.create_masked_store, builder.create_dot

    def recording_run(self: Any, *arguments: Any, **options: Any) -> None:
        launches.append(LaunchTraffic(self.fn.__name__))
        with _disable_current_modes():  # the interpreter's own copies are nobody's traffic
            run(self, *arguments, **options)

    def recording_load(pointers: Any, mask: Any, *rest: Any) -> Any:
        launches[-1].add("load", pointers, mask)
        return load(pointers, mask, *rest)

    def recording_store(pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        launches[-1].add("store", pointers, mask)
        return store(pointers, value, mask, *rest)

    def recording_dot(a: Any, b: Any, *rest: Any) -> Any:
        launches[-1].flops += 2 * a.data.size * b.data.shape[-1]
        return dot(a, b, *rest)

    builder.create_masked_load, builder.create_masked_store = recording_load, recording_store
    builder.create_dot = recording_dot
    interpreter.GridExecutor.__call__ = recording_run
    try:
        yield launches
    finally:
        del builder.create_masked_load, builder.create_masked_store, builder.create_dot
        interpreter.GridExecutor.__call__ = run


_ALLOCATIONS = (
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "detach",
    "lift_fresh",
    "fill_",
)


class EagerTraffic(TorchDispatchMode):
    """Charges every operator that is no view its tensor inputs and outputs.

    Our own operators are looked into instead: their kernels are counted by the interpreter, and what they do beside
    them in PyTorch (second stages of sums, copies) is charged here.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        own = OPDEFS.get(func.name().removesuffix(".default"))
        if own is not None:
            with self:
                return own._init_fn(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        if not func.is_view and func.overloadpacket.__name__ not in _ALLOCATIONS:
            tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
            self.bytes += sum(_extent(t) for t in tensors)
        return result


def _extent(tensor: Tensor) -> int:
    """Bytes of the elements, those of an expanded dimension counted once."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride else min(size, 1)
    return elements * tensor.element_size()


def _backward(workload: Workload, inputs: tuple, outputs: Any) -> None:
    outputs = [y for y in ([outputs] if isinstance(outputs, Tensor) else outputs) if y.requires_grad]
    wanted = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    torch.autograd.grad(outputs, wanted, [torch.empty_like(y).fill_(1) for y in outputs])


def eager_costs(workload: Workload) -> dict[str, tuple[int, int]]:
    """Bytes and FLOPs of the reference's (forward, backward) pass at the production shape."""

    def passes(mode: Callable[[], Any], amount: Callable[[Any], int]) -> tuple[int, int]:
        inputs = workload.make("meta", workload.dtype, **workload.shape)
        with MetaAutocast(None), mode() as forward:  # attention as the one operator that it is on a GPU
            outputs = workload.reference(*inputs)
        with mode() as backward:
            if workload.differentiable():
                _backward(workload, inputs, outputs)
        return amount(forward), amount(backward)

    return {  # one after the other: the counter of FLOPs takes operators apart
        "bytes": passes(EagerTraffic, lambda mode: mode.bytes),
        "flops": passes(lambda: FlopCounterMode(display=False), lambda mode: mode.get_total_flops()),
    }


def _interpreted_dtype(workload: Workload) -> torch.dtype:
    return torch.float16 if workload.dtype == torch.bfloat16 else workload.dtype


def kernel_traffic(workload: Workload) -> dict[str, list[dict[str, Any]]]:
    """{"forward": [...], "backward": [...]}: kernel, total and unique bytes and FLOPs per launch at the reduced shape.

    What an operator does in PyTorch beside its kernels is a row of its own.
    """
    torch.manual_seed(0)
    inputs = workload.make("cpu", _interpreted_dtype(workload), **workload.reduced_shape)
    found = {}
    with recorded_traffic() as launches:
        with EagerTraffic() as beside:
            outputs = workload.ours(*inputs, implementation="triton")
        found["forward"] = _rows(launches, beside)
        launches.clear()
        with EagerTraffic() as beside:
            if workload.differentiable():
                _backward(workload, inputs, outputs)
        found["backward"] = _rows(launches, beside)
    return found


def _rows(launches: list[LaunchTraffic], beside: EagerTraffic) -> list[dict[str, Any]]:
    rows = [{"kernel": one.kernel, "total": one.total, "unique": one.unique, "flops": one.flops} for one in launches]
    if beside.bytes:
        rows.append({"kernel": "PyTorch", "total": beside.bytes, "unique": beside.bytes, "flops": 0})
    return rows


def compiled_bytes(workload: Workload) -> tuple[int, int] | str:
    """Bytes of torch.compile's (forward, backward) code at the reduced shape, or why there is none."""
    from torch._inductor import config, metrics

    torch._logging.set_logs(inductor_metrics=True)
    torch._dynamo.reset()
    inputs = workload.make("cpu", workload.dtype, **workload.reduced_shape)
    try:
        with config.patch(force_disable_caches=True):
            metrics.reset()
            outputs = torch.compile(workload.reference, fullgraph=True, dynamic=False)(*inputs)
            forward = metrics.num_bytes_accessed
            if workload.differentiable():
                _backward(workload, inputs, outputs)
            return forward, metrics.num_bytes_accessed - forward
    except Exception as error:  # the report says which reference cannot be compiled, and goes on
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def main() -> int:
    """Print one JSON list: the counts of every workload of an operator."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        print("benchmarks.traffic counts in Triton's interpreter: set TRITON_INTERPRET=1", file=sys.stderr)
        return 2
    rows, with_compiled = [], "--no-compiled" not in sys.argv
    for workload in workloads_of(sys.argv[1]):
        kernels = kernel_traffic(workload)
        itemsize = workload.dtype.itemsize
        rows.append(
            {
                "label": workload.label,
                "kernels": kernels,
                "reduced_plan": workload.plan(itemsize, **workload.reduced_shape),
                "plan": workload.plan(itemsize, **workload.shape),
                "minimum": workload.minimum(itemsize, **workload.shape),
                "reduced_flops": workload.flops(**workload.reduced_shape),
                "flops": workload.flops(**workload.shape),
                "reason": workload.reason,
                "eager": eager_costs(workload),
                "compiled": compiled_bytes(workload) if with_compiled else "left out",
            }
        )
    print(json.dumps(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
