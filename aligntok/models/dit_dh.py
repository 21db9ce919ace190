"""DiT^DH: LightningDiT with a shallow, wide head, for latents of many channels (RAE, arXiv 2510.11690, section 5).

    c = silu(time(t) + label(y));   s = trunk(patches(z_t) + sin-cos table; c)                     [B, N, trunk width]
    s = project(silu(time(t) + s))                                                                 [B, N, head width]
    v = final(head(patches'(z_t); s); s)                        every token of the head has its own modulation from s

A diffusion transformer narrower than its latent's channels cannot carry the noise through (section 4); the head of 2
blocks of width 2048 can, at a fraction of a wide trunk's cost. Time enters by fixed Gaussian Fourier features. Trunk
and head blocks are LightningDiT's. Time follows the paper (t = 1 is noise, v = z_1 - z_0), as RAE's own code does.
Source: RAE stage2/models/DDT.py and model_utils.py (structure and sizes only).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aligntok.config import LightningDiTConfig
from aligntok.errors import UserError
from aligntok.kernels import adaln, transformed
from aligntok.models.attention import Rope
from aligntok.models.half_precision import KeepsFloat32, weight_dtype
from aligntok.models.lightning_dit import Block, FinalLayer, LightningDiT, Modulate, Pending, build_rope, dimensions

FOURIER_FEATURES = 256  # frequencies drawn once from N(0, 1): RAE model_utils.py


def tokenwise_adaln(
    x: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    h: Tensor | None,
    gate: Tensor | None,
    weight: Tensor,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """`adaln` with scale, shift and gate [B, N, D] for x and h [B, N, D]: to the operator, images of one token."""
    shift, h1, gate = (None if value is None else value.flatten(0, 1) for value in (shift, h, gate))
    h1 = None if h1 is None else h1.unsqueeze(1)
    summed, y = adaln(x.flatten(0, 1).unsqueeze(1), scale.flatten(0, 1), shift, h1, gate, weight, **options)
    return summed.view_as(x), y.view_as(x)


class HeadBlock(Block):
    """LightningDiT's block with a condition [B, N, D] for every token."""

    modulate: ClassVar[Modulate] = staticmethod(tokenwise_adaln)


class HeadFinalLayer(FinalLayer):
    """LightningDiT's last layer with a condition [B, N, D] for every token."""

    modulate: ClassVar[Modulate] = staticmethod(tokenwise_adaln)


class FourierTime(KeepsFloat32):
    """[sin(2 pi W t), cos(2 pi W t)] with fixed W, then Linear, SiLU, Linear."""

    kept_buffers = ("frequencies",)
    frequencies: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.randn(FOURIER_FEATURES))
        self.mlp = nn.Sequential(nn.Linear(2 * FOURIER_FEATURES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        angle = 2 * math.pi * t.float()[:, None] * self.frequencies
        return self.mlp(torch.cat([angle.sin(), angle.cos()], dim=1).to(weight_dtype(self.mlp)))


class DiTDH(LightningDiT):
    """v = model(z_t, t, labels); trunk as in LightningDiT, head by `config.head_depth`, `head_width`, `head_heads`."""

    _head_rope_cache: Rope

    def __init__(self, config: LightningDiTConfig, latent_channels: int, latent_size: tuple[int, int]) -> None:
        super().__init__(config, latent_channels, latent_size)
        trunk, width, heads = dimensions(config)[1], config.head_width, config.head_heads
        if width % heads or (width // heads) % 4:
            raise UserError(
                f"generator.model.head_width is {width} and head_heads {heads}: expected a width for each head that is "
                "a multiple of 4 (2-D RoPE pairs)"
            )
        self.time = FourierTime(trunk)
        self.project = nn.Linear(trunk, width) if trunk != width else nn.Identity()
        self.head_patches = nn.Conv2d(latent_channels, width, config.patch_size, stride=config.patch_size)
        head_blocks = [
            HeadBlock(width, heads, config.qk_norm, config.shift, config.attention) for _ in range(config.head_depth)
        ]
        self.head_blocks = nn.ModuleList(head_blocks)
        self.final = HeadFinalLayer(width, config.patch_size**2 * latent_channels)
        self._initialise()
        for block in head_blocks:
            nn.init.zeros_(block.modulation.weight)
            nn.init.zeros_(block.modulation.bias)
        nn.init.xavier_uniform_(self.head_patches.weight.view(width, -1))
        assert self.head_patches.bias is not None
        nn.init.zeros_(self.head_patches.bias)

    def _initialise_linears(self) -> None:
        """As nn.Linear does by itself: RAE's DDT.py has Xavier switched off (xavier_uniform_init=False)."""

    def forward(self, z: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """z [B, d, h, w], t [B] in [0, 1] with 1 = noise, labels [B], `null_class` = none -> velocity like z."""
        grid, z = self._grid(z.shape[-2:]), z.to(self.patches.weight.dtype)
        time = self.time(t)  # [B, trunk width]
        x = self.patches(z).flatten(2).transpose(1, 2) + self._position_table(grid)  # [B, N, trunk width]
        condition, rope = F.silu(time + self.label(labels)), self._rope(grid, z.device)
        pending: Pending = (None, None)
        for block in self.blocks:
            x, pending = block(x, pending, condition, rope)
        branch, gate = pending
        assert branch is not None and gate is not None  # a trunk has blocks
        x = x + gate.unsqueeze(1) * branch
        states = self.project(F.silu(time.unsqueeze(1) + x))  # [B, N, head width]
        y = self.head_patches(z).flatten(2).transpose(1, 2)  # [B, N, head width]
        rope, pending = self._head_rope(grid, z.device), (None, None)
        for block in self.head_blocks:
            y, pending = block(y, pending, states, rope)
        return self._unpatch(self.final(y, pending, states), grid)

    def transformer_blocks(self) -> Iterator[nn.Module]:
        yield from self.blocks
        yield from self.head_blocks

    def _head_rope(self, grid: tuple[int, int], device: torch.device) -> Rope:
        key = (grid, device)
        if getattr(self, "_head_rope_key", None) == key:
            return self._head_rope_cache
        channels = self.config.head_width // self.config.head_heads
        rope = build_rope(grid, channels, max(self._grid(self.latent_size)), device)
        if not transformed():  # as in LightningDiT
            self._head_rope_cache, self._head_rope_key = rope, key
        return rope
