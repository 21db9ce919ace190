"""What a run depends on and does not own: its images, and the clock."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

from benchmarks.drills.place import (
    PARTS,
    ROOT,
    STEPS,
    Place,
    Run,
    Running,
    Trial,
    complaint,
    expect,
    last_line,
    line_with,
    losses,
    write_pictures,
)

_CORRUPT = 60, 3  # pictures, and how many of them cannot be read: 5 %
_STALL = 8  # seconds, long enough for a worker process to start on a busy machine
_STILL = 4  # seconds without a step after which a run of a few steps a second waits
_HOUR = 3600
# Read by every Python process before anything else; `sitecustomize` is Python's own hook for it.
_CLOCK = """\
import atexit, json, os, time

_time, _time_ns, _began = time.time, time.time_ns, time.monotonic()
_calls = {"before": 0, "after": 0}


def _back():
    jumped = os.path.exists(os.environ["DRILL_CLOCK"] + ".now")
    _calls["after" if jumped else "before"] += 1
    return 3600 if jumped else 0


time.time = lambda: _time() - _back()
time.time_ns = lambda: _time_ns() - _back() * 10**9
atexit.register(lambda: open(os.environ["DRILL_CLOCK"], "w").write(json.dumps(_calls)))
"""


def corrupt_images(place: Place, chance: Random) -> Iterator[Trial]:
    """5 % of the images cut off, empty, or text: each is named and left out; a killed run comes to the same end."""
    name = f"corrupt-{chance.random():.6f}"
    pictures = write_pictures(place.folder / name, _CORRUPT[0])
    bad = _spoil(pictures, chance)
    runs = [place.run("streamed", f"{name}-{which}", pictures) for which in ("straight", "killed")]
    for run in runs:
        run.arguments += [f"--tokenizer.stages.stage1.steps={2 * _CORRUPT[0] // 4}"]  # two epochs
    straight, killed = runs
    lost, said = straight.finish()
    lost += _named(said, bad)
    running, goal = killed.start(), chance.randint(3, STEPS)
    running.until(lambda: killed.steps("stage1") >= goal, f"stage1 came to {goal}")
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    problems, _ = killed.finish()
    lost += problems + losses(killed.folder, straight.folder)
    numbers = [value for record in _metrics(straight) for value in record.values() if isinstance(value, float)]
    lost += [] if all(map(math.isfinite, numbers)) else ["numbers that are not finite"]
    in_memory = place.run("tokenizer", f"{name}-memory", pictures)
    in_memory.arguments += ["--data.held_out=0"]
    problems, said_too = in_memory.finish()
    yield Trial(len(bad), lost + problems + _named(said_too, bad), line_with(said, "skipped "))


def _spoil(folder: Path, chance: Random) -> list[str]:
    """Names of the pictures that can no longer be read."""
    chosen = chance.sample(sorted(folder.rglob("*.png")), _CORRUPT[1])
    cut, empty, text = chosen
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    empty.write_bytes(b"")
    text.write_text("this is no picture\n")
    return [str(file.relative_to(folder)) for file in chosen]


def _named(said: str, bad: list[str]) -> list[str]:
    """What is wrong with the names of skipped pictures."""
    lines = [line for line in said.splitlines() if "skipped " in line]
    silent = [f"{name} is left out in silence" for name in bad if not any(name in line for line in lines)]
    return silent + [f"a sound picture is left out: {line}" for line in lines if not any(name in line for name in bad)]


def stalled_loader(place: Place, chance: Random) -> Iterator[Trial]:
    """An image whose reading never ends: the time-out names it; with the image back, the same command goes on."""
    with stalled_picture(place, f"stalled-{chance.random():.6f}", chance, f"--data.stall_timeout={_STALL}") as found:
        run, running, picture = found
        lost = expect(running.wait(), 2)
        name = f"{picture.parent.name}/{picture.name}"
        wrong, seen = complaint(running.said(), "delivered no images for step", name, "stall_timeout")
    problems, _ = run.finish()
    yield Trial(1, lost + wrong + problems + place.lost(run, "streamed"), seen)


@contextmanager
def stalled_picture(place: Place, name: str, chance: Random, *more: str) -> Iterator[tuple[Run, Running, Path]]:
    """A run that waits for a picture behind a pipe that nobody writes to, as on a network disk that has gone away.

    Yields the run, its process and the picture, which is back at the end.
    """
    place.straight("streamed")
    pictures = write_pictures(place.folder / f"pictures-{name}", 20)
    picture = chance.choice(sorted(pictures.rglob("*.png")))  # every epoch of five steps reads it
    kept, run = picture.read_bytes(), place.run("streamed", name, pictures)
    running = run.start(*more)
    try:
        running.until(lambda: run.steps("stage1"), "the first step")
        _replace_by_pipe(picture)
        _standstill(run, running)
        yield run, running, picture
    finally:
        running.end()
        picture.unlink()
        picture.write_bytes(kept)


def _replace_by_pipe(picture: Path) -> None:
    pipe = picture.with_suffix(".pipe")
    os.mkfifo(pipe)
    os.replace(pipe, picture)


def _standstill(run: Run, running: Running) -> None:
    """Return when the batches that were read ahead are used up."""
    seen, since = -1, time.monotonic()

    def still() -> bool:
        nonlocal seen, since
        if (steps := run.steps("stage1")) != seen:
            seen, since = steps, time.monotonic()
        return time.monotonic() - since > _STILL

    running.until(still, "it waited for the picture")


def clock_back(place: Place, chance: Random) -> Iterator[Trial]:
    """The clock goes back by an hour in the midst of a stage: the same weights, and times that make sense."""
    place.straight("tokenizer")
    run, part = place.run("tokenizer", f"clock-{chance.random():.6f}"), chance.choice(PARTS)
    hook = place.folder / f"{run.folder.name}-hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(_CLOCK)
    calls = hook / "calls.json"
    run.environment = {"DRILL_CLOCK": str(calls), "PYTHONPATH": os.pathsep.join([str(hook), str(ROOT)])}
    running, goal = run.start(), chance.randint(2, STEPS - 4)
    running.until(lambda: run.steps(part) >= goal, f"{part} came to {goal}")
    Path(f"{calls}.now").touch()
    lost = expect(running.wait(), 0)
    counted = json.loads(calls.read_text())
    lost += [] if counted["before"] and counted["after"] else [f"the clock was not asked on both sides: {counted}"]
    for this in PARTS:
        found = [r for r in _metrics(run) if r["part"] == this]
        seconds = [r["seconds"] for r in found]
        sane = seconds == sorted(seconds) and all(0 < r["images_per_second"] < math.inf for r in found)
        sane = sane and seconds[-1] < _HOUR and all(0 <= r["data_wait"] <= 1 for r in found)
        lost += [] if sane else [f"{this} has times or rates that make no sense"]
    said = running.said()
    lefts = [line.rpartition("| ")[2] for line in said.splitlines() if line.endswith(" left")]
    lost += [f"{left!r} in a run of seconds" for left in lefts if not left.startswith("0:0")]
    yield Trial(1, lost + place.lost(run, "tokenizer"), last_line(said))


def _metrics(run: Run) -> list[dict]:
    return [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
