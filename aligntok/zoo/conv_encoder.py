"""The convolutional encoder of latent diffusion: the mirror image of models/decoder.py.

conv_in -> levels from fine to coarse, each with `blocks` residual blocks and, but for the last, a convolution of
stride 2 -> (residual block, attention, residual block) -> GroupNorm, SiLU, conv_out. The stride-2 convolution pads one
row below and one column to the right, and none above or to the left (LDM). Sizes as in LDM and FLUX: a level's first
block changes the width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aligntok.config import DecoderConfig
from aligntok.errors import UserError
from aligntok.models.decoder import EPS, Level, ResidualBlock, SpatialAttention, apply_norm


class DownLevel(Level):
    """Residual blocks of the given widths at one resolution, then halving it where asked."""

    def __init__(self, widths: list[int], attention: bool, downsample: bool, groups: int) -> None:
        super().__init__(widths, attention, upsample=False, groups=groups)
        self.downsample = nn.Conv2d(widths[-1], widths[-1], 3, stride=2) if downsample else None

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x if self.downsample is None else self.downsample(F.pad(x, (0, 1, 0, 1)))


class ConvEncoder(nn.Module):
    """Images [B, 3, H, W] in [-1, 1] -> [B, channels, H/f, W/f], f = 2 ** (levels - 1).

    Args:
        channels: of the output; 2 d for the mean and log-variance of a VAE.
        config: widths, blocks, groups and attention levels, read as those of the decoder that it belongs to.
    """

    def __init__(self, channels: int, config: DecoderConfig) -> None:
        super().__init__()
        widths = [config.base_channels * multiplier for multiplier in config.channel_multipliers]
        groups = config.groups
        if any(width % groups for width in (config.base_channels, *widths)):
            raise UserError(f"encoder widths are {widths}, expected multiples of groups = {groups}")
        self.conv_in = nn.Conv2d(3, config.base_channels, 3, padding=1)
        levels, before = [], config.base_channels
        for index, width in enumerate(widths):
            last = index == len(widths) - 1
            level_widths = [before] + [width] * config.blocks
            levels.append(DownLevel(level_widths, index in config.attention_levels, not last, groups))
            before = level_widths[-1]
        self.levels = nn.Sequential(*levels)
        self.middle = nn.Sequential(
            ResidualBlock(before, before, groups),
            SpatialAttention(before, groups),
            ResidualBlock(before, before, groups),
        )
        self.norm_out = nn.GroupNorm(groups, before, eps=EPS)
        self.conv_out = nn.Conv2d(before, channels, 3, padding=1)
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        h = self.conv_in(images.contiguous(memory_format=torch.channels_last))
        h = self.middle(self.levels(h))
        return self.conv_out(apply_norm(h, self.norm_out))
