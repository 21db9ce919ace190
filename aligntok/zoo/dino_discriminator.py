"""RAE's discriminator: small heads that judge the tokens of a frozen DINO ViT, as in StyleGAN-T and VAR.

    logits = concat over 5 feature maps of  conv_1(r(block_9(block_1(f)))),   r(y) = (y + block(y)) / sqrt(2)

f: the patch tokens [B, C, N] of blocks 2, 5, 8, 11 and of the last block once more; block_k: spectrally normalised
circular convolution of kernel k along the tokens, normalisation of every image's channels over its tokens ("local BN"
with one image in each group), LeakyReLU .2. In training, images are shifted and their colours changed first
(DiffAugment, Zhao et al., arXiv 2006.10738), since the frozen features make the discriminator's task easy. Source:
RAE src/disc/dinodisc.py and configs/stage1/training (structure and sizes only).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from aligntok.config import DinoDiscriminatorConfig
from aligntok.errors import UserError
from aligntok.models.encoder import Encoder

NORM_EPS = 1e-6  # of the heads' normalisation: RAE
SHIFT = 1 / 8  # largest translation, as a share of the side: DiffAugment


def augment(images: Tensor) -> Tensor:
    """Images [B, 3, H, W] with random brightness, saturation, contrast and translation, each image its own."""
    share = torch.rand(3, len(images), 1, 1, 1, device=images.device)
    images = images + share[0] - 0.5
    grey = images.mean(1, keepdim=True)
    images = (images - grey) * (2 * share[1]) + grey
    mean = images.mean((1, 2, 3), keepdim=True)
    images = (images - mean) * (share[2] + 0.5) + mean
    return _translate(images)


def _translate(images: Tensor) -> Tensor:
    """Moves every image by up to SHIFT of its sides; what comes in from outside is 0."""
    batch, _, height, width = images.shape
    rows, columns = (
        torch.arange(side, device=images.device)
        + torch.randint(-round(side * SHIFT), round(side * SHIFT) + 1, (batch, 1), device=images.device)
        for side in (height, width)
    )  # [B, H], [B, W]: where each pixel comes from
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None]  # [B, H, W]
    index = rows.clamp(0, height - 1)[:, :, None] * width + columns.clamp(0, width - 1)[:, None]
    index = index.view(batch, 1, -1).expand(-1, images.shape[1], -1)
    return images.flatten(2).gather(2, index).view_as(images) * inside[:, None]


class HeadBlock(nn.Module):
    """Convolution along the tokens, normalisation over them, LeakyReLU: [B, C, N] -> [B, C, N]."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        convolution = nn.Conv1d(channels, channels, kernel, padding=kernel // 2, padding_mode="circular")
        self.convolution = spectral_norm(convolution)
        self.norm = nn.InstanceNorm1d(channels, eps=NORM_EPS, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.norm(self.convolution(x).float()), 0.2)


class Head(nn.Module):
    """Tokens [B, C, N] -> logits [B, N]."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.first = HeadBlock(channels, 1)
        self.second = HeadBlock(channels, kernel)
        self.last = spectral_norm(nn.Conv1d(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = (x + self.second(x)) / math.sqrt(2)
        return self.last(x).squeeze(1)


class DinoDiscriminator(nn.Module):
    """Images [B, 3, H, W] in [-1, 1] -> logits [B, 5 N], positive = real. Only the heads learn and are saved."""

    def __init__(self, config: DinoDiscriminatorConfig) -> None:
        super().__init__()
        encoder = Encoder(config.encoder).eval().requires_grad_(False)
        depth = len(encoder.blocks)
        if not config.taps or not all(0 <= tap < depth for tap in config.taps):
            raise UserError(f"dino.taps is {list(config.taps)}, expected blocks from 0 to {depth - 1}")
        if config.input_size % encoder.patch_size or config.kernel % 2 == 0:
            raise UserError(
                f"dino.input_size is {config.input_size} and dino.kernel {config.kernel}: expected a multiple of the "
                f"encoder's patch of {encoder.patch_size} px and an odd number"
            )
        self._frozen = (encoder,)  # in a tuple: no part of the state that is trained and saved
        self.input_size, self.indices = config.input_size, sorted({*config.taps, depth - 1})
        self.order = [self.indices.index(tap) for tap in (depth - 1, *config.taps)]
        self.heads = nn.ModuleList(Head(encoder.width, config.kernel) for _ in self.order)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        self._frozen[0]._apply(fn)
        return super()._apply(fn, recurse)

    def features(self, images: Tensor) -> list[Tensor]:
        """Patch tokens [B, C, N] of the last block and of the tapped ones, before the final norm."""
        encoder = self._frozen[0]
        size = (self.input_size, self.input_size)
        images = F.interpolate(images.float(), size=size, mode="bilinear", align_corners=False)
        images = images * encoder.input_scale + encoder.input_shift
        tokens = encoder.backbone.forward_intermediates(
            images, indices=self.indices, norm=False, output_fmt="NLC", intermediates_only=True
        )
        assert isinstance(tokens, list)  # of intermediates only
        return [tokens[index].transpose(1, 2) for index in self.order]

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            images = augment(images)
        return torch.cat([head(f) for head, f in zip(self.heads, self.features(images), strict=True)], dim=1)
