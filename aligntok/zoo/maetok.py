"""MAETok (arXiv 2502.03444): an image as 128 latent tokens without a grid, from a plain ViT autoencoder.

    latents = projection(encoder([K learned tokens ; image patches]))_1..K        decoder([latents ; N image queries])

Image tokens get two-dimensional rotary positions with learned frequencies (RoPE-ViT's mixed form, temperature 10), the
latent tokens get none but what they learn themselves. In training a share of the patches is overwritten by one learned
token. There is no KL. Latents lie in a row, [B, d, 1, K], so that the generator takes them like any others.
Sizes: Hhhhhhao/continuous_tokenizer as of the release of MAETok's training code; both halves are ViT-B/16.

There is no converter of MAETok's published weights: the names and layout of their tensors are not in the sources that
this was written from, and nothing here can check a guess at them.
"""

from __future__ import annotations

from functools import partial

import torch
from timm.layers import RotaryEmbeddingMixed
from timm.models.eva import EvaBlock
from torch import Tensor, nn
from torch.nn import functional as F

from aligntok.config import MAETokConfig
from aligntok.errors import UserError
from aligntok.models.tokenizer import StoredTokenizer

NORM_EPS = 1e-6  # ViT
INIT_STD = 0.02  # of linear layers and learned tokens (ViT)
TEMPERATURE = 10.0  # of the rotary frequencies' start (RoPE-ViT; MAETok's rope_theta)


class Trunk(nn.Module):
    """Transformer over `prefix` tokens without positions followed by a grid of tokens with rotary ones."""

    def __init__(self, width: int, depth: int, heads: int, prefix: int) -> None:
        super().__init__()
        norm = partial(nn.LayerNorm, eps=NORM_EPS)
        self.rope = RotaryEmbeddingMixed(width, depth, heads, temperature=TEMPERATURE)
        self.blocks = nn.ModuleList(
            EvaBlock(width, heads, attn_type="rope", num_prefix_tokens=prefix, norm_layer=norm) for _ in range(depth)
        )
        self.norm = norm(width)

    def forward(self, tokens: Tensor, side: int) -> Tensor:
        """[B, prefix + side * side, C] -> the same, normed."""
        for block, rope in zip(self.blocks, self.rope.get_embed([side, side]), strict=True):
            tokens = block(tokens, rope=rope)
        return self.norm(tokens)


class TokenEncoder(nn.Module):
    """Images [B, 3, S, S] in [-1, 1] -> latent tokens [B, K, d]."""

    def __init__(self, config: MAETokConfig) -> None:
        super().__init__()
        self.side = config.side
        self.patches = nn.Conv2d(3, config.width, config.patch_size, stride=config.patch_size)
        self.latents = nn.Parameter(INIT_STD * torch.randn(1, config.latent_tokens, config.width))
        self.mask = nn.Parameter(INIT_STD * torch.randn(1, 1, config.width))
        self.trunk = Trunk(config.width, config.depth, config.heads, config.latent_tokens)
        self.projection = nn.Linear(config.width, config.latent_channels)
        self.apply(_initialise)

    def forward(self, images: Tensor, masked: Tensor | None = None) -> Tensor:
        """`masked` [B, N] is True where the learned token stands in for a patch."""
        patches = self.patches(images).flatten(2).transpose(1, 2)  # [B, N, C]
        if masked is not None:
            patches = torch.where(masked[..., None], self.mask.to(patches.dtype), patches)
        latents = self.latents.to(patches.dtype).expand(len(patches), -1, -1)
        tokens = self.trunk(torch.cat([latents, patches], dim=1), self.side)
        return self.projection(tokens[:, : latents.shape[1]])


