"""Training of a rival from a configuration, in the same loop and on the same data as AlignTok.

OUTPUT/tokenizer                   the finished rival with its latent statistics: what train-generator reads
OUTPUT/checkpoints/rival/step-N    while it runs
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import nn

from aligntok.collectives import main_first, on_main
from aligntok.config import Recipe, RivalConfig
from aligntok.data.frozen import FrozenNetwork, FrozenOutput, tabulate
from aligntok.data.images import ImageSet, open_images
from aligntok.data.loading import build_source
from aligntok.data.sources import MemorySource, Source
from aligntok.devices import Precision, choose_precision
from aligntok.errors import UserError
from aligntok.files import remove_unfinished
from aligntok.models.discriminator import PatchDiscriminator
from aligntok.models.encoder import Encoder
from aligntok.models.tokenizer import StoredTokenizer, load_tokenizer
from aligntok.training import distributed
from aligntok.training.banner import PartFacts, machine_line, part_lines, rival_kernels
from aligntok.training.checkpoint import Checkpoints, course, discard
from aligntok.training.loop import train
from aligntok.training.statistics import latent_statistics
from aligntok.training.telemetry import Telemetry
from aligntok.training.train_tokenizer import training_perceptual
from aligntok.world import current
from aligntok.zoo.dino_discriminator import DinoDiscriminator
from aligntok.zoo.objectives import RAEObjective, RivalObjective, VAEObjective, VAVAEObjective
from aligntok.zoo.rae import RAE
from aligntok.zoo.vae import VAE

PART = "rival"
INDIFFERENT = ("training", "statistics_images")  # of the configuration, to the course of training; see `course`


def train_rival(recipe: Recipe, telemetry: Telemetry | None = None) -> StoredTokenizer:
    """`aligntok train-rival`; a finished rival is read and not trained again.

    Raises:
        UserError: images of a size that the rival cannot take; an encoder without weights; and what the loop raises.
    """
    with distributed.start(recipe.rival.training.device):
        return _train(recipe, telemetry or Telemetry(recipe.output, recipe.rival.training.log_every))


def _train(recipe: Recipe, telemetry: Telemetry) -> StoredTokenizer:
    config, output = recipe.rival, Path(recipe.output)
    training, folder = config.training, output / "tokenizer"
    if distributed.is_sharded(training.parallel):
        raise UserError("rivals train with all weights in every process: set rival.training.parallel to ddp")
    precision = choose_precision(training.device, training.precision)
    on_main(lambda: remove_unfinished(output, folder.name.__eq__))
    if on_main(lambda: (folder / "config.json").is_file()):
        on_main(lambda: discard(output / "checkpoints" / PART))  # still there where a kill came between the two
        telemetry.say(f"{config.kind}: already finished, read from {folder}")
        return load_tokenizer(folder).to(precision.device)
    with main_first():
        tokenizer = build_rival(config)
    tokenizer = tokenizer.to(precision.device).eval()
    _check_size(recipe.data.image_size, tokenizer)
    images, _ = open_images(recipe.data.path, recipe.data.max_images).split(recipe.data.held_out)
    services = (telemetry.say, telemetry.bar, current(), precision.device)
    source = build_source(images, recipe.data, config.crop, training.batch_size, training.seed, *services)
    objective = _objective(tokenizer, config, precision, source, telemetry)
    decisive = {key: value for key, value in dataclasses.asdict(config).items() if key not in INDIFFERENT}
    mark = course(training, recipe.data, images=len(images), rival=decisive)
    checkpoints = Checkpoints(output / "checkpoints" / PART, training, mark)
    _announce(objective, images, source, checkpoints, output, telemetry)
    train(PART, objective, source, training, precision.device, telemetry, checkpoints)
    objective.finish()
    tokenizer.eval().requires_grad_(False)
    with telemetry.bar("latent statistics") as update:
        wanted = min(config.statistics_images, len(images))
        tokenizer.set_statistics(*latent_statistics(tokenizer, source, wanted, precision, update))
    on_main(lambda: tokenizer.save(folder))
    on_main(checkpoints.remove)
    telemetry.say(f"tokenizer: {folder}")
    return tokenizer


def _announce(
    objective: RivalObjective,
    images: ImageSet,
    source: Source,
    checkpoints: Checkpoints,
    output: Path,
    telemetry: Telemetry,
) -> None:
    """Say what starts, and prepare its telemetry."""
    config, precision = objective.config, objective.precision
    peak = telemetry.watch(PART, config.training, precision, config, None)
    networks = dict(objective.tokenizer.named_children()) | objective.trained
    networks["discriminator"] = objective.discriminator
    kernels = rival_kernels(config.losses, config.stage, objective.tokenizer.decoder, precision.device)
    facts = PartFacts(
        f"{PART} {config.kind}",
        objective.steps,
        config.training,
        f"{len(images):,} pictures of {images.name}",
        source,
        networks,
        kernels,
        checkpoints.fingerprint,
        output,
    )
    telemetry.announce(machine_line(precision, telemetry.world), part_lines(facts, telemetry.world, peak))


def build_rival(config: RivalConfig) -> StoredTokenizer:
    """A new, seeded rival: its encoder is random (VAE, VA-VAE) or pretrained (RAE), its decoder random."""
    torch.manual_seed(config.training.seed)
    if config.kind == "rae":
        return RAE(config.rae)
    if config.kind in ("vae", "va-vae"):
        return VAE(config.vae)
    raise UserError(f"rival.kind is {config.kind!r}, expected vae, va-vae or rae")


def _check_size(size: int, tokenizer: StoredTokenizer) -> None:
    if size % tokenizer.downsample:
        raise UserError(f"data.image_size is {size}, expected a multiple of the downsampling {tokenizer.downsample}")
    if isinstance(tokenizer, RAE) and size != tokenizer.config.image_size:
        raise UserError(f"data.image_size is {size}, but rival.rae.image_size is {tokenizer.config.image_size}")


def _objective(
    tokenizer: StoredTokenizer, config: RivalConfig, precision: Precision, source: Source, telemetry: Telemetry
) -> RivalObjective:
    torch.manual_seed(config.training.seed + 1)
    dino = config.discriminator == "dino"
    with main_first():
        discriminator = DinoDiscriminator(config.dino) if dino else PatchDiscriminator(config.losses.discriminator)
    perceptual = training_perceptual(config.losses.perceptual, precision.device)
    common = (tokenizer, discriminator.to(precision.device), perceptual, config, precision)
    if config.kind == "vae":
        return VAEObjective(*common)
    if config.kind == "rae":
        latents = _frozen(tokenizer.raw_latents, source, precision, telemetry)
        return RAEObjective(*common, latents)
    with main_first():
        encoder = Encoder(config.alignment.encoder)
    encoder = encoder.to(precision.device).eval().requires_grad_(False)
    if encoder.downsample != tokenizer.downsample:
        raise UserError(
            f"rival.alignment.encoder.downsample is {encoder.downsample}, "
            f"expected the tokenizer's {tokenizer.downsample}"
        )
    return VAVAEObjective(*common, _frozen(encoder, source, precision, telemetry), encoder.width)


def _frozen(network: nn.Module, source: Source, precision: Precision, telemetry: Telemetry) -> FrozenOutput:
    """A frozen network's outputs: a table where the crops repeat, the network in the loop where they do not."""
    if not isinstance(source, MemorySource):
        return FrozenNetwork(network, precision)
    with telemetry.bar("encoder features") as update:
        return tabulate(network, source, precision, torch.bfloat16, update)
