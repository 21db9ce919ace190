"""Processes that end too early: SIGKILL at any moment, of one process among two, and the signals that ask politely."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from random import Random

from benchmarks.drills.inputs import stalled_picture
from benchmarks.drills.place import (
    PARTS,
    STEPS,
    Place,
    Run,
    Trial,
    complaint,
    expect,
    last_line,
    line_with,
)

_AT_ONCE = 10  # seconds that a process may take to go after a second signal, on a busy machine


def kill_tokenizer(place: Place, chance: Random) -> Iterator[Trial]:
    """SIGKILL in each stage: at a random step, and while a checkpoint is written."""
    yield _killed(place, "tokenizer", PARTS, chance)


def kill_generator(place: Place, chance: Random) -> Iterator[Trial]:
    """SIGKILL in the generator's training, likewise."""
    yield _killed(place, "generator", ("generator",), chance)


def kill_cache(place: Place, chance: Random) -> Iterator[Trial]:
    """SIGKILL in the writer of the latent cache: between two shards, and while one is written."""
    yield _killed(place, "cache", ("cache",), chance)


def _killed(place: Place, kind: str, parts: tuple[str, ...], chance: Random) -> Trial:
    place.straight(kind)
    run = place.run(kind, f"killed-{chance.random():.6f}")
    lost: list[str] = []
    faults = caught = 0  # caught: in the midst of writing
    for part in parts:
        for while_writing in (False, True):
            wrong, unfinished = _kill_once(run, part, while_writing, chance)
            lost, caught, faults = lost + wrong, caught + unfinished, faults + 1
    problems, _ = run.finish()
    seen = f"the same command goes on ({caught} of {faults} kills left an unfinished copy, which is gone)"
    return Trial(faults, lost + problems + place.lost(run, kind), seen)


def _kill_once(run: Run, part: str, while_writing: bool, chance: Random) -> tuple[list[str], bool]:
    """(what went wrong, whether the kill came in the midst of writing)."""
    before = run.unfinished(part)  # of the kill before this one
    running = run.start()

    def done() -> int:
        return len(list(run.folder.glob("latents-*.safetensors"))) if part == "cache" else run.steps(part)

    if while_writing:
        running.until(lambda: run.unfinished(part) - before, f"{part} wrote anything", pause=0)
    else:
        goal = done() + chance.randint(2, STEPS // 2)
        running.until(lambda: done() >= goal, f"{part} came to {goal}")
        time.sleep(chance.uniform(0, 0.02))
    os.kill(running.pid, signal.SIGKILL)
    return expect(running.wait(), -signal.SIGKILL), bool(run.unfinished(part) - before)


def dead_rank(place: Place, chance: Random) -> Iterator[Trial]:
    """SIGKILL of one of two processes under torchrun, which ends the other; the same command goes on."""
    place.straight("ranks")
    run, part = place.run("ranks", f"rank-{chance.random():.6f}"), chance.choice(PARTS)
    running = run.start()
    goal = chance.randint(3, STEPS - 4)
    running.until(lambda: run.steps(part) >= goal, f"{part} came to {goal}")
    ranks = _children(running.pid)
    os.kill(chance.choice(ranks), signal.SIGKILL)
    lost = expect(running.wait(), 1)
    said = running.said()
    seen = line_with(said, r"exitcode.*-9|Signal 9|SIGKILL") or last_line(said)
    lost += [] if "SIGKILL" in said or "-9" in said else ["torchrun does not say that a process was killed"]
    problems, said = run.finish()
    lost += [] if "resumed at step" in said else ["the same command did not resume"]
    yield Trial(1, lost + problems + place.lost(run, "ranks"), seen.strip())


def _children(pid: int) -> list[int]:
    """Processes that this one has started."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


def _came_to(run: Run, part: str, goal: int) -> bool:
    return run.steps(part) >= goal


def polite(place: Place, chance: Random) -> Iterator[Trial]:
    """SIGTERM and SIGINT: a checkpoint of the last step, the documented status, and on with the same command."""
    for number in (signal.SIGTERM, signal.SIGINT):
        run, part = place.run("tokenizer", f"{number.name}-{chance.random():.6f}"), chance.choice(PARTS)
        running, goal = run.start(), chance.randint(1, STEPS - 4)
        running.until(partial(_came_to, run, part, goal), f"{part} came to {goal}")
        os.kill(running.pid, number)
        lost = expect(running.wait(), 128 + number)
        wrong, seen = complaint(running.said(), f"stopped by {number.name} after step", "the same command resumes")
        newest = run.checkpoints(part)[-1:]
        if not newest or int(newest[0].name.removeprefix("step-")) != run.steps(part):
            lost.append("the last step is in no checkpoint")
        problems, _ = run.finish()
        yield Trial(1, lost + wrong + problems + place.lost(run, "tokenizer"), seen)


def impatient(place: Place, chance: Random) -> Iterator[Trial]:
    """A second signal while the first one waits for a step: the run stops at once, and can be resumed."""
    for number, allowed in ((signal.SIGTERM, (-signal.SIGTERM, 143)), (signal.SIGINT, (130,))):
        name = f"second-{number.name}-{chance.random():.6f}"
        with stalled_picture(place, name, chance) as (run, running, _):
            os.kill(running.pid, number)
            time.sleep(1)
            lost = [] if running.process.poll() is None else ["the first signal did not wait for the step"]
            began = time.monotonic()
            os.kill(running.pid, number)
            lost += expect(running.wait(), *allowed)
            took = time.monotonic() - began
            lost += [] if took < _AT_ONCE else [f"went on for {took:.0f} s after the second signal"]
            seen = line_with(running.said(), "^aligntok: ") or "the end, by the signal itself"
        problems, _ = run.finish()
        yield Trial(1, lost + problems + place.lost(run, "streamed"), seen)
