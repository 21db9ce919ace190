"""FLUX's `ae.safetensors` (black-forest-labs) -> a tokenizer folder.

The file holds the autoencoder alone, under LDM's names, without quant convolutions: encoder 34.27 M and decoder
49.55 M parameters. Scale and shift are not in it; they are FLUX's (.3611, .1159).
"""

from __future__ import annotations

from pathlib import Path

from aligntok.zoo.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig, flux_config
from aligntok.zoo.ldm_keys import ldm_names
from aligntok.zoo.published import read_published, write_converted


def convert(source: Path, output: Path, config: AutoencoderKLConfig | None = None) -> None:
    """Read `source`, write the tokenizer to the folder `output` and print what was converted.

    Args:
        config: the architecture of the file; None = FLUX's.

    Raises:
        UserError: an unreadable file, or missing, unexpected or misshapen tensors.
    """
    state = read_published(source)
    tokenizer = AutoencoderKL(config or flux_config())
    names = ldm_names(len(tokenizer.config.network.channel_multipliers))
    write_converted(tokenizer, state, names, Path(source), Path(output))
