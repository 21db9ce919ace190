"""Adversarial losses of a patch discriminator and of the generator that it judges.

With the logits `real` of any shape [...] and `fake` of any shape [...] (a PatchGAN gives [B, 1, h, w] each),

    kind               discriminator                                        generator
    hinge              0.5 (mean relu(1 - real) + mean relu(1 + fake))      -mean fake
    non_saturating     0.5 (mean softplus(-real) + mean softplus(fake))     mean softplus(-fake)

The factor 0.5 is the convention of taming-transformers (taming/modules/losses/vqperceptual.py), which VA-VAE
inherits; the non-saturating loss is that of Goodfellow et al. 2014 (arXiv 1406.2661), written with softplus.

The discriminator's loss may contain the LeCam term of Tseng et al. 2021 (arXiv 2104.03310),

    lecam_weight * (mean relu(real - mean_fake)^2 + mean relu(mean_real - fake)^2)

with moving averages mean_real and mean_fake of the mean logits of earlier steps, in the one-sided form of the authors'
code (google/lecam-gan): logits of real images are pulled down to the average of the fake ones, those of fake images
up to the average of the real ones.

Next to the loss, both return what a training log wants to know of the logits, without a gradient and without
a read-back to the host:

    discriminator      [4]: mean real, mean fake, share of real > 0, share of fake < 0
    generator          [2]: mean fake, share of fake > 0

Sums and results are fp32, or fp64 for fp64 logits. The C++ implementation computes loss, gradient and
statistics in one pass over the logits, on CUDA in one launch, and adds in a fixed order: two runs give the same
bits, on the CPU for any number of threads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _extension, _extension_cuda
from ._dispatch import register, select
from ._dtypes import check_dtype

KINDS = ("hinge", "non_saturating")


def _accumulated(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _share(condition: Tensor, dtype: torch.dtype) -> Tensor:
    return condition.to(dtype).mean()


def discriminator_loss_reference(
    real: Tensor, fake: Tensor, kind: str, lecam_means: Tensor | None = None, lecam_weight: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The discriminator's loss and statistics in plain PyTorch; see `discriminator_loss`."""
    real, fake = _accumulated(real), _accumulated(fake)
    if kind == "hinge":
        loss = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    else:
        loss = 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())
    if lecam_weight:
        assert lecam_means is not None  # `discriminator_loss` has checked it
        mean_real, mean_fake = lecam_means.detach().to(real.dtype)
        excess_real, excess_fake = F.relu(real - mean_fake), F.relu(mean_real - fake)
        loss = loss + lecam_weight * (excess_real.square().mean() + excess_fake.square().mean())
    real, fake = real.detach(), fake.detach()  # no_grad would leave them their tangents in forward mode
    shares = _share(real > 0, real.dtype), _share(fake < 0, fake.dtype)
    return loss, torch.stack([real.mean(), fake.mean(), *shares])  # [4]


def generator_loss_reference(fake: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """The generator's loss and statistics in plain PyTorch; see `generator_loss`."""
    fake = _accumulated(fake)
    loss = -fake.mean() if kind == "hinge" else F.softplus(-fake).mean()
    fake = fake.detach()
    return loss, torch.stack([fake.mean(), _share(fake > 0, fake.dtype)])  # [2]


def _cpp_refusal(device: torch.device) -> str | None:
    return _extension.unavailable() if device.type == "cpu" else _extension_cuda.refusal(device)


register("gan_loss", cpp=_cpp_refusal)


def _check_logits(name: str, logits: Tensor, kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    check_dtype(f"{name} logits", logits.dtype)
    if logits.numel() == 0:
        raise ValueError(f"{name} logits: shape {tuple(logits.shape)} has no element, so there is no mean")


def _check_lecam(real: Tensor, means: Tensor | None, weight: float) -> None:
    if weight == 0:
        return
    if not weight > 0:
        raise ValueError(f"lecam_weight: expected a number >= 0, got {weight}")
    if means is None:
        raise ValueError(f"lecam_means: with lecam_weight {weight} expected a tensor [2], got None")
    if means.shape != (2,) or means.dtype != torch.float32 or means.device != real.device:
        raise ValueError(
            f"lecam_means: expected [2] in float32 on {real.device}, "
            f"got {list(means.shape)} in {means.dtype} on {means.device}"
        )


def discriminator_loss(
    real: Tensor,
    fake: Tensor,
    kind: str = "hinge",
    *,
    lecam_means: Tensor | None = None,
    lecam_weight: float = 0.0,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss of the discriminator and statistics of its logits; formulas in the module's docstring.

    Args:
        real: logits of real images, any shape, fp32, bf16, fp16 or fp64; strides are free.
        fake: logits of generated images, any shape, same dtype and device as `real`.
        kind: "hinge" or "non_saturating".
        lecam_means: moving averages of the mean real and fake logits [2], fp32, needed where `lecam_weight` is not
            0; they get no gradient and are not updated (`stats` has what they are updated with).
        lecam_weight: of the LeCam term; 0 = no such term.
        implementation: "auto", "cpp" or "reference"; None follows `use_implementation` and ALIGNTOK_KERNELS.

    Returns:
        loss [] and stats [4] (mean real, mean fake, share of real > 0, share of fake < 0), fp32 (fp64 for
        fp64 logits). Only the loss carries a gradient. The C++ implementation differentiates once; the hinge
        without LeCam also twice.

    Raises:
        ValueError: unknown `kind`; unsupported or different dtypes; different devices; no logits; a negative
            `lecam_weight`; wrong `lecam_means`; `implementation` is unknown or cannot run here.
    """
    _check_logits("real", real, kind)
    _check_logits("fake", fake, kind)
    if real.dtype != fake.dtype or real.device != fake.device:
        raise ValueError(
            "real and fake logits: expected one dtype and one device, got "
            f"{real.dtype} on {real.device} and {fake.dtype} on {fake.device}"
        )
    _check_lecam(real, lecam_means, lecam_weight)
    if select("gan_loss", real.device.type, implementation) == "cpp":
        return torch.ops.aligntok.gan_discriminator_loss.default(real, fake, kind, lecam_means, lecam_weight)
    return discriminator_loss_reference(real, fake, kind, lecam_means, lecam_weight)


def generator_loss(fake: Tensor, kind: str = "hinge", *, implementation: str | None = None) -> tuple[Tensor, Tensor]:
    """Loss of the generator and statistics of the discriminator's logits for its images.

    Args:
        fake: logits of generated images, any shape, fp32, bf16, fp16 or fp64; strides are free.
        kind: "hinge" or "non_saturating".
        implementation: "auto", "cpp" or "reference"; None follows `use_implementation` and ALIGNTOK_KERNELS.

    Returns:
        loss [] and stats [2] (mean fake, share of fake > 0), fp32 (fp64 for fp64 logits). Only the loss
        carries a gradient.

    Raises:
        ValueError: unknown `kind`; unsupported dtype; no logits; `implementation` is unknown or cannot run
            here.
    """
    _check_logits("fake", fake, kind)
    if select("gan_loss", fake.device.type, implementation) == "cpp":
        return torch.ops.aligntok.gan_generator_loss.default(fake, kind)
    return generator_loss_reference(fake, kind)
