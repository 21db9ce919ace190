"""LDM's KL autoencoder: the paper's vanilla VAE, the network of VA-VAE (f16d32: 28.41 M + 41.42 M parameters), FLUX's
and Stable Diffusion's autoencoders (f8, 16 and 4 channels).

    q(z | x) = N(mean, exp(logvar)),  [mean, logvar] = quant(encoder(x)),  logvar clamped to [-30, 20]
    x_hat = decoder(post_quant(z))
    KL(q || N(0, I)) = 1/2 sum(mean^2 + exp(logvar) - 1 - logvar)

Packing by 2 puts each 2 x 2 block of latents into the channels, channel c * 4 + row * 2 + column, as FLUX's transformer
reads them: f16 and 64 channels.

Training reconstructs a sample of q; `raw_latents` is its mean, so that encoding is a function. (VA-VAE's code caches
one sample for each image; at a KL weight of 1e-6 the standard deviations are small against the spread of the means.)
Sources: LightningDiT tokenizer/autoencoder.py, vavae/ldm/modules/diffusionmodules/model.py and distributions.py, FLUX
src/flux/modules/autoencoder.py and src/flux/sampling.py (structure and sizes only).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aligntok.config import DecoderConfig, VAEConfig
from aligntok.errors import UserError
from aligntok.models.decoder import EPS, Decoder, ResidualBlock, SpatialAttention, apply_norm
from aligntok.models.encoder import Encoder
from aligntok.models.tokenizer import StoredTokenizer, check_upsampling

LOGVAR_RANGE = (-30.0, 20.0)  # LDM distributions.py


@dataclass
class Posterior:
    """A diagonal Gaussian over latents: mean and logvar [B, d, h, w]."""

    mean: Tensor
    logvar: Tensor

    def sample(self, noise: Tensor | None = None) -> Tensor:
        """A draw [B, d, h, w], from given N(0, 1) noise of that shape if there is any."""
        noise = torch.randn_like(self.mean) if noise is None else noise
        return self.mean + (0.5 * self.logvar).exp() * noise

    def kl(self) -> Tensor:
        """KL divergence to N(0, I), summed over each latent: [B]."""
        terms = self.mean.square() + self.logvar.exp() - 1 - self.logvar
        return 0.5 * terms.flatten(1).sum(1)


class DownLevel(nn.Module):
    """Residual blocks of the given widths, attention after each where asked, optional downsampling by 2."""

    def __init__(self, widths: list[int], attention: bool, downsample: bool, groups: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ResidualBlock(a, b, groups) for a, b in pairwise(widths))
        self.attentions = nn.ModuleList(
            SpatialAttention(width, groups) if attention else nn.Identity() for width in widths[1:]
        )
        self.downsample = nn.Conv2d(widths[-1], widths[-1], 3, stride=2) if downsample else None

    def forward(self, x: Tensor) -> Tensor:
        for block, attention in zip(self.blocks, self.attentions, strict=True):
            x = attention(block(x))
        # LDM pads on the right and at the bottom only
        return x if self.downsample is None else self.downsample(F.pad(x, (0, 1, 0, 1)))


class CNNEncoder(nn.Module):
    """Images [B, 3, H, W] in [-1, 1] -> features [B, out, H/f, W/f]; the mirror image of LDM's decoder."""

    def __init__(self, out: int, config: DecoderConfig) -> None:
        super().__init__()
        widths = [config.base_channels * multiplier for multiplier in config.channel_multipliers]
        groups, width = config.groups, config.base_channels
        self.conv_in = nn.Conv2d(3, width, 3, padding=1)
        levels = []
        for index, following in enumerate(widths):
            last = index == len(widths) - 1
            level_widths = [width] + [following] * config.blocks
            levels.append(DownLevel(level_widths, index in config.attention_levels, not last, groups))
            width = level_widths[-1]
        self.levels = nn.Sequential(*levels)
        self.middle = nn.Sequential(
            ResidualBlock(width, width, groups), SpatialAttention(width, groups), ResidualBlock(width, width, groups)
        )
        self.norm_out = nn.GroupNorm(groups, width, eps=EPS)
        self.conv_out = nn.Conv2d(width, out, 3, padding=1)
        self.to(memory_format=torch.channels_last)

    @property
    def last_weight(self) -> Tensor:
        """Where VA-VAE takes its adaptive weight."""
        return self.conv_out.weight

    def forward(self, images: Tensor) -> Tensor:
        h = self.conv_in(images.contiguous(memory_format=torch.channels_last))
        return self.conv_out(apply_norm(self.middle(self.levels(h)), self.norm_out))


