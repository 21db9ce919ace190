"""A generator on disk: a folder with `config.json` and `model.safetensors`, as a tokenizer's.

config.json also has the sampler's defaults, the fingerprint of the tokenizer that it belongs to, and what it can be
asked for: the names of its classes, or the text encoder whose features it reads.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from aligntok.config import (
    FluxTransformerConfig,
    GeneratorTrainingConfig,
    LightningDiTConfig,
    SamplerConfig,
    TextEncoderConfig,
)
from aligntok.errors import UserError
from aligntok.models.dit_dh import DiTDH
from aligntok.models.flux_transformer import FluxTransformer
from aligntok.models.lightning_dit import LightningDiT
from aligntok.runtime.files import write_folder
from aligntok.runtime.hub import located
from aligntok.runtime.manifest import VERSION, Manifest
from aligntok.runtime.weights import load_strictly, read_tensors

FORMAT = "aligntok.generator"
Network = LightningDiT | FluxTransformer


@dataclass(frozen=True)
class TextSource:
    """The text encoder whose features a generator was trained on."""

    encoder: TextEncoderConfig
    fingerprint: str  # of its weights and of what else decides the features


def generator_class(config: LightningDiTConfig) -> type[LightningDiT]:
    """LightningDiT, or DiT^DH where the configuration has a head."""
    return DiTDH if config.head_depth else LightningDiT


def build_network(
    config: LightningDiTConfig | FluxTransformerConfig, channels: int, size: tuple[int, int], text_width: int | None
) -> Network:
    """The network of a configuration on latents (channels, *size); `text_width` is that of a caption's features."""
    if isinstance(config, LightningDiTConfig):
        return generator_class(config)(config, channels, size)
    assert text_width is not None  # a FLUX transformer reads text
    return FluxTransformer(config, channels, size, text_width)


def network_of(config: GeneratorTrainingConfig, channels: int, size: tuple[int, int]) -> Network:
    """The network that a recipe trains on latents (channels, *size)."""
    if config.condition == "text":
        return build_network(config.text.model, channels, size, config.text.encoder.width)
    return build_network(config.model, channels, size, None)


def network_name(model: Network) -> str:
    """As the banner and the plan call it."""
    return "FLUX transformer" if isinstance(model, FluxTransformer) else "LightningDiT"


def save_generator(
    folder: Path,
    model: Network,
    weights: dict[str, Tensor],
    sampler: SamplerConfig,
    classes: list[str],
    tokenizer_fingerprint: str,
    text: TextSource | None = None,
) -> None:
    """Write a generator folder: config.json, with the sampler's defaults and what it belongs to, and the weights.

    Args:
        classes: names of the classes; none with `text`.
        text: of a generator that reads captions.
    """
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "config": dataclasses.asdict(model.config),
        "sampler": dataclasses.asdict(sampler),
        "latent_channels": model.latent_channels,
        "latent_size": list(model.latent_size),
        "classes": classes,
        "tokenizer": tokenizer_fingerprint,
    }
    if text is not None:
        manifest["text"] = dataclasses.asdict(text)
    write_folder(folder, {"model": weights}, {"config": manifest})


class Generator:
    """A trained generator read from its folder, or from a repository on the hub, USER/NAME or USER/NAME@REVISION: the
    network, what it can be asked for and its sampler's defaults.

    Raises:
        UserError: no such folder, a damaged one, another format or version, or weights that do not fit.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = located(folder, "generator")
        manifest, weights = Manifest(folder, "generator"), folder / "model.safetensors"
        if manifest.format != FORMAT:
            raise UserError(f"{manifest.file} says format {manifest.format!r}, expected {FORMAT!r}")
        manifest.check_version()
        height, width = manifest.value("latent_size", tuple[int, int])
        self.latent_shape: tuple[int, int, int] = (manifest.value("latent_channels", int), height, width)
        self.classes: list[str] = manifest.value("classes", list[str])
        self.tokenizer_fingerprint: str = manifest.value("tokenizer", str)
        self.sampler: SamplerConfig = manifest.value("sampler", SamplerConfig)
        self.text: TextSource | None = manifest.value("text", TextSource) if "text" in manifest.values else None
        config = manifest.value("config", LightningDiTConfig if self.text is None else FluxTransformerConfig)
        if isinstance(config, LightningDiTConfig) and config.classes is None:
            raise UserError(f"{manifest.file}: config.classes is null, expected the number of classes that it knows")
        text_width = None if self.text is None else self.text.encoder.width
        self.model = manifest.build(lambda: build_network(config, self.latent_shape[0], (height, width), text_width))
        load_strictly(self.model, read_tensors(weights), weights)
        self.model.eval().requires_grad_(False)
