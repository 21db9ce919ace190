"""One training step of every part of the quickstart, with the fused operators and with the references, in one run.

    python -m benchmarks.bench_stages [--parts stage1 stage2 stage3 generator] [--rounds 9] [--profile]

A step is what training does between two batches, adversarial loss on: forward, backward, clipping and optimizer of
every phase, then the moving averages. Sizes, losses and batch are the quickstart's; weights and images are random, and
what frozen networks give is looked up, as there. Both paths start from the same weights and take the same batches in
turn; their first losses must agree before anything is timed. --profile prints the operators that take most of a step.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import gettempdir

import torch
from torch import Tensor

from aligntok.config import Recipe
from aligntok.config.parsing import parse_recipe
from aligntok.data.sources import MemorySource
from aligntok.kernels import use_implementation
from aligntok.losses.perceptual import build_perceptual
from aligntok.models.discriminator import PatchDiscriminator
from aligntok.models.lightning_dit import LightningDiT
from aligntok.models.tokenizer import AlignTok
from aligntok.runtime.devices import choose_precision
from aligntok.training.conditions import by_label
from aligntok.training.feed import move
from aligntok.training.generator_objective import GeneratorObjective
from aligntok.training.loop import run_phase
from aligntok.training.objective import Values
from aligntok.training.recovery.guard import Guard
from aligntok.training.tokenizer_objective import FrozenInputs, TokenizerObjective
from benchmarks.bench_training_step import perturb
from benchmarks.machine import DEVICE, machine_line, seconds_of

PARTS = ("stage1", "stage2", "stage3", "generator")
PATHS = {"reference": "reference", "fused": "auto"}
CLASSES = 12
# Two bf16 paths round differently; the first losses have been seen to agree to about 2e-3
LOSS_TOLERANCE = 1e-2


class Part:
    """One part of the quickstart under one choice of implementations."""

    def __init__(self, part: str, implementation: str) -> None:
        recipe = parse_recipe("quickstart", [], default_recipe="quickstart")
        source = random_pictures(recipe, part)
        self.implementation, self.precision = implementation, choose_precision(DEVICE)
        self.batch = move(source.batch(0), self.precision.device)
        torch.manual_seed(0)
        self.objective = self._generator(recipe) if part == "generator" else self._stage(part, recipe)
        self.last = self.objective.steps - 1  # whose adversarial loss is on
        self.guard = Guard(part, recipe.tokenizer.training, self.objective, source, Path(gettempdir()))
        self.samples: list[float] = []

    def _generator(self, recipe: Recipe) -> GeneratorObjective:
        recipe.generator.model.classes = CLASSES
        channels = recipe.tokenizer.model.adapter.latent_channels
        side = recipe.data.image_size // recipe.tokenizer.model.encoder.downsample
        latents = torch.randn(len(self.batch["labels"]), channels, side, side).to(DEVICE)
        model = perturb(LightningDiT(recipe.generator.model, channels, (side, side)).to(DEVICE))
        return GeneratorObjective(model, lambda batch: latents, by_label(model), recipe.generator, self.precision)

    def _stage(self, part: str, recipe: Recipe) -> TokenizerObjective:
        config, stage = recipe.tokenizer, getattr(recipe.tokenizer.stages, part)
        config.model.encoder.weights = "random"
        tokenizer = AlignTok(config.model).to(DEVICE)
        discriminator = PatchDiscriminator(config.losses.discriminator).to(DEVICE)
        perceptual = build_perceptual(config.losses.perceptual).to(DEVICE).to(memory_format=torch.channels_last)
        tables = {name: self._table(network) for name, network in self._frozen(part, tokenizer).items()}
        return TokenizerObjective(
            tokenizer,
            discriminator,
            perceptual,
            config.losses,
            stage,
            FrozenInputs(**{name: lambda batch, values=values: values for name, values in tables.items()}),
            self.precision,
            config.training,
            config.betas,
        )

    def _frozen(self, part: str, tokenizer: AlignTok) -> dict[str, Callable[[Tensor], Tensor]]:
        """What each stage looks up: the frozen network's output for the one batch."""
        networks: dict[str, dict[str, Callable[[Tensor], Tensor]]] = {
            "stage1": {"features": tokenizer.encoder},
            "stage2": {"snapshot": tokenizer.raw_latents},
            "stage3": {"latents": tokenizer.raw_latents},
        }
        return networks[part]

    @torch.no_grad()
    def _table(self, network: Callable[[Tensor], Tensor]) -> Tensor:
        with self.precision.autocast():
            return network(self.batch["images"]).float()

    def step(self, number: int) -> float:
        """One whole training step as the loop takes it; returns the loss of its first phase."""
        torch.manual_seed(number)
        self.guard.begin(number)
        values: Values = {}
        with use_implementation(self.implementation):
            for phase in self.objective.phases(self.last):
                values = run_phase(self.objective, phase, self.batch, self.guard, print) | values
            self.objective.after_step()
        return values["loss"].item()

    def timed_step(self, number: int) -> None:
        """A step whose seconds are kept."""
        self.samples.append(seconds_of(lambda: self.step(number)))


def random_pictures(recipe: Recipe, part: str) -> MemorySource:
    """As many as one batch of the part has."""
    training = recipe.generator.training if part == "generator" else recipe.tokenizer.training
    random, size = torch.Generator().manual_seed(3), recipe.data.image_size
    pixels = torch.randint(256, (training.batch_size, 3, size, size), generator=random, dtype=torch.uint8)
    labels = torch.randint(CLASSES, (training.batch_size,), generator=random)
    return MemorySource(pixels, labels, training.batch_size, training.seed, flip=False)


def measure(part: str, rounds: int, profile: bool) -> bool:
    """Print a part's line; False if the paths disagree."""
    paths = {name: Part(part, implementation) for name, implementation in PATHS.items()}
    first = {name: path.step(0) for name, path in paths.items()}
    if not abs(first["fused"] - first["reference"]) <= LOSS_TOLERANCE * abs(first["reference"]):
        print(f"{part}: the losses differ ({first}): nothing is timed")
        return False
    for path in paths.values():
        path.step(1)
    for number in range(rounds):
        for path in paths.values():
            path.timed_step(number)
    medians = {name: statistics.median(path.samples) for name, path in paths.items()}
    spread = {name: f"{min(path.samples):.3f} .. {max(path.samples):.3f}" for name, path in paths.items()}
    cells = [f"{medians[name]:.3f} s ({spread[name]})" for name in PATHS]
    print(f"| {part} | {' | '.join(cells)} | {medians['reference'] / medians['fused']:.2f}x |", flush=True)
    if profile:
        for name, path in paths.items():
            with torch.profiler.profile() as found:
                path.step(0)
            print(f"{part}, {name}")
            print(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=8, max_name_column_width=50))
    return True


def main() -> int:
    """Print a table; exit status 1 if two paths disagree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--rounds", type=int, default=9, help="timed steps of each path")
    parser.add_argument("--profile", action="store_true", help="print where a step of each path spends its time")
    options = parser.parse_args()
    print(machine_line())
    print(f"| part | {' | '.join(PATHS)} | ratio |\n|---|---|---|---|")
    return 0 if all([measure(part, options.rounds, options.profile) for part in options.parts]) else 1


if __name__ == "__main__":
    sys.exit(main())
