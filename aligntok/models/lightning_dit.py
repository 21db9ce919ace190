"""LightningDiT: the diffusion transformer of VA-VAE (models/lightningdit.py there), velocity from noisy latents.

    x = patches(z_t) + frozen sin-cos table;  c = time(t) + label(y)
    x = x + gate_1 * attention(modulate(rms_norm(x), shift_1, scale_1))      (2-D RoPE on q and k, optional QK-norm)
    x = x + gate_2 * swiglu(modulate(rms_norm(x), shift_2, scale_2))
    v = linear(modulate(rms_norm(x), shift, scale))

Time follows the paper: t = 1 is noise and the output is the velocity z_1 - z_0. LightningDiT's own code counts the
other way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aligntok.config import LightningDiTConfig
from aligntok.errors import UserError
from aligntok.kernels import adaln, swiglu, transformed
from aligntok.models.attention import Rope, attention
from aligntok.models.half_precision import weight_dtype
from aligntok.runtime.autocast import autocast_dtype

SIZES = {  # depth, width, heads. S as in DiT; L/1 is not defined in LightningDiT, its L/2 widths are used
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}
ROPE_THETA = 10_000.0
TIME_FEATURES = 256  # sinusoidal features of raw t in [0, 1]
NORM_EPS = 1e-6


def dimensions(config: LightningDiTConfig) -> tuple[int, int, int]:
    """(depth, width, heads) of a configuration; raises UserError when they do not make a transformer."""
    depth, width, heads = config.depth, config.width, config.heads
    if config.size != "custom":
        if any(value is not None for value in (depth, width, heads)):
            raise UserError(
                f"model.size is {config.size} and depth/width/heads are given: use size custom with all three"
            )
        return SIZES[config.size]
    if depth is None or width is None or heads is None:
        raise UserError("model.size is custom: give depth, width and heads")
    if width % heads or (width // heads) % 4:
        raise UserError(
            f"width {width} and heads {heads}: expected a head width that is a multiple of 4 (2-D RoPE pairs); "
            f"try width {64 * heads}"
        )
    return depth, width, heads


def sincos_table(grid: tuple[int, int], width: int) -> Tensor:
    """Fixed 2-D sin-cos position table [h*w, width]; channels encode first the column, then the row (MAE)."""
    quarter = width // 4
    frequencies = 1.0 / 10_000 ** (torch.arange(quarter, dtype=torch.float64) / quarter)
    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    parts = []
    for position in (columns, rows):
        angle = position.flatten()[:, None] * frequencies
        parts += [angle.sin(), angle.cos()]
    return torch.cat(parts, dim=1).float()


def rope_table(grid: tuple[int, int], head_width: int, trained_side: int) -> tuple[Tensor, Tensor]:
    """cos and sin [h*w, D] of 2-D rotary positions: the first half of D turns with the row, the second with the column.

    Neighbouring channels form the rotated pairs. Grids other than the trained one are scaled onto its extent, as in
    LightningDiT's VisionRotaryEmbeddingFast.
    """
    axis = head_width // 2
    frequencies = 1.0 / ROPE_THETA ** (torch.arange(0, axis, 2, dtype=torch.float64) / axis)
    sides = [torch.arange(n, dtype=torch.float64) * (trained_side / n) for n in grid]
    rows, columns = torch.meshgrid(*sides, indexing="ij")
    angles = torch.cat([p.flatten()[:, None] * frequencies for p in (rows, columns)], dim=1)  # [h*w, D/2]
    angles = angles.repeat_interleave(2, dim=1).float()  # [h*w, D]
    return angles.cos(), angles.sin()


def build_rope(grid: tuple[int, int], head_width: int, trained_side: int, device: torch.device) -> Rope:
    """The tables of `rope_table` on a device, in both of the forms that attention takes.

    They can be kept: made under inference mode, they serve training too.
    """
    with torch.inference_mode(False):
        tables = rope_table(grid, head_width, trained_side)
        pairs = (table[:, ::2].contiguous() for table in tables)
        return Rope(*(table.to(device) for table in (*tables, *pairs)))


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a linear layer would take x: autocast's where autocast is on, else x's own."""
    return autocast_dtype(x.device.type) or x.dtype


