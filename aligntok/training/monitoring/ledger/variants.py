"""Ways to run one and the same step, each with its predicted sums.

eager reference            the PyTorch references, operator by operator
compiled reference         the same, fused by the rule of `fusion`
fused eager                our operators, the rest operator by operator
fused and compiled         our operators, the rest fused
with CUDA graphs           the same, launched at once
with fp8 products          the same, linear layers in fp8 where that pays for the casts
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from aligntok.training.monitoring.ledger.assumptions import Assumptions, Gpu
from aligntok.training.monitoring.ledger.call import Call, Touch
from aligntok.training.monitoring.ledger.fusion import fuse
from aligntok.training.monitoring.ledger.kinds import Kind
from aligntok.training.monitoring.ledger.pricing import (
    COMPILED,
    EAGER,
    GRAPH,
    Machine,
    accumulation,
    in_order,
    step_seconds,
)
from aligntok.training.monitoring.ledger.record import BACKWARD, Step

REFERENCE, COMPILED_REFERENCE = "eager reference", "compiled reference"
FUSED, FUSED_COMPILED, GRAPHS, FP8 = "fused eager", "fused and compiled", "with CUDA graphs", "with fp8 products"
FP8_MULTIPLE = 16  # of the sides of an fp8 product


@dataclass(frozen=True)
class Setting:
    """What a step is run on, and how often.

    Attributes:
        gpus: processes, each with a GPU of its own.
        precision: bf16, tf32 or fp32.
        accumulate: micro-batches to a step.
        sharded: FSDP2 instead of DDP.
    """

    gpu: Gpu
    assumed: Assumptions
    gpus: int = 1
    precision: str = "bf16"
    accumulate: int = 1
    sharded: bool = False

    def machine(self, launcher: str = EAGER) -> Machine:
        return Machine(self.gpu, self.assumed, launcher, self.precision)


@dataclass(frozen=True)
class Variant:
    """One way to run a step, predicted; seconds.

    Attributes:
        calls: everything that runs, in order.
        device: sum of all operators on the GPU.
        host: sum of what launches them.
        exposed: communication that the backward pass does not hide.
        seconds: the step.
    """

    name: str
    calls: tuple[Call, ...]
    machine: Machine
    device: float
    host: float
    exposed: float
    seconds: float


def variants(reference: Step, fused: Step, setting: Setting) -> list[Variant]:
    """All ways in which a step can run on a GPU; fp8 only where the GPU has it.

    Args:
        reference: the step recorded with the PyTorch references.
        fused: the same with our operators.
    """
    compiled = fuse(fused)
    found = [
        priced(REFERENCE, reference, setting, EAGER),
        priced(COMPILED_REFERENCE, fuse(reference), setting, COMPILED),
        priced(FUSED, fused, setting, EAGER),
        priced(FUSED_COMPILED, compiled, setting, COMPILED),
        priced(GRAPHS, compiled, setting, GRAPH),
    ]
    if setting.gpu.has_fp8:
        found.append(priced(FP8, in_fp8(compiled, setting.machine(GRAPH)), setting, GRAPH))
    return found


def priced(name: str, step: Step, setting: Setting, launcher: str) -> Variant:
    """The sums of a step."""
    machine = setting.machine(launcher)
    calls = (*in_order(step.calls, setting.accumulate), *accumulation(step.trained, setting.accumulate))
    prices = [machine.price(call) for call in calls]
    backward = sum(p.device for c, p in zip(calls, prices, strict=True) if c.phase == BACKWARD) / setting.accumulate
    exposed = communication(step.trained, setting, backward)
    device, host = sum(price.device for price in prices), sum(price.host for price in prices)
    return Variant(name, calls, machine, device, host, exposed, step_seconds(machine, calls) + exposed)


def sent(trained: int, setting: Setting) -> float:
    """Bytes that each GPU sends in a step for `trained` bytes of weights: ring all-reduce, or FSDP2's three passes."""
    return (3 if setting.sharded else 2) * trained * (setting.gpus - 1) / setting.gpus


def communication(trained: int, setting: Setting, backward: float) -> float:
    """Seconds of communication that the last backward pass does not hide: what is longer, or the last bucket."""
    if setting.gpus == 1:
        return 0.0
    rate = setting.gpu.link * setting.assumed.link_share
    total = sent(trained, setting) / rate
    return max(total - backward, min(total, 2 * setting.assumed.bucket / rate))


def in_fp8(step: Step, machine: Machine) -> Step:
    """Products of linear layers in fp8, each operand cast by a pass of its own, where that is predicted to pay."""
    found: list[Call] = []
    for call in step.calls:
        some = _fp8(call)
        pays = some and sum(machine.price(c).device for c in some) < machine.price(call).device
        found += some if pays else [call]
    return replace(step, calls=tuple(found))


def _fp8(call: Call) -> list[Call]:
    """Casts of both operands, and the product; nothing where it cannot be done."""
    if call.kind is not Kind.PRODUCT or call.dtype != "bf16" or not _fp8_can(call):
        return []
    operands = sorted(call.reads, key=lambda touch: touch.bytes)[-2:]  # the bias is the smallest
    small = [Touch(-1, index, one.bytes // one.itemsize, 1) for index, one in enumerate(operands)]
    casts = [
        replace(call, op="cast to fp8", kind=Kind.POINTWISE, reads=(one,), writes=(cast,), flops=0)
        for one, cast in zip(operands, small, strict=True)
    ]
    return [*casts, replace(call, op=f"{call.op} in fp8", dtype="fp8", reads=tuple(small))]


def _fp8_can(call: Call) -> bool:
    sides = [int(n) for shape in call.shapes.split(", ") for n in shape.split(" ")[0].split("x")]
    return len(call.reads) >= 2 and all(side % FP8_MULTIPLE == 0 for side in sides)
