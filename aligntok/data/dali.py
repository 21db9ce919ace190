"""Batches by NVIDIA DALI: decoding, resizing, cropping and flipping in its threads, or on the GPU.

Promise: `DaliSource` gives the batches of `StreamSource`: same pictures, crops, flips and rows, as a function of (seed,
step, world) alone; pixels differ only by rounding (tests/data/test_dali.py). The graph is in aligntok.data.dali_graph.

On the GPU, JPEGs are decoded there and the batch never visits the host. Without one, the same graph runs on the CPU.
What DALI would decode differently or not at all (aligntok.data.headers) goes through Pillow, picture by picture.
"""

from __future__ import annotations

import warnings
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import wait as futures_wait
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aligntok.config import DataConfig
from aligntok.data.dali_graph import (
    DEPTH,
    MAX_HALVINGS,
    build_pipeline,
    last_line,
    outputs,
    refusal,
    run,
    sample_inputs,
)
from aligntok.data.decoding import decode, unreadable_because
from aligntok.data.geometry import Window, cut, to_tensor, to_unit_range, window
from aligntok.data.headers import read_header
from aligntok.data.images import Entry, ImageSet
from aligntok.data.readahead import ReadAhead
from aligntok.data.sources import (
    Batch,
    Order,
    Request,
    Skips,
    flip_images,
    requests,
    stalled,
    stand_ins,
    whole_batch_unreadable,
)
from aligntok.errors import UserError
from aligntok.runtime.world import World

READ_STEPS = 4  # steps whose files are read ahead of the one that is asked for
FAILURES = 3  # batches in a row that DALI refuses although Pillow reads them: then DALI itself is at fault


@dataclass
class Encoded:
    """A picture that DALI will decode, with where its crop lies."""

    data: np.ndarray
    height: int
    width: int
    place: Window

    def region(self) -> tuple[np.ndarray, np.ndarray]:
        """The crop's (y, x) begin and end, in pixels of the picture after its halvings."""
        height, width = self.height >> self.place.halvings, self.width >> self.place.halvings
        scale = np.array([height / self.place.height, width / self.place.width])
        begin = np.array([self.place.top, self.place.left])
        return (begin * scale).astype(np.float32), ((begin + self.place.size) * scale).astype(np.float32)


@dataclass
class Decoded:
    """A crop that Pillow has made, uint8 [3, S, S], and why not DALI."""

    pixels: Tensor
    reason: str


@dataclass
class Unreadable:
    reason: str


Row = Encoded | Decoded | Unreadable


@dataclass
class Step:
    """A batch on its way: what each row became, and whether DALI works on it."""

    number: int
    requests: list[Request]
    rows: list[Row]

    @property
    def encoded(self) -> list[int]:
        """Rows that DALI decodes."""
        return [row for row, item in enumerate(self.rows) if isinstance(item, Encoded)]


def prepare(entry: Entry, crop: str, size: int, request: Request, pillow: bool = False) -> Row:
    """Read one picture and decide by its header who decodes it; Pillow's share is decoded and cropped at once."""
    u, v = request[2:]
    try:
        data = entry.read_bytes()
        header = "DALI failed on their batch" if pillow else read_header(data)
        if not isinstance(header, str):
            place = window(crop, header.width, header.height, size, u, v)
            if place.halvings <= MAX_HALVINGS:
                return Encoded(np.frombuffer(data, np.uint8), header.height, header.width, place)
            header = "an extreme size"
        picture = decode(data)
        return Decoded(to_tensor(cut(picture, window(crop, *picture.size, size, u, v))), header)
    except (OSError, UserError) as error:
        return Unreadable(unreadable_because(error))


