"""A bounded, uniform sample of rows that arrive in batches (reservoir sampling, Vitter 1985, algorithm R).

Row number i (from 0) is kept for certain while there is room, and with probability capacity / (i + 1) afterwards, in
the place of a row drawn uniformly. Up to `capacity` rows the sample is the whole set in its order.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Reservoir:
    """At most `capacity` rows [dimension], float32 on the CPU; the seed and their number decide which."""

    def __init__(self, capacity: int, dimension: int, seed: int = 0) -> None:
        self.capacity, self.count = capacity, 0
        self._rows = torch.empty(0, dimension)
        self._random = torch.Generator().manual_seed(seed)

    def add(self, rows: Tensor) -> None:
        """Take in a batch [n, dimension]."""
        rows = rows.detach().float().cpu()
        room = min(len(rows), max(self.capacity - self.count, 0))
        if room:
            self._make_place(self.count + room)
            self._rows[self.count : self.count + room] = rows[:room]
        late = rows[room:]
        numbers = self.count + room + torch.arange(len(late), dtype=torch.float64)
        places = (torch.rand(len(late), generator=self._random, dtype=torch.float64) * (numbers + 1)).long()
        for row in torch.nonzero(places < self.capacity).flatten().tolist():  # in order: the later row wins
            self._rows[places[row]] = late[row]
        self.count += len(rows)

    @property
    def rows(self) -> Tensor:
        """[min(count, capacity), dimension]."""
        return self._rows[: min(self.count, self.capacity)]

    def _make_place(self, wanted: int) -> None:
        """Memory is doubled as rows come: small sets do not pay for the capacity."""
        if wanted > len(self._rows):
            larger = torch.empty(min(self.capacity, max(wanted, 2 * len(self._rows))), self._rows.shape[1])
            larger[: len(self._rows)] = self._rows
            self._rows = larger