class Attention(nn.Module):
    """Multi-head self-attention from a packed qkv projection [B, N, 3, H, D], with QK-norm and 2-D RoPE."""

    def __init__(self, width: int, heads: int, qk_norm: bool, backend: str) -> None:
        super().__init__()
        self.heads = heads
        self.backend = backend
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.RMSNorm(width // heads, eps=NORM_EPS) if qk_norm else None
        self.k_norm = nn.RMSNorm(width // heads, eps=NORM_EPS) if qk_norm else None
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, rope: Rope) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # [B, N, 3, H, D]
        q_weight = None if self.q_norm is None else self.q_norm.weight
        k_weight = None if self.k_norm is None else self.k_norm.weight
        return self.proj(attention(qkv, q_weight, k_weight, rope, NORM_EPS, self.backend))


class SwiGLU(nn.Module):
    """w_2(silu(a) * b) with a and b from one projection; hidden width int(2/3 * 4 * D), as in LightningDiT."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = int(2 / 3 * 4 * width)
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.w3(swiglu(self.w12(x)))


Modulate = Callable[..., tuple[Tensor, Tensor]]  # `adaln`, or what is called as it is
# What a branch adds to the residual stream, and its gate: added by the adaLN that follows, in the same pass.
Pending = tuple[Tensor, Tensor] | tuple[None, None]


class Block(nn.Module):
    """Attention and SwiGLU, each behind RMSNorm and adaLN-zero modulation; `shift=False` is LightningDiT's wo_shift."""

    modulate: ClassVar[Modulate] = staticmethod(adaln)  # other forms of conditioning bring their own

    def __init__(self, width: int, heads: int, qk_norm: bool, shift: bool, backend: str) -> None:
        super().__init__()
        self.shift = shift
        self.norm1 = nn.RMSNorm(width, eps=NORM_EPS)
        self.attention = Attention(width, heads, qk_norm, backend)
        self.norm2 = nn.RMSNorm(width, eps=NORM_EPS)
        self.mlp = SwiGLU(width)
        self.modulation = nn.Linear(width, (6 if shift else 4) * width)

    def forward(self, x: Tensor, pending: Pending, condition: Tensor, rope: Rope) -> tuple[Tensor, Pending]:
        """Stream x [B, N, D] without the previous block's last branch, which is `pending` -> the same one block on."""
        parts = self.modulation(F.silu(condition)).chunk(6 if self.shift else 4, dim=-1)
        if self.shift:
            shift1, scale1, gate1, shift2, scale2, gate2 = parts
        else:
            shift1 = shift2 = None
            scale1, gate1, scale2, gate2 = parts
        dtype = compute_dtype(x)
        x, y = self.modulate(x, scale1, shift1, *pending, self.norm1.weight, eps=NORM_EPS, dtype=dtype)
        attended = self.attention(y, rope)
        x, y = self.modulate(x, scale2, shift2, attended, gate1, self.norm2.weight, eps=NORM_EPS, dtype=dtype)
        return x, (self.mlp(y), gate2)


def time_frequencies(half: int, device: torch.device | None = None) -> Tensor:
    """Frequencies [half] of the time embedding, from 1 down to almost 1 / 10,000 radians (DiT)."""
    return torch.exp(-math.log(10_000) * torch.arange(half, device=device, dtype=torch.float32) / half)


class TimeEmbedding(nn.Module):
    """Sinusoidal features of t in [0, 1] times `scale` (LightningDiT 1, FLUX 1000), then Linear, SiLU, Linear."""

    def __init__(self, width: int, bias: bool = True, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        first, second = (nn.Linear(fan_in, width, bias=bias) for fan_in in (TIME_FEATURES, width))
        self.mlp = nn.Sequential(first, nn.SiLU(), second)

    def forward(self, t: Tensor) -> Tensor:
        angle = t.float()[:, None] * self.scale * time_frequencies(TIME_FEATURES // 2, t.device)
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=1).to(weight_dtype(self.mlp)))


class FinalLayer(nn.Module):
    """RMSNorm, shift and scale, linear to patch_size^2 * channels; starts at zero."""

    modulate: ClassVar[Modulate] = staticmethod(adaln)

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=NORM_EPS)
        self.modulation = nn.Linear(width, 2 * width)
        self.linear = nn.Linear(width, out)

    def forward(self, x: Tensor, pending: Pending, condition: Tensor) -> Tensor:
        shift, scale = self.modulation(F.silu(condition)).chunk(2, dim=-1)
        _, y = self.modulate(x, scale, shift, *pending, self.norm.weight, eps=NORM_EPS, dtype=compute_dtype(x))
        return self.linear(y)


