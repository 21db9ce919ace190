"""A recorded step as a compiler would run it, by a rule that stands for what Inductor does.

Between two barriers, pointwise operators and reductions over the last dimension that hand tensors to each other become
one kernel. Barriers are products, convolutions, attention, our operators, and whatever else runs by itself. A kernel

    reads    what comes from outside of it, once
    writes   what is used outside of it

Sums over other dimensions stay kernels of their own; those of one large tensor between two barriers are one. What only
such sums ask for, only fused kernels of the backward pass, or only fused kernels where it is made from a single tensor
(a cast), is not written: they compute it again from what its own kernel has read, unless writing and reading it moves
less. Views cost nothing, and the updates of weights stay as they are. Not modelled: fusion into products, memory that a
cache serves. The whole forward and backward pass is fused, where `training.compile` compiles transformer blocks.

The rule gives the bytes that Inductor counts for the references of adaLN, SwiGLU and GroupNorm, within a tenth (a test
has them). Of RoPE and the LPIPS distance Inductor's code for CPUs moves more, or less, by a factor of three.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace

from aligntok.training.monitoring.ledger.call import Call, Touch
from aligntok.training.monitoring.ledger.kinds import FUSIBLE, Kind
from aligntok.training.monitoring.ledger.record import BACKWARD, FORWARD, Step

Kernel = list[int]  # places in the step of operators that become one kernel


def fuse(step: Step) -> Step:
    """The step with its chains of operators fused by the rule in the module's docstring."""
    calls = tuple(call for call in step.calls if call.kind is not Kind.VIEW)
    return replace(step, calls=tuple(_Fusion(calls, step.kept).calls()))


class _Fusion:
    """The kernels of a step, and what each of them reads and writes.

    Args:
        calls: of the step, without views.
        kept: storages that outlive it.
    """

    def __init__(self, calls: tuple[Call, ...], kept: frozenset[int]) -> None:
        self._calls, self._kept = calls, kept
        self._kernels = chains(calls)
        self._owner = {index: kernel for kernel in self._kernels for index in kernel}
        self._readers: dict[int, list[int]] = defaultdict(list)  # of storages
        self._given: set[int] = set()  # storages that were there before
        made: set[int] = set()
        for index, call in enumerate(calls):
            for touch in call.reads:
                self._readers[touch.storage].append(index)
                self._given |= {touch.storage} - made
            made |= {touch.storage for touch in call.writes}
        self._origins: dict[int, list[Touch]] = {}  # of storages that are not written: what they are computed from

    def calls(self) -> Iterator[Call]:
        """The step's calls, every kernel in the place of its last operator."""
        fused = {kernel[-1]: self._fused(kernel) for kernel in self._kernels}
        sums = {members[-1]: self._summed(members) for members in self._sums()}
        for index, call in enumerate(self._calls):
            if call.kind is Kind.COLUMN:
                yield from [sums[index]] if index in sums else []
            elif index not in self._owner:
                yield call
            elif (kernel := fused.get(index)) is not None:
                yield kernel

    def _fused(self, kernel: Kernel) -> Call | None:
        """A kernel as one call; None where nobody asks for what it computes."""
        reads: list[Touch] = []
        written: dict[int, Touch] = {}
        sources: dict[int, tuple[Touch, ...]] = {}  # of storages made inside: what they are computed from
        for call in (self._calls[index] for index in kernel):
            needed: list[Touch] = []
            for touch in call.reads:
                if touch.storage in sources:
                    needed += [touch] if touch.storage in written else sources[touch.storage]
                else:
                    needed += (origin := self._origin(touch))
                    reads += origin
            for touch in call.writes:
                sources[touch.storage] = _once([*sources.get(touch.storage, ()), *needed])
                if self._must_write(touch, kernel, sources[touch.storage]):
                    written[touch.storage] = touch
        self._origins |= {storage: list(found) for storage, found in sources.items() if storage not in written}
        return self._call(kernel, _once(reads), tuple(written.values())) if written else None

    def _sums(self) -> Iterable[Kernel]:
        """Sums over other dimensions, those together that read the same large tensor between two barriers."""
        found: dict[tuple[int, tuple[Touch, ...]], Kernel] = defaultdict(list)
        barriers = 0
        for index, call in enumerate(self._calls):
            barriers += call.kind not in (*FUSIBLE, Kind.COLUMN)
            if call.kind is Kind.COLUMN:
                reads = self._reads(call)
                largest = max((touch.bytes for touch in reads), default=0)
                found[barriers, tuple(touch for touch in reads if touch.bytes == largest)[:1]].append(index)
        return found.values()

    def _summed(self, members: Kernel) -> Call:
        calls = [self._calls[index] for index in members]
        reads = _once(touch for call in calls for touch in self._reads(call))
        return replace(calls[0], reads=reads, writes=_once(touch for call in calls for touch in call.writes))

    def _reads(self, call: Call) -> tuple[Touch, ...]:
        """What a sum reads, with what is not written replaced by what it is computed from."""
        return _once(origin for touch in call.reads for origin in self._origin(touch))

    def _origin(self, touch: Touch) -> list[Touch]:
        return self._origins.get(touch.storage, [touch])

    def _must_write(self, touch: Touch, kernel: Kernel, sources: tuple[Touch, ...]) -> bool:
        """Whether a tensor has to pass through memory, or does so at less than computing it again."""
        if touch.storage in self._kept or touch.storage in self._given:
            return True
        outside = [i for i in self._readers[touch.storage] if self._owner.get(i) is not kernel and i > kernel[0]]
        if not outside:
            return False
        forward = self._calls[kernel[0]].phase == FORWARD
        for call in (self._calls[i] for i in outside):
            fused = call.kind in FUSIBLE and (len(sources) == 1 or (forward and call.phase == BACKWARD))
            if not (fused or call.kind is Kind.COLUMN):
                return True
        return 2 * touch.bytes < sum(source.bytes for source in sources)

    def _call(self, kernel: Kernel, reads: tuple[Touch, ...], writes: tuple[Touch, ...]) -> Call:
        members = [self._calls[index] for index in kernel]
        largest = max(members, key=lambda call: call.bytes)
        if len(members) == 1:
            return replace(largest, reads=reads, writes=writes)
        names = Counter(call.op for call in members).most_common(3)
        op = f"{len(members)} fused: {', '.join(name for name, _ in names)}"
        return replace(largest, op=op, kind=Kind.POINTWISE, reads=reads, writes=writes, launches=1)


