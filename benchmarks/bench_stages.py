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
import time
from collections.abc import Callable
from operator import itemgetter

import torch
from torch import Tensor

from aligntok.cli import parse_recipe
from aligntok.config import Recipe
from aligntok.data.sources import Batch
from aligntok.devices import choose_precision
from aligntok.kernels import use_implementation
from aligntok.losses.perceptual import build_perceptual
from aligntok.models.discriminator import PatchDiscriminator
from aligntok.models.lightning_dit import LightningDiT
from aligntok.models.tokenizer import AlignTok
from aligntok.training.cost import make_batch
from aligntok.training.generator_objective import GeneratorObjective
from aligntok.training.tokenizer_objective import FrozenInputs, TokenizerObjective
from benchmarks.machine import DEVICE, machine_line, synchronize

PARTS = ("stage1", "stage2", "stage3", "generator")
PATHS = {"reference": "reference", "fused": "auto"}
CLASSES = 12
# Two bf16 paths round differently; the first losses have been seen to agree to about 2e-3
LOSS_TOLERANCE = 1e-2


class Path:
    """One part of the quickstart under one choice of implementations."""

    def __init__(self, part: str, implementation: str, recipe: Recipe, batch: Batch) -> None:
        self.implementation, self.batch = implementation, batch
        self.precision = choose_precision(DEVICE)
        torch.manual_seed(0)
        self.objective = self._generator(recipe) if part == "generator" else self._stage(part, recipe)
        self.first = self.objective.steps - 1  # the last step's settings: adversarial loss on
        self.samples: list[float] = []

    def _generator(self, recipe: Recipe) -> GeneratorObjective:
        recipe.generator.model.classes = CLASSES
        channels, *size = self.batch["latents"].shape[1:]
        model = LightningDiT(recipe.generator.model, channels, tuple(size)).to(DEVICE)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad and not parameter.any():
                    parameter.normal_(std=0.02)  # modulations start at zero: operators would do no real work
        return GeneratorObjective(model, itemgetter("latents"), recipe.generator, self.precision)

    def _stage(self, part: str, recipe: Recipe) -> TokenizerObjective:
        config, stage = recipe.tokenizer, getattr(recipe.tokenizer.stages, part)
        config.model.encoder.weights = "random"
        tokenizer = AlignTok(config.model).to(DEVICE)
        discriminator = PatchDiscriminator(config.losses.discriminator).to(DEVICE)
        perceptual = build_perceptual(config.losses.perceptual).to(DEVICE, memory_format=torch.channels_last)
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
        return {
            "stage1": {"features": tokenizer.encoder},
            "stage2": {"snapshot": tokenizer.raw_latents},
            "stage3": {"latents": tokenizer.raw_latents},
        }[part]

    @torch.no_grad()
    def _table(self, network: Callable[[Tensor], Tensor]) -> Tensor:
        with self.precision.autocast():
            return network(self.batch["images"]).float()

    def step(self, number: int) -> float:
        """One whole training step; returns the loss of its first phase."""
        torch.manual_seed(number)
        losses = []
        with use_implementation(self.implementation):
            for phase in self.objective.phases(self.first):
                phase.optimizer.zero_grad(set_to_none=True)
                loss, _ = phase.loss(self.batch)
                loss.backward()
                if phase.gradient_clip:
                    torch.nn.utils.clip_grad_norm_(phase.parameters, phase.gradient_clip)
                phase.optimizer.step()
                losses.append(loss.item())
            self.objective.after_step()
        return losses[0]

    def timed_step(self, number: int) -> None:
        """A step whose seconds are kept."""
        synchronize()
        start = time.perf_counter()
        self.step(number)
        synchronize()
        self.samples.append(time.perf_counter() - start)


def make_inputs(part: str, recipe: Recipe) -> Batch:
    """Random images [B, 3, H, W], or latents for the generator."""
    random, size = torch.Generator().manual_seed(3), recipe.data.image_size
    if part == "generator":
        side = size // recipe.tokenizer.model.encoder.downsample
        shape = (recipe.generator.training.batch_size, recipe.tokenizer.model.adapter.latent_channels, side, side)
        return make_batch(torch.randn(shape, generator=random).to(DEVICE), CLASSES)
    images = torch.rand((recipe.tokenizer.training.batch_size, 3, size, size), generator=random) * 2 - 1
    return make_batch(images.to(DEVICE), CLASSES)


def measure(part: str, rounds: int, profile: bool) -> bool:
    """Print a part's line; False if the paths disagree."""
    batch = make_inputs(part, parse_recipe("quickstart", [], default_recipe="quickstart"))
    paths = {
        name: Path(part, implementation, parse_recipe("quickstart", [], default_recipe="quickstart"), batch)
        for name, implementation in PATHS.items()
    }
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
