"""Building a rival and its objective from a recipe: for training, and on the meta device to count what a step costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from aligntok.config import EncoderConfig, Recipe, RivalConfig
from aligntok.data import geometry
from aligntok.data.frozen import FrozenOutput
from aligntok.errors import UserError
from aligntok.models.discriminator import PatchDiscriminator
from aligntok.models.encoder import Encoder
from aligntok.models.generator import generator_class
from aligntok.models.tokenizer import StoredTokenizer, load_tokenizer, tokenizer_without_weights
from aligntok.runtime.collectives import main_first
from aligntok.runtime.devices import Precision
from aligntok.training.monitoring import cost, meta_device
from aligntok.training.monitoring.cost import Cost
from aligntok.training.monitoring.meta_device import Built, MetaPrecision
from aligntok.training.train_tokenizer import training_perceptual
from aligntok.zoo.dino_discriminator import DinoDiscriminator
from aligntok.zoo.finished import network_of
from aligntok.zoo.maetok import MAETok
from aligntok.zoo.maetok_objective import FeatureTarget, MAETokObjective, hog_target
from aligntok.zoo.objectives import RAEObjective, RivalObjective, VAEObjective, VAVAEObjective
from aligntok.zoo.rae import RAE
from aligntok.zoo.repa_e import RepaEObjective
from aligntok.zoo.vae import VAE


def build_rival(config: RivalConfig) -> StoredTokenizer:
    """A new, seeded rival: its encoder is random (VAE, VA-VAE, MAETok) or pretrained (RAE), its decoder random.

    REPA-E goes on with the tokenizer that `rival.repa_e.tokenizer` names, where it names one; on the meta device with
    its shapes.
    """
    torch.manual_seed(config.training.seed)
    if config.kind == "repa-e" and config.repa_e.tokenizer is not None:
        read = tokenizer_without_weights if torch.get_default_device().type == "meta" else load_tokenizer
        return read(config.repa_e.tokenizer)
    kind, settings = network_of(config)
    return kind(settings)


@dataclass
class Builder:
    """Builds the objective of a recipe's rival, with its discriminator and frozen networks.

    Args:
        recipe: the rival and, for REPA-E, the generator with its number of classes.
        precision: where and in which precision it trains.
        freeze: called with a frozen network, images -> output; gives its output for a batch.
    """

    recipe: Recipe
    precision: Precision
    freeze: Callable[[Callable[[Tensor], Tensor]], FrozenOutput]
    frozen: dict[str, nn.Module] = field(default_factory=dict)  # networks that were frozen on the way, by name

    def objective(self, tokenizer: StoredTokenizer) -> RivalObjective:
        """For REPA-E, of a tokenizer with latent statistics."""
        config, device = self.recipe.rival, self.precision.device
        torch.manual_seed(config.training.seed + 1)
        dino = config.discriminator == "dino"
        with main_first():
            discriminator = DinoDiscriminator(config.dino) if dino else PatchDiscriminator(config.losses.discriminator)
        perceptual = training_perceptual(config.losses.perceptual, device)
        common = (discriminator.to(device), perceptual, config, self.precision)
        if config.kind == "repa-e":
            return self._joint(tokenizer, *common)
        if config.kind == "rae":
            assert isinstance(tokenizer, RAE)
            return RAEObjective(tokenizer, *common, self.freeze(tokenizer.raw_latents))
        if config.kind == "maetok":
            assert isinstance(tokenizer, MAETok)
            return MAETokObjective(tokenizer, *common, self._targets(config))
        assert isinstance(tokenizer, VAE)
        if config.kind == "vae":
            return VAEObjective(tokenizer, *common)
        encoder = self._encoder("alignment.encoder", config.alignment.encoder, tokenizer.downsample)
        return VAVAEObjective(tokenizer, *common, self.freeze(encoder), encoder.width)

    def _targets(self, config: RivalConfig) -> dict[str, FeatureTarget]:
        """What MAETok's shallow decoders predict."""
        settings, found = config.maetok_loss, {}
        if settings.hog:
            found["hog"] = hog_target(config.maetok)
        for name in ("dino", "clip"):
            if (choice := getattr(settings, name)) is not None:
                encoder = self._encoder(f"maetok_loss.{name}", choice, config.maetok.patch_size)
                found[name] = FeatureTarget(self.freeze(encoder), encoder.width)
        return found

    def _joint(
        self,
        tokenizer: StoredTokenizer,
        discriminator: nn.Module,
        perceptual: nn.Module | None,
        config: RivalConfig,
        precision: Precision,
    ) -> RepaEObjective:
        """REPA-E's objective, with a new generator."""
        settings, size = self.recipe.generator, self.recipe.data.image_size
        patch = tokenizer.downsample * settings.model.patch_size
        encoder = self._encoder("repa_e.encoder", config.repa_e.encoder, patch)
        grid = (size // tokenizer.downsample, size // tokenizer.downsample)
        torch.manual_seed(config.training.seed + 2)
        network = generator_class(settings.model)
        model = network(settings.model, tokenizer.latent_channels, grid).to(precision.device)
        parts = (discriminator, perceptual, config, precision, model, settings)
        return RepaEObjective(tokenizer, *parts, self.freeze(encoder), encoder.width)

    def _encoder(self, key: str, config: EncoderConfig, downsample: int) -> Encoder:
        """A frozen encoder with one token for each of the rival's."""
        with main_first():
            encoder = Encoder(config)
        if encoder.downsample != downsample:
            raise UserError(f"rival.{key}.downsample is {encoder.downsample}, expected the tokenizer's {downsample}")
        self.frozen[key] = encoder.to(self.precision.device).eval().requires_grad_(False)
        return encoder


def rival_cost(recipe: Recipe, micro_batch: int, checkpointing: str = "none", device_type: str = "cuda") -> Cost:
    """Cost of the first step of a rival's training; frozen networks run in the loop, as with random crops."""
    build = partial(_build, recipe, micro_batch, looked_up=False, mode=checkpointing)
    return meta_device.count(device_type, build, cost.measure)


def rival_flops(recipe: Recipe, looked_up: bool, device_type: str) -> dict[int, float]:
    """FLOPs per image of a rival's steps; see `cost.step_flops`.

    Args:
        looked_up: whether outputs of frozen networks come from a table; else they run in the loop.
    """
    rows, mode = recipe.rival.training.batch_size, recipe.rival.training.checkpointing
    return meta_device.count(device_type, partial(_build, recipe, rows, looked_up, mode), cost.step_flops)


def latent_shape(config: RivalConfig, image_size: int) -> tuple[int, int, int]:
    """(d, h, w) of a rival's latents for images of a size; UserError if it does not take them."""
    with meta_device.on_meta("cpu"):
        tokenizer = build_rival(config)
        check_size(image_size, tokenizer, config)
        return (tokenizer.latent_channels, *tokenizer.grid(torch.empty(1, 3, image_size, image_size)))


def check_size(size: int, tokenizer: StoredTokenizer, config: RivalConfig) -> None:
    """Raise UserError unless a rival takes images of a size."""
    geometry.check_size(size, tokenizer.downsample)
    only = getattr(tokenizer.config, "image_size", size)  # of those that belong to one size
    if size != only:
        raise UserError(f"data.image_size is {size}, but rival.{config.kind}.image_size is {only}")


def _build(recipe: Recipe, rows: int, looked_up: bool, mode: str) -> Built:
    """A rival's objective with a batch of `rows` images; inside `meta_device.on_meta`."""
    config = replace(recipe.rival, training=meta_device.settings(recipe.rival.training, rows))
    size, precision = recipe.data.image_size, MetaPrecision(config.training.precision)
    batch = meta_device.make_batch(torch.empty(rows, 3, size, size), classes=recipe.generator.model.classes or 1)
    builder = Builder(
        replace(recipe, rival=config), precision, meta_device.freezer(precision, batch if looked_up else None)
    )
    tokenizer = build_rival(config).eval()
    check_size(size, tokenizer, config)
    objective = builder.objective(tokenizer)
    meta_device.recompute(objective, precision, mode)
    parts = dict(objective.tokenizer.named_children()) | {"discriminator": objective.discriminator}
    parts |= objective.trained | {} if looked_up else objective.trained | builder.frozen
    if isinstance(objective.discriminator, DinoDiscriminator):
        parts["discriminator's DINO"] = objective.discriminator._frozen[0]
    if objective.perceptual is not None:
        parts["perceptual"] = objective.perceptual
    if isinstance(objective, RepaEObjective):
        parts["generator"] = objective.generator
    return Built(objective, batch, parts, [objective.tokenizer])
