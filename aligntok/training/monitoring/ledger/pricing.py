"""Predicted seconds of an operator, and of a step.

    device   the largest of FLOPs / (peak x share), bytes / (bandwidth x share), launches x the least time of a kernel
    host     what Python and PyTorch need to launch it

The host runs ahead of the device. A step is therefore two queues: an operator begins on the device when the one before
it has ended there, and when the host has launched it; where the host reads a number back, it waits. Steps follow each
other, and the second of two is what a step takes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from aligntok.training.monitoring.ledger.assumptions import Assumptions, Gpu
from aligntok.training.monitoring.ledger.call import Call, Touch
from aligntok.training.monitoring.ledger.kinds import OWN, UPDATE, Kind
from aligntok.training.monitoring.ledger.update import PHASE

COMPUTE, MEMORY, LAUNCH, NOTHING = "compute", "memory", "launch", "-"
EAGER, COMPILED, GRAPH = "eager", "compiled", "graph"


@dataclass(frozen=True)
class Price:
    """Predicted seconds of one operator."""

    device: float
    bound: str  # compute, memory or launch; "-" where nothing runs
    host: float


@dataclass(frozen=True)
class Machine:
    """A GPU, what is assumed of it, and how it is used.

    Attributes:
        launcher: eager PyTorch, compiled code, or a CUDA graph.
        precision: of the run: fp32 products take TF32, unless it is fp32; convolutions take it always.
    """

    gpu: Gpu
    assumed: Assumptions
    launcher: str = EAGER
    precision: str = "bf16"

    def price(self, call: Call) -> Price:
        """Predicted seconds of one operator."""
        if not call.launches:
            return Price(0.0, NOTHING, self._host(call))
        floor = self.assumed.graph_kernel_us if self.launcher == GRAPH else self.assumed.kernel_us
        seconds = {
            COMPUTE: call.flops * call.work / self._rate(call) if call.flops else 0.0,
            MEMORY: call.bytes / (self.gpu.bandwidth * self._bandwidth_share(call)),
            LAUNCH: call.launches * floor * 1e-6,
        }
        if (measured := self._measured(call)) is not None:
            ideal = call.flops / (self.gpu.peak[call.dtype] * self.assumed.product_share)
            seconds[COMPUTE], seconds[MEMORY] = ideal / measured, seconds[MEMORY] / measured
        bound = max(seconds, key=lambda name: seconds[name])
        return Price(seconds[bound], bound, self._host(call))

    def _rate(self, call: Call) -> float:
        """FLOP/s of a matrix product, a convolution or attention."""
        assumed = self.assumed
        if call.dtype == "fp8":
            share = assumed.fp8_share
        elif call.kind is Kind.PRODUCT:
            share = assumed.product_share
        else:
            share = assumed.convolution_share if call.kind is Kind.CONVOLUTION else assumed.attention_share
        tf32 = call.dtype == "fp32" and (self.precision != "fp32" or call.kind is Kind.CONVOLUTION)
        return self.gpu.peak["tf32" if tf32 else call.dtype] * share

    def _bandwidth_share(self, call: Call) -> float:
        return self.assumed.column_share if call.kind is Kind.COLUMN else self.assumed.bandwidth_share

    def _measured(self, call: Call) -> float | None:
        """The share of its bound that one of our operators was measured at."""
        return self.assumed.operators.get(_operator(call)) if call.kind in OWN else None

    def _host(self, call: Call) -> float:
        assumed = self.assumed
        if self.launcher == GRAPH:
            return 0.0
        if call.group == UPDATE or self.launcher == EAGER:
            if call.kind in OWN:
                return (assumed.own_us + (call.launches - 1) * assumed.launch_us) * 1e-6
            one = assumed.operator_us if call.launches else assumed.view_us
            return (one + call.tensors * assumed.tensor_us) * 1e-6
        return call.launches * assumed.compiled_us * 1e-6


def _operator(call: Call) -> str:
    """The public name of one of our operators: that of its file and of its benchmark."""
    return call.op.partition("_triton")[0]


def in_order(calls: Sequence[Call], accumulate: int) -> Iterator[Call]:
    """A step's calls as often as they occur: forward and backward once for each micro-batch."""
    for updates, some in groupby(calls, key=lambda call: call.phase == PHASE):
        stretch = list(some)
        yield from stretch
        for _ in range(0 if updates else accumulate - 1):
            yield from stretch


def accumulation(trained: int, accumulate: int) -> list[Call]:
    """What adding up the gradients of further micro-batches costs: read both, write one. `trained`: bytes."""
    reads, writes = (Touch(-1, 0, trained), Touch(-1, 1, trained)), (Touch(-1, 0, trained),)
    one = Call("add to gradients", "", PHASE, UPDATE, Kind.LIST, reads, writes, dtype="fp32")
    return [one] * (accumulate - 1)


def step_seconds(machine: Machine, calls: Iterable[Call]) -> float:
    """Predicted seconds of a step of one process, without communication; see the module's docstring."""
    prices = [(machine.price(call), call) for call in calls]
    ends, host, device, marked = [], 0.0, 0.0, None
    for _ in range(2):
        host += machine.assumed.replay_us * 1e-6 if machine.launcher == GRAPH else 0.0
        for price, call in prices:
            host += price.host
            if price.bound != NOTHING:
                device = max(device, host) + price.device
            marked = device if call.mark else marked
            if call.sync:
                host, marked = max(host, device if marked is None else marked), None
        ends.append(max(device, host))
    return ends[1] - ends[0]
