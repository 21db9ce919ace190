"""Killed with SIGKILL ten times, in every stage and in the generator: the result is that of a run left alone, to the
bit. And the two signals that ask politely."""

import dataclasses
import itertools
import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml
from forked import Forked
from helpers import MACHINE_VALUES, tiny_recipe, write_pictures
from safetensors.torch import load_file

PARTS = ("stage1", "stage2", "stage3", "generator")
STEPS, EVERY = 8, 2
# Where the thread that writes checkpoints is killed: before the tensors, before the checksums, when the second file
# goes to disk, and between the renaming of the new one and the removal of what is older
WRITING = [("write_whole", 1), ("_seal", 1), ("_flush", 2), ("_flush_names", 1)]
COMMANDS = {part: "train-generator" if part == "generator" else "train-tokenizer" for part in PARTS}


@pytest.fixture(scope="module")
def forked():
    with Forked() as parent:
        yield parent


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"), 20)


def arguments(command: str, folder: Path, pictures: Path) -> list[str]:
    """A command line for the tiny recipe: every loss, two checkpoints in sight, noise from every generator."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe = tiny_recipe(folder, pictures)
    for stage in vars(recipe.tokenizer.stages).values():
        stage.steps, stage.decoder_noise = STEPS, 0.1
    recipe.tokenizer.losses.lecam_weight = 1e-3
    recipe.generator.steps = STEPS
    for training in (recipe.tokenizer.training, recipe.generator.training):
        training.checkpoint_every, training.keep_best = EVERY, "loss"
    file = folder.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(json.loads(json.dumps(dataclasses.asdict(recipe)))))
    return [command, "--config", str(file)]


def steps_taken(folder: Path, part: str) -> int:
    """Steps of a part that metrics.jsonl has."""
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else []
    return sum(f'"part": "{part}"' in line for line in lines)


def finish(
    forked: Forked, folder: Path, pictures: Path, commands: tuple = ("train-tokenizer", "train-generator")
) -> None:
    for command in commands:
        forked.start(arguments(command, folder, pictures), folder.with_suffix(".log"))
        assert forked.wait() == 0, folder.with_suffix(".log").read_text()[-2000:]


def results(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in sorted(folder.rglob("*.safetensors")):
        found |= {f"{file.relative_to(folder)}/{key}": value for key, value in load_file(file).items()}
    return found


def records(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in MACHINE_VALUES} for line in lines]


@pytest.fixture(scope="module")
def straight(tmp_path_factory, forked, pictures) -> Path:
    folder = tmp_path_factory.mktemp("straight") / "run"
    finish(forked, folder, pictures)
    return folder


def test_ten_kills_change_nothing(forked, pictures, straight, tmp_path):
    chance, folder, kills = random.Random(0), tmp_path / "run", 0

    def killed(part: str, fate: dict) -> int:
        forked.start(arguments(COMMANDS[part], folder, pictures), folder.with_suffix(".log"), fate)
        assert forked.wait() == -signal.SIGKILL, (part, fate)
        assert 0 < steps_taken(folder, part) < STEPS, "in the midst of this part"
        return 1

    for part, (name, call) in zip(PARTS, WRITING, strict=True):
        if part == "generator":
            finish(forked, folder, pictures, ("train-tokenizer",))
        kills += killed(part, {"part": part, "step": chance.randint(1, 2), "delay": chance.uniform(0, 0.03)})
        kills += killed(part, {"at": name, "call": call, "does": "kill"})
        if part in ("stage2", "generator"):
            kills += killed(part, {"part": part, "step": STEPS - 2, "delay": chance.uniform(0, 0.001)})
    assert kills == 10
    finish(forked, folder, pictures)
    expected, found = results(straight), results(folder)
    assert expected.keys() == found.keys()
    kinds = {Path(name).parts[:2] for name in expected}
    assert {(s, "tokenizer") for s in PARTS[:3]} | {(s, "discriminator") for s in PARTS[:3]} < kinds
    assert ("generator", "model.safetensors") in kinds
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert records(folder) == records(straight)
    assert [(r["part"], r["step"]) for r in records(folder)] == list(itertools.product(PARTS, range(1, STEPS + 1)))
    assert list(folder.rglob(".*")) == [], "nothing unfinished is left lying about"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_with_a_checkpoint_and_their_status(number, forked, pictures, straight, tmp_path):
    folder = tmp_path / "run"
    pid = forked.start(arguments("train-tokenizer", folder, pictures), folder.with_suffix(".log"))
    while steps_taken(folder, "stage1") < 3:
        time.sleep(0.002)
    os.kill(pid, number)
    assert forked.wait() == 128 + number
    said = folder.with_suffix(".log").read_text()
    assert f"stopped by {signal.Signals(number).name} after step" in said and "the same command resumes" in said
    newest = sorted((folder / "checkpoints" / "stage1").glob("step-*"))[-1]
    assert int(newest.name.removeprefix("step-")) == steps_taken(folder, "stage1")


def _catches(pid: int, number: int) -> bool:
    """Whether a process has a handler of its own for a signal; training gives its handlers up at the first one."""
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigCgt:"))
    return bool(int(line.split()[1], 16) >> (number - 1) & 1)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_a_second_signal_stops_at_once(number, status, forked, pictures, tmp_path):
    folder = tmp_path / "run"
    fate = {"at": "write_whole", "call": 1, "does": "hang"}
    pid = forked.start(arguments("train-tokenizer", folder, pictures), folder.with_suffix(".log"), fate)
    while steps_taken(folder, "stage1") < 2 * EVERY:  # where the next save waits for the first
        time.sleep(0.002)
    os.kill(pid, number)
    while _catches(pid, signal.SIGTERM):  # two signals before the first is noticed would count as one
        time.sleep(0.002)
    assert os.path.exists(f"/proc/{pid}"), "the first one waits for the checkpoint"
    began = time.monotonic()
    os.kill(pid, number)
    assert forked.wait() == status
    assert time.monotonic() - began < 5
