"""What every process of test_distributed.py runs: the tiny recipe; its generator in micro-batches; then a run that a
process's NaN disturbs, and one that a process's signal stops and that is resumed. All recompute their blocks.

Arguments: ddp or fsdp, folder of pictures, OUTPUT. Writes OUTPUT/{straight,parts,disturbed,stopped} and said-RANK.json.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from helpers import tiny_recipe
from rich.console import Console

from aligntok.errors import UserError
from aligntok.runtime import collectives
from aligntok.training import distributed, loop
from aligntok.training.monitoring.telemetry import PartLog, Telemetry
from aligntok.training.recovery.guard import Interrupted
from aligntok.training.train_generator import train_generator
from aligntok.training.train_tokenizer import TokenizerTraining


def recipe_for(mode, folder, pictures):
    recipe = tiny_recipe(folder, pictures)
    for training in (recipe.tokenizer.training, recipe.generator.training):
        training.parallel, training.checkpointing = mode, {"ddp": "selective", "fsdp": "full"}[mode]
    return recipe


def run(recipe, telemetry=None):
    TokenizerTraining(recipe, telemetry).run()
    train_generator(recipe, telemetry)


def disturbed(recipe, rank):
    """One process gets a NaN in the images of Stage 1's second step; what the guard says."""
    original, said, calls = loop.run_phase, [], []

    def poisoned(objective, phase, batch, guard, warn):
        calls.append(phase.name)
        if len(calls) == 2 and rank == 1:
            batch = batch | {"images": batch["images"] * float("nan")}
        return original(objective, phase, batch, guard, said.append)

    loop.run_phase = poisoned
    recipe.tokenizer.stages.stage2.steps = recipe.tokenizer.stages.stage3.steps = 0
    TokenizerTraining(recipe).run()
    loop.run_phase = original
    return said


def stopped(recipe, rank):
    """One process gets SIGTERM in Stage 2 and in the generator; both stop, and the run is resumed."""
    original, codes = PartLog.step, []

    def step_then_signal(self, done, values, images):
        original(self, done, values, images)
        if (self.name, done) in (("stage2", 3), ("generator", 2)) and rank == 1 and (self.name, done) not in seen:
            seen.add((self.name, done))
            os.kill(os.getpid(), signal.SIGTERM)

    seen = set()
    PartLog.step = step_then_signal
    while True:
        try:
            run(recipe)
            return codes
        except Interrupted as interrupted:
            codes.append([interrupted.exit_code, str(interrupted)])


def failure_on_main():
    """What each process is told when the first one's work fails."""

    def work():
        raise UserError("the disk is full")

    try:
        collectives.on_main(work)
    except UserError as error:
        return str(error)


def main(mode, pictures, output):
    torch.set_num_threads(1)
    with distributed.start("cpu") as world:
        console = Console(file=open(output / f"console-{world.rank}.txt", "w"), quiet=not world.main)
        straight = recipe_for(mode, output / "straight", pictures)
        run(straight, Telemetry(straight.output, 1, console))
        parts = recipe_for(mode, output / "parts", pictures)
        parts.generator.tokenizer, parts.generator.training.accumulate = str(output / "straight" / "tokenizer"), 2
        train_generator(parts)
        said = {
            "failure": failure_on_main(),
            "guard": disturbed(recipe_for(mode, output / "disturbed", pictures), world.rank),
            "codes": stopped(recipe_for(mode, output / "stopped", pictures), world.rank),
        }
        (output / f"said-{world.rank}.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main(sys.argv[1], *map(Path, sys.argv[2:]))
