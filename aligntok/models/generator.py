"""A generator on disk: a folder with `config.json` and `model.safetensors`, as a tokenizer's.

config.json also has the classes' names, the sampler's defaults and the fingerprint of the tokenizer it belongs to.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from torch import Tensor

from aligntok.config import LightningDiTConfig, SamplerConfig
from aligntok.errors import UserError
from aligntok.models.dit_dh import DiTDH
from aligntok.models.lightning_dit import LightningDiT
from aligntok.runtime.files import write_folder
from aligntok.runtime.manifest import VERSION, Manifest
from aligntok.runtime.weights import load_strictly, read_tensors

FORMAT = "aligntok.generator"


def generator_class(config: LightningDiTConfig) -> type[LightningDiT]:
    """LightningDiT, or DiT^DH where the configuration has a head."""
    return DiTDH if config.head_depth else LightningDiT


def save_generator(
    folder: Path,
    model: LightningDiT,
    weights: dict[str, Tensor],
    sampler: SamplerConfig,
    classes: list[str],
    tokenizer_fingerprint: str,
) -> None:
    """Write a generator folder: config.json, with the sampler's defaults and what it belongs to, and the weights."""
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "config": dataclasses.asdict(model.config),
        "sampler": dataclasses.asdict(sampler),
        "latent_channels": model.latent_channels,
        "latent_size": list(model.latent_size),
        "classes": classes,
        "tokenizer": tokenizer_fingerprint,
    }
    write_folder(folder, {"model": weights}, {"config": manifest})


class Generator:
    """A trained generator read from its folder: the network, its class names and its sampler's defaults.

    Raises:
        UserError: no such folder, a damaged one, another format or version, or weights that do not fit.
    """

    def __init__(self, folder: str | Path) -> None:
        manifest, weights = Manifest(folder, "generator"), Path(folder) / "model.safetensors"
        if manifest.format != FORMAT:
            raise UserError(f"{manifest.file} says format {manifest.format!r}, expected {FORMAT!r}")
        manifest.check_version()
        height, width = manifest.value("latent_size", tuple[int, int])
        self.latent_shape: tuple[int, int, int] = (manifest.value("latent_channels", int), height, width)
        self.classes: list[str] = manifest.value("classes", list[str])
        self.tokenizer_fingerprint: str = manifest.value("tokenizer", str)
        self.sampler: SamplerConfig = manifest.value("sampler", SamplerConfig)
        config = manifest.value("config", LightningDiTConfig)
        if config.classes is None:
            raise UserError(f"{manifest.file}: config.classes is null, expected the number of classes that it knows")
        self.model = manifest.build(lambda: generator_class(config)(config, self.latent_shape[0], (height, width)))
        load_strictly(self.model, read_tensors(weights), weights)
        self.model.eval().requires_grad_(False)
