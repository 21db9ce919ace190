"""A step's calls added up: equal ones to a line, lines to a group."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

from aligntok.training.monitoring.ledger.call import Call
from aligntok.training.monitoring.ledger.kinds import GROUPS
from aligntok.training.monitoring.ledger.variants import Variant


@dataclass
class Line:
    """Calls that are added up; seconds are predicted."""

    op: str
    shapes: str
    phase: str
    group: str
    calls: int = 0
    launches: int = 0
    flops: int = 0
    bytes: int = 0
    device: float = 0.0
    host: float = 0.0
    bounds: dict[str, float] = field(default_factory=dict)  # bound -> seconds on the device

    @property
    def bound(self) -> str:
        """What most of its time is bound by; "-" where nothing runs on the device."""
        return max(self.bounds, key=lambda name: self.bounds[name], default="-")


def lines(variant: Variant) -> list[Line]:
    """One line for equal calls, those first that take the device longest."""
    found = _added_up(variant, lambda call: (call.op, call.shapes, call.phase, call.group))
    return sorted(found, key=lambda line: (-line.device, line.op, line.shapes, line.phase))


def groups(variant: Variant) -> dict[str, Line]:
    """One line for each group that occurs, in the order of kinds.GROUPS."""
    found = {line.group: line for line in _added_up(variant, lambda call: call.group)}
    return {name: found[name] for name in GROUPS if name in found}


def bounds(variant: Variant) -> dict[str, float]:
    """Seconds on the device by what bounds them."""
    total = _added_up(variant, lambda call: None)[0].bounds
    return dict(sorted(total.items(), key=lambda item: -item[1]))


def _added_up(variant: Variant, key: Callable[[Call], Hashable]) -> list[Line]:
    found: dict[Hashable, Line] = {}
    for call in variant.calls:
        price = variant.machine.price(call)
        line = found.setdefault(key(call), Line(call.op, call.shapes, call.phase, call.group))
        line.calls += 1
        line.launches += call.launches
        line.flops += call.flops
        line.bytes += call.bytes
        line.device += price.device
        line.host += price.host
        if call.launches:
            line.bounds[price.bound] = line.bounds.get(price.bound, 0.0) + price.device
    return list(found.values())
