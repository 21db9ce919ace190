"""VA-VAE checkpoints of hustvl/LightningDiT, and any KL autoencoder in LDM's layout, into a VAE folder.

The sizes are read from the tensors. The projection onto the foundation model, the discriminator and the perceptual
network that a training checkpoint holds are left out: they do not touch a latent.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from aligntok.config import DecoderConfig, VAEConfig
from aligntok.errors import UserError
from aligntok.runtime.published import read_published
from aligntok.zoo.converters.conversion import Report, count, described, fill, require, require_shape
from aligntok.zoo.converters.ldm_keys import ldm_names
from aligntok.zoo.vae import VAE

WHAT = "VA-VAE"
GROUPS = 32  # of LDM's GroupNorms, which no tensor tells
IGNORED = {
    r"loss\.": "discriminator and perceptual network, of training only",
    r"foundation_model\.": "frozen foundation model, of training only",
    r"linear_proj\.": "projection onto the foundation model, of training only",
}


def convert(source: Path, output: Path, *, statistics: str | None = None) -> Report:
    """Write the tokenizer folder `output` from the checkpoint `source`.

    Args:
        statistics: latents_stats.pt of LightningDiT (mean, std [1, d, 1, 1]).

    Raises:
        UserError: a file that cannot be read or does not fit, naming what is missing, unexpected or misshapen.
    """
    state = read_published(source)
    vae = VAE(config_of(state, source))
    names = ldm_names(len(vae.config.networks.channel_multipliers))
    report = fill(vae, state, names, IGNORED, source, WHAT)
    if statistics is not None:
        vae.set_statistics(*channel_statistics(Path(statistics), vae.latent_channels))
    vae.save(output)
    report.notes.append(described(vae))
    return report


def config_of(state: dict[str, Tensor], path: Path) -> VAEConfig:
    """The sizes of a network in LDM's layout."""
    base = require_shape(state, "encoder.conv_in.weight", path, WHAT, 4)[0]
    d = require_shape(state, "post_quant_conv.weight", path, WHAT, 4)[0]
    levels, blocks = count(state, r"encoder\.down\.(\d+)\."), count(state, r"encoder\.down\.0\.block\.(\d+)\.")
    firsts = [require_shape(state, f"encoder.down.{i}.block.0.conv1.weight", path, WHAT, 4)[0] for i in range(levels)]
    if base % GROUPS:
        raise UserError(f"{path} has {base} base channels, expected a multiple of {GROUPS} as in LDM")
    if not firsts or any(first % base for first in firsts):
        raise UserError(
            f"{path} has levels of {firsts} channels, expected at least one level, and multiples of the {base} base "
            "channels as in LDM"
        )
    attention = tuple(i for i in range(levels) if f"encoder.down.{i}.attn.0.norm.weight" in state)
    networks = DecoderConfig(
        base_channels=base,
        channel_multipliers=tuple(first // base for first in firsts),
        blocks=blocks,
        groups=GROUPS,
        attention_levels=attention,
    )
    return VAEConfig(latent_channels=d, networks=networks)


def channel_statistics(path: Path, channels: int) -> tuple[Tensor, Tensor]:
    """(mean, std), each [d], from a file of both with any number of axes of length 1 beside the channels'."""
    held = read_published(path)
    found = [require(held, name, path, "file of latent statistics").flatten().float() for name in ("mean", "std")]
    if any(value.shape != torch.Size([channels]) for value in found):
        held_of = " and ".join(str(len(value)) for value in found)
        raise UserError(f"{path} holds a mean and std of {held_of} channels, expected {channels}")
    return found[0], found[1]
