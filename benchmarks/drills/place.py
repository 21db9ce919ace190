"""Where drills happen: a recipe of seconds, the real command line in processes of its own, and what counts as lost.

Nothing is put into the programs that are drilled: faults come from outside (signals, files, mounts, limits), at moments
that are read off the files of the run. The one exception is the clock, see benchmarks.drills.inputs.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

ROOT = Path(__file__).parents[2]
STEPS, EVERY = 12, 2  # of every part, and between two checkpoints
LIMIT = 300  # seconds for one command that takes ten: whatever takes longer hangs
PARTS = ("stage1", "stage2", "stage3")
# What a record of metrics.jsonl says of the machine and not of the training
MACHINE_VALUES = {"seconds", "images_per_second", "memory_gib", "data_wait", "mfu"}
_STAGE = {"steps": STEPS, "learning_rate": 1e-3, "gan_start": 3, "decoder_noise": 0.1}
_TRAINING = {"batch_size": 4, "precision": "fp32", "log_every": 1, "checkpoint_every": EVERY}
RECIPE: dict[str, Any] = {
    "data": {"image_size": 32, "held_out": 0.2, "workers": 0},
    "tokenizer": {
        "crop": "center",
        "model": {
            "encoder": {"name": "vit_tiny_patch16_224.augreg_in21k", "weights": "random", "layer": 1},
            "adapter": {"latent_channels": 8},
            "decoder": {"base_channels": 8, "channel_multipliers": [1, 1, 1, 1, 2], "blocks": 0, "groups": 4},
        },
        "losses": {
            "perceptual": {"kind": "none"},
            "discriminator": {"base_channels": 8, "layers": 1},
            "lecam_weight": 1e-3,
        },
        "stages": {
            "stage1": {"trains": ["adapter", "decoder"], **_STAGE},
            "stage2": {
                "trains": ["encoder", "adapter", "decoder"],
                "semantic": {"weight": 1.0},
                "ema_decay": 0.9,
                "gradient_clip": 1.0,
                **_STAGE,
            },
            "stage3": {"trains": ["decoder"], **_STAGE},
        },
        "training": _TRAINING,
    },
    "generator": {
        "model": {"size": "custom", "depth": 1, "width": 32, "heads": 2},
        "training": _TRAINING,
        "steps": STEPS,
        "ema_decay": 0.9,
    },
}
STREAMED = [
    "--tokenizer.crop=random",
    "--data.workers=1",
    "--data.held_out=0",
    "--tokenizer.stages.stage2.steps=0",
    "--tokenizer.stages.stage3.steps=0",
]


class Failed(Exception):
    """A fault that could not be made, or a run that hangs: the drill proves nothing, which counts as a loss."""


@dataclass
class Trial:
    """Some faults in one run: how many, what was lost by them, and the line that the user saw."""

    faults: int
    lost: list[str]
    seen: str = ""


class Running:
    """One process of the command line; what it says goes to a file."""

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str], prepare: Any) -> None:
        self.log = log
        with log.open("w") as output:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=ROOT,
                start_new_session=True,
                preexec_fn=prepare,
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def until(self, condition: Callable[[], Any], what: str, pause: float = 0.001) -> Any:
        """Wait for the moment of a fault; returns what the condition returned.

        Raises:
            Failed: the process has ended before.
        """
        ends = time.monotonic() + LIMIT
        while not (found := condition()):
            if self.process.poll() is not None:
                raise Failed(f"ended with status {self.process.returncode} before {what}: {last_line(self.said())}")
            if time.monotonic() > ends:
                self.end()
                raise Failed(f"hangs before {what}")
            time.sleep(pause)
        return found

    def wait(self) -> int:
        """Exit status, negative for a signal; whatever it has started is gone afterwards.

        Raises:
            Failed: it hangs.
        """
        try:
            return self.process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            raise Failed(f"hangs: {last_line(self.said())}") from None
        finally:
            self.end()

    def end(self) -> None:
        """Kill the process and all that it has started."""
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()


@dataclass
class Run:
    """One command line, which may be given several times, and its output folder."""

    folder: Path
    logs: Path  # their names begin so
    arguments: list[str]
    processes: int = 1
    environment: dict[str, str] = field(default_factory=dict)
    given: int = 0

    def start(self, *more: str, prefix: Sequence[str] = (), prepare: Callable[[], Any] | None = None) -> Running:
        """Give the command."""
        launcher = ["-m", "aligntok"]
        if self.processes > 1:
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self.processes}", *launcher]
        self.given += 1
        log = self.logs.with_name(f"{self.logs.name}-{self.given}.log")
        # One thread and one instruction set of MKL: sums of the same numbers are then the same bits
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_CBWR": "AVX2,STRICT", "PYTHONPATH": str(ROOT)}
        command = [*prefix, sys.executable, *launcher, *self.arguments, *more]
        return Running(command, log, environment | self.environment, prepare)

    def finish(self) -> tuple[list[str], str]:
        """Give the command and let it come to its end: (what went wrong, what it said)."""
        running = self.start()
        status = running.wait()
        return ([] if status == 0 else [f"status {status} at the end: {last_line(running.said())}"]), running.said()

    def steps(self, part: str) -> int:
        """Steps of a part that metrics.jsonl has."""
        file = self.folder / "metrics.jsonl"
        return file.read_text(errors="replace").count(f'"part": "{part}"') if file.is_file() else 0

    def checkpoints(self, part: str) -> list[Path]:
        return sorted((self.folder / "checkpoints" / part).glob("step-*"))

    def unfinished(self, part: str) -> set[Path]:
        """Checkpoints of the part, or for "cache" shards, on their way to the disk."""
        return set(self.folder.glob(".latents-*.tmp" if part == "cache" else f"checkpoints/{part}/.step-*.tmp"))


class Place:
    """The folder of a session of drills, with the results of runs that nothing disturbed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pictures = write_pictures(folder / "pictures", 20)
        self.recipe = folder / "recipe.yaml"
        self.recipe.write_text(yaml.safe_dump(RECIPE))
        self._straight: dict[str, Run] = {}
        self._locks = {kind: threading.Lock() for kind in ("tokenizer", "generator", "cache", "streamed", "ranks")}

    def run(self, kind: str, name: str, pictures: Path | None = None, folder: Path | None = None) -> Run:
        """A run that has not begun.

        Args:
            kind: tokenizer, generator, cache, streamed (random crops, Stage 1 alone) or ranks (two processes).
            name: of the drill.
            pictures: other images than those of all runs.
            folder: where its output goes instead of a new folder here.
        """
        output = folder or self.folder / f"{name}-{kind}"
        images, logs = str(pictures or self.pictures), self.folder / f"{name}-{kind}"
        if kind == "cache":
            tokenizer = self.straight("tokenizer").folder / "tokenizer"
            arguments = ["cache-latents", f"--tokenizer={tokenizer}", f"--images={images}", f"--output={output}"]
            return Run(
                output, logs, [*arguments, "--image_size=32", "--shard_size=1", "--workers=0", "--precision=fp32"]
            )
        command = "train-generator" if kind == "generator" else "train-tokenizer"
        arguments = [command, f"--config={self.recipe}", f"--output={output}", f"--data.path={images}"]
        if kind == "generator":
            arguments.append(f"--generator.tokenizer={self.straight('tokenizer').folder / 'tokenizer'}")
        if kind == "streamed":
            arguments += STREAMED
        return Run(output, logs, arguments, processes=2 if kind == "ranks" else 1)

    def straight(self, kind: str) -> Run:
        """The run of this kind that nothing disturbs; made when first asked for."""
        with self._locks[kind]:
            if kind not in self._straight:
                run = self.run(kind, "straight")
                problems, _ = run.finish()
                if problems:
                    raise Failed(f"the undisturbed run: {problems[0]}")
                self._straight[kind] = run
            return self._straight[kind]

    def lost(self, run: Run, kind: str) -> list[str]:
        """What a run that has come to its end lacks of the one that nothing disturbed."""
        return losses(run.folder, self.straight(kind).folder)


