"""Names of the convolutional autoencoder's tensors in the two published layouts.

LDM's (FLUX's ae.safetensors) numbers the decoder's levels from fine to coarse, diffusers' and ours from coarse to fine.
Attention's q, k and v are three tensors there and one here; diffusers keeps them as linear layers [C, C].
"""

from __future__ import annotations

import re

from aligntok.zoo.converters.conversion import STATISTICS, Sources

# (pattern of our module, template of theirs); {up} is the decoder's level counted from fine to coarse
_LDM = [
    (r"(en|de)coder\.(conv_in|norm_out|conv_out)", r"\1coder.\2"),
    (r"(en|de)coder\.middle\.0\.(\w+)", r"\1coder.mid.block_1.\2"),
    (r"(en|de)coder\.middle\.2\.(\w+)", r"\1coder.mid.block_2.\2"),
    (r"(en|de)coder\.middle\.1\.(\w+)", r"\1coder.mid.attn_1.\2"),
    (r"encoder\.levels\.(\d+)\.blocks\.(\d+)\.(\w+)", r"encoder.down.\1.block.\2.\3"),
    (r"encoder\.levels\.(\d+)\.attentions\.(\d+)\.(\w+)", r"encoder.down.\1.attn.\2.\3"),
    (r"encoder\.levels\.(\d+)\.downsample", r"encoder.down.\1.downsample.conv"),
    (r"decoder\.levels\.(\d+)\.blocks\.(\d+)\.(\w+)", r"decoder.up.{up}.block.\2.\3"),
    (r"decoder\.levels\.(\d+)\.attentions\.(\d+)\.(\w+)", r"decoder.up.{up}.attn.\2.\3"),
    (r"decoder\.levels\.(\d+)\.upsample", r"decoder.up.{up}.upsample.conv"),
    (r"(post_)?quant", r"\1quant_conv"),
]
_DIFFUSERS = [
    (r"(en|de)coder\.(conv_in|conv_out)", r"\1coder.\2"),
    (r"(en|de)coder\.norm_out", r"\1coder.conv_norm_out"),
    (r"(en|de)coder\.middle\.0\.(\w+)", r"\1coder.mid_block.resnets.0.\2"),
    (r"(en|de)coder\.middle\.2\.(\w+)", r"\1coder.mid_block.resnets.1.\2"),
    (r"(en|de)coder\.middle\.1\.(\w+)", r"\1coder.mid_block.attentions.0.\2"),
    (r"encoder\.levels\.(\d+)\.blocks\.(\d+)\.(\w+)", r"encoder.down_blocks.\1.resnets.\2.\3"),
    (r"encoder\.levels\.(\d+)\.downsample", r"encoder.down_blocks.\1.downsamplers.0.conv"),
    (r"decoder\.levels\.(\d+)\.blocks\.(\d+)\.(\w+)", r"decoder.up_blocks.\1.resnets.\2.\3"),
    (r"decoder\.levels\.(\d+)\.upsample", r"decoder.up_blocks.\1.upsamplers.0.conv"),
    (r"(post_)?quant", r"\1quant_conv"),
]
# Last part of a module's name: ours -> theirs, in residual blocks and in attention
_LDM_PARTS = {"shortcut": ["nin_shortcut"], "qkv": ["q", "k", "v"], "proj": ["proj_out"]}
_DIFFUSERS_PARTS = {
    "shortcut": ["conv_shortcut"],
    "qkv": ["to_q", "to_k", "to_v"],
    "proj": ["to_out.0"],
    "norm": ["group_norm"],
}


def ldm_names(levels: int) -> Sources:
    """LDM's layout for an autoencoder of so many levels."""
    return lambda name: _translate(name, _LDM, _LDM_PARTS, levels)


def diffusers_names(levels: int) -> Sources:
    """That of diffusers' AutoencoderKL."""
    return lambda name: _translate(name, _DIFFUSERS, _DIFFUSERS_PARTS, levels)


def _translate(name: str, rules: list[tuple[str, str]], parts: dict[str, list[str]], levels: int) -> tuple[str, ...]:
    if name in STATISTICS:
        return ()
    module, leaf = name.rsplit(".", 1)  # leaf: weight or bias
    for pattern, template in rules:
        match = re.fullmatch(pattern, module)
        if match is None:
            continue
        theirs = match.expand(template)
        if "{up}" in theirs:
            theirs = theirs.replace("{up}", str(levels - 1 - int(match[1])))
        stem, _, last = theirs.rpartition(".")
        return tuple(f"{stem}.{part}.{leaf}" if stem else f"{part}.{leaf}" for part in parts.get(last, [last]))
    raise AssertionError(f"no name for {name}")
