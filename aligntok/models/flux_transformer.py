"""FLUX's transformer, in the dialect of FLUX.2: velocity from noisy latents and the features of a caption.

    text  = text_in(features), a learned token in the place of padding          [B, L, width]
    image = image_in(patches(z_t))                                              [B, N, width]
    double blocks, each stream with weights of its own, attending to both:
        y = modulate(rms_norm(x), shift_1, scale_1);  x = x + gate_1 * out(attention(qkv(y)))
        x = x + gate_2 * mlp(modulate(rms_norm(x), shift_2, scale_2))
    single blocks, one set of weights for both streams in a row, attention and MLP side by side:
        y = modulate(rms_norm(x), shift, scale);      x = x + gate * (out(attention(qkv(y))) + mlp(y))
    v = linear(modulate(rms_norm(image), shift, scale))

Attention has QK-norm and rotary positions on three axes: a caption's tokens count on the first, the image's rows and
columns on the others. The vectors shift, scale and gate come from the time alone; one linear layer makes them for all
blocks of a kind (FLUX.2), or every block has its own (FLUX.1). No matrix product has a bias.

Sources: black-forest-labs/flux (src/flux/model.py) and black-forest-labs/flux2 (src/flux2/model.py), structure and
sizes only. The norms before the branches are RMSNorm as in LightningDiT, where FLUX has LayerNorm, neither with
weights; the learned padding and its mask are Z-Image's (docs/decisions.md). Time follows the paper: t = 1 is noise and
the output is the velocity z_1 - z_0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aligntok.config import FluxTransformerConfig
from aligntok.errors import UserError
from aligntok.kernels import adaln, swiglu, transformed
from aligntok.models.joint_attention import attend_jointly
from aligntok.models.lightning_dit import NORM_EPS, Pending, TimeEmbedding, compute_dtype

GRIDS = 32  # whose rotary tables are kept: more than there are aspect-ratio buckets (aligntok.data.buckets)
TIME_SCALE = 1000.0  # of t before its sinusoidal features (FLUX)
Vectors = tuple[Tensor, ...]  # shift, scale, gate of every branch, [B, width] each


class Positions(NamedTuple):
    """Rotary tables over text and image, and how much of the text can be attended to."""

    cos: Tensor  # [L + N, head / 2]: one value for each pair of channels
    sin: Tensor
    text_tokens: int  # L
    lengths: Tensor | None  # [B] keys of the text that count; None = all


def axes_of(config: FluxTransformerConfig) -> tuple[int, int, int]:
    """Channels of a head that turn with text index, row and column.

    Raises:
        UserError: width and heads do not divide, or the axes do not fill a head with pairs.
    """
    width, heads = config.width, config.heads
    if width % heads or (width // heads) % 16:
        raise UserError(
            f"text.model.width {width} and heads {heads}: expected a head width that is a multiple of 16; "
            f"try width {64 * heads}"
        )
    head = width // heads
    axes = config.rope_axes or (head // 4, 3 * head // 8, 3 * head // 8)
    if sum(axes) != head or any(axis < 0 or axis % 2 for axis in axes):
        raise UserError(
            f"text.model.rope_axes are {list(axes)}, expected three even numbers that add up to the head width {head}"
        )
    return axes


def rope_pairs(config: FluxTransformerConfig, text_tokens: int, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """cos and sin [L + h*w, head / 2]: text token i at (i, 0, 0), the image's token of row r and column c at (0, r, c).

    With `centred_positions` rows and columns count from the middle of the grid.
    """
    height, width = grid
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    image = torch.stack([torch.zeros(height * width), rows.flatten(), columns.flatten()], dim=1).double()
    if config.centred_positions:
        image -= torch.tensor([0.0, (height - 1) / 2, (width - 1) / 2], dtype=torch.float64)
    text = torch.zeros(text_tokens, 3, dtype=torch.float64)
    text[:, 0] = torch.arange(text_tokens)
    angles = []
    for position, axis in zip(torch.cat([text, image]).unbind(1), axes_of(config), strict=True):
        frequencies = config.rope_theta ** -(torch.arange(0, axis, 2, dtype=torch.float64) / max(axis, 1))
        angles.append(position[:, None] * frequencies)
    table = torch.cat(angles, dim=1).float()
    return table.cos(), table.sin()


class MLP(nn.Module):
    """SwiGLU (FLUX.2) or GELU (FLUX.1) between two projections."""

    def __init__(self, width: int, config: FluxTransformerConfig) -> None:
        super().__init__()
        self.activation = activation_of(config)
        self.into = nn.Linear(width, hidden_width(config) * (2 if config.mlp == "swiglu" else 1), bias=False)
        self.out = nn.Linear(hidden_width(config), width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.activation(self.into(x)))


def hidden_width(config: FluxTransformerConfig) -> int:
    return int(config.mlp_ratio * config.width)


def _gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def activation_of(config: FluxTransformerConfig) -> Callable[[Tensor], Tensor]:
    return swiglu if config.mlp == "swiglu" else _gelu


class Modulation(nn.Module):
    """Vectors [B, width] of shift, scale and gate for some branches from the time's embedding [B, width]."""

    def __init__(self, width: int, vectors: int) -> None:
        super().__init__()
        self.vectors = vectors
        self.linear = nn.Linear(width, vectors * width, bias=False)

    def forward(self, condition: Tensor) -> Vectors:
        return self.linear(F.silu(condition)).chunk(self.vectors, dim=-1)


