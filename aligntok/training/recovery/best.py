"""Which checkpoint is the best: the one after which a logged value had its lowest mean since the checkpoint before."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from aligntok.errors import UserError
from aligntok.training.objective import Values


class BestValue:
    """Mean of one logged value between two regular checkpoints, and the lowest of them so far.

    Args:
        name: key of the value, as metrics.jsonl has it.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.lowest: float | None = None
        self.step: int | None = None  # of the checkpoint with the lowest mean
        self._sum: Tensor | float = 0.0
        self._count = 0
        self._others: set[str] = set()

    def observe(self, values: Values) -> None:
        """Take in a step's values; nothing is read back from a GPU."""
        if self.name not in values:
            self._others |= values.keys()
            return
        self._sum = self._sum + values[self.name].detach().to(torch.float64)
        self._count += 1

    def close(self, step: int) -> bool:
        """End the mean at a regular checkpoint; whether it is the lowest so far.

        Raises:
            UserError: the value was never among the logged ones.
        """
        if not self._count:
            if self._others:
                raise UserError(
                    f"training.keep_best is {self.name!r}, but no step has logged it; "
                    f"there are {', '.join(sorted(self._others))}"
                )
            return False  # every step since the last checkpoint was skipped
        mean = float(self._sum) / self._count
        self._sum, self._count = 0.0, 0
        if self.lowest is not None and not mean < self.lowest:
            return False
        self.lowest, self.step = mean, step
        return True

    def state(self) -> dict[str, Any]:
        """Numbers for the checkpoint: a mean that an interruption cuts in two goes on where it was."""
        return {"lowest": self.lowest, "step": self.step, "sum": float(self._sum), "count": self._count}

    def load_state(self, state: dict[str, Any]) -> None:
        self.lowest, self.step = state["lowest"], state["step"]
        self._sum, self._count = state["sum"], state["count"]
