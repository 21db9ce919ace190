"""Threads that read ahead: jobs go in, futures come out, and a job that hangs never keeps the process alive."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from threading import Thread
from typing import Any, TypeVar

T = TypeVar("T")


class ReadAhead:
    """A pool of daemon threads. concurrent.futures' own pool waits for its threads when the interpreter ends, so that a
    read from a dead network disk would hold the process for ever.
    """

    def __init__(self, threads: int) -> None:
        self._jobs: SimpleQueue = SimpleQueue()
        for _ in range(threads):
            Thread(target=_serve, args=(self._jobs,), daemon=True).start()
        weakref.finalize(self, _stop, self._jobs, threads)

    def submit(self, work: Callable[..., T], *arguments: Any) -> Future[T]:
        """work(*arguments) in some thread; `future.running()` tells whether it has been begun."""
        future: Future[T] = Future()
        self._jobs.put((future, work, arguments))
        return future


def _serve(jobs: SimpleQueue) -> None:
    while (job := jobs.get()) is not None:
        future, work, arguments = job
        if not future.set_running_or_notify_cancel():
            continue
        try:
            future.set_result(work(*arguments))
        except BaseException as error:
            future.set_exception(error)


def _stop(jobs: SimpleQueue, threads: int) -> None:
    for _ in range(threads):
        jobs.put(None)
