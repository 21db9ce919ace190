"""PatchGAN discriminator, as in VA-VAE: kernel 4, strides 2, 2, 2, 1, 1, BatchNorm, LeakyReLU .2, N(0, .02) init.

At 256 px and the default widths it has 2.77 M parameters and returns a 30x30 map of logits, one per overlapping patch
of the image. Source: Isola et al. 2017; taming-transformers taming/modules/discriminator/model.py.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from aligntok.config import DiscriminatorConfig
from aligntok.errors import UserError

MAX_MULTIPLIER = 8  # channel widths stop growing at 8 x base (pix2pix)
INIT_STD = 0.02  # of convolutions and of BatchNorm's scale around 1 (DCGAN)


class PatchDiscriminator(nn.Module):
    """Images [B, 3, H, W] in [-1, 1] -> logits [B, 1, h, w], positive = real."""

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        widths = [config.base_channels * min(2**i, MAX_MULTIPLIER) for i in range(config.layers + 1)]
        layers: list[nn.Module] = [
            nn.Conv2d(3, widths[0], 4, stride=2, padding=1),
            nn.LeakyReLU(0.2, inplace=True),
        ]
        for index in range(1, len(widths)):
            stride = 2 if index < config.layers else 1
            layers += [
                nn.Conv2d(widths[index - 1], widths[index], 4, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(widths[index]),
                nn.LeakyReLU(0.2, inplace=True),
            ]
        layers.append(nn.Conv2d(widths[-1], 1, 4, stride=1, padding=1))
        self.layers = nn.Sequential(*layers)
        # px: what the last two kernels of 4 need after the strides
        self.smallest = 3 * 2**config.layers if config.layers else 4
        self.apply(_initialise)
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        if min(images.shape[-2:]) < self.smallest:
            raise UserError(
                f"losses.discriminator.layers needs images of at least {self.smallest} px, these have "
                f"{' x '.join(map(str, images.shape[-2:]))}: use fewer layers"
            )
        return self.layers(images.contiguous(memory_format=torch.channels_last))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, INIT_STD)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, INIT_STD)