class Stream(nn.Module):
    """What one of the two streams owns in a double block."""

    def __init__(self, config: FluxTransformerConfig) -> None:
        super().__init__()
        width, head = config.width, config.width // config.heads
        self.heads = config.heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_norm = nn.RMSNorm(head, eps=NORM_EPS)
        self.k_norm = nn.RMSNorm(head, eps=NORM_EPS)
        self.proj = nn.Linear(width, width, bias=False)
        self.mlp = MLP(width, config)
        self.modulation = Modulation(width, 6) if config.per_block_modulation else None

    def vectors(self, shared: Vectors, condition: Tensor) -> Vectors:
        """This block's own, or those of all blocks."""
        return shared if self.modulation is None else self.modulation(condition)

    def before(self, x: Tensor, pending: Pending, vectors: Vectors) -> tuple[Tensor, Tensor]:
        """The stream with what was pending, and its packed projection [B, N, 3, H, D]."""
        shift, scale = vectors[:2]
        x, y = adaln(x, scale, shift, *pending, eps=NORM_EPS, dtype=compute_dtype(x))
        return x, self.qkv(y).unflatten(-1, (3, self.heads, -1))

    def after(self, x: Tensor, attended: Tensor, vectors: Vectors) -> tuple[Tensor, Pending]:
        """The stream with its attention, and its MLP as what is pending."""
        _, _, gate1, shift, scale, gate2 = vectors
        x, y = adaln(x, scale, shift, self.proj(attended), gate1, eps=NORM_EPS, dtype=compute_dtype(x))
        return x, (self.mlp(y), gate2)


Pair = tuple[Tensor, Tensor]


class DoubleBlock(nn.Module):
    """Text and image with weights of their own, attending to each other."""

    def __init__(self, config: FluxTransformerConfig) -> None:
        super().__init__()
        self.backend = config.attention
        self.text, self.image = Stream(config), Stream(config)

    def forward(
        self,
        streams: Pair,
        pending: tuple[Pending, Pending],
        shared: tuple[Vectors, Vectors],
        condition: Tensor,
        positions: Positions,
    ) -> tuple[Pair, tuple[Pending, Pending]]:
        """Streams (text, image) without the previous block's last branches, which are `pending` -> one block on."""
        weights = (self.text, self.image)
        vectors = [w.vectors(s, condition) for w, s in zip(weights, shared, strict=True)]
        text, text_qkv = self.text.before(streams[0], pending[0], vectors[0])
        image, image_qkv = self.image.before(streams[1], pending[1], vectors[1])
        attended = attend_jointly(
            (text_qkv, image_qkv),
            (self.text.q_norm.weight, self.image.q_norm.weight),
            (self.text.k_norm.weight, self.image.k_norm.weight),
            *positions,
            eps=NORM_EPS,
            backend=self.backend,
        )
        text, text_pending = self.text.after(text, attended[0], vectors[0])
        image, image_pending = self.image.after(image, attended[1], vectors[1])
        return (text, image), (text_pending, image_pending)


