"""The autoencoder family of latent diffusion: Stable Diffusion's VAE and FLUX's, both f8, 4 and 16 channels.

    (mean, log_variance) = encoder(x)          raw latent = mean, packed          reconstruct(z) = decoder(unpacked z)
    normalised latent = scale * (raw - shift)

The published scale and shift are the latent statistics that a new model starts with (mean = shift, std = 1 / scale), so
it can be used at once; `set_statistics` replaces them. Packing by 2 puts each 2 x 2 block of latents into the channels,
as FLUX's transformer reads them: f16 and 64 channels, channel c * 4 + row * 2 + column.
Sources: FLUX src/flux/modules/autoencoder.py and util.py (sizes, scale, shift), src/flux/sampling.py (packing);
LDM for Stable Diffusion.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aligntok.config import DecoderConfig
from aligntok.errors import UserError
from aligntok.models.decoder import Decoder
from aligntok.models.tokenizer import StoredTokenizer
from aligntok.zoo.vae import LOGVAR_RANGE, CNNEncoder, Posterior


def _published_network() -> DecoderConfig:
    """Both families: width 128, multipliers 1 2 4 4, two blocks, attention in the middle only."""
    return DecoderConfig(channel_multipliers=(1, 2, 4, 4), attention_levels=())


@dataclass
class AutoencoderKLConfig:
    """Defaults: Stable Diffusion's f8 with 4 channels."""

    latent_channels: int = 4  # of the network; the tokenizer has packing ** 2 times as many
    network: DecoderConfig = field(default_factory=_published_network)  # of encoder and decoder
    quant_convs: bool = True  # 1x1 convolutions behind the encoder and before the decoder; FLUX has none
    scale: float = 0.18215  # LDM: 1 / the standard deviation of the latents
    shift: float = 0.0
    packing: int = 1


def flux_config() -> AutoencoderKLConfig:
    """FLUX's autoencoder as its transformer sees it: f16 after 2x2 packing, 64 channels (util.py:323-327)."""
    return AutoencoderKLConfig(latent_channels=16, quant_convs=False, scale=0.3611, shift=0.1159, packing=2)


class AutoencoderKL(StoredTokenizer):
    """See the module's docstring."""

    format = "aligntok.zoo.autoencoder-kl"
    config_class = AutoencoderKLConfig
    latent_parts = ("encoder", "quant")

    def __init__(self, config: AutoencoderKLConfig) -> None:
        super().__init__(config)
        channels, packing = config.latent_channels, config.packing
        self.latent_channels = channels * packing**2
        self.decoder = Decoder(channels, config.network)
        self.encoder = CNNEncoder(2 * channels, config.network)
        self.quant = nn.Conv2d(2 * channels, 2 * channels, 1) if config.quant_convs else nn.Identity()
        self.post_quant = nn.Conv2d(channels, channels, 1) if config.quant_convs else nn.Identity()
        self.downsample = self.decoder.upsampling * packing
        self._add_statistics(self.latent_channels)
        self.latent_mean.fill_(config.shift)
        self.latent_std.fill_(1 / config.scale)

    def posterior(self, images: Tensor) -> Posterior:
        """Images [B, 3, H, W] in [-1, 1] -> Gaussian over raw latents, at least float32."""
        height, width = images.shape[-2:]
        f = self.downsample
        if min(height, width) < f or height % f or width % f:
            raise UserError(f"images are {height} x {width} px, expected multiples of the downsampling {f}")
        moments = self.quant(self.encoder(images))
        mean, logvar = moments.to(torch.promote_types(moments.dtype, torch.float32)).chunk(2, dim=1)
        packed = (F.pixel_unshuffle(part, self.config.packing) for part in (mean, logvar.clamp(*LOGVAR_RANGE)))
        return Posterior(*packed)

    def raw_latents(self, images: Tensor) -> Tensor:
        """The posterior's mean; FLUX and the evaluations of Stable Diffusion's VAE do not sample."""
        return self.posterior(images).mean

    def reconstruct(self, raw: Tensor) -> Tensor:
        return self.decoder(self.post_quant(F.pixel_shuffle(raw, self.config.packing)))
