"""Training of a rival from a configuration, in the same loop and on the same data as AlignTok.

OUTPUT/tokenizer                   the finished rival with its latent statistics: what train-generator reads
OUTPUT/generator                   of REPA-E, which trains both together
OUTPUT/previews/rival-N.png        originals above their reconstructions
OUTPUT/checkpoints/rival/step-N    while it runs
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aligntok.config import Recipe
from aligntok.config.ranges import check_ranges
from aligntok.data.frozen import FrozenNetwork, FrozenOutput, tabulate
from aligntok.data.images import ImageSet, open_images
from aligntok.data.loading import build_source
from aligntok.data.sources import MemorySource, Source
from aligntok.errors import UserError
from aligntok.models.generator import save_generator
from aligntok.models.tokenizer import StoredTokenizer, load_tokenizer
from aligntok.runtime.collectives import main_first, on_main
from aligntok.runtime.devices import Precision, choose_precision
from aligntok.runtime.files import remove_unfinished
from aligntok.runtime.world import current
from aligntok.training import distributed
from aligntok.training.generator_inputs import check_classes
from aligntok.training.loop import train
from aligntok.training.monitoring.banner import PartFacts, generator_kernels, machine_line, part_lines, rival_kernels
from aligntok.training.monitoring.cost import once
from aligntok.training.monitoring.previews import TokenizerPreview
from aligntok.training.monitoring.telemetry import Telemetry
from aligntok.training.recovery.checkpoint import Checkpoints, discard
from aligntok.training.recovery.course import course
from aligntok.training.sizes import refuse_buckets
from aligntok.training.statistics import latent_statistics
from aligntok.zoo.building import Builder, build_rival, check_size, rival_flops
from aligntok.zoo.finished import check_finished
from aligntok.zoo.objectives import RivalObjective
from aligntok.zoo.repa_e import RepaEObjective

PART = "rival"
INDIFFERENT = ("training", "statistics_images")  # of the configuration, to the course of training; see `course`
# What REPA-E takes of the recipe's generator
OF_THE_GENERATOR = (
    "model",
    "flow",
    "learning_rate",
    "betas",
    "warmup_steps",
    "final_learning_rate",
    "ema_decay",
    "gradient_clip",
)


def train_rival(recipe: Recipe, telemetry: Telemetry | None = None) -> StoredTokenizer:
    """`aligntok train-rival`; a finished rival is read and not trained again.

    Raises:
        UserError: another finished tokenizer in OUTPUT; images of a size that the rival cannot take; an encoder without
            weights, or of another grid; for REPA-E, a tokenizer without posterior; and what the loop raises.
    """
    with distributed.start(recipe.rival.training.device):
        return _train(recipe, telemetry or Telemetry(recipe.output, recipe.rival.training.log_every))


def _train(recipe: Recipe, telemetry: Telemetry) -> StoredTokenizer:
    check_ranges(recipe)
    refuse_buckets(recipe.data, "a rival")
    config, output = recipe.rival, Path(recipe.output)
    distributed.check_batches(config.training)
    training, folder = config.training, output / "tokenizer"
    if distributed.is_sharded(training.parallel):
        raise UserError("rivals train with all weights in every process: set rival.training.parallel to ddp")
    precision = choose_precision(training.device, training.precision)
    on_main(lambda: remove_unfinished(output, ("tokenizer", "generator").__contains__))
    if on_main(lambda: (folder / "config.json").is_file()):
        on_main(lambda: check_finished(folder, config))
        on_main(lambda: discard(output / "checkpoints" / PART))  # still there where a kill came between the two
        telemetry.say(f"{config.kind}: already finished, read from {folder}")
        return load_tokenizer(folder).to(precision.device)
    with main_first():
        tokenizer = build_rival(config)
    tokenizer = tokenizer.to(precision.device).eval()
    check_size(recipe.data.image_size, tokenizer, config)
    everything = open_images(recipe.data.path, recipe.data.max_images, say=telemetry.say)
    images, held_out = everything.split(recipe.data.held_out)
    services = (telemetry.say, telemetry.bar, current(), precision.device)
    source = build_source(images, recipe.data, config.crop, training.batch_size, training.seed, *services)
    run = _Run(recipe, images, held_out, source, precision, telemetry)
    start = tokenizer.fingerprint()
    objective = run.objective(tokenizer)
    checkpoints = Checkpoints(output / "checkpoints" / PART, training, run.mark(start))
    run.announce(objective, checkpoints)
    train(PART, objective, source, training, precision.device, telemetry, checkpoints)
    objective.finish()
    tokenizer.eval().requires_grad_(False)
    if isinstance(objective, RepaEObjective):
        on_main(lambda: run.save_generator(objective))
    else:
        run.compute_statistics(tokenizer)
    on_main(lambda: tokenizer.save(folder))  # last: its presence means that the rival is finished
    on_main(checkpoints.remove)
    telemetry.say(f"tokenizer: {folder}")
    return tokenizer


@dataclass
class _Run:
    """What a run has beside the tokenizer."""

    recipe: Recipe
    images: ImageSet
    held_out: ImageSet
    source: Source
    precision: Precision
    telemetry: Telemetry

    def mark(self, start: str) -> dict[str, Any]:
        """What decides the course of training; `start` is the fingerprint of the tokenizer that it starts with."""
        config = self.recipe.rival
        decisive = {key: value for key, value in dataclasses.asdict(config).items() if key not in INDIFFERENT}
        # BatchNorm and the adaptive weights are per micro-batch
        marks: dict[str, Any] = {"images": len(self.images), "image_set": self.images.identity(), "rival": decisive}
        marks["accumulate"] = config.training.accumulate
        if config.kind == "repa-e":
            given = config.repa_e.tokenizer is not None  # one that is drawn anew follows from the seed
            decisive["repa_e"] |= {"tokenizer": start if given else None}  # wherever it lies
            generator = dataclasses.asdict(self.recipe.generator)
            marks["generator"] = {key: generator[key] for key in OF_THE_GENERATOR}
        return course(config.training, self.precision, self.recipe.data, **marks)

    def objective(self, tokenizer: StoredTokenizer) -> RivalObjective:
        """The objective of the recipe's kind, with its discriminator and frozen networks."""
        if self.recipe.rival.kind == "repa-e":
            check_classes(self.recipe.generator.model, self.images.classes)
            if hasattr(tokenizer, "posterior") and not tokenizer.has_statistics:
                self.compute_statistics(tokenizer)  # where the bridge starts
        return Builder(self.recipe, self.precision, self.freeze).objective(tokenizer)

    def freeze(self, network: Callable[[Tensor], Tensor]) -> FrozenOutput:
        """A frozen network's outputs: a table where the crops repeat, the network in the loop where they do not."""
        if not isinstance(self.source, MemorySource):
            return FrozenNetwork(network, self.precision)
        with self.telemetry.bar("encoder features") as update:
            return tabulate(network, self.source, self.precision, torch.bfloat16, update)

    def compute_statistics(self, tokenizer: StoredTokenizer) -> None:
        """Latent statistics of the training images."""
        wanted = min(self.recipe.rival.statistics_images, len(self.images))
        with self.telemetry.bar("latent statistics") as update:
            found = latent_statistics(tokenizer, self.source, wanted, self.precision, update)
        tokenizer.set_statistics(*found)

    def save_generator(self, objective: RepaEObjective) -> None:
        """Write OUTPUT/generator, which belongs to the finished tokenizer."""
        folder, weights = Path(self.recipe.output) / "generator", objective.generator_ema.module.state_dict()
        classes, belongs = self.images.classes, objective.tokenizer.fingerprint()
        save_generator(folder, objective.model, weights, self.recipe.generator.sampler, classes, belongs)
        self.telemetry.say(f"generator: {folder}")

    def announce(self, objective: RivalObjective, checkpoints: Checkpoints) -> None:
        """Say what starts, and prepare its telemetry."""
        config, precision, telemetry = objective.config, self.precision, self.telemetry
        shown = self.held_out if len(self.held_out) else self.images
        preview = TokenizerPreview(objective, shown, self.recipe.data.image_size, precision)
        looked_up, kind = isinstance(self.source, MemorySource), precision.device.type
        flops = partial(once, rival_flops, self.recipe, looked_up, kind)
        mfu = telemetry.watch(PART, config.training, precision, config, preview, flops)
        networks = dict(objective.tokenizer.named_children()) | objective.trained
        networks["discriminator"] = objective.discriminator
        joint = isinstance(objective, RepaEObjective)
        decoder = objective.tokenizer.decoder
        kernels = rival_kernels(config.losses, config.stage, decoder, precision.device, adaptive=not joint)
        if isinstance(objective, RepaEObjective):
            networks["generator"] = objective.generator
            tokens = objective.generator.model.positions.shape[1]
            kernels += f"; the generator's {generator_kernels(self.recipe.generator.model, tokens, precision)}"
        facts = PartFacts(
            f"{PART} {config.kind}",
            objective.steps,
            config.training,
            f"{len(self.images):,} pictures of {self.images.name}",
            self.source,
            networks,
            kernels,
            checkpoints.fingerprint,
            Path(self.recipe.output),
        )
        telemetry.announce(machine_line(precision, telemetry.world), part_lines(facts, telemetry.world, mfu))
