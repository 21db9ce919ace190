"""What a run says of itself: a progress bar with the step line, `metrics.jsonl`, TensorBoard.

`metrics.jsonl` has one line per logged step: part, step, seconds since the part began, values. A resumed part first
drops the lines of steps that it will take again, so the file reads as if nothing had happened.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from aligntok import collectives
from aligntok.files import write_bytes
from aligntok.training.objective import Values
from aligntok.world import current

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


class Telemetry:
    """Records of a whole run; `part` opens the log of one training part. Only the first process speaks and writes.

    Args:
        folder: where metrics.jsonl and the TensorBoard events go.
        log_every: steps between two records.
        console: None = standard error.
    """

    def __init__(self, folder: str | Path, log_every: int, console: Console | None = None) -> None:
        self.folder, self.log_every = Path(folder), log_every
        self.main = current().main
        self.console = console or Console(stderr=True, quiet=not self.main)
        self.file = self.folder / "metrics.jsonl"
        self._writer: Any = None

    def say(self, message: str) -> None:
        """One line for the user."""
        self.console.print(message, markup=False, highlight=False)

    @contextmanager
    def bar(self, description: str, unit: str = "") -> Iterator[Callable[..., None]]:
        """A progress bar; call the yielded function with (done, total) and optionally a text."""
        columns = [
            TextColumn("{task.description:<22}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}"),
        ]
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task(description, total=None, text="")

            def update(done: int, total: int, text: str = "") -> None:
                progress.update(task, completed=done, total=total, text=text)

            yield update

    @contextmanager
    def part(self, name: str, start: int, steps: int) -> Iterator[PartLog]:
        """The log of one part from step `start` on."""
        self._drop_later_records(name, start)
        if start:
            self.say(f"{name}: resumed at step {start} of {steps}")
        with self.bar(name) as update:
            log = PartLog(self, name, start, steps, update)
            update(start, steps)
            yield log
        if log.waited > 0.02 * log.elapsed and log.elapsed > 10:
            self.say(
                f"{name}: {log.waited / log.elapsed:.0%} of the time went into waiting for images; raise data.workers"
            )

    def records(self) -> list[dict[str, Any]]:
        """All records so far."""
        if not self.file.is_file():
            return []
        return [json.loads(line) for line in self.file.read_text().splitlines() if line]

    def write(self, record: dict[str, Any]) -> None:
        if not self.main:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.file.open("a") as file:
            file.write(json.dumps(record) + "\n")
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.folder / "tensorboard"))
        for key, value in record.items():
            if key not in ("part", "step"):
                self._writer.add_scalar(f"{record['part']}/{key}", value, record["step"])

    def _drop_later_records(self, part: str, start: int) -> None:
        records = self.records()
        kept = [r for r in records if r["part"] != part or r["step"] <= start]
        if self.main and len(kept) != len(records):
            write_bytes(self.file, "".join(json.dumps(r) + "\n" for r in kept).encode())


class PartLog:
    """Step line and records of one part; values stay on their device between two records."""

    def __init__(self, telemetry: Telemetry, name: str, start: int, steps: int, update: Callable[..., None]) -> None:
        self.telemetry, self.name, self.steps, self.update = telemetry, name, steps, update
        earlier = [r["seconds"] for r in telemetry.records() if r["part"] == name]
        self.before = max(earlier, default=0.0)  # seconds of the interrupted run, so that time goes on
        self.began = self.mark = time.monotonic()
        self.marked_step, self.images, self.waited = start, 0, 0.0
        self.sums: dict[str, torch.Tensor] = {}
        self.counts: dict[str, int] = {}

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.began

    def waiting_for(self, fetch: Callable[[], Any]) -> Any:
        """Result of `fetch`, its time counted as waiting for data."""
        began = time.monotonic()
        result = fetch()
        self.waited += time.monotonic() - began
        return result

    def step(self, done: int, values: Values, images: int) -> None:
        """Take in the values of a finished step; writes a record of means every `log_every` steps and at the end."""
        self.images += images
        for key, value in values.items():
            value = value.detach().float()
            self.sums[key] = self.sums[key] + value if key in self.sums else value
            self.counts[key] = self.counts.get(key, 0) + 1
        if done % self.telemetry.log_every and done != self.steps:
            self.update(done, self.steps)
            return
        means = _means(self.sums, self.counts)
        now = time.monotonic()
        rate = self.images / max(now - self.mark, 1e-9)
        record = {
            "part": self.name,
            "step": done,
            "seconds": self.before + self.elapsed,
            "images_per_second": rate,
        }
        self.telemetry.write({k: round(v, 6) if isinstance(v, float) else v for k, v in (record | means).items()})
        shown = " ".join(f"{key} {means[key]:.3f}" for key in SHOWN if key in means)
        self.update(done, self.steps, f"{shown} | {rate:.0f} img/s")
        self.mark, self.images, self.sums, self.counts = now, 0, {}, {}

    def warn(self, message: str) -> None:
        self.telemetry.say(f"{self.name}: {message}")


def _means(sums: dict[str, torch.Tensor], counts: dict[str, int]) -> dict[str, float]:
    """Means over steps and processes; all of them are read from the device at once."""
    if not sums:
        return {}
    total = collectives.mean(torch.stack([sums[key] / counts[key] for key in sums]))
    return dict(zip(sums, total.tolist(), strict=True))
