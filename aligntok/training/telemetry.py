"""What a run says of itself: the step line, `metrics.jsonl`, trackers, previews, a profile.

`metrics.jsonl` has one line per record: part, step, seconds since the part began, images per second, memory in GiB,
share of the time that went into waiting for data, MFU, and the means of the values since the last record. A resumed
part first drops the lines of steps that it will take again, so the file reads as if nothing had happened.

Values stay on their device between two records: only a record waits for the device. With several processes all of them
take part in the means and draw the previews, and the first one speaks and writes. A disk or a service that refuses
costs records, with a warning, and never the training.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from aligntok.config import TrainingConfig
from aligntok.devices import Precision
from aligntok.files import write_bytes
from aligntok.training.objective import Values
from aligntok.training.profiling import StepProfiler
from aligntok.training.progress import Update, clock, moving_bar, plain_lines
from aligntok.training.throughput import FlopLedger, Peak, memory_gib, peak, step_kind
from aligntok.training.trackers import TensorBoard, Tracker, WeightsAndBiases, require_wandb
from aligntok.world import World, current

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


@dataclass(frozen=True)
class Watch:
    """What is to be observed of one part."""

    log_every: int
    device: torch.device = field(default_factory=partial(torch.device, "cpu"))
    peak: Peak | None = None  # None = no MFU
    preview_every: int = 0
    preview: Preview | None = None
    profile: int = 0
    settings: dict[str, Any] = field(default_factory=dict)


class Telemetry:
    """Records of a whole run; `part` opens the log of one training part.

    Args:
        folder: where metrics.jsonl and everything else goes.
        log_every: steps between two records of a part that `watch` was not called for.
        console: None = standard error.
        world: the processes of the run; None = those of torch.distributed.
    """

    def __init__(
        self, folder: str | Path, log_every: int, console: Console | None = None, world: World | None = None
    ) -> None:
        self.folder, self.log_every, self.world = Path(folder), log_every, world or current()
        self.console = console or Console(stderr=True)
        self.file = self.folder / "metrics.jsonl"
        self.began = time.monotonic()
        self._watches: dict[str, Watch] = {}
        self._trackers: list[Tracker] = [TensorBoard(self.folder / "tensorboard")] if self.world.main else []
        self._announced: set[str] = set()
        self._refused = False  # the last record could not be written

    def say(self, message: str) -> None:
        """One line for the user."""
        if self.world.main:
            self.console.print(message, markup=False, highlight=False, soft_wrap=True)

    def announce(self, header: str, lines: Iterable[str]) -> None:
        """The banner of a part; the header that all parts share is said once."""
        if header not in self._announced:
            self._announced.add(header)
            self.say(header)
        for line in lines:
            self.say(line)

    def bar(self, description: str) -> AbstractContextManager[Update]:
        """Progress of something; call the yielded function with (done, total) and optionally a text."""
        if not self.world.main:
            return nullcontext(lambda done, total, text="": None)
        if self.console.is_terminal:
            return moving_bar(self.console, description)
        return plain_lines(self.console, description, self.began)

    def watch(
        self, part: str, training: TrainingConfig, precision: Precision, settings: Any, preview: Preview | None
    ) -> Peak | None:
        """Prepare the observation of a part; returns what MFU is measured against (None where nobody listens).

        Args:
            part: its name, as given to `part` later.
            training: intervals, profile and W&B project.
            precision: device and precision of the run.
            settings: configuration dataclass of the part, for W&B.
            preview: makes a PNG of the current state; None = no previews.

        Raises:
            UserError: a W&B project is given, but wandb is absent or refuses.
        """
        if training.wandb_project is not None:
            require_wandb()
            if self.world.main and not any(isinstance(t, WeightsAndBiases) for t in self._trackers):
                self._trackers.append(WeightsAndBiases(self.folder, training.wandb_project))
        found = peak(precision) if self.world.main else None
        self._watches[part] = Watch(
            training.log_every,
            precision.device,
            found,
            training.preview_every,
            preview,
            training.profile if self.world.main else 0,
            dataclasses.asdict(settings),
        )
        return found

    @contextmanager
    def part(self, name: str, start: int, steps: int) -> Iterator[PartLog]:
        """The log of one part from step `start` on."""
        watch = self._watches.pop(name, Watch(self.log_every))
        if self.world.main:
            self._drop_later_records(name, start)
        if start:
            self.say(f"{name}: resumed at step {start} of {steps}")
        self._track("begin", name, start, watch.settings)
        with self.bar(name) as update:
            log = PartLog(self, name, start, steps, update, watch)
            update(start, steps)
            try:
                yield log
            finally:
                log.close()
                self._track("end")
        if log.waited > 0.02 * log.elapsed and log.elapsed > 10:
            self.say(
                f"{name}: {log.waited / log.elapsed:.0%} of the time went into waiting for images; raise data.workers"
            )

    def records(self) -> list[dict[str, Any]]:
        """All records so far; a line that a full disk or a kill cut short is left out."""
        return self._lines()[0]

    def write(self, record: dict[str, Any]) -> None:
        """Append a record and hand it to the trackers."""
        line = ("\n" if self._refused else "") + json.dumps(record) + "\n"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self.file.open("a") as file:
                file.write(line)
            self._refused = False
        except OSError as error:
            if not self._refused:
                self.say(f"warning: no records in {self.file} ({error.strerror or error}); training goes on")
            self._refused = True
        self._track("scalars", record)

    def show(self, part: str, step: int, png: bytes) -> None:
        """Keep a preview: OUTPUT/previews/PART-STEP.png and the trackers."""
        write_bytes(self.folder / "previews" / f"{part}-{step:08d}.png", png)
        self._track("picture", part, step, png)

    def _track(self, event: str, *arguments: Any) -> None:
        for tracker in list(self._trackers):
            try:
                getattr(tracker, event)(*arguments)
            except Exception as error:  # somebody else's code, disk and network: not worth a week of training
                self._trackers.remove(tracker)
                self.say(f"warning: {tracker.name} is given up ({type(error).__name__}: {error}); training goes on")

    def _lines(self) -> tuple[list[dict[str, Any]], bool]:
        """(records, whether the file held anything else)."""
        if not self.file.is_file():
            return [], False
        records, broken = [], False
        for line in self.file.read_text(errors="replace").splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:
                broken = True
        return records, broken

    def _drop_later_records(self, part: str, start: int) -> None:
        records, broken = self._lines()
        kept = [r for r in records if r["part"] != part or r["step"] <= start]
        if broken or len(kept) != len(records):
            write_bytes(self.file, "".join(json.dumps(r) + "\n" for r in kept).encode())


@dataclass
class _Interval:
    """What happened since the last record."""

    began: float
    step: int
    images: int = 0
    waited: float = 0.0
    flops: float | None = 0.0  # None: not known for every step
    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def take(self, values: Values, images: int, flops: float | None) -> None:
        self.images += images
        self.flops = None if flops is None or self.flops is None else self.flops + flops
        for key, value in values.items():
            value = value.detach().float()
            self.sums[key] = self.sums[key] + value if key in self.sums else value
            self.counts[key] = self.counts.get(key, 0) + 1

    def means(self, world: World) -> dict[str, float]:
        """Means over steps and processes; the one place that waits for the device."""
        if not self.sums:
            return {}
        means = torch.stack([total / self.counts[key] for key, total in self.sums.items()])
        if world.size > 1:
            torch.distributed.all_reduce(means)
            means /= world.size
        return dict(zip(self.sums, means.tolist(), strict=True))


class PartLog:
    """Step line and records of one part."""

    def __init__(
        self, telemetry: Telemetry, name: str, start: int, steps: int, update: Update, watch: Watch | None = None
    ) -> None:
        self.telemetry, self.name, self.steps, self.update = telemetry, name, steps, update
        self.watch, self.world = watch or Watch(telemetry.log_every), telemetry.world
        earlier = [r["seconds"] for r in telemetry.records() if r["part"] == name]
        self.before = max(earlier, default=0.0)  # seconds of the interrupted run, so that time goes on
        self.began, self.waited = time.monotonic(), 0.0
        self.pace: float | None = None  # seconds per step, recent ones first
        self._interval = _Interval(self.began, start)
        listens = self.watch.peak is not None
        self._flops = FlopLedger(telemetry.folder / "flops.json", name, start) if listens else None
        self._profiler = None
        if self.watch.profile and start < steps:
            file = telemetry.folder / "profile" / f"{name}.json.gz"
            self._profiler = StepProfiler(self.watch.profile, file, self.watch.device, telemetry.say)

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.began

    def waiting_for(self, fetch: Callable[[], Any]) -> Any:
        """Result of `fetch`, its time counted as waiting for data; a step begins when it is there."""
        began = time.monotonic()
        result = fetch()
        waited = time.monotonic() - began
        self.waited += waited
        self._interval.waited += waited
        if self._flops is not None:
            self._flops.begin()
        return result

    def step(self, done: int, values: Values, images: int) -> None:
        """Take in the values of a finished step; records and previews where they are due.

        Args:
            done: steps taken so far.
            values: detached scalars of this process.
            images: how many this process has seen in the step.
        """
        flops = None if self._flops is None else self._flops.end(step_kind(values), images)
        if self._profiler is not None:
            self._profiler.step()
        self._interval.take(values, images, flops)
        if done % self.watch.log_every == 0 or done == self.steps:
            self._record(done)
        else:
            self.update(done, self.steps)
        every = self.watch.preview_every
        if every and self.watch.preview is not None and (done % every == 0 or done == self.steps):
            self._preview(done)

    def warn(self, message: str) -> None:
        self.telemetry.say(f"{self.name}: {message}")

    def close(self) -> None:
        """Let go of profiler and counter, wherever the part stopped."""
        if self._flops is not None:
            self._flops.abandon()
        if self._profiler is not None:
            self._profiler.close()

    def _record(self, done: int) -> None:
        now, interval = time.monotonic(), self._interval
        means = interval.means(self.world)
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
        if self.watch.peak is not None and interval.flops is not None:
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

    def _preview(self, done: int) -> None:
        """Not counted as training time; whatever fails in it is a warning."""
        began = time.monotonic()
        try:
            png = self.watch.preview()
            if self.world.main:
                self.telemetry.show(self.name, done, png)
        except Exception as error:  # a full disk, no memory to spare, pictures of NaN
            self.warn(f"warning: no preview at step {done} ({error or type(error).__name__}); training goes on")
        self._interval.began += time.monotonic() - began
