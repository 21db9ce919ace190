"""Training checkpoints: exact, atomic, checked, written while training goes on.

    step-00000400/state.safetensors    weights, buffers, averages, optimizer moments (or shards, see state.py)
    step-00000400/state.json           step, guard, what decides the course of the run, a checksum of every file
    best-00000300/                     with training.keep_best: the checkpoint after the lowest mean of that value

Random numbers and data position need no saving: both are functions of the seed and the step. A folder that is
incomplete or fails its checksums is named, passed over and the one before it is used. To go on from a best checkpoint,
rename it to step-... and remove the later ones.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import warnings
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import distributed

from aligntok.config import TrainingConfig
from aligntok.errors import UserError
from aligntok.runtime.files import digest, remove_unfinished, unfinished_folder
from aligntok.runtime.world import current
from aligntok.training.objective import Objective, Values
from aligntok.training.recovery.best import BestValue
from aligntok.training.recovery.course import ADDED, FRESH, by_content
from aligntok.training.recovery.state import (
    HostCopy,
    State,
    apply,
    collect,
    group_steps,
    is_sharded,
    set_group_steps,
    write_shards,
    write_whole,
)


class Checkpoints:
    """The checkpoints of one training part; a context that ends when the last one is on disk.

    Args:
        folder: where they lie; made on the first save.
        training: keep_checkpoints, keep_best.
        course: see `course`; a checkpoint with another one is refused.
    """

    def __init__(self, folder: Path, training: TrainingConfig, course: dict[str, Any]) -> None:
        self.folder, self.keep, self.course = folder, max(1, training.keep_checkpoints), course
        self.best = None if training.keep_best is None else BestValue(training.keep_best)
        self.world = current()
        group = distributed.new_group(backend="gloo") if self.world.size > 1 else None
        assert group is None or isinstance(group, distributed.ProcessGroup)  # every process belongs to it
        self.group = group  # of the writing threads
        self._copy = HostCopy()
        self._writer: threading.Thread | None = None
        self._failure: BaseException | None = None

    def __enter__(self) -> Checkpoints:
        if self.world.main:
            remove_unfinished(self.folder, lambda name: name.startswith(("step-", "best-")))
        self._meet()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.wait()
        elif not isinstance(error, KeyboardInterrupt) and self._writer is not None:
            self._writer.join()

    @property
    def fingerprint(self) -> str:
        """Short hash of the course of the run."""
        return hashlib.sha256(json.dumps(self.course, sort_keys=True).encode()).hexdigest()[:16]

    def observe(self, values: Values) -> None:
        """Take in a step's logged values, for `keep_best`."""
        if self.best is not None:
            self.best.observe(values)

    def save(self, step: int, objective: Objective, guard: dict[str, Any], regular: bool = True) -> None:
        """Copy the state after `step` steps; a thread writes it, and removes older ones when it is on disk.

        Args:
            guard: numbers of the guard, handed back by `restore`.
            regular: False for one that a signal asked for, which does not end the mean behind `keep_best`.

        Raises:
            UserError: the disk refused the save before this one; what was there before is untouched.
        """
        self.wait()
        best = self.best is not None and regular and step > 0 and self.best.close(step)
        document = {"step": step, "guard": guard, "course": self.course, "group_steps": group_steps(objective)}
        if self.best is not None:
            document["best"] = self.best.state()
        state = self._copy.take(collect(objective))
        self._writer = threading.Thread(target=self._write, args=(step, state, document, best), daemon=True)
        self._writer.start()

    def check(self) -> None:
        """Raise the UserError of a save that has failed in the meantime; training calls it at every step."""
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def wait(self) -> None:
        """Return when the last save is on disk; raises its UserError where it failed."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        self.check()

    def restore(self, objective: Objective) -> tuple[int, dict[str, Any]]:
        """Load the newest sound checkpoint into `objective`: (steps done, the guard's numbers); (0, {}) without any.

        Raises:
            UserError: the checkpoint was made with another configuration, or all there are are damaged.
        """
        self.wait()
        folder, problem = self._agreed(self._choose() if self.world.main else None)
        if problem:
            raise UserError(problem)
        if folder is None:
            return 0, {}
        document = json.loads((folder / "state.json").read_text())
        apply(objective, folder, self.group)
        set_group_steps(objective, document["group_steps"])
        if self.best is not None and "best" in document:
            self.best.load_state(document["best"])
            if self.best.step == document["step"] and self.world.main:
                self._keep_best(document["step"])
        return document["step"], document["guard"]

    def remove(self) -> None:
        """Delete all but the best, once the part's result is on disk."""
        if self.world.main:
            discard(self.folder)

    def _write(self, step: int, state: State, document: dict[str, Any], best: bool) -> None:
        """Body of the writing thread; what goes wrong is kept for `check`."""
        try:
            self._copy.ready()
            if is_sharded(state):
                self._write_shards(step, state, document)
            else:
                with unfinished_folder(self._path(step), replaces_any=True) as unfinished:
                    write_whole(state, unfinished)
                    _seal(unfinished, document)
            if self.world.main:
                if best:
                    self._keep_best(step)
                upto = [folder for folder in self._existing("step") if folder.name <= self._path(step).name]
                for old in upto[: -self.keep]:  # later ones can only be damaged: they must not push this one out
                    shutil.rmtree(old, ignore_errors=True)
        except OSError as error:
            self._failure = UserError(f"could not write {self._path(step)}: {error}; earlier checkpoints are untouched")
        except BaseException as error:
            self._failure = error

    def _write_shards(self, step: int, state: State, document: dict[str, Any]) -> None:
        """All processes fill the folder that the first one makes, seals and renames."""
        made = False
        try:
            if not self.world.main:
                made, folder = True, self._agreed(None)
                if folder is None:
                    raise UserError(f"could not write {self._path(step)}: the first process could not make the folder")
                write_shards(state, folder, self.group)
                return
            with unfinished_folder(self._path(step), replaces_any=True) as unfinished:
                made = True
                write_shards(state, self._agreed(unfinished), self.group)
                _seal(unfinished, document)
        finally:
            if not made:
                self._agreed(None)
            self._meet()

    def _keep_best(self, step: int) -> None:
        """A second name for the files of a checkpoint; the earlier best goes."""
        target = self.folder / f"best-{step:08d}"
        if not target.exists():
            with unfinished_folder(target) as unfinished:
                for file in self._path(step).iterdir():
                    try:
                        os.link(file, unfinished / file.name)
                    except OSError:  # no hard links on this file system
                        shutil.copy2(file, unfinished / file.name)
        for old in self._existing("best"):
            if old != target:
                shutil.rmtree(old, ignore_errors=True)

    def _choose(self) -> tuple[Path | None, str | None]:
        """The newest sound checkpoint, or None; and what forbids to go on."""
        damaged = []
        for folder in reversed(self._existing("step")):
            problem = damage(folder)
            if problem is None:
                return folder, self._difference(folder)
            damaged.append(f"{folder.name} is damaged ({problem})")
            warnings.warn(f"checkpoint {self.folder / damaged[-1]}; using the one before it", stacklevel=3)
        if damaged:
            return None, f"no sound checkpoint in {self.folder}: {'; '.join(damaged)}. Remove the folder to start over"
        return None, None

    def _difference(self, folder: Path) -> str | None:
        """What tells this run from the one that wrote the checkpoint, as a message."""
        then = json.loads((folder / "state.json").read_text())["course"]
        absent = "absent"
        if then.pop("data.path", None) is not None:  # before 0.2: the place of the images stood for what they are
            then["image_set"] = self.course.get("image_set", absent)
            if str(self.course.get("start")).startswith(FRESH):  # drawn weights were part of it
                then["start"] = self.course["start"]
        then = {key: by_content(key, value) for key, value in then.items()}  # before 0.2: where weights lay
        then = {key: value for key, value in ADDED.items() if key in self.course} | then
        differ = [key for key in {**then, **self.course} if then.get(key, absent) != self.course.get(key, absent)]
        if not differ:
            return None
        first = f"{differ[0]} was {then.get(differ[0], absent)}, is {self.course.get(differ[0], absent)}"
        more = f" (and {', '.join(differ[1:4])}{', ...' if len(differ) > 4 else ''})" if len(differ) > 1 else ""
        return (
            f"checkpoint {folder} was made with another configuration or other images: {first}{more}; "
            f"give another output folder, or remove {self.folder} to start over"
        )

    def _agreed(self, value: Any) -> Any:
        """The first process's value, in all of them."""
        if self.group is None:
            return value
        box = [value]
        distributed.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def _meet(self) -> None:
        if self.group is not None:
            distributed.barrier(group=self.group)

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _existing(self, kind: str) -> list[Path]:
        return sorted(self.folder.glob(f"{kind}-*"))


def discard(folder: Path) -> None:
    """Delete the checkpoints of a finished part, but for the best."""
    for checkpoint in folder.glob("step-*"):
        shutil.rmtree(checkpoint, ignore_errors=True)
    with suppress(OSError):  # not there, or not empty
        folder.rmdir()


def _seal(folder: Path, document: dict[str, Any]) -> None:
    """Write state.json: the document with the checksums of all files there, and its own."""
    document = document | {"sha256": {file.name: digest(file) for file in sorted(folder.iterdir())}}
    sealed = folder / "state.json"
    sealed.write_text(json.dumps(document | {"seal": _own_digest(document)}, indent=1))
    for name in document["sha256"]:
        shutil.copymode(sealed, folder / name)  # safetensors makes files that only their owner can read


def _own_digest(document: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def damage(folder: Path) -> str | None:
    """What is wrong with the files of a checkpoint, or None."""
    try:
        document = json.loads((folder / "state.json").read_text())
        seal = document.pop("seal")
        if seal != _own_digest(document):
            return "state.json fails its checksum"
        for name, expected in document["sha256"].items():
            if not (folder / name).is_file():
                return f"{name} is missing"
            if digest(folder / name) != expected:
                return f"{name} fails its checksum"
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        return f"state.json cannot be read: {error}"
    return None