def losses(found: Path, expected: Path) -> list[str]:
    """Differences between the outputs of two runs, and what was left lying about; [] where nothing is lost."""
    lost = []
    wanted, there = _results(expected), _results(found)
    lost += [f"{name} is missing" for name in wanted.keys() - there.keys()]
    lost += [f"{name} is left over" for name in there.keys() - wanted.keys()]
    lost += [f"{name} differs" for name in wanted.keys() & there.keys() if wanted[name] != there[name]]
    if (expected / "metrics.jsonl").is_file() and records(found) != records(expected):
        lost.append("metrics.jsonl differs")
    lost += [f"{path.relative_to(found)} is unfinished" for path in found.rglob(".*")]
    return sorted(lost)


def _results(folder: Path) -> dict[str, bytes]:
    """Weights, latents and documents, and not what was measured."""
    files = (path for path in folder.rglob("*") if path.suffix in (".safetensors", ".json") and path.is_file())
    return {str(f.relative_to(folder)): f.read_bytes() for f in files}


def records(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what it says of the machine; a line that is none shows as one."""
    file = folder / "metrics.jsonl"
    found = []
    for line in file.read_text().splitlines() if file.is_file() else ():
        try:
            found.append({k: v for k, v in json.loads(line).items() if k not in MACHINE_VALUES})
        except ValueError:
            found.append({"broken": line})
    return found


def last_line(said: str) -> str:
    lines = said.strip().splitlines()
    return lines[-1] if lines else "nothing was said"


def complaint(said: str, *words: str) -> tuple[list[str], str]:
    """The one line that tells the user what happened: (what is wrong with it, the line)."""
    lines = [line for line in said.splitlines() if line.startswith("aligntok: ")]
    if len(lines) != 1 or "Traceback" in said:
        return [f"{len(lines)} lines of explanation{', a traceback' * ('Traceback' in said)}"], last_line(said)
    return [f"the message lacks {word!r}" for word in words if word not in lines[0]], lines[0]


def expect(status: int, *allowed: int) -> list[str]:
    """[] for one of the documented exit statuses."""
    return [] if status in allowed else [f"status {status}, expected {' or '.join(map(str, allowed))}"]


def line_with(said: str, pattern: str) -> str:
    """The first line that a pattern is found in, or ""."""
    return next((line for line in said.splitlines() if re.search(pattern, line)), "")


def write_pictures(folder: Path, count: int) -> Path:
    """Blots of colour as PNG files in two classes."""
    random = np.random.default_rng(0)
    for index in range(count):
        target = folder / ("even", "odd")[index % 2]
        target.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 256, (5, 5, 3), np.uint8)
        Image.fromarray(pixels).resize((40, 40), Image.Resampling.BICUBIC).save(target / f"{index:03d}.png")
    return folder
