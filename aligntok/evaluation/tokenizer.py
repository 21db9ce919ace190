"""A tokenizer on held-out images: what comes back (reconstruction) and what the latent knows (linear
probe)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from aligntok.data.geometry import to_unit_range
from aligntok.errors import UserError
from aligntok.evaluation.features import FeatureExtractor
from aligntok.evaluation.probe import linear_probe, probe_latents
from aligntok.evaluation.reconstruction import ReconstructionMetrics
from aligntok.losses.perceptual import PerceptualDistance
from aligntok.models.encoder import Encoder
from aligntok.models.tokenizer import StoredTokenizer, Tokenizer
from aligntok.runtime.devices import Precision

BATCH = 32


@dataclass
class Measured:
    """Numbers with the protocol that they were measured by, and what could not be measured, with the reason."""

    values: dict[str, float]
    protocol: str
    extra: dict[str, Tensor] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def told_left_out(left_out: dict[str, str]) -> str:
    """For the user: {number: reason} with the numbers of one reason together."""
    reasons: dict[str, list[str]] = {}
    for number, reason in left_out.items():
        reasons.setdefault(reason, []).append(number)
    return "left out: " + "; ".join(f"{', '.join(numbers)}: {reason}" for reason, numbers in reasons.items())


@torch.no_grad()
def encode_all(tokenizer: Tokenizer, images: Tensor, precision: Precision) -> Tensor:
    """uint8 images [n, 3, H, W] -> normalised latents [n, d, h, w] on the CPU."""
    latents = []
    for batch in images.split(BATCH):
        with precision.autocast():
            latents.append(tokenizer.encode(to_unit_range(batch).to(precision.device)).float().cpu())
    return torch.cat(latents)


@torch.no_grad()
def decode_all(tokenizer: Tokenizer, latents: Tensor, precision: Precision) -> Tensor:
    """Normalised latents [n, d, h, w] -> images [n, 3, H, W] float32 in [-1, 1] on the CPU."""
    images = []
    for batch in latents.split(BATCH):
        with precision.autocast():
            images.append(tokenizer.decode(batch.to(precision.device)).float().clamp(-1, 1).cpu())
    return torch.cat(images)


def evaluate_reconstruction(
    tokenizer: Tokenizer,
    images: Tensor,
    precision: Precision,
    perceptual: PerceptualDistance | None,
    extractor: FeatureExtractor | None,
) -> Measured:
    """PSNR, SSIM, perceptual and feature distances of uint8 images [n, 3, H, W] and their reconstructions.

    `extra` holds "latents" [n, d, h, w] and "reconstructions" [n, 3, H, W].
    """
    latents = encode_all(tokenizer, images, precision)
    reconstructions = decode_all(tokenizer, latents, precision)
    metrics = ReconstructionMetrics(perceptual, extractor)
    for original, reconstruction in zip(images.split(BATCH), reconstructions.split(BATCH), strict=True):
        metrics.add(to_unit_range(original).to(precision.device), reconstruction.to(precision.device))
    return Measured(metrics.compute(), metrics.protocol, {"latents": latents, "reconstructions": reconstructions})


def stream_reconstruction(
    tokenizer: Tokenizer,
    batches: Iterable[Tensor],
    precision: Precision,
    perceptual: PerceptualDistance | None,
    extractors: Sequence[FeatureExtractor],
) -> Measured:
    """The numbers of `evaluate_reconstruction` for uint8 batches [B, 3, H, W], of which none is kept."""
    metrics = ReconstructionMetrics(perceptual, extractors)
    for images in batches:
        restored = decode_all(tokenizer, encode_all(tokenizer, images, precision), precision)
        metrics.add(to_unit_range(images).to(precision.device), restored.to(precision.device))
    return Measured(metrics.compute(), metrics.protocol)


def evaluate_probe(latents: Tensor, labels: Tensor, seed: int = 0) -> Measured | None:
    """Linear probe on pooled (and on flattened) normalised latents [n, d, h, w]; None where there are no
    two classes."""
    try:
        pooled, flattened = probe_latents(latents, labels, seed=seed)
    except UserError:
        if len(labels.unique()) > 1:
            raise
        return None
    values = {"mean": pooled.mean, "std": pooled.std, "flattened": flattened.mean}
    return Measured(values, pooled.protocol)


@torch.no_grad()
def pooled_tokens(encoder: Encoder, images: Tensor, precision: Precision) -> Tensor:
    """uint8 images [n, 3, H, W] -> mean of the encoder's tokens [n, C], float32 on the CPU."""
    pooled = []
    for batch in images.split(BATCH):
        with precision.autocast():
            pooled.append(encoder(to_unit_range(batch).to(precision.device)).float().mean(1).cpu())
    return torch.cat(pooled)


def encoder_probe(
    tokenizer: StoredTokenizer, images: Tensor, labels: Tensor, precision: Precision, seed: int = 0
) -> Measured | None:
    """The same probe on the pooled tokens of a tokenizer's encoder, before the adapter; None where it has none."""
    if len(labels.unique()) < 2 or not isinstance(tokenizer.encoder, Encoder):
        return None
    result = linear_probe(pooled_tokens(tokenizer.encoder, images, precision), labels, seed=seed)
    return Measured({"mean": result.mean, "std": result.std}, result.protocol)