class LightningDiT(nn.Module):
    """v = model(z_t, t, labels).

    Args:
        config: size, patch size, classes, switches.
        latent_channels: d of the tokenizer.
        latent_size: (h, w) of the latents that it is trained on; other sizes work at inference, positions are scaled.
    """

    _rope_cache: Rope

    def __init__(self, config: LightningDiTConfig, latent_channels: int, latent_size: tuple[int, int]) -> None:
        super().__init__()
        depth, width, heads = dimensions(config)
        assert config.classes is not None  # None in a recipe is filled in from the images
        self.config = config
        self.null_class = config.classes  # the label that means "no label"
        self.latent_channels = latent_channels
        self.latent_size = latent_size
        self.patch_size = config.patch_size
        self.head_width = width // heads
        self.patches = nn.Conv2d(latent_channels, width, config.patch_size, stride=config.patch_size)
        self.time: nn.Module = TimeEmbedding(width)
        self.label = nn.Embedding(config.classes + 1, width)  # the last row is the null class
        self.blocks = nn.ModuleList(
            Block(width, heads, config.qk_norm, config.shift, config.attention) for _ in range(depth)
        )
        self.final = FinalLayer(width, config.patch_size**2 * latent_channels)
        self.positions = nn.Parameter(sincos_table(self._grid(latent_size), width)[None], requires_grad=False)
        self._initialise()

    def forward(self, z: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """z [B, d, h, w], t [B] in [0, 1] with 1 = noise, labels [B], `null_class` = none -> velocity like z."""
        grid, z = self._grid(z.shape[-2:]), z.to(self.patches.weight.dtype)
        x = self.patches(z).flatten(2).transpose(1, 2)  # [B, N, width]
        x = x + self._position_table(grid)
        condition = self.time(t) + self.label(labels)  # [B, width]
        rope = self._rope(grid, x.device)
        pending: Pending = (None, None)
        for block in self.blocks:
            x, pending = block(x, pending, condition, rope)
        return self._unpatch(self.final(x, pending, condition), grid)

    def transformer_blocks(self) -> Iterator[nn.Module]:
        """In the order in which they run."""
        yield from self.blocks

    def _grid(self, size: Sequence[int]) -> tuple[int, int]:
        height, width = size
        if height % self.patch_size or width % self.patch_size:
            raise UserError(
                f"latents of {height}x{width}: expected sides divisible by the patch size {self.patch_size}"
            )
        return height // self.patch_size, width // self.patch_size

    def _position_table(self, grid: tuple[int, int]) -> Tensor:
        trained = self._grid(self.latent_size)
        if grid == trained:
            return self.positions
        table = self.positions.transpose(1, 2).unflatten(2, trained)
        return F.interpolate(table, size=grid, mode="bicubic").flatten(2).transpose(1, 2)

    def _rope(self, grid: tuple[int, int], device: torch.device) -> Rope:
        key = (grid, device)
        if getattr(self, "_rope_key", None) == key:
            return self._rope_cache
        trained_side = max(self._grid(self.latent_size))  # the longer one: tokens in a row keep whole steps
        rope = build_rope(grid, self.head_width, trained_side, device)
        if not transformed():  # what is made inside torch.func belongs to it and cannot be copied afterwards
            self._rope_cache, self._rope_key = rope, key
        return rope

    def _unpatch(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        p, (h, w) = self.patch_size, grid
        x = x.view(x.shape[0], h, w, p, p, self.latent_channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(x.shape[0], self.latent_channels, h * p, w * p)

    def _initialise(self) -> None:
        """Zeros on modulations and output, N(0, .02) on time and label embeddings, Xavier elsewhere (LightningDiT)."""
        self._initialise_linears()
        nn.init.xavier_uniform_(self.patches.weight.view(self.patches.weight.shape[0], -1))
        assert self.patches.bias is not None
        nn.init.zeros_(self.patches.bias)
        nn.init.normal_(self.label.weight, std=0.02)
        for layer in self.time.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
        for module in (*self.blocks, self.final):
            nn.init.zeros_(module.modulation.weight)
            nn.init.zeros_(module.modulation.bias)
        nn.init.zeros_(self.final.linear.weight)
        nn.init.zeros_(self.final.linear.bias)

    def _initialise_linears(self) -> None:
        """All of them; `_initialise` goes over some again."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
