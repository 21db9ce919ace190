"""The adaptive weight between reconstruction and adversarial loss, with each loss network traversed
backwards once.

    lambda = min(|dL_rec/dW| / (|dL_gan/dW| + 1e-4), limit)        W: weight of the decoder's last
    convolution (VQGAN, eq. 7)

VQGAN's code differentiates the perceptual and the adversarial graph for lambda and then a second time for
the update. Here both are differentiated once, down to the reconstructed image; the two image gradients give
the norms at W and, weighted and added, they are what flows into the decoder.

`LeCam` keeps the moving averages that the LeCam term of the discriminator's loss compares logits with.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from aligntok.kernels import norm_ratio
from aligntok.runtime import collectives

DELTA = 1e-4  # keeps the ratio finite (VQGAN)


def image_gradient(loss: Tensor, image: Tensor) -> Tensor:
    """d loss / d image, for a leaf `image` [B, 3, H, W] that requires grad; parameters of the loss network
    get none."""
    (gradient,) = torch.autograd.grad(loss, image)
    return gradient


def adaptive_weight(
    output: Tensor, weight: Tensor, reconstruction: Tensor, adversarial: Tensor, limit: float
) -> Tensor:
    """Scalar lambda (float32, no gradient), clamped to `limit`; the same in all processes, of the losses' means.

    Args:
        output: decoder output [B, 3, H, W] with its graph.
        weight: W, the last convolution's weight, a parent of `output`.
        reconstruction, adversarial: gradients of the two losses by the image, each shaped like `output`.
    """
    at_weight = [
        torch.autograd.grad(output, weight, gradient, retain_graph=True)[0]
        for gradient in (reconstruction, adversarial)
    ]
    a, b = collectives.mean(torch.stack(at_weight))
    return norm_ratio([a], [b], delta=DELTA, limit=limit)


def surrogate(output: Tensor, gradient: Tensor, value: Tensor) -> Tensor:
    """A scalar with the value of `value` whose gradient by `output` is `gradient`; a NaN in either one shows."""
    carrier = (output.float() * gradient.detach()).sum()
    return carrier - carrier.detach() + value.detach()


class LeCam(nn.Module):
    """Moving averages of the discriminator's mean logits for real and fake images, as a buffer `means` [2].

    They start at 0, as in TiTok's and UniTok's training code: until they have settled, the term holds all logits
    near 0. A step's loss uses the averages of the steps before it.
    """

    means: Tensor

    def __init__(self, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("means", torch.zeros(2))

    @torch.no_grad()
    def update(self, stats: Tensor) -> None:
        """Move towards the mean logits, which `stats` [4] of `discriminator_loss` begins with, of all processes.

        Nothing is read back; a mean that is not finite is passed over.
        """
        means = collectives.mean(stats[:2]).to(self.means)
        self.means.lerp_(torch.where(means.isfinite(), means, self.means), 1 - self.decay)
