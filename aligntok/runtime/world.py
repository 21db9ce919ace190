"""The processes of a run, and which rows of a batch belong to which of them.

A batch is one thing whatever the number of processes: its rows are numbered 0 .. batch_size - 1 and process r of n
takes the r-th of n equal runs of them. What is drawn at random for a row depends on its number only, so that one
process and several draw the same.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aligntok.errors import UserError, near_multiples

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class World:
    """This process's number and how many there are; `World()` is a run of a single process."""

    rank: int = 0
    size: int = 1

    @property
    def main(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.rank == 0

    def rows(self, batch_size: int) -> range:
        """Rows of a batch of `batch_size` (over all processes) that belong to this process.

        Raises:
            UserError: the batch cannot be divided evenly.
        """
        if batch_size < 1 or batch_size % self.size:
            wanted = f"a multiple of the {self.size} processes" if self.size > 1 else "at least 1 image"
            raise UserError(
                f"training.batch_size is {batch_size}, expected {wanted}: use {near_multiples(batch_size, self.size)}"
            )
        own = batch_size // self.size
        return range(self.rank * own, (self.rank + 1) * own)


@dataclass(frozen=True)
class Place:
    """Where some neighbouring rows lie in a batch of all processes.

    What is random for a row is drawn for the whole batch and looked up by this, so that a row has the same
    times, noise and dropped label however the batch is shared out.
    """

    first: int
    count: int
    batch_size: int

    @classmethod
    def from_rows(cls, rows: Tensor, batch_size: int) -> Place:
        """Of the row numbers that a batch carries, on the CPU."""
        return cls(int(rows[0]), len(rows), batch_size)

    def of(self, values: Tensor) -> Tensor:
        """Those of the values [batch_size, ...] that belong to the rows."""
        return values[self.first : self.first + self.count]

    def chosen(self, share: float) -> tuple[list[int], int]:
        """A share of the batch, at least one row, spread evenly over it.

        Returns:
            which of these rows are in it, counted from the first of these; how many rows of the batch are.
        """
        wanted = max(1, round(share * self.batch_size))
        edges = [(self.first + i) * wanted // self.batch_size for i in range(self.count + 1)]
        return [i for i in range(self.count) if edges[i] != edges[i + 1]], wanted


def refuse_several(command: str) -> None:
    """Raise UserError under torchrun with more than one process, for a command that has no use for them."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count > 1:
        raise UserError(f"{command} runs in one process, torchrun has started {count}: start it without torchrun")


_alone: ContextVar[bool] = ContextVar("aligntok_alone", default=False)


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this process counts as the only one, so that it can build and count something without the others."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def current() -> World:
    """The world that torch.distributed was started with; a single process where it was not, and inside `alone`."""
    from torch import distributed

    if _alone.get():
        return World()
    if distributed.is_available() and distributed.is_initialized():
        return World(distributed.get_rank(), distributed.get_world_size())
    return World()
