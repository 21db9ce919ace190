"""A tokenizer, AlignTok's or a rival's, as an autoencoder of diffusers."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput, EncoderOutput
from torch import Tensor
from torch.nn import functional as F

from aligntok.config.from_dict import from_dict
from aligntok.data.geometry import check_size
from aligntok.diffusers.tiles import in_tiles
from aligntok.models.tokenizer import StoredTokenizer, tokenizer_class

if TYPE_CHECKING:
    from typing_extensions import Self


class AutoencoderAlignTok(ModelMixin, AutoencoderMixin, ConfigMixin):
    """`encode(x).latent` and `decode(z).sample`, with the latents' statistics inside, as diffusers' AutoencoderRAE.

    Latents are normalised already: pipelines have nothing to multiply them by, and `config.scaling_factor` is 1.

    Args:
        tokenizer_format: which network (`aligntok.tokenizer`, or a rival's, as a tokenizer folder's config.json says).
        tokenizer_config: its configuration, as there.
        scaling_factor: always 1, for pipelines that ask.
        tile_size, tile_overlap: sides of tiles and what neighbours share, in latent cells, for `enable_tiling`.
    """

    _supports_gradient_checkpointing = False
    _keep_in_fp32_modules: ClassVar[list[str]] = [*StoredTokenizer.kept_buffers]

    @register_to_config
    def __init__(
        self,
        tokenizer_format: str = "aligntok.tokenizer",
        tokenizer_config: dict[str, Any] | None = None,
        scaling_factor: float = 1.0,
        tile_size: int = 32,
        tile_overlap: int = 8,
    ) -> None:
        super().__init__()
        kind = tokenizer_class(tokenizer_format, Path("the autoencoder's config.json"))
        config = from_dict(kind.config_class, dict(tokenizer_config or {}))
        self.tokenizer: StoredTokenizer = kind(kind.offline(config))
        self.use_slicing, self.use_tiling = False, False

    @classmethod
    def of(cls, tokenizer: StoredTokenizer, config: dict[str, Any]) -> Self:
        """Around a tokenizer that is there, and its configuration as its config.json has it."""
        made = cls(tokenizer_format=tokenizer.format, tokenizer_config=config)
        made.tokenizer = tokenizer
        return made.eval()

    @property
    def downsample(self) -> int:
        """Pixels to a latent cell along a side."""
        return self.tokenizer.downsample

    @torch.no_grad()
    def encode(self, x: Tensor, return_dict: bool = True) -> EncoderOutput | tuple[Tensor]:
        """Images [B, 3, H, W] in [-1, 1] -> normalised latents [B, d, H/f, W/f] in the images' dtype.

        Raises:
            ValueError: sides that are no multiples of f (calling the model itself pads them).
        """
        for side in x.shape[-2:]:
            check_size(side, self.downsample, "a side of the images")
        latent = self._apart(self.tokenizer.encode, x, self._cells(x)).to(x.dtype)
        return EncoderOutput(latent=latent) if return_dict else (latent,)

    @torch.no_grad()
    def decode(
        self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """Normalised latents [B, d, h, w] -> images [B, 3, f h, f w], nominally in [-1, 1], in the latents' dtype.

        `generator` is there for pipelines that give one; nothing is drawn.
        """
        height, width = z.shape[-2:]
        sample = self._apart(self.tokenizer.decode, z, (height, width)).to(z.dtype)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def forward(self, sample: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Images [B, 3, H, W] -> reconstructions of the same size; sides that f does not divide are padded, and the
        padding is cut off again, with a warning."""
        height, width = sample.shape[-2:]
        below, right = -height % self.downsample, -width % self.downsample
        if below or right:
            warnings.warn(
                f"images of {height}x{width} are padded to {height + below}x{width + right}, multiples of "
                f"{self.downsample}, and their reconstructions cut back",
                stacklevel=2,
            )
            sample = F.pad(sample, (0, right, 0, below), mode="replicate")
        (latent,) = self.encode(sample, return_dict=False)
        (whole,) = self.decode(latent, return_dict=False)
        decoded = whole[..., :height, :width]
        return DecoderOutput(sample=decoded) if return_dict else (decoded,)

    def _cells(self, images: Tensor) -> tuple[int, int]:
        return images.shape[-2] // self.downsample, images.shape[-1] // self.downsample

    def _apart(self, function: Any, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """`function` of a batch: picture by picture with slicing, in tiles with tiling where the grid is large."""
        if self.use_slicing and len(x) > 1:
            return torch.cat([self._apart(function, one, grid) for one in x.split(1)])
        if self.use_tiling and max(grid) > self.config.tile_size:
            return in_tiles(function, x, grid, self.config.tile_size, self.config.tile_overlap)
        return function(x)
