"""The log of one training part: means, rates and shares between two records, and what is due at a step.

Values stay on their device between two records: only a record waits for the device. All processes take part in the
means and draw the previews, since both may need every one of them; the first one writes.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from aligntok.runtime import collectives
from aligntok.runtime.world import World
from aligntok.training.monitoring.profiling import StepProfiler
from aligntok.training.monitoring.progress import Update, clock
from aligntok.training.monitoring.throughput import Peak, memory_gib
from aligntok.training.objective import Values

SHOWN = (
    "loss",
    "l1",
    "perceptual",
    "gan",
    "discriminator",
    "semantic",
    "mse",
    "direction",
)  # on the step line, in order
Preview = Callable[[], bytes]  # a PNG


class Records(Protocol):
    """What the log of a part needs of the whole run's records: aligntok.training.monitoring.telemetry.Telemetry."""

    folder: Path
    log_every: int
    world: World

    def say(self, message: str) -> None: ...
    def records(self) -> list[dict[str, Any]]: ...
    def write(self, record: dict[str, Any]) -> None: ...
    def show(self, part: str, step: int, png: bytes) -> None: ...


@dataclass(frozen=True)
class Watch:
    """What is to be observed of one part."""

    log_every: int
    device: torch.device = field(default_factory=partial(torch.device, "cpu"))
    peak: Peak | None = None
    flops: Mapping[int, float] | None = None  # per image, by the first step of its kind; None, or no peak = no MFU
    preview_every: int = 0
    preview: Preview | None = None
    profile: int = 0
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass
class _Interval:
    """What happened since the last record."""

    began: float
    step: int
    images: int = 0
    waited: float = 0.0
    flops: float = 0.0
    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def take(self, values: Values, images: int, flops: float) -> None:
        self.images += images
        self.flops += flops
        for key, value in values.items():
            value = value.detach().float()
            self.sums[key] = self.sums[key] + value if key in self.sums else value
            self.counts[key] = self.counts.get(key, 0) + 1

    def means(self) -> dict[str, float]:
        """Means over steps and processes; the one place that waits for the device."""
        if not self.sums:
            return {}
        means = collectives.mean(torch.stack([total / self.counts[key] for key, total in self.sums.items()]))
        return dict(zip(self.sums, means.tolist(), strict=True))


class PartLog:
    """Step line and records of one part."""

    def __init__(
        self, telemetry: Records, name: str, start: int, steps: int, update: Update, watch: Watch | None = None
    ) -> None:
        self.telemetry, self.name, self.steps, self.update = telemetry, name, steps, update
        self.watch, self.world = watch or Watch(telemetry.log_every), telemetry.world
        earlier = [r["seconds"] for r in telemetry.records() if r["part"] == name]
        self.before = max(earlier, default=0.0)  # seconds of the interrupted run, so that time goes on
        self.began, self.waited = time.monotonic(), 0.0
        self.pace: float | None = None  # seconds per step, recent ones first
        self._interval = _Interval(self.began, start)
        self._profiler = None
        if self.watch.profile and start < steps:
            file = telemetry.folder / "profile" / f"{name}.json.gz"
            self._profiler = StepProfiler(self.watch.profile, file, self.watch.device, telemetry.say)

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.began

    def waiting_for(self, fetch: Callable[[], Any]) -> Any:
        """Result of `fetch`, its time counted as waiting for data."""
        began = time.monotonic()
        result = fetch()
        waited = time.monotonic() - began
        self.waited += waited
        self._interval.waited += waited
        return result

    def step(self, done: int, values: Values, images: int) -> None:
        """Take in the values of a finished step; records and previews where they are due.

        Args:
            done: steps taken so far.
            values: detached scalars of this process.
            images: how many this process has seen in the step.
        """
        if self._profiler is not None:
            self._profiler.step()
        self._interval.take(values, images, self._flops(done - 1) * images if values else 0.0)
        if done % self.watch.log_every == 0 or done == self.steps:
            self._record(done)
        else:
            self.update(done, self.steps)
        every, preview = self.watch.preview_every, self.watch.preview
        if every and preview is not None and (done % every == 0 or done == self.steps):
            self._preview(done, preview)

    def warn(self, message: str) -> None:
        self.telemetry.say(f"{self.name}: {message}")

    def close(self) -> None:
        """Let go of the profiler, wherever the part stopped."""
        if self._profiler is not None:
            self._profiler.close()

    def _flops(self, step: int) -> float:
        """FLOPs per image of a step, counted from 0; a skipped one, which trains nothing, is not asked about."""
        if self.watch.flops is None:
            return 0.0
        starts = sorted(self.watch.flops)
        return self.watch.flops[starts[bisect_right(starts, step) - 1]]

    def _record(self, done: int) -> None:
        now, interval = time.monotonic(), self._interval
        means = interval.means()
        seconds = max(now - interval.began, 1e-9)
        pace = seconds / max(done - interval.step, 1)
        self.pace = pace if self.pace is None else (self.pace + pace) / 2
        record: dict[str, Any] = {
            "part": self.name,
            "step": done,
            "seconds": self.before + self.elapsed,
            "images_per_second": interval.images * self.world.size / seconds,
            "memory_gib": memory_gib(self.watch.device),
            "data_wait": min(1.0, interval.waited / seconds),
        }
        if self.watch.peak is not None and self.watch.flops is not None:
            record["mfu"] = interval.flops / seconds / self.watch.peak.rate
        record |= means
        if self.world.main:
            self.telemetry.write({k: round(v, 6) if isinstance(v, float) else v for k, v in record.items()})
        self.update(done, self.steps, self._line(record, (self.steps - done) * self.pace))
        self._interval = _Interval(now, done)

    def _line(self, record: dict[str, Any], left: float) -> str:
        shown = " ".join(f"{key} {record[key]:.3f}" for key in SHOWN if key in record)
        facts = [shown] if shown else []
        facts.append(f"{record['images_per_second']:.0f} img/s")
        if "mfu" in record:
            facts.append(f"MFU {record['mfu']:.1%}")
        facts += [f"{record['memory_gib']:.1f} GiB", f"data {record['data_wait']:.0%}", f"{clock(left)} left"]
        return " | ".join(facts)

    def _preview(self, done: int, draw: Preview) -> None:
        """Not counted as training time; whatever fails in it is a warning."""
        began = time.monotonic()
        try:
            png = draw()
            if self.world.main:
                self.telemetry.show(self.name, done, png)
        except Exception as error:  # a full disk, no memory to spare, pictures of NaN
            self.warn(f"warning: no preview at step {done} ({error or type(error).__name__}); training goes on")
        self._interval.began += time.monotonic() - began
