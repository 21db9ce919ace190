"""What a run says of itself: the step line, `metrics.jsonl`, trackers, previews, a profile.

`metrics.jsonl` has one line per record: part, step, seconds since the part began, images per second, memory in GiB,
share of the time that went into waiting for data, MFU, and the means of the values since the last record. A resumed
part first drops the lines of steps that it will take again, so the file reads as if nothing had happened.

With several processes only the first one speaks and writes. A disk or a service that refuses costs records, with a
warning, and never the training.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console

from aligntok.config import TrainingConfig
from aligntok.runtime.devices import Precision
from aligntok.runtime.files import write_bytes
from aligntok.runtime.world import World, current
from aligntok.training.monitoring.part_log import PartLog, Preview, Watch
from aligntok.training.monitoring.progress import Update, moving_bar, plain_lines
from aligntok.training.monitoring.throughput import peak
from aligntok.training.monitoring.trackers import TensorBoard, Tracker, WeightsAndBiases, require_wandb


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
        self,
        part: str,
        training: TrainingConfig,
        precision: Precision,
        settings: Any,
        preview: Preview | None,
        flops: Callable[[], Mapping[int, float]],
    ) -> str | None:
        """Prepare the observation of a part; returns a line on MFU, or None where nobody listens.

        Args:
            part: its name, as given to `part` later.
            training: intervals, profile and W&B project.
            precision: device and precision of the run.
            settings: configuration dataclass of the part, for W&B.
            preview: makes a PNG of the current state; None = no previews.
            flops: counts FLOPs per image, {first step of a kind of step: FLOPs}; called in the first process only.
                Where it fails there is no MFU, and the line says why.

        Raises:
            UserError: a W&B project is given, but wandb is absent or refuses.
        """
        if training.wandb_project is not None:
            require_wandb()
            if self.world.main and not any(isinstance(t, WeightsAndBiases) for t in self._trackers):
                self._trackers.append(WeightsAndBiases(self.folder, training.wandb_project))
        found, counted, line = None, None, None
        if self.world.main:
            counted, line = _try_to_count(flops)
        if counted is not None:
            found = peak(precision)
            line = f"MFU against {found}; {line}"
        self._watches[part] = Watch(
            training.log_every,
            precision.device,
            found,
            counted,
            training.preview_every,
            preview,
            training.profile if self.world.main else 0,
            dataclasses.asdict(settings),
        )
        return line

    @contextmanager
    def part(self, name: str, start: int, steps: int) -> Iterator[PartLog]:
        """The log of one part from step `start` on."""
        watch = self._watches.get(name, Watch(self.log_every))
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


def _try_to_count(flops: Callable[[], Mapping[int, float]]) -> tuple[Mapping[int, float] | None, str]:
    """What `flops` gives, and how to say it; where it fails None, and why."""
    try:
        counted = flops()
    except Exception as error:  # an operator without a form for the meta device: not worth a run
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        return None, f"no MFU: the FLOPs of a step could not be counted ({type(error).__name__}: {reason})"
    (_, first), *later = sorted(counted.items())
    texts = [f"{first / 1e9:,.4g} GFLOP per image", *(f"{n / 1e9:,.4g} from step {s + 1:,}" for s, n in later)]
    return counted, ", ".join(texts)