class ViTEncoder(nn.Module):
    """A vision transformer and one linear layer in the place of the CNN: images [B, 3, H, W] -> [B, out, H/f, W/f]."""

    def __init__(self, out: int, vit: Encoder) -> None:
        super().__init__()
        self.vit = vit
        self.projection = nn.Linear(vit.width, out)

    @property
    def last_weight(self) -> Tensor:
        return self.projection.weight

    def forward(self, images: Tensor) -> Tensor:
        grid = self.vit.grid(*images.shape[-2:])
        return self.projection(self.vit(images)).transpose(1, 2).unflatten(2, grid)


class VAE(StoredTokenizer):
    """See the module's docstring. With the ViT encoder there is no `quant` convolution: its last layer is linear."""

    format = "aligntok.zoo.vae"
    config_class = VAEConfig
    encoder: CNNEncoder | ViTEncoder
    decoder: Decoder
    latent_parts = ("encoder", "quant")

    def __init__(self, config: VAEConfig) -> None:
        super().__init__(config)
        d, packing = config.latent_channels, config.packing
        if packing < 1:
            raise UserError(f"vae.packing is {packing}, expected 1 (none) or more")
        self.latent_channels = d * packing**2
        self.decoder = Decoder(d, config.networks)
        self.downsample = self.decoder.upsampling * packing
        if config.encoder == "cnn":
            self.encoder: nn.Module = CNNEncoder(2 * d, _checked(config.networks))
        else:
            check_upsampling(self.decoder, config.vit.downsample)
            self.encoder = ViTEncoder(2 * d, Encoder(config.vit))
        quant = config.quant_convs and config.encoder == "cnn"
        self.quant = nn.Conv2d(2 * d, 2 * d, 1) if quant else nn.Identity()
        self.post_quant = nn.Conv2d(d, d, 1) if config.quant_convs else nn.Identity()
        self._add_statistics(self.latent_channels)

    @classmethod
    def offline(cls, config: VAEConfig) -> VAEConfig:
        config.vit.weights = "random"
        return config

    def posterior(self, images: Tensor) -> Posterior:
        """Images [B, 3, H, W] in [-1, 1] -> q(z | x), packed, at least float32.

        Raises:
            UserError: a side that the downsampling does not divide.
        """
        height, width = images.shape[-2:]
        f = self.downsample
        if min(height, width) < f or height % f or width % f:
            raise UserError(f"images of {height} x {width} px: both sides must be a multiple of the downsampling {f}")
        moments = self.quant(self.encoder(images))
        mean, logvar = moments.to(torch.promote_types(moments.dtype, torch.float32)).chunk(2, dim=1)
        return Posterior(
            *(F.pixel_unshuffle(part, self.config.packing) for part in (mean, logvar.clamp(*LOGVAR_RANGE)))
        )

    def raw_latents(self, images: Tensor) -> Tensor:
        return self.posterior(images).mean

    def reconstruct(self, raw: Tensor) -> Tensor:
        return self.decoder(self.post_quant(F.pixel_shuffle(raw, self.config.packing)))


def scale_and_shift(vae: VAE, scale: float, shift: float) -> None:
    """Statistics such that the normalised latent is scale * (raw - shift), as FLUX and Stable Diffusion publish it."""
    vae.set_statistics(torch.full_like(vae.latent_mean, shift), torch.full_like(vae.latent_std, 1 / scale))


def _checked(config: DecoderConfig) -> DecoderConfig:
    if config.blocks < 1:
        raise UserError(f"vae.networks.blocks is {config.blocks}: the CNN encoder needs at least 1 block a level")
    return config
