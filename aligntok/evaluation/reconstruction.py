"""How close reconstructions are to their originals: PSNR, SSIM, a perceptual distance, and feature distances.

    PSNR = mean over images of 10 log10(2^2 / MSE), images in [-1, 1] (equal to 255^2 / MSE of the 8-bit
    values)

Both sides are first quantised to 8 bits, as if they had been saved to a file: numbers of a tensor and of
its PNG agree. What is kept of the images does not grow with their number: sums, moments of features, and a sample of
features for the kernel distance.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from aligntok.errors import UserError
from aligntok.evaluation.distances import FeatureSet, set_distances
from aligntok.evaluation.features import FeatureExtractor, to_uint8
from aligntok.losses.perceptual import PerceptualDistance

_SSIM_WINDOW = 11  # px: Gaussian window with sigma 1.5, the original paper's and torchmetrics' default


def psnr(originals: Tensor, reconstructions: Tensor) -> Tensor:
    """[B, 3, H, W] in [-1, 1] twice -> dB per image [B] on the CPU, data range 2; infinite for equal images."""
    error = (originals.float() - reconstructions.float()).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(4 / error.cpu().double())  # on the CPU: not every device has float64


def ssim(originals: Tensor, reconstructions: Tensor) -> Tensor:
    """[B, 3, H, W] in [-1, 1] twice -> structural similarity per image [B], by torchmetrics.

    Taken on [0, 1]: the luminance term compares means, so it is only defined for values that start at 0.
    The border is reflected and counts (scikit-image leaves it out of its mean).
    """
    if min(originals.shape[2:]) < _SSIM_WINDOW:
        raise UserError(f"SSIM needs images of at least {_SSIM_WINDOW} px, got {list(originals.shape[2:])}")
    first, second = originals.float() / 2 + 0.5, reconstructions.float() / 2 + 0.5
    found = structural_similarity_index_measure(second, first, data_range=1.0, reduction="none")
    assert isinstance(found, Tensor)  # a tuple only where its images are asked for
    return found.reshape(-1)


def quantise(images: Tensor) -> Tensor:
    """[-1, 1] -> the nearest of the 256 values that an 8-bit file can hold, back in [-1, 1]."""
    return to_uint8(images).float() / 127.5 - 1


class ReconstructionMetrics:
    """Accumulates over batches: `add(originals, reconstructions)`, then `compute()` and `protocol`.

    `perceptual` adds "LPIPS" or "ST-LPIPS"; every extractor adds rFD and rKD under its name.
    """

    def __init__(
        self,
        perceptual: PerceptualDistance | None = None,
        extractor: FeatureExtractor | Sequence[FeatureExtractor] | None = None,
    ) -> None:
        self.perceptual = perceptual
        given = extractor if isinstance(extractor, Sequence) else [] if extractor is None else [extractor]
        self.extractors = [(found, FeatureSet(found.dimension), FeatureSet(found.dimension)) for found in given]
        self.count = 0
        self._sums: dict[str, float] = {}
        self._sizes: set[tuple[int, int]] = set()
        self._distances_found: tuple[dict[str, float], str] | None = None

    @torch.no_grad()
    def add(self, originals: Tensor, reconstructions: Tensor) -> None:
        """Two batches [B, 3, H, W] in [-1, 1] on one device. UserError if their shapes differ."""
        if originals.shape != reconstructions.shape or originals.ndim != 4 or originals.shape[1] != 3:
            raise UserError(
                f"originals {list(originals.shape)} and reconstructions {list(reconstructions.shape)} must "
                "have the same shape [B, 3, H, W]: compare at the resolution of the original crop"
            )
        if not reconstructions.isfinite().all():
            raise UserError("the reconstructions hold values that are not finite")
        originals, reconstructions = quantise(originals), quantise(reconstructions)
        self._sizes.add((originals.shape[2], originals.shape[3]))
        found = {"PSNR [dB]": psnr(originals, reconstructions), "SSIM": ssim(originals, reconstructions)}
        if self.perceptual is not None:
            found[self.perceptual.label] = self.perceptual(originals, reconstructions)
        for name, value in found.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.cpu().double().sum().item()
        self.count += len(originals)
        self._distances_found = None
        for extractor, *sets in self.extractors:
            for images, features in zip((originals, reconstructions), sets, strict=True):
                features.add(extractor(images))

    def compute(self) -> dict[str, float]:
        """Means over all images, and the feature distances. UserError before the first batch."""
        if not self.count:
            raise UserError("no images were added: reconstruction metrics need at least one batch")
        return {name: total / self.count for name, total in self._sums.items()} | self._distances()[0]

    @property
    def protocol(self) -> str:
        """What to print beside the numbers."""
        sizes = ", ".join(f"{height}x{width}" for height, width in sorted(self._sizes))
        text = f"n={self.count}, {sizes} px, both sides 8-bit; PSNR averaged over images; SSIM with its border"
        if self.perceptual is not None:
            text += f"; {self.perceptual.label}: {self.perceptual.name}"
        distances = self._distances()[1]
        return f"{text}; {distances}" if distances else text

    def _distances(self) -> tuple[dict[str, float], str]:
        if not self.count:
            return {}, ""
        if self._distances_found is None:
            metrics: dict[str, float] = {}
            protocols = []
            for extractor, originals, reconstructions in self.extractors:
                found, protocol = set_distances(originals, reconstructions, extractor, prefix="r")
                metrics |= found
                protocols.append(protocol)
            self._distances_found = metrics, "; ".join(protocols)
        return self._distances_found


def reconstruction_metrics(
    originals: Tensor,
    reconstructions: Tensor,
    perceptual: PerceptualDistance | None = None,
    extractor: FeatureExtractor | None = None,
    batch_size: int = 64,
) -> dict[str, float]:
    """Metrics of two tensors [n, 3, H, W] in [-1, 1], worked through in batches; see
    ReconstructionMetrics."""
    if len(originals) != len(reconstructions):
        raise UserError(f"{len(originals)} originals but {len(reconstructions)} reconstructions")
    metrics = ReconstructionMetrics(perceptual, extractor)
    for start in range(0, len(originals), batch_size):
        metrics.add(originals[start : start + batch_size], reconstructions[start : start + batch_size])
    return metrics.compute()
