"""Loss spikes, by a running median.

spread = max(1.4826 MAD, 0.05 |median|);  a loss is a spike where loss - median > factor * spread

over the last `window` losses. Median and MAD (median absolute deviation) are not moved by the spikes themselves.
"""

from __future__ import annotations

from collections import deque
from statistics import median
from typing import Any

from aligntok.config import SpikeConfig

GAUSSIAN = 1.4826  # MAD of a normal distribution times this is its standard deviation
FLOOR = 0.05  # share of the median: a loss that hardly moves must not make every change a spike


class Spike(Exception):
    """Training is to go back to its last checkpoint, because of a spike before step `step` was taken."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


class SpikeDetector:
    """Judges one loss per step."""

    def __init__(self, config: SpikeConfig) -> None:
        self.config = config
        self._window: deque[float] = deque(maxlen=config.window)
        self._parts: list[str] = []
        self._high = False

    def judge(self, loss: float, parts: list[str]) -> str | None:
        """What is unusual about a finite loss, or None; a lasting one is reported once.

        Args:
            parts: names of what the loss is made of; where they change (the adversarial loss sets in), the
                statistics begin anew.
        """
        if parts != self._parts:
            self._parts, self._high = list(parts), False
            self._window.clear()
        before, self._high = self._high, False
        message = None
        if len(self._window) == self.config.window:
            middle = median(self._window)
            spread = max(GAUSSIAN * median(abs(x - middle) for x in self._window), FLOOR * abs(middle))
            self._high = loss - middle > self.config.factor * spread
            if self._high and not before:
                message = f"the loss {loss:.4g} is a spike: median {middle:.4g}, spread {spread:.2g}"
        self._window.append(loss)
        return message

    def state(self) -> dict[str, Any]:
        return {"window": list(self._window), "parts": self._parts, "high": self._high}

    def load_state(self, state: dict[str, Any]) -> None:
        self._window = deque(state["window"], maxlen=self.config.window)
        self._parts, self._high = state["parts"], state["high"]
