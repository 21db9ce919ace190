"""One operator of a recorded step."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from aligntok.training.monitoring.ledger.kinds import Kind


@dataclass(frozen=True)
class Touch:
    """A part of a storage that an operator reads or writes."""

    storage: int  # numbered in the order of allocation; -1 = nothing that another operator would ask for
    offset: int  # in elements
    bytes: int
    itemsize: int = 4


@dataclass(frozen=True)
class Call:
    """One operator of a step.

    Attributes:
        op: its name.
        shapes: of its first inputs, to print.
        phase: forward, backward or update.
        group: what it serves, one of kinds.GROUPS.
        kind: how it is priced.
        reads, writes: everything once, of our operators once for each launch.
        flops: by the formulas of PyTorch's counter.
        work: FLOPs executed for each of them: attention pads, and computes scores again.
        launches: kernels.
        dtype: of the operands of a matrix product: bf16, fp32 or fp8.
        tensors: of an operator on lists, else 0.
        mark: whether the next `sync` waits for what the device has to do up to here, and not for all of it.
        sync: whether the host waits for the device.
    """

    op: str
    shapes: str
    phase: str
    group: str
    kind: Kind
    reads: tuple[Touch, ...] = ()
    writes: tuple[Touch, ...] = ()
    flops: int = 0
    work: float = 1.0
    launches: int = 1
    dtype: str = "bf16"
    tensors: int = 0
    mark: bool = False
    sync: bool = False

    @cached_property
    def bytes(self) -> int:
        """What has to pass through the GPU's memory if each tensor passes once."""
        return sum(touch.bytes for touch in (*self.reads, *self.writes))
