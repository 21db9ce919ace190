"""Reconstruction metrics: parity, quantisation, batching, refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import skimage.data
import skimage.metrics
import torch

from aligntok.config import PerceptualConfig
from aligntok.errors import UserError
from aligntok.evaluation.reconstruction import (
    ReconstructionMetrics,
    psnr,
    quantise,
    reconstruction_metrics,
    ssim,
)
from aligntok.losses.perceptual import build_perceptual


class Means:
    """An extractor for tests: the mean of each colour."""

    name, dimension, protocol = "Means", 3, "colour means"

    def __call__(self, images):
        return images.mean(dim=(2, 3))


def pair(count: int = 6, size: int = 48) -> tuple[torch.Tensor, torch.Tensor]:
    """Crops of a photograph, and the same with noise that grows from crop to crop; in [-1, 1]."""
    photo = torch.from_numpy(skimage.data.astronaut()).permute(2, 0, 1).float() / 127.5 - 1
    originals = torch.stack([photo[:, 40 * i : 40 * i + size, 200 : 200 + size] for i in range(count)])
    noise = torch.randn(originals.shape, generator=torch.Generator().manual_seed(0))
    strength = torch.linspace(0.05, 0.4, count).view(-1, 1, 1, 1)
    return originals, (originals + strength * noise).clamp(-1, 1)


def test_matches_scikit_image_on_the_saved_bytes():
    originals, noisy = pair()
    metrics = reconstruction_metrics(originals, noisy, batch_size=4)
    bytes_of = [
        ((t * 127.5 + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()) for t in (originals, noisy)
    ]
    expected_psnr = np.mean([skimage.metrics.peak_signal_noise_ratio(a, b) for a, b in zip(*bytes_of, strict=True)])
    assert metrics["PSNR [dB]"] == pytest.approx(expected_psnr, abs=1e-4)
    # The mean over the whole map: torchmetrics keeps the reflected border, scikit-image drops 5 px of it
    # from its own mean. The two differ in whether the last pixel is repeated.
    maps = [
        skimage.metrics.structural_similarity(
            a, b, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, full=True
        )[1]
        for a, b in zip(*bytes_of, strict=True)
    ]
    assert metrics["SSIM"] == pytest.approx(np.mean(maps), abs=1e-3)


def test_known_psnr():
    """A constant error of a tenth of the range is 20 dB."""
    assert psnr(torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 0.2)).tolist() == pytest.approx([20.0, 20.0])
    assert math.isinf(psnr(torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4)).item())


def test_images_are_quantised_first():
    originals, _ = pair(2)
    assert math.isinf(reconstruction_metrics(originals, originals + 0.003)["PSNR [dB]"])  # below half a grey level
    assert torch.equal(quantise(quantise(originals)), quantise(originals))


def test_batching_changes_nothing_and_every_metric_is_there():
    originals, noisy = pair()
    perceptual = build_perceptual(PerceptualConfig("st-lpips-alex"))
    whole = reconstruction_metrics(originals, noisy, perceptual, Means())
    parts = reconstruction_metrics(originals, noisy, perceptual, Means(), batch_size=4)
    assert list(whole) == ["PSNR [dB]", "SSIM", "ST-LPIPS", "rFD-Means", "rKD-Means"]
    assert parts == pytest.approx(whole, rel=1e-4, abs=1e-6)
    better = reconstruction_metrics(originals, (originals + noisy) / 2, perceptual, Means())
    assert better["PSNR [dB]"] > whole["PSNR [dB]"] and better["SSIM"] > whole["SSIM"]
    assert better["ST-LPIPS"] < whole["ST-LPIPS"] and better["rFD-Means"] < whole["rFD-Means"]


def test_protocol_follows_what_was_added():
    originals, noisy = pair(4)
    metrics = ReconstructionMetrics(extractor=Means())
    metrics.add(originals, noisy)
    first = metrics.compute()
    assert "n=4, 48x48 px, both sides 8-bit" in metrics.protocol and "colour means" in metrics.protocol
    metrics.add(noisy, originals)
    assert metrics.compute() != first and "n=8" in metrics.protocol


def test_refusals():
    originals, noisy = pair(2)
    with pytest.raises(UserError, match="same shape"):
        reconstruction_metrics(originals, noisy[..., :40])
    with pytest.raises(UserError, match="2 originals but 1"):
        reconstruction_metrics(originals, noisy[:1])
    with pytest.raises(UserError, match="not finite"):
        reconstruction_metrics(originals, noisy * float("nan"))
    with pytest.raises(UserError, match="at least 11 px"):
        ssim(originals[..., :8, :8], noisy[..., :8, :8])
    with pytest.raises(UserError, match="at least one batch"):
        ReconstructionMetrics().compute()
