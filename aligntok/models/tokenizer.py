"""The tokenizer: encoder, adapter, decoder and the latent statistics that belong to them.

    encode(x) = (adapter(encoder(x)) - mean) / std          decode(z) = decoder(z * std + mean)

There is no KL, so the scale of the latent is arbitrary and its per-channel statistics are part of the model. Nobody
outside this file multiplies latents by anything. On disk a tokenizer is a folder with `config.json` and
`model.safetensors`. What AlignTok shares with its rivals (aligntok.zoo) is `StoredTokenizer`.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from aligntok.config import TokenizerConfig
from aligntok.errors import UserError
from aligntok.models.adapter import Adapter
from aligntok.models.decoder import Decoder
from aligntok.models.encoder import Encoder
from aligntok.models.half_precision import KeepsFloat32, weight_dtype
from aligntok.runtime.files import write_folder
from aligntok.runtime.hub import located
from aligntok.runtime.manifest import VERSION, Manifest
from aligntok.runtime.weights import load_strictly, read_tensors

# What config.json of a tokenizer folder says -> module and class that read it. By name and imported on use, so that the
# rivals stay above this file and whoever reads a folder needs to know none of them.
TOKENIZERS = {
    "aligntok.tokenizer": ("aligntok.models.tokenizer", "AlignTok"),
    "aligntok.zoo.vae": ("aligntok.zoo.vae", "VAE"),  # VA-VAE, FLUX, Stable Diffusion: the same network
    "aligntok.zoo.rae": ("aligntok.zoo.rae", "RAE"),
    "aligntok.zoo.maetok": ("aligntok.zoo.maetok", "MAETok"),
}


class Tokenizer(Protocol):
    """What everything else knows of a tokenizer."""

    @property
    def latent_channels(self) -> int:
        """d"""

    @property
    def downsample(self) -> int:
        """f"""

    def encode(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] -> normalised latents [B, d, H/f, W/f]."""

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents [B, d, h, w] -> images [B, 3, f*h, f*w], nominally in [-1, 1]."""


class StoredTokenizer(KeepsFloat32):
    """What every tokenizer of this project shares: latent statistics, normalisation, fingerprint, a folder on disk.

    A subclass names its `format`, `config_class` and `latent_parts`, builds these parts and `decoder`, calls
    `_add_statistics` and maps images to `raw_latents`.
    """

    format: ClassVar[str]  # what config.json calls it
    config_class: ClassVar[type]
    latent_parts: ClassVar[tuple[str, ...]]  # the modules that decide the latents
    kept_buffers = ("latent_mean", "latent_std")
    decoder: nn.Module
    latent_channels: int
    downsample: int
    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self._cast_from: str | None = None  # fingerprint of the float32 weights, after a cast

    @classmethod
    def offline(cls, config: Any) -> Any:
        """`config` such that building downloads nothing: all weights are about to be loaded from the folder."""
        return config

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        lowered = fn(torch.zeros((), device="cpu")).dtype != torch.float32
        if lowered and weight_dtype(self) == torch.float32 and not self.latent_mean.is_meta:
            self._cast_from = self.fingerprint()
        return super()._apply(fn, recurse)

    def _add_statistics(self, *shape: int) -> None:
        """Buffers of mean and standard deviation: (d,) per channel, or (d, h, w) per element."""
        # NaN until statistics are computed: a forgotten normalisation cannot pass unnoticed.
        self.register_buffer("latent_mean", torch.full(shape, float("nan")))
        self.register_buffer("latent_std", torch.full(shape, float("nan")))

    @property
    def has_statistics(self) -> bool:
        if self.latent_mean.is_meta:
            return True  # numbers are not what a tokenizer on the meta device is asked for
        return bool(torch.isfinite(self.latent_mean).all() and torch.isfinite(self.latent_std).all())

    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Mean and standard deviation of raw latents over training images, shaped like the buffers."""
        bad = ~(torch.isfinite(mean) & torch.isfinite(std) & (std > 0))
        if bad.any():
            dead = torch.nonzero(bad.reshape(len(bad), -1).any(1)).flatten().tolist()
            raise UserError(f"latent statistics are unusable: channels {dead} are constant or not finite; train longer")
        self.latent_mean.copy_(mean)
        self.latent_std.copy_(std)

    def grid(self, images: Tensor) -> tuple[int, int]:
        """Token grid (h, w) of images [B, 3, H, W]."""
        return images.shape[-2] // self.downsample, images.shape[-1] // self.downsample

    def raw_latents(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] -> latents before normalisation [B, d, H/f, W/f]; what training works on."""
        raise NotImplementedError

    def reconstruct(self, raw: Tensor) -> Tensor:
        """Latents before normalisation [B, d, h, w] -> images [B, 3, f*h, f*w]."""
        return self.decoder(raw)

    def encode(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] -> normalised latents [B, d, H/f, W/f], float32."""
        self._require_statistics()
        return self.normalise(self.raw_latents(images.to(weight_dtype(self))).float())

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents [B, d, h, w] -> images [B, 3, f*h, f*w], nominally in [-1, 1], float32."""
        self._require_statistics()
        return self.reconstruct(self.denormalise(latents.float()).to(weight_dtype(self))).float()

    def normalise(self, raw: Tensor) -> Tensor:
        return (raw - _broadcast(self.latent_mean)) / _broadcast(self.latent_std)

    def denormalise(self, latents: Tensor) -> Tensor:
        return latents * _broadcast(self.latent_std) + _broadcast(self.latent_mean)

    def fingerprint(self, parts: tuple[str, ...] | None = None) -> str:
        """Short hash of everything that decides the latents; decoder-only training does not change it.

        `parts` names some of the modules that do, None = all of them.

        Cast to bf16 or fp16, a tokenizer keeps the fingerprint of the weights that it was cast from.
        """
        if parts is None and self._cast_from is not None and weight_dtype(self) != torch.float32:
            return self._cast_from
        digest = hashlib.sha256()
        for part in self.latent_parts if parts is None else parts:
            for name, value in getattr(self, part).state_dict().items():
                digest.update(name.encode() + _bytes(value))
        digest.update(_bytes(self.latent_mean) + _bytes(self.latent_std))
        return digest.hexdigest()[:16]

    def save(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors atomically; an older tokenizer at that place survives a failure."""
        manifest = {"format": self.format, "version": VERSION, "config": dataclasses.asdict(self.config)}
        write_folder(folder, tensors={"model": self.state_dict()}, documents={"config": manifest})

    def _require_statistics(self) -> None:
        if not self.has_statistics:
            raise UserError(
                "this tokenizer has no latent statistics, so its latents have no defined scale; compute them with: "
                "aligntok statistics --tokenizer FOLDER --images IMAGES"
            )


