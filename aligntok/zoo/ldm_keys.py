"""Names of the convolutional autoencoder's tensors in the two published layouts.

LDM's (FLUX's ae.safetensors) numbers the decoder's levels from fine to coarse, diffusers' and ours from coarse to fine.
Attention's q, k and v are three tensors there and one here; diffusers keeps them as linear layers [C, C].
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from aligntok.errors import UserError

Names = Callable[[str], tuple[str, ...]]  # our name -> theirs: one, or q, k, v to be joined

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


def ldm_names(levels: int) -> Names:
    """LDM's layout for an autoencoder of so many levels."""
    return lambda name: _translate(name, _LDM, _LDM_PARTS, levels)


def diffusers_names(levels: int) -> Names:
    """That of diffusers' AutoencoderKL."""
    return lambda name: _translate(name, _DIFFUSERS, _DIFFUSERS_PARTS, levels)


def _translate(name: str, rules: list[tuple[str, str]], parts: dict[str, list[str]], levels: int) -> tuple[str, ...]:
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


def translate_state(
    module: nn.Module, state: Mapping[str, Tensor], names: Names, source: Path, own: set[str] | None = None
) -> dict[str, Tensor]:
    """The state dict of `module` made from a file's tensors, strictly: each of them is used, and used once.

    Args:
        module: gives the names and shapes that are wanted.
        state: tensors of the file under its own names.
        names: from our names to the file's.
        source: the file, for the message.
        own: names that the file does not hold and that keep the module's values (the latent statistics).

    Raises:
        UserError: missing, unexpected or misshapen tensors, by the file's names; the first three of each.
    """
    made, used = {}, set()
    missing, misshapen = [], []
    for name, wanted in module.state_dict().items():
        if own is not None and name in own:
            made[name] = wanted
            continue
        theirs = names(name)
        used.update(theirs)
        missing += [key for key in theirs if key not in state]
        if any(key not in state for key in theirs):
            continue
        rows = wanted.shape[0] // len(theirs)
        for key in theirs:
            if _squeezed(state[key].shape) != _squeezed((rows, *wanted.shape[1:])):
                misshapen.append(f"{key} {list(state[key].shape)} instead of {[rows, *wanted.shape[1:]]}")
        if not misshapen:
            made[name] = torch.cat([state[key].reshape(rows, *wanted.shape[1:]) for key in theirs]).to(wanted.dtype)
    unexpected = [key for key in state if key not in used]
    faults = (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen))
    told = "; ".join(
        f"{len(keys)} {what}: {', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''}" for what, keys in faults if keys
    )
    if told:
        raise UserError(f"{source} does not fit the autoencoder that was expected: {told}")
    return made


def _squeezed(shape: tuple[int, ...] | torch.Size) -> tuple[int, ...]:
    """A shape without the two 1s of a 1x1 convolution, which diffusers writes as a linear layer."""
    return tuple(shape[:2]) if len(shape) == 4 and tuple(shape[2:]) == (1, 1) else tuple(shape)
