"""Sums and means over the processes of a run; in a single process they hand back what they were given.

Every process has to make the same calls in the same order. Tensors on a GPU travel by NCCL, those on the CPU by gloo;
the latter do not wait for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist
from torch.autograd.function import Function, once_differentiable

from aligntok.errors import UserError
from aligntok.runtime.world import current

T = TypeVar("T")


def total(value: Tensor) -> Tensor:
    """Sum over the processes, as a new tensor without a gradient."""
    value = value.detach()
    if current().size > 1:
        value = value.clone()
        dist.all_reduce(value)
    return value


def mean(value: Tensor) -> Tensor:
    """Mean over the processes, without a gradient."""
    return total(value) / current().size if current().size > 1 else value.detach()


class _DifferentiableTotal(Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return total(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return total(gradient)


def differentiable_mean(value: Tensor) -> Tensor:
    """Mean over the processes; its gradient is that of the sum of every process's loss."""
    return _DifferentiableTotal.apply(value) / current().size


def largest(number: int) -> int:
    """The largest of the processes' numbers; the device is not waited for."""
    if current().size == 1:
        return number
    box = torch.tensor(number)
    dist.all_reduce(box, dist.ReduceOp.MAX)
    return int(box)


def on_main(work: Callable[[], T]) -> T:
    """Run `work` in the first process alone; all wait, get its result, and share its failure.

    Raises:
        UserError: in the others, with the message of what was raised in the first.
    """
    world = current()
    if world.size == 1:
        return work()
    result: T | None = None
    failure: BaseException | None = None
    if world.main:
        try:
            result = work()
        except BaseException as error:
            failure = error
    box: list[Any] = [result, None if failure is None else str(failure) or type(failure).__name__]
    dist.broadcast_object_list(box, src=0)
    if failure is not None:
        raise failure
    if box[1] is not None:
        raise UserError(f"the first process failed: {box[1]}")
    return box[0]


def gathered(own: T) -> list[T]:
    """What every process hands in, in the order of their ranks."""
    world = current()
    if world.size == 1:
        return [own]
    found: list[Any] = [None] * world.size
    dist.all_gather_object(found, own)
    return found


def in_turns(own: Iterator[Tensor], shapes: Iterable[tuple[int, ...]], dtype: torch.dtype) -> Iterator[Tensor]:
    """Tensors that the processes make in turns, in the first process; nothing in the others.

    Tensor number i has the i-th of `shapes` and is the next of `own` in process i % size, on the CPU. A process makes
    one ahead of what the first has asked for. No process leaves before the first has everything.
    """
    world, sent = current(), None
    for number, shape in enumerate(shapes):
        maker = number % world.size
        if world.main:
            if maker == world.rank:
                tensor = next(own)
            else:
                tensor = torch.empty(shape, dtype=dtype)
                dist.recv(tensor, src=maker)
            yield tensor
        elif maker == world.rank:
            tensor = next(own).contiguous()
            if sent is not None:
                sent.wait()
            sent = dist.isend(tensor, dst=0)
    if sent is not None:
        sent.wait()
    if world.size > 1:
        dist.barrier()


@contextmanager
def main_first() -> Iterator[None]:
    """The first process passes through the block before the others, which then find its downloads in the cache."""
    world = current()
    if world.size > 1 and not world.main:
        dist.barrier()
    try:
        yield
    finally:
        if world.size > 1 and world.main:
            dist.barrier()
