"""An AutoencoderKL in diffusers' layout (Stable Diffusion's VAE, FLUX's `vae` folder) -> a tokenizer folder.

The architecture, scale and shift come from the config.json beside the weights. Files from before diffusers 0.18 call
the attention's layers query, key, value and proj_attn; both spellings are read.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from aligntok.config import DecoderConfig
from aligntok.errors import UserError
from aligntok.zoo.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from aligntok.zoo.ldm_keys import diffusers_names
from aligntok.zoo.published import read_published, write_converted

WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
# What the convolutional autoencoder of this package is; another value is another network.
_FIXED = {
    "act_fn": "silu",
    "in_channels": 3,
    "out_channels": 3,
    "mid_block_add_attention": True,
    "latents_mean": None,
    "latents_std": None,
}
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def convert(source: Path, output: Path) -> None:
    """Read a weight file, or the folder that holds it, write the tokenizer to `output` and print what was converted.

    Raises:
        UserError: no weights or no config.json beside them, an architecture that is not LDM's, or missing, unexpected
            or misshapen tensors.
    """
    source = Path(source)
    weights = next((source / name for name in WEIGHTS if (source / name).is_file()), source)
    if weights.is_dir():
        raise UserError(f"{source} holds neither {WEIGHTS[0]} nor {WEIGHTS[1]}: give the vae folder of a pipeline")
    tokenizer = AutoencoderKL(read_config(weights.with_name("config.json")))
    state = {_new_name(key): value for key, value in read_published(weights).items()}
    names = diffusers_names(len(tokenizer.config.network.channel_multipliers))
    write_converted(tokenizer, state, names, weights, Path(output))


def read_config(file: Path) -> AutoencoderKLConfig:
    """diffusers' config.json as ours; UserError where it describes another network."""
    if not file.is_file():
        raise UserError(f"{file} is missing: diffusers writes it beside the weights, and the latents' scale is in it")
    try:
        found: dict[str, Any] = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error})") from error
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
    return AutoencoderKLConfig(
        latent_channels=found.get("latent_channels", 4),
        network=network,
        quant_convs=quant,
        scale=found.get("scaling_factor", 0.18215),  # older files of Stable Diffusion's VAE leave it to this default
        shift=found.get("shift_factor") or 0.0,
    )


def _new_name(key: str) -> str:
    match = re.fullmatch(r"(.*attentions\.0)\.(query|key|value|proj_attn)\.(weight|bias)", key)
    return key if match is None else f"{match[1]}.{_OLD_ATTENTION[match[2]]}.{match[3]}"
