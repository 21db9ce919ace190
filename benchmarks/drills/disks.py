"""Disks that lie or refuse: damaged checkpoints, no space left, folders that nobody may write to.

Root may write everywhere, so a root's command runs without the two capabilities that ignore permissions (setpriv).
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

from benchmarks.drills.place import (
    EVERY,
    PARTS,
    STEPS,
    Failed,
    Place,
    Run,
    Running,
    Trial,
    complaint,
    expect,
    line_with,
)

_TMPFS = 160 << 20  # bytes: a run of the tiny recipe takes 80 MiB, most of it three checkpoints of Stage 2
_LARGEST = 1 << 20  # bytes of a file that a limited process may write: less than a checkpoint has


def truncated(place: Place, chance: Random) -> Iterator[Trial]:
    """The newest checkpoint loses its end: it is named, and the one before it is used."""

    def shorten(file: Path) -> None:
        os.truncate(file, chance.randrange(file.stat().st_size))

    for name in ("state.safetensors", "state.json"):
        yield _damaged(place, f"truncated-{chance.random():.6f}", name, shorten, chance)


def flipped(place: Place, chance: Random) -> Iterator[Trial]:
    """One bit of the newest checkpoint changes: it is named, and the one before it is used."""

    def flip(file: Path) -> None:
        data = bytearray(file.read_bytes())
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        file.write_bytes(data)

    for name in ("state.safetensors", "state.json"):
        yield _damaged(place, f"flipped-{chance.random():.6f}", name, flip, chance)


def _damaged(place: Place, name: str, file: str, damage: Callable[[Path], None], chance: Random) -> Trial:
    place.straight("tokenizer")
    run, part = place.run("tokenizer", name), chance.choice(PARTS)
    running = run.start()
    running.until(lambda: len(run.checkpoints(part)) > 1 and run.steps(part) > 2 * EVERY, f"two checkpoints of {part}")
    os.kill(running.pid, signal.SIGKILL)
    lost = expect(running.wait(), -signal.SIGKILL)
    newest, earlier = run.checkpoints(part)[-1], run.checkpoints(part)[-2]
    damage(newest / file)
    problems, said = run.finish()
    lost += problems
    seen = line_with(said, f"{newest.name} is damaged")
    lost += [] if seen else [f"{newest.name}, damaged in {file}, is not named"]
    step = int(earlier.name.removeprefix("step-"))
    lost += [] if f"{part}: resumed at step {step} " in said else [f"{earlier.name} was not used"]
    return Trial(1, lost + place.lost(run, "tokenizer"), seen.partition("UserWarning: ")[2] or seen)


def full_disk(place: Place, chance: Random) -> Iterator[Trial]:
    """No space left in the midst of a stage; space is made and the same command given again.

    Everywhere by a limit on the size of files (EFBIG), and where a tmpfs can be mounted on one that is filled up.
    """
    place.straight("tokenizer")
    run = place.run("tokenizer", f"limited-{chance.random():.6f}")
    limits = (_LARGEST, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    running = run.start(prepare=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits))
    yield _refused(place, run, running, "could not write", "File too large")
    with _tmpfs(place.folder / f"tmpfs-{chance.random():.6f}") as folder:
        if folder is None:
            return
        run, part = place.run("tokenizer", folder.name, folder=folder / "run"), chance.choice(PARTS)
        running, goal = run.start(), chance.randint(1, STEPS - 6)
        running.until(lambda: run.steps(part) >= goal, f"{part} came to {goal}")
        _fill(folder / "ballast")
        yield _refused(place, run, running, "could not write", "No space left", remedy=(folder / "ballast").unlink)


def _fill(ballast: Path) -> None:
    """Write until the disk refuses."""
    with ballast.open("wb", buffering=0) as file:
        for size in (1 << 16, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue


@contextmanager
def _tmpfs(folder: Path) -> Iterator[Path | None]:
    """A disk of its own; None where this user cannot mount one."""
    folder.mkdir()
    options = f"size={_TMPFS}"
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(folder)], capture_output=True).returncode:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def read_only(place: Place, chance: Random) -> Iterator[Trial]:
    """A folder that may not be written to: from the start, and in the midst of a stage."""
    place.straight("tokenizer")
    bound = _bound_by_permissions()
    run = place.run("tokenizer", f"readonly-{chance.random():.6f}")
    run.folder.mkdir()
    run.folder.chmod(0o555)
    yield _refused(
        place, run, run.start(prefix=bound), "could not write", "ermission denied", remedy=_writable(run.folder)
    )
    run, part = place.run("tokenizer", f"protected-{chance.random():.6f}"), chance.choice(PARTS)
    running, goal = run.start(prefix=bound), chance.randint(EVERY + 1, STEPS - 6)
    running.until(lambda: run.steps(part) >= goal and run.checkpoints(part), f"{part} came to {goal}")
    folder = run.folder / "checkpoints" / part
    folder.chmod(0o555)
    yield _refused(place, run, running, "could not write", "ermission denied", remedy=_writable(folder))


def _writable(folder: Path) -> Callable[[], None]:
    return lambda: folder.chmod(0o755)


def _bound_by_permissions() -> list[str]:
    """What to put before a command so that permissions hold for it."""
    if os.geteuid() != 0:
        return []
    prefix = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
    if shutil.which("setpriv") is None or subprocess.run([*prefix, "true"], capture_output=True).returncode:
        raise Failed("root needs setpriv (util-linux) to be bound by permissions: install it, or run as another user")
    return prefix


def _refused(place: Place, run: Run, running: Running, *words: str, remedy: Callable[[], None] = lambda: None) -> Trial:
    """A disk refuses: status 2 and one line; after the remedy the same command comes to the same end."""
    try:
        lost = expect(running.wait(), 2)
    finally:
        remedy()
    wrong, seen = complaint(running.said(), *words)
    problems, _ = run.finish()
    return Trial(1, lost + wrong + problems + place.lost(run, "tokenizer"), seen)