def chains(calls: Iterable[Call]) -> list[Kernel]:
    """The operators that become one kernel each, in order of their first.

    What is computed from a sum over other dimensions does not join the kernels that may have fed the sum.
    """
    found: dict[int, Kernel] = {}  # by the number of the first operator
    makers: dict[int, int] = {}  # storage made since the last barrier -> its kernel
    sums: set[int] = set()  # storages that sums over other dimensions have made since
    late: set[int] = set()  # kernels that read them, or each other
    phase = None
    for index, call in enumerate(calls):
        changed, phase = call.phase != phase, call.phase
        fusible = call.kind in FUSIBLE and phase in (FORWARD, BACKWARD)
        if changed or not (fusible or call.kind is Kind.COLUMN):
            makers, sums, late = {}, set(), set()
        if call.kind is Kind.COLUMN:
            sums |= {touch.storage for touch in call.writes}
        if not fusible:
            continue
        joined = {makers[touch.storage] for touch in call.reads if touch.storage in makers}
        after_sum = bool(joined & late) or any(touch.storage in sums for touch in call.reads)
        joined = joined & late if after_sum else joined
        first = min(joined, default=index)
        late |= {first} if after_sum else set()
        found[first] = sorted({*(i for kernel in joined for i in found.pop(kernel)), index})
        makers = {storage: first if kernel in joined else kernel for storage, kernel in makers.items()}
        makers |= {touch.storage: first for touch in call.writes}
    return [found[first] for first in sorted(found)]


def _once(touches: Iterable[Touch]) -> tuple[Touch, ...]:
    """Every part of a storage once, at its largest."""
    found: dict[tuple[int, int], Touch] = {}
    for touch in touches:
        key = touch.storage, touch.offset
        if key not in found or found[key].bytes < touch.bytes:
            found[key] = touch
    return tuple(found.values())
