"""An AutoencoderKL in diffusers' layout (Stable Diffusion's VAE, FLUX's `vae` folder) -> a tokenizer folder.

The architecture, scale and shift come from the config.json beside the weights. Files from before diffusers 0.18 call
the attention's layers query, key, value and proj_attn; both spellings are read.
"""

from __future__ import annotations

import json
import re
from math import inf
from pathlib import Path
from typing import Any

from torch import Tensor

from aligntok.config import DecoderConfig, VAEConfig
from aligntok.errors import UserError
from aligntok.runtime.published import read_published, weight_file
from aligntok.zoo.converters.conversion import Report, described, fill
from aligntok.zoo.converters.ldm_keys import diffusers_names
from aligntok.zoo.vae import VAE, scale_and_shift

WHAT = "diffusers AutoencoderKL"
# What the convolutional autoencoder of this package is; another value is another network.
_FIXED = {
    "act_fn": "silu",
    "in_channels": 3,
    "out_channels": 3,
    "mid_block_add_attention": True,
    "latents_mean": None,
    "latents_std": None,
}
SCALE = 0.18215  # diffusers' default, LDM's for Stable Diffusion
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def convert(source: Path, output: Path) -> Report:
    """Write the tokenizer folder `output` from a weight file, the folder that holds it, or a pipeline's.

    Raises:
        UserError: no weights or no config.json beside them, an architecture that is not LDM's, or missing, unexpected
            or misshapen tensors.
    """
    weights = weight_file(source / "vae" if (source / "vae").is_dir() else source)
    config, scale, shift = read_config(weights.with_name("config.json"))
    vae = VAE(config)
    state = dict(_as_published_now(key, value) for key, value in read_published(weights).items())
    names = diffusers_names(len(config.networks.channel_multipliers))
    report = fill(vae, state, names, {}, weights, WHAT)
    scale_and_shift(vae, scale, shift)
    vae.save(output)
    report.notes.append(described(vae))
    return report


def read_config(file: Path) -> tuple[VAEConfig, float, float]:
    """(our configuration, scale, shift) of diffusers' config.json; UserError where it describes another network."""
    if not file.is_file():
        raise UserError(f"{file} is missing: diffusers writes it beside the weights, and the latents' scale is in it")
    try:
        found: dict[str, Any] = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is not JSON that can be read ({error})") from error
    if not isinstance(found, dict):
        raise UserError(f"{file} is a {type(found).__name__} in JSON, expected the settings of a {WHAT}")
    _check_types(found, file)
    for key, wanted in _FIXED.items():
        if found.get(key, wanted) != wanted:
            raise UserError(f"{file}: {key} is {found[key]!r}, this converter knows only {wanted!r}")
    widths = found.get("block_out_channels", [])
    for key, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        if not widths or found.get(key) != [kind] * len(widths):
            raise UserError(f"{file}: {key} is {found.get(key)}, expected {kind} for each of block_out_channels")
    if any(width % widths[0] for width in widths):
        raise UserError(f"{file}: block_out_channels are {widths}, expected multiples of the first")
    network = DecoderConfig(
        base_channels=widths[0],
        channel_multipliers=tuple(width // widths[0] for width in widths),
        blocks=found.get("layers_per_block", 1),  # this and the next are diffusers' own defaults
        groups=found.get("norm_num_groups", 32),
        attention_levels=(),
    )
    quant, post_quant = found.get("use_quant_conv", True), found.get("use_post_quant_conv", True)
    if quant != post_quant:
        raise UserError(
            f"{file}: use_quant_conv is {quant} and use_post_quant_conv {post_quant}; both or none expected"
        )
    config = VAEConfig(latent_channels=found.get("latent_channels", 4), networks=network, quant_convs=quant)
    scale = found.get("scaling_factor", SCALE)  # older files of Stable Diffusion's VAE leave it out
    return config, scale, found.get("shift_factor") or 0.0


def _check_types(found: dict[str, Any], file: Path) -> None:
    """UserError for a setting that is no number, or not of the numbers that it can be; those that are absent pass."""
    for key in ("layers_per_block", "norm_num_groups", "latent_channels"):
        if key in found and not (type(found[key]) is int and found[key] > 0):
            raise UserError(f"{file}: {key} is {found[key]!r}, expected a whole number of at least 1")
    widths = found.get("block_out_channels", [])
    if not isinstance(widths, list) or not all(type(width) is int and width > 0 for width in widths):
        raise UserError(f"{file}: block_out_channels is {widths!r}, expected a list of channels, each at least 1")
    scale, shift = found.get("scaling_factor", SCALE), found.get("shift_factor") or 0.0
    if not (isinstance(scale, (int, float)) and 0 < scale < inf and isinstance(shift, (int, float))):
        raise UserError(
            f"{file}: scaling_factor is {scale!r} and shift_factor {shift!r}, expected a scale above 0, and a number "
            "or null"
        )


def _as_published_now(key: str, value: Tensor) -> tuple[str, Tensor]:
    """A tensor under today's name; the linear layers of attention as the 1x1 convolutions that they are in LDM."""
    match = re.fullmatch(r"(.*attentions\.0)\.(query|key|value|proj_attn)\.(weight|bias)", key)
    key = key if match is None else f"{match[1]}.{_OLD_ATTENTION[match[2]]}.{match[3]}"
    return key, value[:, :, None, None] if ".attentions.0.to_" in key and value.ndim == 2 else value
