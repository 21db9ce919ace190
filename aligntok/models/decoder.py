"""Decoder: the convolutional decoder of latent diffusion, as VA-VAE uses it (41.42 M parameters at f16d32).

conv_in -> (residual block, attention, residual block) -> levels from coarse to fine, each with `blocks + 1` residual
blocks and, but for the last, a nearest-neighbour upsampling with a convolution -> GroupNorm, SiLU, conv_out.
Source: LightningDiT vavae/ldm/modules/diffusionmodules/model.py (structure and sizes only). Everything runs
channels-last, which is the layout that convolutions want on both CPUs and GPUs.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aligntok.config import DecoderConfig
from aligntok.errors import UserError
from aligntok.kernels import group_norm_silu, transformed
from aligntok.models.attention import attend

EPS = 1e-6  # of every GroupNorm (LDM)


def apply_norm(x: Tensor, norm: nn.GroupNorm, activation: bool = True) -> Tensor:
    """SiLU(norm(x)), or norm(x), for x [B, C, H, W] by the fused operator."""
    return group_norm_silu(x, norm.weight, norm.bias, norm.num_groups, norm.eps, activation)


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 convolution on x where the width changes."""

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=EPS)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=EPS)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(apply_norm(x, self.norm1))
        h = self.conv2(apply_norm(h, self.norm2))
        return (x if self.shortcut is None else self.shortcut(x)) + h


class SpatialAttention(nn.Module):
    """Single-head self-attention over the H*W positions of a feature map, added to its input."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=EPS)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        _, channels, height, width = x.shape
        qkv = (
            self.qkv(apply_norm(x, self.norm, activation=False)).flatten(2).transpose(1, 2).unsqueeze(1)
        )  # [B, 1, H*W, 3C]
        out = attend(*qkv.split(channels, dim=-1))  # [B, 1, H*W, C]
        return x + self.proj(out.squeeze(1).transpose(1, 2).unflatten(2, (height, width)))


class Level(nn.Module):
    """Residual blocks of the given widths at one resolution, attention after each where asked, optional upsampling."""

    def __init__(self, widths: list[int], attention: bool, upsample: bool, groups: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ResidualBlock(a, b, groups) for a, b in pairwise(widths))
        self.attentions = nn.ModuleList(
            SpatialAttention(width, groups) if attention else nn.Identity() for width in widths[1:]
        )
        self.upsample = nn.Conv2d(widths[-1], widths[-1], 3, padding=1) if upsample else None

    def forward(self, x: Tensor) -> Tensor:
        for block, attention in zip(self.blocks, self.attentions, strict=True):
            x = attention(block(x))
        return x if self.upsample is None else self.upsample(F.interpolate(x, scale_factor=2, mode="nearest"))


class Decoder(nn.Module):
    """Latents [B, d, h, w] (raw, not normalised) -> images [B, 3, f*h, f*w], nominally in [-1, 1], not clamped.

    The upsampling factor f is 2 ** (levels - 1).
    """

    def __init__(self, latent_channels: int, config: DecoderConfig) -> None:
        super().__init__()
        widths = [config.base_channels * multiplier for multiplier in config.channel_multipliers]
        groups = config.groups
        if any(width % groups for width in widths):
            raise UserError(
                f"decoder widths are {widths}, expected multiples of decoder.groups = {groups}: "
                f"change decoder.base_channels or decoder.groups"
            )
        self.upsampling = 2 ** (len(widths) - 1)
        top = widths[-1]
        self.conv_in = nn.Conv2d(latent_channels, top, 3, padding=1)
        self.middle = nn.Sequential(
            ResidualBlock(top, top, groups), SpatialAttention(top, groups), ResidualBlock(top, top, groups)
        )
        levels = []
        for index in reversed(range(len(widths))):
            level_widths = [top] + [widths[index]] * (config.blocks + 1)
            levels.append(Level(level_widths, index in config.attention_levels, index > 0, groups))
            top = widths[index]
        self.levels = nn.Sequential(*levels)
        self.norm_out = nn.GroupNorm(groups, top, eps=EPS)
        self.conv_out = nn.Conv2d(top, 3, 3, padding=1)
        self.to(memory_format=torch.channels_last)

    @property
    def blocks(self) -> list[nn.Module]:
        """What FSDP2 gathers one at a time, in order."""
        return [self.middle, *self.levels]

    def forward(self, latents: Tensor) -> Tensor:
        if not transformed():  # vmap refuses memory formats
            latents = latents.contiguous(memory_format=torch.channels_last)
        h = self.conv_in(latents)
        h = self.levels(self.middle(h))
        return self.conv_out(apply_norm(h, self.norm_out))