class TokenDecoder(nn.Module):
    """Latent tokens [B, K, d] -> one output [B, N, out] per patch; of pixels, and as shallow one of features."""

    def __init__(self, config: MAETokConfig, out: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.side = config.side
        self.projection = nn.Linear(config.latent_channels, width)
        self.positions = nn.Parameter(INIT_STD * torch.randn(1, config.latent_tokens, width))
        self.query = nn.Parameter(INIT_STD * torch.randn(1, 1, width))  # the patches differ by their rotary positions
        self.trunk = Trunk(width, depth, heads, config.latent_tokens)
        self.out = nn.Linear(width, out)
        self.apply(_initialise)

    def forward(self, latents: Tensor) -> Tensor:
        tokens = self.projection(latents) + self.positions
        queries = self.query.to(tokens.dtype).expand(len(tokens), self.side**2, -1)
        tokens = self.trunk(torch.cat([tokens, queries], dim=1), self.side)
        return self.out(tokens[:, latents.shape[1] :])


class MAETok(StoredTokenizer):
    """See the module's docstring."""

    format = "aligntok.zoo.maetok"
    config_class = MAETokConfig
    latent_parts = ("encoder",)
    decoder: TokenDecoder

    def __init__(self, config: MAETokConfig) -> None:
        if config.image_size < config.patch_size or config.image_size % config.patch_size:
            raise UserError(
                f"image_size is {config.image_size}, expected a multiple of patch_size = {config.patch_size}"
            )
        if config.width % (4 * config.heads):
            raise UserError(
                f"width {config.width} and heads {config.heads}: expected heads whose width is a multiple of 4 "
                f"(rotary pairs on two axes); try width {64 * config.heads}"
            )
        super().__init__(config)
        self.latent_channels, self.downsample = config.latent_channels, config.patch_size
        self.encoder = TokenEncoder(config)
        out = 3 * config.patch_size**2
        self.decoder = TokenDecoder(config, out, config.width, config.depth, config.heads)
        self._add_statistics(self.latent_channels)

    def grid(self, images: Tensor) -> tuple[int, int]:
        """(1, K) whatever the image shows; UserError for another size than the model's."""
        size = self.config.image_size
        if tuple(images.shape[-2:]) != (size, size):
            height, width = images.shape[-2:]
            raise UserError(f"images are {height} x {width} px, this MAETok takes {size} x {size} px only")
        return 1, self.config.latent_tokens

    def raw_latents(self, images: Tensor, masked: Tensor | None = None) -> Tensor:
        """Images [B, 3, S, S] -> [B, d, 1, K]; `masked` [B, N] hides patches, in training."""
        self.grid(images)
        return self.encoder(images, masked).transpose(1, 2).unsqueeze(2)

    def reconstruct(self, raw: Tensor) -> Tensor:
        pixels = self.decoder(raw.squeeze(2).transpose(1, 2))  # [B, N, 3 * p * p]
        side = self.config.side
        return F.pixel_shuffle(pixels.transpose(1, 2).unflatten(2, (side, side)), self.config.patch_size)


def draw_hidden(batch: int, patches: int, low: float, high: float, device: torch.device | str = "cpu") -> Tensor:
    """Numbers [B, M] of the patches to hide, ascending: in each row equally many, at random places.

    The share is one draw for the batch from a normal distribution around `high` with deviation .25, truncated to
    [low, high] (MAETok takes it from MAR); the number is rounded up.
    """
    share = torch.empty((), device="cpu")  # read at once, as the shape depends on it
    nn.init.trunc_normal_(share, mean=high, std=0.25, a=low, b=high)
    count = min(patches, -int(-(share.item() * patches) // 1))
    return torch.rand(batch, patches, device=device).argsort(dim=1)[:, :count].sort(dim=1).values


def as_mask(hidden: Tensor, patches: int) -> Tensor:
    """Masks [B, N], True for the patches whose numbers are in `hidden` [B, M]."""
    return torch.zeros(len(hidden), patches, dtype=torch.bool, device=hidden.device).scatter_(1, hidden, True)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=INIT_STD)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
