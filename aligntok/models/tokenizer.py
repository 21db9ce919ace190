"""The tokenizer: encoder, adapter, decoder and the latent statistics that belong to them.

    encode(x) = (adapter(encoder(x)) - mean) / std          decode(z) = decoder(z * std + mean)

There is no KL, so the scale of the latent is arbitrary and its per-channel statistics are part of the model. Nobody
outside this file multiplies latents by anything. On disk a tokenizer is a folder with `config.json` and
`model.safetensors`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from aligntok.config import TokenizerConfig, from_dict
from aligntok.errors import UserError
from aligntok.files import write_folder
from aligntok.models.adapter import Adapter
from aligntok.models.decoder import Decoder
from aligntok.models.encoder import Encoder

FORMAT = "aligntok.tokenizer"


class Tokenizer(Protocol):
    """What everything else knows of a tokenizer."""

    latent_channels: int  # d
    downsample: int  # f

    def encode(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] -> normalised latents [B, d, H/f, W/f]."""

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents [B, d, h, w] -> images [B, 3, f*h, f*w], nominally in [-1, 1]."""


class AlignTok(nn.Module):
    """A pretrained vision encoder turned into an image tokenizer (AlignTok, arXiv 2509.25162, section 4)."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config.encoder)
        self.adapter = Adapter(self.encoder.width, config.adapter)
        self.decoder = Decoder(config.adapter.latent_channels, config.decoder)
        self.latent_channels = config.adapter.latent_channels
        self.downsample = config.encoder.downsample
        if self.decoder.upsampling != self.downsample:
            raise UserError(
                f"decoder.channel_multipliers has {len(config.decoder.channel_multipliers)} levels, which enlarges "
                f"{self.decoder.upsampling}x, but encoder.downsample is {self.downsample}: they must agree"
            )
        # NaN until statistics are computed: a forgotten normalisation cannot pass unnoticed.
        self.register_buffer("latent_mean", torch.full((self.latent_channels,), float("nan")))
        self.register_buffer("latent_std", torch.full((self.latent_channels,), float("nan")))

    @property
    def has_statistics(self) -> bool:
        return bool(torch.isfinite(self.latent_mean).all() and torch.isfinite(self.latent_std).all())

    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Per-channel mean and standard deviation [d] of raw latents over training images."""
        if not (torch.isfinite(mean).all() and torch.isfinite(std).all() and (std > 0).all()):
            dead = torch.nonzero(~(std > 0) | ~torch.isfinite(std)).flatten().tolist()
            raise UserError(f"latent statistics are unusable: channels {dead} are constant or not finite; train longer")
        self.latent_mean.copy_(mean)
        self.latent_std.copy_(std)

    def grid(self, images: Tensor) -> tuple[int, int]:
        """Token grid (h, w) of images [B, 3, H, W]."""
        return images.shape[-2] // self.downsample, images.shape[-1] // self.downsample

    def raw_latents(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] -> latents before normalisation [B, d, H/f, W/f]; what training works on."""
        return self.adapter(self.encoder(images), self.grid(images))

    def encode(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] -> normalised latents [B, d, H/f, W/f], float32."""
        self._require_statistics()
        return self.normalise(self.raw_latents(images).float())

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents [B, d, h, w] -> images [B, 3, f*h, f*w], nominally in [-1, 1], float32."""
        self._require_statistics()
        return self.decoder(self.denormalise(latents.float())).float()

    def normalise(self, raw: Tensor) -> Tensor:
        return (raw - self.latent_mean[:, None, None]) / self.latent_std[:, None, None]

    def denormalise(self, latents: Tensor) -> Tensor:
        return latents * self.latent_std[:, None, None] + self.latent_mean[:, None, None]

    def fingerprint(self) -> str:
        """Short hash of everything that decides the latents; decoder-only training does not change it."""
        digest = hashlib.sha256()
        for part in (self.encoder, self.adapter):
            for name, value in part.state_dict().items():
                digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
        digest.update(self.latent_mean.cpu().numpy().tobytes() + self.latent_std.cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def save(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors atomically; an older tokenizer at that place survives a failure."""
        manifest = {"format": FORMAT, "version": 1, "config": dataclasses.asdict(self.config)}
        write_folder(folder, tensors={"model": self.state_dict()}, documents={"config": manifest})

    def _require_statistics(self) -> None:
        if not self.has_statistics:
            raise UserError(
                "this tokenizer has no latent statistics, so its latents have no defined scale; compute them with: "
                "aligntok statistics --tokenizer FOLDER --images IMAGES"
            )


def load_tokenizer(folder: str | Path, require_statistics: bool = True) -> AlignTok:
    """Read a tokenizer folder written by `AlignTok.save`, in eval mode on the CPU.

    Raises:
        UserError: no such folder, another format, weights that do not fit the configuration, or no latent statistics
            (unless `require_statistics` is False).
    """
    folder = Path(folder)
    config_file, weights_file = folder / "config.json", folder / "model.safetensors"
    for file in (config_file, weights_file):
        if not file.is_file():
            raise UserError(
                f"no tokenizer at {folder}: {file.name} is missing; give a folder that training has written"
            )
    manifest = json.loads(config_file.read_text())
    if manifest.get("format") != FORMAT:
        raise UserError(f"{config_file} says format {manifest.get('format')!r}, expected {FORMAT!r}")
    config = from_dict(TokenizerConfig, manifest["config"])
    config.encoder.weights = "random"  # everything comes from model.safetensors: nothing is downloaded
    tokenizer = AlignTok(config)
    load_strictly(tokenizer, load_file(weights_file), weights_file)
    if require_statistics:
        tokenizer._require_statistics()
    return tokenizer.eval()


def load_strictly(module: nn.Module, state: dict[str, Tensor], source: Path) -> None:
    """Load `state` into `module`; names every missing, unexpected and misshapen tensor in one UserError."""
    own = module.state_dict()
    problems = [f"missing {name}" for name in own if name not in state]
    problems += [f"unexpected {name}" for name in state if name not in own]
    problems += [
        f"{name} is {tuple(state[name].shape)}, expected {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(f"{source} belongs to another configuration: {'; '.join(problems[:3])}{more}")
    module.load_state_dict(state)