class SingleBlock(nn.Module):
    """Text and image in one sequence; attention and MLP read the same input and are added.

    FLUX packs both into one layer on each side. Here each has its own: as many weights and FLOPs, and no gradient that
    is written out wide with zeros, or copied together, to be the gradient of a packed projection (docs/decisions.md).
    """

    def __init__(self, config: FluxTransformerConfig) -> None:
        super().__init__()
        width, head = config.width, config.width // config.heads
        self.heads, self.backend = config.heads, config.attention
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_norm = nn.RMSNorm(head, eps=NORM_EPS)
        self.k_norm = nn.RMSNorm(head, eps=NORM_EPS)
        self.proj = nn.Linear(width, width, bias=False)
        self.mlp = MLP(width, config)
        self.modulation = Modulation(width, 3) if config.per_block_modulation else None

    def forward(
        self, x: Tensor, pending: Pending, shared: Vectors, condition: Tensor, positions: Positions
    ) -> tuple[Tensor, Pending]:
        """Stream x [B, L + N, width] without the previous block's branch, which is `pending` -> one block on."""
        shift, scale, gate = shared if self.modulation is None else self.modulation(condition)
        x, y = adaln(x, scale, shift, *pending, eps=NORM_EPS, dtype=compute_dtype(x))
        qkv = self.qkv(y).unflatten(-1, (3, self.heads, -1))
        (attended,) = attend_jointly(
            (qkv,), (self.q_norm.weight,), (self.k_norm.weight,), *positions, eps=NORM_EPS, backend=self.backend
        )
        return x, (self.proj(attended) + self.mlp(y), gate)


