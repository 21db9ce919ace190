"""The processes of a run, and which rows of a batch belong to which of them.

A batch is one thing whatever the number of processes: its rows are numbered 0 .. batch_size - 1 and process r of n
takes the r-th of n equal runs of them. What is drawn at random for a row depends on its number only, so that one
process and several draw the same.
"""

from __future__ import annotations

from dataclasses import dataclass

from aligntok.errors import UserError


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
        if batch_size % self.size:
            raise UserError(
                f"training.batch_size is {batch_size}, expected a multiple of the {self.size} processes: "
                f"use {max(1, batch_size // self.size) * self.size} or {(batch_size // self.size + 1) * self.size}"
            )
        own = batch_size // self.size
        return range(self.rank * own, (self.rank + 1) * own)


def current() -> World:
    """The world that torch.distributed was started with; a single process where it was not."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        return World(distributed.get_rank(), distributed.get_world_size())
    return World()
