"""What a step does with its gradients: norm, guard, clip, fused Adam, moving averages.

On a GPU these are operators on lists of tensors, which PyTorch takes apart on the meta device. They are written down
from the sizes instead: bytes of fp32 weights, launches as MultiTensorApply makes them.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from aligntok.training.monitoring.ledger.call import Call, Touch
from aligntok.training.monitoring.ledger.kinds import UPDATE, Kind
from aligntok.training.objective import Phase

# Numbers to a block, blocks to a launch, tensors to a launch by how many lists there are: PyTorch's
# MultiTensorApply.cuh as built for CUDA 13
CHUNK, BLOCKS, TENSORS = 65_536, 2_240, {1: 770, 2: 448, 4: 252}
PHASE = "update"
NORM, CLIP, ADAM, AVERAGE = "gradient norm", "clip", "fused Adam", "moving average"


def of_phase(phase: Phase) -> list[Call]:
    """From the gradients of a phase to its next weights, as in training/loop.py."""
    weights = phase.parameters
    calls = [
        _on_lists(NORM, weights, lists=1, read=1, written=0),
        *_small("norm of norms", 2),
        *_small("is it finite", 8),
        Call("copied for the guard", "", PHASE, UPDATE, Kind.OTHER, mark=True),
    ]
    if phase.gradient_clip:
        calls += [*_small("clip factor", 4), _on_lists(CLIP, weights, lists=1, read=1, written=1)]
    calls += [_on_lists(ADAM, weights, lists=4, read=4, written=3), *_small("steps of fused Adam", 2)]
    return [*calls, Call("waited for by the guard", "", PHASE, UPDATE, Kind.OTHER, launches=0, sync=True)]


def of_averages(averages: AveragedModel) -> list[Call]:
    """The moving average of weights."""
    return [_on_lists(AVERAGE, averages.module.parameters(), lists=2, read=2, written=1)]


def _on_lists(op: str, tensors: Iterable[Tensor], lists: int, read: int, written: int) -> Call:
    """An operator on `lists` lists like the given one, of which some are read and some written."""
    sizes = [tensor.numel() for tensor in tensors]
    total, blocks = 4 * sum(sizes), sum(-(-size // CHUNK) for size in sizes)
    launches = max(-(-blocks // BLOCKS), -(-len(sizes) // TENSORS[lists]), 1)
    reads = tuple(Touch(-1, index, total) for index in range(read))
    writes = tuple(Touch(-1, index, total) for index in range(written))
    shapes = f"{len(sizes)} tensors, {sum(sizes) / 1e6:.1f} M"
    called = len(sizes) * lists
    return Call(op, shapes, PHASE, UPDATE, Kind.LIST, reads, writes, launches=launches, dtype="fp32", tensors=called)


def _small(op: str, count: int) -> list[Call]:
    return [Call(op, "", PHASE, UPDATE, Kind.OTHER) for _ in range(count)]
