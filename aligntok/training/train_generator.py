"""Generator training from a configuration: LightningDiT on the latents of a finished tokenizer.

OUTPUT/generator/config.json, model.safetensors     the averaged weights, what `aligntok sample` reads
OUTPUT/checkpoints/generator/step-N                 while it runs
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from aligntok.config import LightningDiTConfig, Recipe, SamplerConfig, from_dict
from aligntok.data.frozen import FrozenNetwork, FrozenOutput, tabulate
from aligntok.data.images import ImageSet, open_images
from aligntok.data.sources import MemorySource
from aligntok.devices import choose_precision
from aligntok.errors import UserError
from aligntok.files import write_folder
from aligntok.models.lightning_dit import LightningDiT
from aligntok.models.tokenizer import load_strictly, load_tokenizer
from aligntok.training.checkpoint import Checkpoints, fingerprint
from aligntok.training.generator_objective import GeneratorObjective
from aligntok.training.loop import train
from aligntok.training.telemetry import Telemetry
from aligntok.training.train_tokenizer import build_source
from aligntok.zoo import generator_class

FORMAT = "aligntok.generator"
PART = "generator"


def train_generator(recipe: Recipe, telemetry: Telemetry | None = None) -> Path:
    """Train and write a generator; returns its folder. A finished one is left as it is.

    Raises:
        UserError: no tokenizer, one without latent statistics, labels beyond generator.model.classes.
    """
    config, output = recipe.generator, Path(recipe.output)
    training, folder = config.training, output / PART
    telemetry = telemetry or Telemetry(output, training.log_every)
    if (folder / "config.json").is_file():
        telemetry.say(f"{PART}: already finished, read from {folder}")
        return folder
    precision = choose_precision(training.device, training.precision)
    tokenizer = load_tokenizer(config.tokenizer or output / "tokenizer").to(precision.device).requires_grad_(False)
    images, _ = open_images(recipe.data.path, recipe.data.max_images).split(recipe.data.held_out)
    _check_classes(config.model, images)
    source = build_source(images, recipe.data, "center", training.batch_size, training.seed, telemetry)
    latents: FrozenOutput = FrozenNetwork(tokenizer.encode, precision)
    if isinstance(source, MemorySource):
        with telemetry.bar("latents") as update:
            latents = tabulate(tokenizer.encode, source, precision, progress=update)
    size = recipe.data.image_size
    grid = tokenizer.grid(torch.empty(1, 3, size, size, device="meta"))  # (h, w) of the latents
    torch.manual_seed(training.seed)
    network = generator_class(config.model)
    model = network(config.model, tokenizer.latent_channels, grid).to(precision.device)
    objective = GeneratorObjective(model, latents, config, precision)
    mark = fingerprint(config, recipe.data, tokenizer.fingerprint(), len(images))
    checkpoints = Checkpoints(output / "checkpoints" / PART, training.keep_checkpoints, mark)
    train(PART, objective, source, training, precision.device, telemetry, checkpoints)
    save_generator(folder, objective.ema.module, config.sampler, images.classes, tokenizer.fingerprint())
    checkpoints.remove()
    return folder


def _check_classes(model: LightningDiTConfig, images: ImageSet) -> None:
    """Fill in the number of classes from the images where the recipe leaves it open."""
    if model.classes is None:
        model.classes = len(images.classes)
    if len(images.classes) > model.classes:
        raise UserError(
            f"{images.name} has {len(images.classes)} classes, but generator.model.classes is {model.classes}: "
            f"raise it, or leave it at null"
        )


def save_generator(
    folder: Path, model: LightningDiT, sampler: SamplerConfig, classes: list[str], tokenizer_fingerprint: str
) -> None:
    """Write a generator folder: config.json, with the sampler's defaults and what it belongs to, and the weights."""
    manifest = {
        "format": FORMAT,
        "version": 1,
        "config": dataclasses.asdict(model.config),
        "sampler": dataclasses.asdict(sampler),
        "latent_channels": model.latent_channels,
        "latent_size": list(model.latent_size),
        "classes": classes,
        "tokenizer": tokenizer_fingerprint,
    }
    write_folder(folder, {"model": model.state_dict()}, {"config": manifest})


class Generator:
    """A trained generator read from its folder: the network, its class names and its sampler's defaults."""

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        file = folder / "config.json"
        if not file.is_file():
            raise UserError(
                f"no generator at {folder}: config.json is missing; give a folder that training has written"
            )
        manifest = json.loads(file.read_text())
        if manifest.get("format") != FORMAT:
            raise UserError(f"{file} says format {manifest.get('format')!r}, expected {FORMAT!r}")
        self.latent_shape = (manifest["latent_channels"], *manifest["latent_size"])
        self.classes: list[str] = manifest["classes"]
        self.tokenizer_fingerprint: str = manifest["tokenizer"]
        self.sampler: SamplerConfig = from_dict(SamplerConfig, manifest["sampler"])
        config = from_dict(LightningDiTConfig, manifest["config"])
        self.model = generator_class(config)(config, self.latent_shape[0], self.latent_shape[1:])
        weights = folder / "model.safetensors"
        load_strictly(self.model, load_file(weights), weights)
        self.model.eval().requires_grad_(False)
