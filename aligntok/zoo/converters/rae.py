"""RAE decoders of bytetriper/RAE into tokenizer folders, with the encoder that they belong to.

A published decoder is a file of its own; its encoder is a pretrained one, which timm brings or a file in timm's
layout. Three of them are equally wide, so a decoder does not tell which one it belongs to. Published statistics are
mean and var [C, h, w]; std = sqrt(var + 1e-5) as in RAE rae.py.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from aligntok.config import EncoderConfig, RAEConfig, ViTDecoderConfig
from aligntok.errors import UserError
from aligntok.runtime.published import read_published
from aligntok.zoo.converters.conversion import (
    Report,
    count,
    described,
    fill,
    heads_of,
    renamed,
    require,
    require_shape,
    side_of,
)
from aligntok.zoo.rae import RAE

WHAT = "RAE decoder"
# timm's names of the encoders of the published decoders, all 768 wide
ENCODERS = (
    "vit_base_patch14_reg4_dinov2.lvd142m",
    "vit_base_patch16_siglip_256.v2_webli",
    "vit_base_patch16_224.mae",
)
VARIANCE_EPS = 1e-5  # RAE rae.py
IGNORED = {r"decoder_pos_embed$": "sin-cos table, equal to the one computed here"}
RULES = [
    (r"^embed\.", "decoder_embed."),
    (r"^class_token$", "trainable_cls_token"),
    (r"^blocks\.", "decoder_layers."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
    (r"^norm\.", "decoder_norm."),
    (r"^prediction\.", "decoder_pred."),
]


def convert(
    source: Path,
    output: Path,
    *,
    statistics: str | None = None,
    encoder: str | None = None,
    encoder_weights: str = "pretrained",
) -> Report:
    """Write the tokenizer folder `output` from the decoder `source`.

    Args:
        statistics: stat.pt of RAE (mean, var [C, h, w]).
        encoder: timm name; has to be given.
        encoder_weights: "pretrained", "random", or a file in timm's layout.

    Raises:
        UserError: a file that cannot be read or does not fit; no encoder, one of another width, or without weights.
    """
    if encoder is None:
        raise UserError(
            f"{source} does not tell which encoder it belongs to: give --encoder, of RAE's {', '.join(ENCODERS)}"
        )
    state = read_published(source)
    state = {re.sub(r"^decoder\.(?=decoder_|trainable)", "", name): value for name, value in state.items()}
    rae = RAE(config_of(state, source, EncoderConfig(encoder, encoder_weights, antialias=False)))
    channels = require_shape(state, "decoder_embed.weight", source, WHAT, 2)[1]
    if channels != rae.latent_channels:
        raise UserError(
            f"{source} decodes {channels} channels, {encoder} has {rae.latent_channels}: give its --encoder"
        )
    report = fill(rae.decoder, state, sources, IGNORED, source, WHAT)
    _check_positions(rae, state, source)
    if statistics is not None:
        rae.set_statistics(*_element_statistics(Path(statistics), rae))
    rae.save(output)
    report.notes += [described(rae), f"encoder: {rae.encoder.source}"]
    return report


def config_of(state: dict[str, Tensor], path: Path, encoder: EncoderConfig) -> RAEConfig:
    """The sizes that the tensors have."""
    width = require_shape(state, "decoder_embed.weight", path, WHAT, 2)[0]
    patch = side_of(require_shape(state, "decoder_pred.weight", path, WHAT, 2)[0] // 3, path)
    decoder = ViTDecoderConfig(
        size="custom",
        depth=count(state, r"decoder_layers\.(\d+)\."),
        width=width,
        heads=heads_of(width, path),
        hidden=require_shape(state, "decoder_layers.0.intermediate.dense.weight", path, WHAT, 2)[0],
        patch_size=patch,
    )
    side = side_of(require_shape(state, "decoder_pos_embed", path, WHAT, 3)[1] - 1, path)
    encoder.downsample = patch
    return RAEConfig(encoder=encoder, decoder=decoder, image_size=side * patch)


def sources(name: str) -> list[str]:
    """RAE's names of the tensors that one of our decoder's is made of."""
    name = renamed(RULES, name)
    if ".attn.qkv." in name:
        return [name.replace(".attn.qkv.", f".attention.attention.{part}.") for part in ("query", "key", "value")]
    return [name]


def _check_positions(rae: RAE, state: dict[str, Tensor], path: Path) -> None:
    table = state["decoder_pos_embed"]
    own = torch.cat([torch.zeros_like(rae.decoder.positions[:, :1]), rae.decoder.positions], dim=1)
    if table.shape != own.shape or not torch.allclose(table.float(), own, atol=1e-5):
        raise UserError(f"{path} is not a {WHAT}: decoder_pos_embed is not the sin-cos table of RAE's decoders")


def _element_statistics(path: Path, rae: RAE) -> tuple[Tensor, Tensor]:
    held = read_published(path)
    mean, var = (require(held, name, path, "file of latent statistics").float() for name in ("mean", "var"))
    if not mean.shape == var.shape == rae.latent_mean.shape:
        expected = list(rae.latent_mean.shape)
        raise UserError(f"{path} holds mean {list(mean.shape)} and var {list(var.shape)}, expected {expected}")
    return mean, (var + VARIANCE_EPS).sqrt()
