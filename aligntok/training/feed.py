"""Batches on the training device; on CUDA the next one is fetched and copied while the present one is worked on.

A thread asks the source for the next step, pins what is not pinned and copies it on a stream of its own, so that
neither decoding nor the copy is waited for unless it is slower than a step.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch

from aligntok.data.sources import Batch, Source

# What the host reads: row numbers, and where tables of frozen networks have a picture's output. On a GPU each would be
# waited for, in every step.
ON_HOST = ("rows", "index", "flip")


class Feed:
    """`batch(step)` of a source, on `device`; a context whose end waits for the thread.

    Args:
        source: asked in order, and on CUDA for one step beyond the last that is asked for, up to `end`.
        device: where batches go, except what is ON_HOST.
        end: number of steps.
    """

    def __init__(self, source: Source, device: torch.device, end: int) -> None:
        self.source, self.device, self.end = source, device, end
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._next: tuple[int, Future[Batch]] | None = None

    def __enter__(self) -> Feed:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._thread.shutdown(cancel_futures=True)

    def batch(self, step: int) -> Batch:
        """The batch of a step; raises what the source raises."""
        if self.stream is None:
            return move(self.source.batch(step), self.device)
        ready = self._next[1] if self._next and self._next[0] == step else self._ask(step)
        batch = ready.result()
        here = torch.cuda.current_stream(self.device)
        here.wait_stream(self.stream)  # before the next copy is put on it
        for value in batch.values():
            if value.is_cuda:
                value.record_stream(here)
        self._next = (step + 1, self._ask(step + 1)) if step + 1 < self.end else None
        return batch

    def _ask(self, step: int) -> Future[Batch]:
        return self._thread.submit(self._fetch, step)

    def _fetch(self, step: int) -> Batch:
        with torch.cuda.stream(self.stream):
            batch = self.source.batch(step)
            return move({k: v if k in ON_HOST or v.is_cuda else v.pin_memory() for k, v in batch.items()}, self.device)


def move(batch: Batch, device: torch.device) -> Batch:
    """The batch's tensors on `device`, copied asynchronously where they are pinned."""
    return {key: value if key in ON_HOST else value.to(device, non_blocking=True) for key, value in batch.items()}