class DaliSource:
    """Pictures decoded by DALI as training goes; the contract of StreamSource.

    Args:
        images: what to read.
        data: image size, flips, threads (data.workers for reading and as many for decoding), stall_timeout.
        crop: "random" or "center".
        batch_size: over all processes.
        seed: of order, flips and crops.
        device: where the batch is wanted; a CUDA device also decodes.
        say: gets one line for every unreadable picture and for what goes through Pillow.
        world: this process's share.

    Raises:
        UserError: DALI cannot be imported or cannot run here.
    """

    def __init__(
        self,
        images: ImageSet,
        data: DataConfig,
        crop: str,
        batch_size: int,
        seed: int,
        device: torch.device | str = "cpu",
        say: Callable[[str], None] = warnings.warn,
        world: World | None = None,
    ) -> None:
        reason = refusal()
        if reason is not None:
            raise UserError(f"data.loader=dali: {reason}")
        self.images, self.data, self.crop, self.say = images, data, crop, say
        self.device = torch.device(device)
        self.order = Order(len(images), batch_size, seed, world)
        self.labels = images.labels
        self.skips = Skips(images, say)
        self.by_pillow: Counter[str] = Counter()  # pictures that Pillow decoded, by reason
        self._threads = max(1, data.workers)
        self._readers = ReadAhead(self._threads)
        self._pipeline = self._build()
        self._reading: deque[tuple[int, list[Request], list[Future[Row]]]] = deque()
        self._running: deque[Step] = deque()
        self._next_step = -1
        self._refused: set[int] = set()  # pictures on which DALI has failed
        self._broken: Exception | None = None  # what has killed the pipeline
        self._failures = 0

    def __str__(self) -> str:
        return f"decoded as training goes by DALI on the {'GPU' if self.device.type == 'cuda' else 'CPU'}"

    def batch(self, step: int) -> Batch:
        """The batch of one step, images on `device` if it is a CUDA device, else on the CPU.

        Raises:
            UserError: files could not be read for data.stall_timeout seconds, a whole batch is unreadable, or DALI
                fails again and again.
        """
        if step != self._next_step:
            self._restart()
        self._next_step = step + 1
        self._fill(step, wait=not self._running)
        current = self._running.popleft()
        images = self._images(current)
        self._fill(step + 1, wait=False)  # the pipeline works on while the caller trains
        return self._assemble(current, images)

    def _restart(self) -> None:
        """Forget what is under way."""
        while self._running:
            self._images(self._running.popleft())
        for _, _, futures in self._reading:
            for future in futures:
                future.cancel()
        self._reading.clear()

    def _fill(self, step: int, wait: bool) -> None:
        """Give the pipeline its next batches, from `step` on; waits for files only where told to."""
        while len(self._running) < DEPTH:
            self._read_ahead(step)
            if not wait and not all(future.done() for future in self._reading[0][2]):
                return
            self._submit(self._collect())
            wait = False

    def _read_ahead(self, step: int) -> None:
        under_way = [part[0] for part in self._reading] or [part.number for part in self._running] or [step - 1]
        for number in range(under_way[-1] + 1, step + READ_STEPS):
            wanted = requests(self.order, number, self.data.flip)
            self._reading.append((number, wanted, [self._read(request) for request in wanted]))

    def _read(self, request: Request) -> Future[Row]:
        entry, size, pillow = self.images.entries[request[0]], self.data.image_size, request[0] in self._refused
        return self._readers.submit(prepare, entry, self.crop, size, request, pillow)

    def _collect(self) -> Step:
        """The next step, with its files read; waits for them."""
        number, wanted, futures = self._reading[0]
        limit = self.data.stall_timeout
        _, late = futures_wait(futures, limit or None)
        if late:
            slow = [self.images.entries[r[0]].name for r, f in zip(wanted, futures, strict=True) if f.running()]
            raise stalled("DALI's readers", limit, number, slow)
        self._reading.popleft()
        return Step(number, wanted, [future.result() for future in futures])

    def _submit(self, step: Step) -> None:
        self._to_pillow(step, [row for row in step.encoded if step.requests[row][0] in self._refused])
        self._running.append(step)
        if not step.encoded or self._broken is not None:
            return
        items = [item for item in step.rows if isinstance(item, Encoded)]
        regions = [item.region() for item in items]
        inputs: dict[str, list[np.ndarray | np.generic]] = {
            "encoded": [item.data for item in items],
            "begin": [begin for begin, _ in regions],
            "end": [end for _, end in regions],
            "mirror": [np.int32(step.requests[row][1]) for row in step.encoded],
        }
        if self.crop == "center":
            inputs["halvings"] = [np.int32(item.place.halvings) for item in items]
            inputs["shape"] = [np.array([item.height, item.width], np.float32) for item in items]
        try:
            run(self._pipeline, inputs)
        except Exception as error:  # a batch before this one has broken the pipeline: see _images
            self._broken = error

    def _to_pillow(self, step: Step, rows: list[int]) -> None:
        for row in rows:
            request = step.requests[row]
            step.rows[row] = prepare(self.images.entries[request[0]], self.crop, self.data.image_size, request, True)

    def _images(self, step: Step) -> Tensor | None:
        """DALI's share of a step, float32 [n, 3, S, S]; None where there was none, or it failed and Pillow did it."""
        if not step.encoded:
            return None
        try:
            if self._broken is not None:
                raise self._broken
            images = outputs(self._pipeline, self.device)
        except Exception as error:  # DALI raises many kinds, all of which mean that its pipeline is dead
            self._recover(step, error)
            return None
        self._failures = 0
        return images

    def _recover(self, step: Step, error: Exception) -> None:
        """Pillow decodes the step that broke the pipeline; a new pipeline gets the steps behind it."""
        tried = step.encoded
        self._to_pillow(step, tried)
        broken = [row for row in tried if isinstance(step.rows[row], Unreadable)]
        self._refused.update(step.requests[row][0] for row in broken or tried)
        reason = last_line(error)
        if not broken:
            self._failures += 1
            self.say(f"DALI failed on the batch of step {step.number} although Pillow reads all of it: {reason}")
        if self._failures == FAILURES:
            raise UserError(f"DALI failed on {FAILURES} batches in a row ({reason}); data.loader=torchvision avoids it")
        self._pipeline, self._broken = self._build(), None
        behind = list(self._running)
        self._running.clear()
        for waiting in behind:
            self._submit(waiting)

    def _assemble(self, step: Step, images: Tensor | None) -> Batch:
        """The batch, with Pillow's pictures and the stand-ins of unreadable ones in their rows."""
        names = [self.images.entries[request[0]].name for request in step.requests]
        skipped = [(n, item.reason) for n, item in zip(names, step.rows, strict=True) if isinstance(item, Unreadable)]
        if len(skipped) == len(names):
            raise whole_batch_unreadable(skipped)
        self.skips.add(skipped)
        index = torch.tensor([request[0] for request in step.requests])
        flip = torch.tensor([request[1] for request in step.requests])
        if images is None or len(images) < len(names):
            images = self._merge(step, names, images, flip)
        if skipped:
            source = torch.tensor(stand_ins([not isinstance(item, Unreadable) for item in step.rows]))
            images, index, flip = images[source.to(images.device)], index[source], flip[source]
        return {
            "images": images,
            "labels": self.labels[index],
            "index": index,
            "flip": flip,
            "rows": self.order.rows,
        }

    def _merge(self, step: Step, names: list[str], images: Tensor | None, flip: Tensor) -> Tensor:
        size, device = self.data.image_size, self.device if self.device.type == "cuda" else torch.device("cpu")
        merged = torch.zeros(len(names), 3, size, size, device=device)
        if images is not None:
            merged[torch.tensor(step.encoded, device=device)] = images
        decoded = {row: item for row, item in enumerate(step.rows) if isinstance(item, Decoded)}
        for row, item in decoded.items():
            self.by_pillow[item.reason] += 1
            if self.by_pillow[item.reason] == 1:
                self.say(f"{names[row]} and others like it are decoded by Pillow, more slowly: {item.reason}")
        if rows := list(decoded):
            pixels = torch.stack([item.pixels for item in decoded.values()]).to(device)
            merged[torch.tensor(rows, device=device)] = flip_images(to_unit_range(pixels), flip[rows].to(device))
        return merged

    def _build(self) -> Any:
        """A pipeline that has proved on one small picture that it runs."""
        rows = len(self.order.rows)
        try:
            pipeline = build_pipeline(self.crop, self.data.image_size, rows, self._threads, self.device)
            for _ in range(DEPTH):  # the first run starts as many batches as the pipeline holds
                run(pipeline, sample_inputs(self.crop), start=False)
            pipeline.schedule_run()
            for _ in range(DEPTH):
                outputs(pipeline, self.device)
        except Exception as error:
            raise UserError(
                f"DALI cannot run on {self.device} ({last_line(error)}); use data.loader=torchvision"
            ) from error
        return pipeline
