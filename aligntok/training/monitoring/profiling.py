"""A trace of a few training steps: OUTPUT/profile/PART.json.gz and a table of the operators that take the time.

The first WARM_UP steps of a command are left out: they compile, allocate and count. Open the trace with Perfetto
(https://ui.perfetto.dev, in the browser) or chrome://tracing.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import torch
from torch.profiler import ProfilerActivity, profile, schedule

WARM_UP = 5  # steps before the first recorded one
ROWS = 15  # operators in the table


class StepProfiler:
    """Records `steps` steps after WARM_UP others; `step()` is called at the end of each, `close()` at the very end."""

    def __init__(self, steps: int, file: Path, device: torch.device, say: Callable[[str], None]) -> None:
        self.steps, self.file, self.device, self.say = steps, file, device, say
        self.finished = False
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
        plan = schedule(wait=WARM_UP - 1, warmup=1, active=steps, repeat=1)
        self._profile: profile | None = profile(activities=activities, schedule=plan, on_trace_ready=self._write)
        self._profile.start()

    def step(self) -> None:
        if self._profile is not None:
            self._profile.step()
            if self.finished:
                self.close()

    def close(self) -> None:
        """Stop; a recording that was cut short is written as far as it went."""
        running, self._profile = self._profile, None
        if running is None:
            return
        running.stop()
        if not self.finished:
            self.say(f"profile: nothing recorded, fewer than {WARM_UP + 1} steps were left to take")

    def _write(self, recorded: profile) -> None:
        self.finished = True
        device = "cuda" if self.device.type == "cuda" else "cpu"
        table = recorded.key_averages().table(
            sort_by=f"self_{device}_time_total", row_limit=ROWS, max_name_column_width=60
        )
        unfinished = self.file.with_name(f".{uuid4().hex[:8]}.tmp.{self.file.name}")
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            recorded.export_chrome_trace(str(unfinished))
            os.replace(unfinished, self.file)
        except OSError as error:
            with suppress(OSError):
                unfinished.unlink()
            self.say(f"profile: {self.file} could not be written ({error.strerror or error})")
        else:
            self.say(f"profile: {self.file}; open it at https://ui.perfetto.dev (Open trace file)")
        self.say(table)
