"""Guards of a run: non-finite values, loss spikes, and signals.

A step whose loss or gradient is not finite is skipped: weights, moments, averages and buffers stay as they were, and
the moving average does not count the step. The message names the first layer concerned, and a small file
OUTPUT/nonfinite/PART-STEP.json has the rest. After too many in a row the run stops, with its last checkpoint intact.
"""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor

from aligntok.config import TrainingConfig
from aligntok.data.images import ImageSet
from aligntok.data.sources import Batch, Source
from aligntok.errors import UserError
from aligntok.models.lightning_dit import Attention
from aligntok.runtime.files import write_bytes
from aligntok.runtime.world import current
from aligntok.training.objective import Objective, Phase, Values
from aligntok.training.recovery.diagnosis import Finding, RandomState, locate, to_blame, worst_gradients
from aligntok.training.recovery.spikes import Spike, SpikeDetector

MAX_DUMPS = 20  # files in OUTPUT/nonfinite
COUNTERS = {"skipped": 0, "in_a_row": 0, "offset": 0, "rewinds": 0, "rewound_to": -1}  # kept in checkpoints


class Guard:
    """Decides for each phase whether its step may be taken.

    One copy from the device to the host per phase, of two numbers: (1 if finite, loss). It is begun by `ask` and
    waited for by `passes`; what is queued between the two, the device does meanwhile. Where there are several
    processes, loss and norm have to be those of all of them, so that all decide alike.

    Args:
        part: name of the training part, for the dumps.
        config: nonfinite_limit and spike.
        objective: what is trained.
        source: where batches come from, for the names of pictures in the dumps.
        folder: OUTPUT.
    """

    def __init__(self, part: str, config: TrainingConfig, objective: Objective, source: Source, folder: Path) -> None:
        self.part, self.config, self.objective, self.source = part, config, objective, source
        self.dumps = folder / "nonfinite"
        self.spikes = None if config.spike is None else SpikeDetector(config.spike)
        self.skipped = 0  # steps
        self.in_a_row = 0
        self.offset = 0  # batches left out after spikes
        self.rewinds, self.rewound_to = 0, -1  # how often to the checkpoint of which step, last
        self._buffers = [b for part, m in objective.modules().items() if part != "ema" for b in m.buffers()]
        self._kept = [buffer.clone() for buffer in self._buffers]
        self._step, self._phases, self._refused = 0, 0, False
        self._copied: torch.cuda.Event | None = None  # reached when what was asked is on the host

    @property
    def can_rewind(self) -> bool:
        """Whether a spike sends the run back, so that a checkpoint must be there from the start."""
        return self.config.spike is not None and self.config.spike.rewind

    def begin(self, step: int) -> None:
        """A new step."""
        self._step, self._phases, self._refused = step + 1, 0, False

    @property
    def step_is_lost(self) -> bool:
        """Whether the step's first phase was skipped: nothing has changed, so nothing is to be averaged."""
        return self._refused and self._phases == 1

    def enter(self) -> bool:
        """Before a phase's forward pass: False where an earlier phase of the step was skipped, and this one with it."""
        if self._refused:
            return False
        self._phases += 1
        self._random = RandomState()
        if self._buffers:
            torch._foreach_copy_(self._kept, self._buffers)
        return True

    def ask(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Whether a phase's loss and its gradients' norm are finite, as a bool [] on their device."""
        self._loss, self._norm = loss.detach(), norm
        sound = torch.isfinite(self._loss) & torch.isfinite(norm)
        self._told = torch.stack((sound.float(), self._loss.float())).to("cpu", non_blocking=True)
        if loss.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()
        return sound

    def passes(self, phase: Phase, batch: Batch, values: Values, warn: Callable[[str], None]) -> bool:
        """Whether the phase's step is taken, by what was asked; until then its gradients must not be clipped where
        they are not finite.

        Raises:
            UserError: the limit of skipped steps is reached.
            Spike: the loss is a spike and the run is to go back.
        """
        if self._copied is not None:
            self._copied.synchronize()
        sound, loss = self._told.tolist()
        if not sound:
            self._refuse(phase, batch, values, warn)
            return False
        if self._phases == 1:
            self._judge(loss, values, warn)
        return True

    def finish(self) -> None:
        """The step is over."""
        self.in_a_row = self.in_a_row if self._refused else 0

    def state(self) -> dict[str, Any]:
        """Numbers for the checkpoint."""
        return {key: getattr(self, key) for key in COUNTERS} | {"spikes": self.spikes and self.spikes.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over the numbers of a checkpoint; {} for a run that begins."""
        for key, start in COUNTERS.items():
            setattr(self, key, state.get(key, start))
        if self.spikes is not None and state.get("spikes"):
            self.spikes.load_state(state["spikes"])

    def rewind(self, spike: Spike, start: int, state: dict[str, Any]) -> None:
        """Go on from the checkpoint of step `start` with the batches that follow those up to the spike.

        Raises:
            UserError: it has been gone back to too often.
        """
        self.load_state(state)
        self.rewinds = self.rewinds + 1 if self.rewound_to == start else 1
        self.rewound_to = start
        assert self.config.spike is not None  # which says what a spike is
        if self.rewinds > self.config.spike.max_rewinds:
            raise UserError(
                f"{spike}; training has gone back to step {start} {self.rewinds - 1} times and spikes again, so it "
                f"stops. Try a lower learning rate, or a larger training.spike.factor"
            )
        self.offset += spike.step - start

    def _judge(self, loss: float, values: Values, warn: Callable[[str], None]) -> None:
        message = self.spikes and self.spikes.judge(loss, sorted(values))
        if not message:
            return
        if self.can_rewind:
            raise Spike(f"{message}, in step {self._step}", self._step)
        warn(f"{message}, in step {self._step}")

    def _refuse(self, phase: Phase, batch: Batch, values: Values, warn: Callable[[str], None]) -> None:
        self._refused = True
        self.skipped += 1
        self.in_a_row += 1
        what = "gradient" if torch.isfinite(self._loss) else "loss"
        worst = worst_gradients(self.objective, phase)
        found, pictures = to_blame(locate(self.objective, phase, batch, self._random), batch["index"].tolist())
        if self._buffers:
            torch._foreach_copy_(self._buffers, self._kept)
        message = f"non-finite {what} in phase {phase.name} of step {self._step}, first at {found}; step skipped"
        file = self._dump(
            phase, pictures, found, what, values | {"loss": self._loss, "gradient_norm": self._norm}, worst
        )
        if self.in_a_row >= self.config.nonfinite_limit:
            raise UserError(
                f"{message}; {self.in_a_row} in a row, so training stops. The last checkpoint is intact. "
                f"Try {self._advice(phase)}{f'. Details: {file}' if file else ''}"
            )
        warn(f"{message}{f', see {file}' if file else ''}")

    def _advice(self, phase: Phase) -> str:
        rates = ", ".join(f"{group['lr']:g}" for group in phase.optimizer.param_groups)
        advice = [f"a lower learning rate (now {rates})"]
        if phase.gradient_clip is None:
            advice.append("gradient clipping (gradient_clip=1.0)")
        modules = self.objective.modules().get("model")
        if modules is not None and any(isinstance(m, Attention) and m.q_norm is None for m in modules.modules()):
            advice.append("QK-norm (generator.model.qk_norm=true), for attention logits that overflow")
        return ", ".join(advice)

    def _dump(
        self, phase: Phase, index: list[int], found: Finding, what: str, values: Values, worst: list[dict[str, Any]]
    ) -> Path | None:
        """Write what is known; None where another process does, there are enough files, or the disk refuses."""
        if not current().main or len(list(self.dumps.glob("*.json"))) >= MAX_DUMPS:
            return None
        document = {
            "part": self.part,
            "step": self._step,
            "phase": phase.name,
            "layer": found.layer,
            "what": found.what,
            "non_finite": what,
            "values": {key: _number(value) for key, value in values.items()},
            "learning_rates": [group["lr"] for group in phase.optimizer.param_groups],
            "pictures": index,
            "gradient_norms": [entry | {"norm": _number(entry["norm"])} for entry in worst],
        }
        pictures = getattr(self.source, "images", None)
        if isinstance(pictures, ImageSet):  # a source in memory knows numbers only
            document["files"] = [pictures.entries[i].name for i in index]
        file = self.dumps / f"{self.part}-{self._step:08d}.json"
        try:
            write_bytes(file, json.dumps(document, indent=1).encode())
        except UserError:  # a full disk must not stop a run that would go on
            return None
        return file


def _number(value: Tensor | float) -> float | str:
    """JSON has no word for NaN and infinity: they are written as strings."""
    value = float(value)
    return value if math.isfinite(value) else str(value)


class Interrupted(Exception):
    """A signal asked the run to stop; its checkpoint is written. `exit_code` is 128 + the signal's number."""

    def __init__(self, signal_number: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name} after step {step}; the same command resumes")
        self.exit_code = 128 + signal_number


Handler = Callable[[int, FrameType | None], Any] | int | signal.Handlers


class StopSignals:
    """Context in which SIGINT and SIGTERM are noted instead of obeyed; a second one acts at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Handler] = {}

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                # None: a handler from outside of Python, which cannot be put back
                self._previous[number] = signal.signal(number, self._note) or signal.SIG_DFL
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
