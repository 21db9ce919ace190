"""Progress for a person and for a file: a moving bar on a terminal, plain lines with a time stamp elsewhere.

Stamps and estimates come from a clock that never jumps (time.monotonic), counted from the start of the command.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

Update = Callable[..., None]  # update(done, total, text="")
HEARTBEAT = 60.0  # seconds after which a file gets a line though nothing was said


def clock(seconds: float) -> str:
    """3723.4 -> "1:02:03"."""
    minutes, rest = divmod(int(max(0.0, seconds)), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


class _Bar(Progress):
    """A bar with a line of text below it, so that the text has the terminal's whole width."""

    text = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        if self.text:
            yield Text(self.text, no_wrap=True, overflow="ellipsis")


@contextmanager
def moving_bar(console: Console, description: str) -> Iterator[Update]:
    """On a terminal."""
    columns = [
        TextColumn("{task.description:<18}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    ]
    with _Bar(*columns, console=console) as progress:
        task = progress.add_task(description, total=None)

        def update(done: int, total: int, text: str = "") -> None:
            progress.text = text or progress.text
            progress.update(task, completed=done, total=total)

        yield update


@contextmanager
def plain_lines(console: Console, description: str, began: float) -> Iterator[Update]:
    """In a file: a line for every text, else one a minute, and one at the end. `began`: the clock's zero."""
    printed, last = time.monotonic(), (0, 0, "")

    def show(done: int, total: int, text: str) -> None:
        stamp = clock(time.monotonic() - began)
        line = f"[{stamp}] {description} {done}/{total} {text}".rstrip()
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    def update(done: int, total: int, text: str = "") -> None:
        nonlocal printed, last
        last = (done, total, text)
        if text or time.monotonic() - printed > HEARTBEAT:
            show(done, total, text)
            printed = time.monotonic()

    yield update
    if last[1] and not last[2]:
        show(*last)
