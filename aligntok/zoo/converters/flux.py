"""FLUX's `ae.safetensors` (black-forest-labs) -> a tokenizer folder.

The file holds the autoencoder alone, under LDM's names, without quant convolutions: encoder 34.27 M and decoder
49.55 M parameters. Scale and shift are not in it; they are FLUX's. Source: FLUX src/flux/util.py:323-327.
"""

from __future__ import annotations

from pathlib import Path

from aligntok.config import DecoderConfig, VAEConfig
from aligntok.runtime.published import read_published
from aligntok.zoo.converters.conversion import Report, described, fill
from aligntok.zoo.converters.ldm_keys import ldm_names
from aligntok.zoo.vae import VAE, scale_and_shift

WHAT = "FLUX autoencoder"
SCALE, SHIFT = 0.3611, 0.1159


def flux_config() -> VAEConfig:
    """FLUX's autoencoder as its transformer sees it: f16 after 2x2 packing, 64 channels."""
    networks = DecoderConfig(channel_multipliers=(1, 2, 4, 4), attention_levels=())
    return VAEConfig(latent_channels=16, networks=networks, quant_convs=False, packing=2)


def convert(source: Path, output: Path, config: VAEConfig | None = None) -> Report:
    """Write the tokenizer folder `output` from the checkpoint `source`.

    Args:
        config: the architecture of the file; None = FLUX's.

    Raises:
        UserError: an unreadable file, or missing, unexpected or misshapen tensors.
    """
    state = read_published(source)
    vae = VAE(config or flux_config())
    names = ldm_names(len(vae.config.networks.channel_multipliers))
    report = fill(vae, state, names, {}, source, WHAT)
    scale_and_shift(vae, SCALE, SHIFT)
    vae.save(output)
    report.notes.append(described(vae))
    return report
