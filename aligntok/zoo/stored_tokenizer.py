"""What every tokenizer here has in common: latent statistics, encode and decode around them, and a folder on disk.

    encode(x) = (raw_latents(x) - mean) / std          decode(z) = reconstruct(z * std + mean)

A subclass gives `raw_latents` and `reconstruct`, its configuration's class, the name of its format and of the modules
that decide its latents.
The folder holds `config.json` and `model.safetensors`, like that of AlignTok.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from aligntok.config import from_dict
from aligntok.errors import UserError
from aligntok.files import write_folder
from aligntok.models.tokenizer import load_strictly

T = TypeVar("T", bound="StoredTokenizer")


class StoredTokenizer(nn.Module):
    """Base of the rivals; obeys aligntok.models.tokenizer.Tokenizer.

    Args:
        config: an instance of the subclass's `config_class`, written to config.json.
        latent_channels: d.
        downsample: f.
        mean, std: what the latent statistics start with; NaN = none until `set_statistics`.
    """

    format: ClassVar[str]  # what config.json calls it
    config_class: ClassVar[type]
    latent_parts: ClassVar[tuple[str, ...]]  # the modules that decide the latents

    def __init__(
        self,
        config: Any,
        latent_channels: int,
        downsample: int,
        mean: float = float("nan"),
        std: float = float("nan"),
    ) -> None:
        super().__init__()
        self.config, self.latent_channels, self.downsample = config, latent_channels, downsample
        self.register_buffer("latent_mean", torch.full((latent_channels,), mean))
        self.register_buffer("latent_std", torch.full((latent_channels,), std))

    def raw_latents(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] -> latents before normalisation [B, d, h, w]."""
        raise NotImplementedError

    def reconstruct(self, raw: Tensor) -> Tensor:
        """Latents before normalisation [B, d, h, w] -> images [B, 3, H, W], nominally in [-1, 1]."""
        raise NotImplementedError

    def grid(self, images: Tensor) -> tuple[int, int]:
        """(h, w) of the latents of images [B, 3, H, W]; UserError where a side is not a multiple of f."""
        height, width = images.shape[-2:]
        f = self.downsample
        if min(height, width) < f or height % f or width % f:
            raise UserError(f"images are {height} x {width} px, expected multiples of the downsampling {f}")
        return height // f, width // f

    @property
    def has_statistics(self) -> bool:
        return bool(torch.isfinite(self.latent_mean).all() and torch.isfinite(self.latent_std).all())

    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Per-channel mean and standard deviation [d] of raw latents over training images."""
        if not (torch.isfinite(mean).all() and torch.isfinite(std).all() and (std > 0).all()):
            dead = torch.nonzero(~(std > 0) | ~torch.isfinite(std) | ~torch.isfinite(mean)).flatten().tolist()
            raise UserError(f"latent statistics are unusable: channels {dead} are constant or not finite; train longer")
        self.latent_mean.copy_(mean)
        self.latent_std.copy_(std)

    def encode(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] -> normalised latents [B, d, h, w], float32."""
        self._require_statistics()
        return self.normalise(self.raw_latents(images).float())

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents [B, d, h, w] -> images [B, 3, H, W], nominally in [-1, 1], float32."""
        self._require_statistics()
        return self.reconstruct(self.denormalise(latents.float())).float()

    def normalise(self, raw: Tensor) -> Tensor:
        return (raw - self.latent_mean[:, None, None]) / self.latent_std[:, None, None]

    def denormalise(self, latents: Tensor) -> Tensor:
        return latents * self.latent_std[:, None, None] + self.latent_mean[:, None, None]

    def fingerprint(self) -> str:
        """Short hash of everything that decides the latents; training the decoder alone does not change it."""
        digest = hashlib.sha256()
        for part in self.latent_parts:
            for name, value in getattr(self, part).state_dict().items():
                digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
        digest.update(self.latent_mean.cpu().numpy().tobytes() + self.latent_std.cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def save(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors atomically; an older tokenizer at that place survives a failure."""
        manifest = {"format": self.format, "version": 1, "config": dataclasses.asdict(self.config)}
        write_folder(folder, tensors={"model": self.state_dict()}, documents={"config": manifest})

    @classmethod
    def load(cls: type[T], folder: str | Path, require_statistics: bool = True) -> T:
        """Read a folder written by `save`, in eval mode on the CPU.

        Raises:
            UserError: no such folder, another format, weights that do not fit the configuration, or no latent
                statistics (unless `require_statistics` is False).
        """
        folder = Path(folder)
        config_file, weights_file = folder / "config.json", folder / "model.safetensors"
        for file in (config_file, weights_file):
            if not file.is_file():
                raise UserError(
                    f"no tokenizer at {folder}: {file.name} is missing; give a folder that aligntok has written"
                )
        manifest = json.loads(config_file.read_text())
        if manifest.get("format") != cls.format:
            raise UserError(f"{config_file} says format {manifest.get('format')!r}, expected {cls.format!r}")
        tokenizer = cls(from_dict(cls.config_class, manifest["config"]))
        load_strictly(tokenizer, load_file(weights_file), weights_file)
        if require_statistics:
            tokenizer._require_statistics()
        return tokenizer.eval()

    def _require_statistics(self) -> None:
        if not self.has_statistics:
            raise UserError(
                "this tokenizer has no latent statistics, so its latents have no defined scale; compute them with: "
                "aligntok statistics --tokenizer FOLDER --images IMAGES"
            )
