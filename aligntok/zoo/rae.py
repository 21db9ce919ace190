"""RAE, the representation autoencoder (Zheng et al., arXiv 2510.11690): a frozen encoder is the tokenizer's first half.

    z = normalise(tokens(x)),  tokens: encoder's last layer, final norm without scale and bias, prefix tokens dropped
    x_hat = unpatchify(decoder(denormalise(z)))                      statistics per element: mean and std [d, h, w]

The decoder is a ViT as in MAE: linear embedding, a learned class token, fixed sin-cos positions, pre-norm blocks,
LayerNorm and a linear layer to the pixels of a patch, in the encoder's normalised colours. It alone is trained, on
tokens with noise of a standard deviation that is uniform in [0, tau] for each image (aligntok.zoo.objectives).
Sources: RAE src/stage1/rae.py:73-94, encoders/dinov2.py, configs/decoder (structure and sizes only).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from aligntok.config import RAEConfig, ViTDecoderConfig
from aligntok.errors import UserError
from aligntok.models.encoder import Encoder
from aligntok.models.lightning_dit import sincos_table
from aligntok.models.tokenizer import StoredTokenizer

SIZES = {  # depth, width, heads, hidden width of the MLP: RAE configs/decoder/ViTB, ViTL, ViTXL
    "B": (12, 768, 12, 3072),
    "L": (24, 1024, 16, 4096),
    "XL": (28, 1152, 16, 4096),
}
NORM_EPS = 1e-12  # of the decoder's LayerNorms: vit-mae's configuration
INIT_STD = 0.02  # of the decoder's linear layers and class token: vit-mae's configuration


def dimensions(config: ViTDecoderConfig) -> tuple[int, int, int, int]:
    """(depth, width, heads, hidden) of a decoder; raises UserError when they do not make one."""
    depth, width, heads, hidden = config.depth, config.width, config.heads, config.hidden
    if config.size != "custom":
        if any(value is not None for value in (depth, width, heads, hidden)):
            raise UserError(f"rae.decoder.size is {config.size} and its dimensions are given: use size custom")
        return SIZES[config.size]
    if depth is None or width is None or heads is None or hidden is None:
        raise UserError("rae.decoder.size is custom: give depth, width, heads and hidden")
    if width % heads or width % 4:
        raise UserError(f"rae.decoder.width is {width}, expected a multiple of 4 and of heads = {heads}")
    return depth, width, heads, hidden


class ViTDecoder(nn.Module):
    """Tokens [B, h*w, C] of a fixed grid -> patches [B, h*w, 3 p^2], each row-major with the colour fastest."""

    positions: Tensor

    def __init__(self, channels: int, grid: tuple[int, int], config: ViTDecoderConfig) -> None:
        super().__init__()
        depth, width, heads, hidden = dimensions(config)
        norm = partial(nn.LayerNorm, eps=NORM_EPS)
        self.embed = nn.Linear(channels, width)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        # the class token's position is zero
        self.register_buffer("positions", sincos_table(grid, width)[None], persistent=False)
        ratio = hidden / width
        self.blocks = nn.ModuleList(
            Block(width, heads, mlp_ratio=ratio, qkv_bias=True, norm_layer=norm)  # type: ignore[arg-type]  # calls it
            for _ in range(depth)
        )
        first = (block.get_parameter("mlp.fc1.weight") for block in self.blocks)
        assert all(len(weight) == hidden for weight in first), "timm rounds the ratio down"
        self.norm = norm(width)
        self.prediction = nn.Linear(width, 3 * config.patch_size**2)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=INIT_STD)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.class_token, std=INIT_STD)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.positions
        x = torch.cat([self.class_token.expand(len(x), -1, -1).to(x.dtype), x], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.prediction(self.norm(x))[:, 1:]


class RAE(StoredTokenizer):
    """See the module's docstring."""

    format = "aligntok.zoo.rae"
    config_class = RAEConfig
    latent_parts = ("encoder",)
    decoder: ViTDecoder

    def __init__(self, config: RAEConfig) -> None:
        super().__init__(config)
        self.encoder = Encoder(config.encoder)
        backbone = self.encoder.backbone
        if config.encoder.final_norm:
            # with pretrained scale and bias, tokens would differ from channel to channel in size (RAE 3.1)
            pretrained: Any = backbone.norm  # of several classes, all with eps
            backbone.norm = nn.LayerNorm(self.encoder.width, eps=pretrained.eps, elementwise_affine=False)
        self.patch_size = config.decoder.patch_size
        self.downsample = config.encoder.downsample
        self.latent_channels = self.encoder.width
        if self.patch_size != self.downsample:
            raise UserError(
                f"rae.decoder.patch_size is {self.patch_size} and rae.encoder.downsample {self.downsample}: "
                "the decoder writes one patch for each token, so they must be equal"
            )
        self.token_grid = self.encoder.grid(config.image_size, config.image_size)
        self.decoder = ViTDecoder(self.latent_channels, self.token_grid, config.decoder)
        self._add_statistics(self.latent_channels, *self.token_grid)

    @classmethod
    def offline(cls, config: RAEConfig) -> RAEConfig:
        config.encoder.weights = "random"
        return config

    def raw_latents(self, images: Tensor) -> Tensor:
        grid = self.grid(images)
        if grid != self.token_grid:
            size = self.config.image_size
            raise UserError(
                f"images of {images.shape[-2]} x {images.shape[-1]} px: this RAE was made for {size} x {size} px, as "
                "its statistics are per element; train one with rae.image_size set to your size"
            )
        return self.encoder(images).transpose(1, 2).unflatten(2, grid)

    def reconstruct(self, raw: Tensor) -> Tensor:
        if tuple(raw.shape[-2:]) != self.token_grid:
            raise UserError(f"latents of {list(raw.shape[-2:])}, expected {list(self.token_grid)}")
        patches = self.decoder(raw.flatten(2).transpose(1, 2))  # [B, N, 3 p^2]
        (h, w), p = self.token_grid, self.patch_size
        patches = patches.view(len(raw), h, w, p, p, 3)
        images = patches.permute(0, 5, 1, 3, 2, 4).reshape(len(raw), 3, h * p, w * p)
        return (images - self.encoder.input_shift) / self.encoder.input_scale  # the encoder's colours -> [-1, 1]