def _bytes(value: Tensor) -> bytes:
    """The numbers of a tensor as they lie in memory; NumPy itself knows no bf16."""
    return value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _broadcast(statistic: Tensor) -> Tensor:
    """[d] -> [d, 1, 1]; [d, h, w] as it is."""
    return statistic[:, None, None] if statistic.ndim == 1 else statistic


class AlignTok(StoredTokenizer):
    """A pretrained vision encoder turned into an image tokenizer (AlignTok, arXiv 2509.25162, section 4)."""

    format = "aligntok.tokenizer"
    config_class = TokenizerConfig
    latent_parts = ("encoder", "adapter")
    decoder: Decoder

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__(config)
        self.encoder = Encoder(config.encoder)
        self.adapter = Adapter(self.encoder.width, config.adapter)
        self.decoder = Decoder(config.adapter.latent_channels, config.decoder)
        self.latent_channels = config.adapter.latent_channels
        self.downsample = config.encoder.downsample
        check_upsampling(self.decoder, self.downsample)
        self._add_statistics(self.latent_channels)

    @classmethod
    def offline(cls, config: TokenizerConfig) -> TokenizerConfig:
        config.encoder.weights = "random"
        return config

    def raw_latents(self, images: Tensor) -> Tensor:
        return self.adapter(self.encoder(images), self.grid(images))


def check_upsampling(decoder: Decoder, downsample: int) -> None:
    """Raises UserError where a convolutional decoder does not enlarge as much as the encoder reduces."""
    if decoder.upsampling != downsample:
        raise UserError(
            f"decoder.channel_multipliers has {len(decoder.levels)} levels, which enlarges {decoder.upsampling}x, "
            f"but encoder.downsample is {downsample}: they must agree"
        )


def tokenizer_class(name: str, source: Path) -> type[StoredTokenizer]:
    """The class behind a format's name; UserError, naming `source`, where there is none."""
    if name not in TOKENIZERS:
        others = ", ".join(list(TOKENIZERS)[1:])
        raise UserError(f"{source} says format {name!r}, expected 'aligntok.tokenizer' or a rival's: {others}")
    module, attribute = TOKENIZERS[name]
    return getattr(import_module(module), attribute)


def tokenizer_without_weights(folder: str | Path) -> StoredTokenizer:
    """A tokenizer of a folder's configuration with new weights: for the meta device, where nothing can be read into.

    Raises:
        UserError: as `load_tokenizer`, but for the weights.
    """
    manifest = Manifest(located(folder, "tokenizer"), "tokenizer")
    kind = tokenizer_class(manifest.format, manifest.file)
    manifest.check_version()
    config = kind.offline(manifest.value("config", kind.config_class))
    return manifest.build(lambda: kind(config))


def load_tokenizer(folder: str | Path, require_statistics: bool = True) -> StoredTokenizer:
    """Read a tokenizer folder, of AlignTok or of a rival in aligntok.zoo, in eval mode on the CPU.

    Args:
        folder: or the name of a repository on the hub, USER/NAME or USER/NAME@REVISION.

    Raises:
        UserError: no such folder or repository, a damaged one, an unknown format or version, weights that do not fit
            the configuration, or no latent statistics (unless `require_statistics` is False).
    """
    folder = located(folder, "tokenizer")
    weights = folder / "model.safetensors"
    tokenizer = tokenizer_without_weights(folder)
    load_strictly(tokenizer, read_tensors(weights), weights)
    if require_statistics:
        tokenizer._require_statistics()
    return tokenizer.eval()
