"""Training of a rival from a configuration, in the same loop and on the same data as AlignTok.

OUTPUT/tokenizer                   the finished rival with its latent statistics: what train-generator reads
OUTPUT/generator                   of REPA-E, which trains both together
OUTPUT/previews/rival-N.png        originals above their reconstructions
OUTPUT/checkpoints/rival/step-N    while it runs
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from aligntok.config import EncoderConfig, Recipe, RivalConfig
from aligntok.data.frozen import FrozenNetwork, FrozenOutput, tabulate
from aligntok.data.geometry import check_size
from aligntok.data.images import ImageSet, open_images
from aligntok.data.loading import build_source
from aligntok.data.sources import MemorySource, Source
from aligntok.errors import UserError
from aligntok.models.discriminator import PatchDiscriminator
from aligntok.models.encoder import Encoder
from aligntok.models.generator import generator_class, save_generator
from aligntok.models.tokenizer import StoredTokenizer, load_tokenizer
from aligntok.runtime.collectives import main_first, on_main
from aligntok.runtime.devices import Precision, choose_precision
from aligntok.runtime.files import remove_unfinished
from aligntok.runtime.world import current
from aligntok.training import distributed
from aligntok.training.loop import train
from aligntok.training.monitoring.banner import PartFacts, generator_kernels, machine_line, part_lines, rival_kernels
from aligntok.training.monitoring.previews import TokenizerPreview
from aligntok.training.monitoring.telemetry import Telemetry
from aligntok.training.recovery.checkpoint import Checkpoints, course, discard
from aligntok.training.statistics import latent_statistics
from aligntok.training.train_generator import check_classes
from aligntok.training.train_tokenizer import training_perceptual
from aligntok.zoo.dino_discriminator import DinoDiscriminator
from aligntok.zoo.finished import check_finished, network_of
from aligntok.zoo.maetok_objective import FeatureTarget, MAETokObjective, hog_target
from aligntok.zoo.objectives import RAEObjective, RivalObjective, VAEObjective, VAVAEObjective
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
    config, output = recipe.rival, Path(recipe.output)
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
    _check_size(recipe.data.image_size, tokenizer, config)
    images, held_out = open_images(recipe.data.path, recipe.data.max_images).split(recipe.data.held_out)
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


def build_rival(config: RivalConfig) -> StoredTokenizer:
    """A new, seeded rival: its encoder is random (VAE, VA-VAE, MAETok) or pretrained (RAE), its decoder random.

    REPA-E goes on with the tokenizer that `rival.repa_e.tokenizer` names, where it names one.
    """
    torch.manual_seed(config.training.seed)
    if config.kind == "repa-e" and config.repa_e.tokenizer is not None:
        return load_tokenizer(config.repa_e.tokenizer)
    kind, settings = network_of(config)
    return kind(settings)


def _check_size(size: int, tokenizer: StoredTokenizer, config: RivalConfig) -> None:
    check_size(size, tokenizer.downsample)
    only = getattr(tokenizer.config, "image_size", size)  # of those that belong to one size
    if size != only:
        raise UserError(f"data.image_size is {size}, but rival.{config.kind}.image_size is {only}")


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
        marks = {"images": len(self.images), "rival": decisive, "accumulate": config.training.accumulate}
        if config.kind == "repa-e":
            decisive["repa_e"] |= {"tokenizer": start}  # wherever it lies
            generator = dataclasses.asdict(self.recipe.generator)
            marks["generator"] = {key: generator[key] for key in OF_THE_GENERATOR}
        return course(config.training, self.recipe.data, **marks)

    def objective(self, tokenizer: StoredTokenizer) -> RivalObjective:
        """The objective of the recipe's kind, with its discriminator and frozen networks."""
        config, device = self.recipe.rival, self.precision.device
        torch.manual_seed(config.training.seed + 1)
        dino = config.discriminator == "dino"
        with main_first():
            discriminator = DinoDiscriminator(config.dino) if dino else PatchDiscriminator(config.losses.discriminator)
        perceptual = training_perceptual(config.losses.perceptual, device)
        common = (tokenizer, discriminator.to(device), perceptual, config, self.precision)
        if config.kind == "vae":
            return VAEObjective(*common)
        if config.kind == "rae":
            return RAEObjective(*common, self.frozen(tokenizer.raw_latents))
        if config.kind == "maetok":
            return MAETokObjective(*common, self.targets(config))
        if config.kind == "repa-e":
            return self.joint(*common)
        encoder = self.encoder("alignment.encoder", config.alignment.encoder, tokenizer.downsample)
        return VAVAEObjective(*common, self.frozen(encoder), encoder.width)

    def targets(self, config: RivalConfig) -> dict[str, FeatureTarget]:
        """What MAETok's shallow decoders predict."""
        settings, found = config.maetok_loss, {}
        if settings.hog:
            found["hog"] = hog_target(config.maetok)
        for name in ("dino", "clip"):
            if (choice := getattr(settings, name)) is not None:
                encoder = self.encoder(f"maetok_loss.{name}", choice, config.maetok.patch_size)
                found[name] = FeatureTarget(self.frozen(encoder), encoder.width)
        return found

    def joint(
        self,
        tokenizer: StoredTokenizer,
        discriminator: nn.Module,
        perceptual: nn.Module | None,
        config: RivalConfig,
        precision: Precision,
    ) -> RepaEObjective:
        """REPA-E's objective, with a new generator."""
        settings, size = self.recipe.generator, self.recipe.data.image_size
        check_classes(settings.model, self.images.classes)
        patch = tokenizer.downsample * settings.model.patch_size
        encoder = self.encoder("repa_e.encoder", config.repa_e.encoder, patch)
        if not tokenizer.has_statistics:
            self.compute_statistics(tokenizer)  # where the bridge starts
        grid = (size // tokenizer.downsample, size // tokenizer.downsample)
        torch.manual_seed(config.training.seed + 2)
        network = generator_class(settings.model)
        model = network(settings.model, tokenizer.latent_channels, grid).to(precision.device)
        parts = (tokenizer, discriminator, perceptual, config, precision)
        return RepaEObjective(*parts, model, settings, self.frozen(encoder), encoder.width)

    def encoder(self, key: str, config: EncoderConfig, downsample: int) -> Encoder:
        """A frozen encoder with one token for each of the rival's."""
        with main_first():
            encoder = Encoder(config)
        if encoder.downsample != downsample:
            raise UserError(f"rival.{key}.downsample is {encoder.downsample}, expected the tokenizer's {downsample}")
        return encoder.to(self.precision.device).eval().requires_grad_(False)

    def frozen(self, network: nn.Module) -> FrozenOutput:
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
        peak = telemetry.watch(PART, config.training, precision, config, preview)
        networks = dict(objective.tokenizer.named_children()) | objective.trained
        networks["discriminator"] = objective.discriminator
        joint = isinstance(objective, RepaEObjective)
        decoder = objective.tokenizer.decoder
        kernels = rival_kernels(config.losses, config.stage, decoder, precision.device, adaptive=not joint)
        if joint:
            networks["generator"] = objective.generator
            kernels += f"; the generator's {generator_kernels(self.recipe.generator.model, precision)}"
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
        telemetry.announce(machine_line(precision, telemetry.world), part_lines(facts, telemetry.world, peak))