class FinalLayer(nn.Module):
    """RMSNorm, shift and scale, linear to patch_size^2 * channels; starts at zero."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.modulation = Modulation(width, 2)
        self.linear = nn.Linear(width, out, bias=False)

    def forward(self, x: Tensor, pending: Pending, condition: Tensor) -> Tensor:
        shift, scale = self.modulation(condition)
        _, y = adaln(x, scale, shift, *pending, eps=NORM_EPS, dtype=compute_dtype(x))
        return self.linear(y)


class FluxTransformer(nn.Module):
    """v = model(z_t, t, text, lengths).

    Args:
        config: sizes and switches.
        latent_channels: d of the tokenizer.
        latent_size: (h, w) of the latents that it is trained on; other sizes work too.
        text_width: of the text encoder's features.

    Raises:
        UserError: see `axes_of`; no block at all.
    """

    def __init__(
        self, config: FluxTransformerConfig, latent_channels: int, latent_size: tuple[int, int], text_width: int
    ) -> None:
        super().__init__()
        axes_of(config)
        if not config.double_blocks + config.single_blocks:
            raise UserError("text.model.double_blocks and single_blocks are both 0: give at least one block")
        self.config, self.latent_channels, self.latent_size = config, latent_channels, latent_size
        self.text_width, self.patch_size = text_width, config.patch_size
        width, patch = config.width, config.patch_size**2 * latent_channels
        self.image_in = nn.Linear(patch, width, bias=False)
        self.text_in = nn.Linear(text_width, width, bias=False)
        self.padding = nn.Parameter(torch.empty(width))
        self.time = TimeEmbedding(width, bias=False, scale=TIME_SCALE)
        shared = not config.per_block_modulation
        double, single = config.double_blocks > 0 and shared, config.single_blocks > 0 and shared
        self.text_modulation = Modulation(width, 6) if double else None
        self.image_modulation = Modulation(width, 6) if double else None
        self.single_modulation = Modulation(width, 3) if single else None
        self.double_blocks = nn.ModuleList(DoubleBlock(config) for _ in range(config.double_blocks))
        self.single_blocks = nn.ModuleList(SingleBlock(config) for _ in range(config.single_blocks))
        self.final = FinalLayer(width, patch)
        self._ropes: dict[tuple[int, tuple[int, int], torch.device], tuple[Tensor, Tensor]] = {}
        self._initialise()

    def transformer_blocks(self) -> Iterator[nn.Module]:
        """In the order in which they run."""
        yield from self.double_blocks
        yield from self.single_blocks

    def forward(self, z: Tensor, t: Tensor, text: Tensor, lengths: Tensor) -> Tensor:
        """z [B, d, h, w], t [B] in [0, 1] with 1 = noise, text [B, L, text_width], lengths [B] tokens that are the
        caption's -> velocity like z."""
        grid = self._grid(z.shape[-2:])
        condition = self.time(t)  # [B, width]
        words, keys = self._text(text, lengths)
        image = self._stream(self.image_in, self._patches(z, grid))
        positions = Positions(*self._rope(text.shape[1], grid, z.device), text.shape[1], keys)
        streams, pending = (words, image), ((None, None), (None, None))
        shared = _shared(condition, self.text_modulation, self.image_modulation)
        for block in self.double_blocks:
            streams, pending = block(streams, pending, shared, condition, positions)
        x = torch.cat([_complete(x, rest) for x, rest in zip(streams, pending, strict=True)], dim=1)
        (vectors,) = _shared(condition, self.single_modulation)
        branch: Pending = (None, None)
        for block in self.single_blocks:
            x, branch = block(x, branch, vectors, condition, positions)
        return self._unpatch(self.final(*_behind(x, branch, text.shape[1]), condition), grid)

    def _text(self, text: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor | None]:
        """The text's stream [B, L, width], and how many of its keys count for each caption."""
        tokens, multiple = text.shape[1], self.config.pad_to
        words = self._stream(self.text_in, text)
        own = torch.arange(tokens, device=text.device) < lengths[:, None]  # [B, L]
        words = torch.where(own[..., None], words, self.padding.to(words.dtype))
        if self.config.mask == "none":
            return words, None
        return words, ((lengths + multiple - 1) // multiple * multiple).clamp(max=tokens)

    def _stream(self, layer: nn.Linear, x: Tensor) -> Tensor:
        """layer(x) as a residual stream: in the weights' dtype, which under autocast is wider than the product's."""
        return layer(x.to(layer.weight.dtype)).to(layer.weight.dtype)

    def _grid(self, size: Sequence[int]) -> tuple[int, int]:
        height, width = size
        if height % self.patch_size or width % self.patch_size:
            raise UserError(
                f"latents of {height}x{width}: expected sides divisible by the patch size {self.patch_size}"
            )
        return height // self.patch_size, width // self.patch_size

    def _patches(self, z: Tensor, grid: tuple[int, int]) -> Tensor:
        p, (h, w) = self.patch_size, grid
        z = z.unflatten(2, (h, p)).unflatten(4, (w, p))  # [B, d, h, p, w, p]
        return z.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def _unpatch(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        p, (h, w) = self.patch_size, grid
        x = x.unflatten(2, (self.latent_channels, p, p)).unflatten(1, (h, w))
        return x.permute(0, 3, 1, 4, 2, 5).reshape(x.shape[0], self.latent_channels, h * p, w * p)

    def _rope(self, tokens: int, grid: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
        key = (tokens, grid, device)
        if key in self._ropes:
            return self._ropes[key]
        with torch.inference_mode(False):  # made under inference mode they must serve training too
            cos, sin = (table.to(device) for table in rope_pairs(self.config, tokens, grid))
        if not transformed():  # what is made inside torch.func belongs to it and cannot be copied afterwards
            if len(self._ropes) == GRIDS:
                del self._ropes[next(iter(self._ropes))]  # the oldest
            self._ropes[key] = cos, sin
        return cos, sin

    def _initialise(self) -> None:
        """As LightningDiT: zeros on modulations and output, N(0, .02) on time and padding, Xavier elsewhere."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
        for layer in self.time.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
        nn.init.normal_(self.padding, std=0.02)
        for module in self.modules():
            if isinstance(module, Modulation):
                nn.init.zeros_(module.linear.weight)
        nn.init.zeros_(self.final.linear.weight)


def _shared(condition: Tensor, *modulations: Modulation | None) -> tuple[Vectors, ...]:
    """The vectors of every kind of block; none where blocks have their own."""
    return tuple(() if modulation is None else modulation(condition) for modulation in modulations)


def _complete(x: Tensor, pending: Pending) -> Tensor:
    """The stream with what is pending added."""
    branch, gate = pending
    return x if branch is None or gate is None else (x + gate.unsqueeze(1) * branch).to(x.dtype)


def _behind(x: Tensor, pending: Pending, first: int) -> tuple[Tensor, Pending]:
    """The image's part of the joint stream, whose tokens begin at `first`."""
    branch, gate = pending
    return x[:, first:], (None, None) if branch is None or gate is None else (branch[:, first:], gate)
