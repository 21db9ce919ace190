"""Runs the real commands on a recipe of a few thousand parameters, with one switch or several turned.

`Bench.run` is `aligntok COMMAND` but for the reading of a command line: `main` with the recipe in the place of
`parse_recipe`'s. It ends with an `Outcome`. `turn` puts dotted names into a recipe.
"""

from __future__ import annotations

import copy
import io
import json
import os
import signal
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from helpers import caption, of_text, tiny_recipe, write_pictures
from safetensors.torch import load_file
from text_encoders import write_encoder
from zoo_rivals import rival_recipe

from aligntok.cli import main
from aligntok.config import Recipe
from aligntok.config.from_dict import from_dict
from aligntok.training.monitoring.telemetry import PartLog

COMMANDS = {
    "generator": "train-generator",
    "text": "train-generator",
    "tokenizer": "train-tokenizer",
    "rival": "train-rival",
}


@dataclass
class Outcome:
    """What a command has left."""

    status: int
    said: str
    folder: Path
    recipe: Recipe

    @property
    def records(self) -> list[dict[str, Any]]:
        file = self.folder / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """Of the finished parts."""
        files = [f for f in sorted(self.folder.rglob("model.safetensors")) if "snapshots" not in f.parts]
        return {f"{f.parent.relative_to(self.folder)}/{k}": v for f in files for k, v in load_file(f).items()}

    @property
    def previews(self) -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in sorted((self.folder / "previews").glob("*.png"))}


Check = Callable[[Outcome, Outcome], None]


@dataclass
class Switch:
    """One or several fields of a recipe turned, and what has to come of it.

    Args:
        command: "generator", "text" (a generator that reads captions), "tokenizer" (Stage 2 alone) or "rival".
        fields: dotted names and their values.
        check: called with the outcome and that of the same command without the fields.
        beside: what both have, for the effect to show.
        kind: of the rival.
    """

    command: str
    fields: dict[str, Any]
    check: Check
    beside: dict[str, Any] = field(default_factory=dict)
    kind: str = "vae"

    def __str__(self) -> str:
        texts = (f"{name.split('.', 1)[1]}={value}" for name, value in self.fields.items())
        return f"{self.kind if self.command == 'rival' else self.command}: {', '.join(texts)}"


class Bench:
    """Pictures, a finished tokenizer with a cache of its latents, and outcomes to compare with."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.pictures, self._plain, self._runs = folder, caption(write_pictures(folder / "p", 20)), {}, 0
        self.encoder = write_encoder(folder / "encoder", "bert")
        done = self.run("tokenizer", {})
        assert done.status == 0, done.said
        self._plain["tokenizer", "{}", "vae"] = done
        self.tokenizer, self.cache = done.folder / "tokenizer", folder / "cache"
        given = {"tokenizer": self.tokenizer, "images": self.pictures, "output": self.cache, "image_size": 32}
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            assert main(["cache-latents", *(f"--{name}={value}" for name, value in given.items()), "--workers=0"]) == 0

    def recipe(self, command: str, fields: dict[str, Any], kind: str = "vae", output: Path | None = None) -> Recipe:
        """The recipe of a command that takes a second: Stage 2 alone, with every loss from its second step."""
        self._runs += 1
        folder = output or self.folder / f"run-{self._runs}"
        if command == "rival":
            recipe = rival_recipe(folder, self.pictures, kind)
            recipe.rival.stage.steps, recipe.rival.stage.gan_start = 3, 1
        else:
            stage2 = {"steps": 3, "gan_start": 1}
            recipe = tiny_recipe(folder, self.pictures, stage1={"steps": 0}, stage2=stage2, stage3={"steps": 0})
        recipe.generator.learning_rate = 1e-2  # samples then show what the sampler does
        recipe.generator.model.classes = None
        if command in ("generator", "text"):
            recipe.generator.tokenizer = str(self.tokenizer)
        if command == "text":
            of_text(recipe, self.encoder)
        return turn(recipe, fields)

    def run(self, command: str, fields: dict[str, Any], kind: str = "vae", output: Path | None = None) -> Outcome:
        recipe, said = self.recipe(command, fields, kind, output), io.StringIO()
        parsed = mock.patch("aligntok.cli.parse_recipe", lambda *_, **__: recipe)
        with parsed, redirect_stderr(said), redirect_stdout(said):
            status = main([COMMANDS[command]])
        return Outcome(status, said.getvalue(), Path(recipe.output), recipe)

    def plain(self, command: str, fields: dict[str, Any], kind: str = "vae") -> Outcome:
        """The outcome of a command to compare with, run once."""
        key = (command, repr(fields), kind)
        if key not in self._plain:
            self._plain[key] = self.run(command, fields, kind)
        return self._plain[key]

    def check(self, switch: Switch) -> None:
        """Run a switch; it ends well, says its MFU, has finite losses and weights, and passes its own check."""
        found = self.run(switch.command, switch.beside | switch.fields, switch.kind)
        if switch.check.__name__ != "refused":
            sound(found)
        switch.check(found, self.plain(switch.command, switch.beside, switch.kind))


def interrupted(bench: Bench, command: str, fields: dict[str, Any], monkeypatch) -> Outcome:
    """A run that SIGTERM stops after its second step, and the same command again."""
    original, folder = PartLog.step, bench.folder / f"interrupted-{len(list(bench.folder.iterdir()))}"

    def step_then_signal(self, done, values, images):
        original(self, done, values, images)
        if done == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(PartLog, "step", step_then_signal)
        stopped = bench.run(command, fields, output=folder)
    assert stopped.status == 128 + signal.SIGTERM, stopped.said
    torch._dynamo.reset()  # another process would begin with nothing compiled
    return bench.run(command, fields, output=folder)


def sound(found: Outcome) -> None:
    assert found.status == 0, found.said
    assert found.records and "no MFU" not in found.said and all("mfu" in record for record in found.records)
    values = [v for record in found.records for v in record.values() if isinstance(v, float)]
    assert torch.tensor(values).isfinite().all(), found.records
    assert all(value.isfinite().all() for value in found.weights.values())
    assert not [name for name in found.weights if "_orig_mod" in name]


def turn(recipe: Recipe, fields: dict[str, Any]) -> Recipe:
    """A recipe with dotted names set, read again as from a file."""
    data = asdict(recipe)
    for name, value in fields.items():
        *way, last = name.split(".")
        part = data
        for step in way:
            part = part[step]
        part[last] = copy.deepcopy(value)
    return from_dict(Recipe, json.loads(json.dumps(data)))


def same(found: Outcome, plain: Outcome) -> None:
    """The weights of the plain run, to the bit."""
    one, two = found.weights, plain.weights
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


def near(found: Outcome, plain: Outcome) -> None:
    """The weights of the plain run, but for rounding: on average less than a hundredth of the smallest rate."""
    one, two = found.weights, plain.weights
    assert one.keys() == two.keys()
    far = {name: float((one[name].float() - two[name].float()).abs().mean()) for name in one}
    assert max(far.values()) < 1e-5, max(far.items(), key=lambda entry: entry[1])


def other(found: Outcome, plain: Outcome) -> None:
    """Other weights than those of the plain run: the switch does something."""
    one, two = found.weights, plain.weights
    shared = [name for name in one if name in two and one[name].shape == two[name].shape]
    assert any(not torch.equal(one[name], two[name]) for name in shared) or one.keys() != two.keys()
