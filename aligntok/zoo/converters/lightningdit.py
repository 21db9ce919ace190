"""LightningDiT checkpoints of hustvl into generator folders, turned to our direction of time.

Theirs: t' = 0 is noise, v' = data - noise. Ours: t = 1 - t', v = -v'. Both differences are linear in the weights, so
they are put there, and the network needs no switch:

    final linear layer:   negated
    time embedding's first layer, W = [W_c, W_s] on [cos(t' f), sin(t' f)]:
                          W_c <- W_c cos f + W_s sin f,   W_s <- W_c sin f - W_s cos f
    since cos((1 - t) f) = cos f cos tf + sin f sin tf and sin((1 - t) f) = sin f cos tf - cos f sin tf

Their sampler's settings become the folder's defaults: 250 grid points are 249 evaluations; a shift of .3 seen
from t = 1 is 3.33; guidance on the first three channels, off where t' < start of the interval, or t > 1 - start.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aligntok.config import LightningDiTConfig, SamplerConfig
from aligntok.errors import UserError
from aligntok.models.generator import save_generator
from aligntok.models.lightning_dit import TIME_FEATURES, LightningDiT, time_frequencies
from aligntok.models.tokenizer import load_tokenizer
from aligntok.runtime.published import read_published
from aligntok.zoo.converters.conversion import (
    Report,
    count,
    fill,
    heads_of,
    renamed,
    require_shape,
    side_of,
)

WHAT = "LightningDiT"
IGNORED = {r"feat_rope\.": "tables of rotary positions, computed here"}
RULES = [
    (r"^time\.", "t_embedder."),
    (r"^label\.", "y_embedder.embedding_table."),
    (r"\.attention\.", ".attn."),
    (r"\.modulation\.", ".adaLN_modulation.1."),
    (r"^final\.norm\.", "final_layer.norm_final."),
    (r"^final\.", "final_layer."),
    (r"^positions$", "pos_embed"),
]
# (guidance, interval's start in their time): configs/reproductions/lightningdit_xl_vavae_f16d32_{64,800}ep_cfg.yaml
PRESETS = {"64ep": (10.0, 0.10), "800ep": (6.7, 0.125)}
SHIFT, GRID_POINTS = 0.3, 250  # the same files


def convert(source: Path, output: Path, *, tokenizer: str | None = None, preset: str = "64ep") -> Report:
    """Write the generator folder `output` from the checkpoint `source`, its moving averages where it holds them.

    Args:
        tokenizer: folder of the converted VA-VAE, with the published statistics.
        preset: 64ep or 800ep.

    Raises:
        UserError: a file that cannot be read or does not fit; no tokenizer, or one of other latents.
    """
    if preset not in PRESETS:
        raise UserError(f"--preset is {preset!r}, expected one of {', '.join(PRESETS)}")
    state = read_published(source)
    fingerprint = tokenizer_fingerprint(tokenizer, require_shape(state, "x_embedder.proj.weight", source, WHAT, 4)[1])
    model = build(state, source)
    report = fill(model, state, sources, IGNORED, source, WHAT)
    turn(model)
    classes = [str(number) for number in range(model.null_class)]
    save_generator(output, model, model.state_dict(), sampler(preset), classes, fingerprint)
    report.notes.append("time direction and velocity sign turned to t = 1 noise; classes are called by their numbers")
    return report


def trunk(state: dict[str, Tensor], path: Path, what: str, width: int, patch: int) -> dict[str, Any]:
    """What the tensors say of a configuration, but for its depth; DiT^DH has the same names."""
    return {
        "size": "custom",
        "width": width,
        "heads": heads_of(width, path),
        "patch_size": patch,
        "classes": require_shape(state, "y_embedder.embedding_table.weight", path, what, 2)[0] - 1,
        "qk_norm": "blocks.0.attn.q_norm.weight" in state,
        "shift": require_shape(state, "blocks.0.adaLN_modulation.1.weight", path, what, 2)[0] == 6 * width,
    }


def build(state: dict[str, Tensor], path: Path) -> LightningDiT:
    """A network of the sizes that the tensors have."""
    width, channels, patch, _ = require_shape(state, "x_embedder.proj.weight", path, WHAT, 4)
    side = side_of(require_shape(state, "pos_embed", path, WHAT, 3)[1], path) * patch
    config = LightningDiTConfig(depth=count(state, r"blocks\.(\d+)\."), **trunk(state, path, WHAT, width, patch))
    return LightningDiT(config, channels, (side, side))


def sources(name: str) -> list[str]:
    """LightningDiT's name of one of our tensors."""
    return [renamed([(r"^patches\.", "x_embedder.proj."), *RULES], name)]


@torch.no_grad()
def turn(model: LightningDiT) -> None:
    """Change a network of their time and velocity into one of ours, or back, in place."""
    for parameter in (model.final.linear.weight, model.final.linear.bias):
        parameter.neg_()
    weight = model.time.get_parameter("mlp.0.weight")
    cosine, sine = weight.double().chunk(2, dim=1)
    angle = time_frequencies(TIME_FEATURES // 2).double()
    turned = (
        cosine * angle.cos() + sine * angle.sin(),
        cosine * angle.sin() - sine * angle.cos(),
    )
    weight.copy_(torch.cat(turned, dim=1))


def sampler(preset: str) -> SamplerConfig:
    """The published sampling settings in our terms."""
    guidance, start = PRESETS[preset]
    return SamplerConfig(
        steps=GRID_POINTS - 1,
        time_shift=1 / SHIFT,
        guidance=guidance,
        guidance_channels=3,
        guidance_interval=(0.0, 1 - start),
    )


def tokenizer_fingerprint(folder: str | None, channels: int) -> str:
    """Fingerprint of the tokenizer that a converted generator belongs to.

    Raises:
        UserError: none given, one without statistics, or one of another number of channels.
    """
    if folder is None:
        raise UserError("a generator belongs to a tokenizer: convert that first and give its folder with --tokenizer")
    tokenizer = load_tokenizer(folder)
    if tokenizer.latent_channels != channels:
        raise UserError(f"{folder} has {tokenizer.latent_channels} latent channels, the checkpoint {channels}")
    return tokenizer.fingerprint()
