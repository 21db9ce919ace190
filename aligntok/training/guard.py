"""Guards of a run: non-finite values, and signals.

A step whose loss or gradient is not finite is skipped and counted; the message names the first layer concerned. After
too many in a row the run stops, with its last checkpoint intact.
"""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

import torch
from torch import Tensor

from aligntok.errors import UserError
from aligntok.training.objective import Objective, Phase

ADVICE = "try a lower learning rate, gradient clipping, or model.qk_norm=true for a generator"


class NonFiniteGuard:
    """Decides for each phase whether its step may be taken.

    Args:
        limit: skipped steps in a row after which the run stops.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.skipped = 0
        self.in_a_row = 0

    def passes(self, objective: Objective, phase: Phase, loss: Tensor, gradient_norm: Tensor) -> str | None:
        """None when the step may be taken, else what is wrong with it.

        Raises:
            UserError: the limit is reached.
        """
        if bool(torch.isfinite(loss) & torch.isfinite(gradient_norm)):
            self.in_a_row = 0
            return None
        self.skipped += 1
        self.in_a_row += 1
        what = "loss" if not torch.isfinite(loss) else "gradient"
        message = (
            f"non-finite {what} in phase {phase.name}, first at {_first_bad_layer(objective, phase)}; step skipped"
        )
        if self.in_a_row >= self.limit:
            raise UserError(f"{message}; {self.in_a_row} in a row, so training stops. {ADVICE}")
        return message


def _first_bad_layer(objective: Objective, phase: Phase) -> str:
    wanted = {id(p) for p in phase.parameters}
    for module_name, module in objective.modules().items():
        for name, parameter in module.named_parameters():
            if id(parameter) not in wanted:
                continue
            if not torch.isfinite(parameter).all():
                return f"{module_name}.{name} (weight)"
            if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
                return f"{module_name}.{name} (gradient)"
    return "the loss itself (all weights and gradients are finite)"


class Interrupted(Exception):
    """A signal asked the run to stop; its checkpoint is written. `exit_code` is 128 + the signal's number."""

    def __init__(self, signal_number: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name} after step {step}; the same command resumes")
        self.exit_code = 128 + signal_number


class StopSignals:
    """Context in which SIGINT and SIGTERM are noted instead of obeyed; a second one acts at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._previous[number] = signal.signal(number, self._note)
            except ValueError:  # not in the main thread: signals are the caller's business
                return self
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        for number_again, handler in self._previous.items():
            signal.signal(number_again, handler)
