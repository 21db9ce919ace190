"""The adaptive weight between reconstruction and adversarial loss, with each loss network traversed
backwards once.

    lambda = min(|dL_rec/dW| / (|dL_gan/dW| + 1e-4), limit)        W: weight of the decoder's last
    convolution (VQGAN, eq. 7)

VQGAN's code differentiates the perceptual and the adversarial graph for lambda and then a second time for
the update. Here both are differentiated once, down to the reconstructed image; the two image gradients give
the norms at W and, weighted and added, they are what flows into the decoder.
"""

from __future__ import annotations

import torch
from torch import Tensor

DELTA = 1e-4  # keeps the ratio finite (VQGAN)


def image_gradient(loss: Tensor, image: Tensor) -> Tensor:
    """d loss / d image, for a leaf `image` [B, 3, H, W] that requires grad; parameters of the loss network
    get none."""
    (gradient,) = torch.autograd.grad(loss, image)
    return gradient


def adaptive_weight(
    output: Tensor, weight: Tensor, reconstruction: Tensor, adversarial: Tensor, limit: float
) -> Tensor:
    """Scalar lambda (float32, no gradient), clamped to `limit`.

    Args:
        output: decoder output [B, 3, H, W] with its graph.
        weight: W, the last convolution's weight, a parent of `output`.
        reconstruction, adversarial: gradients of the two losses by the image, each shaped like `output`.
    """
    norms = []
    for gradient in (reconstruction, adversarial):
        (at_weight,) = torch.autograd.grad(output, weight, gradient, retain_graph=True)
        norms.append(at_weight.float().norm())
    return (norms[0] / (norms[1] + DELTA)).clamp(max=limit).detach()


def surrogate(output: Tensor, gradient: Tensor, value: Tensor) -> Tensor:
    """A scalar with the value of `value` whose gradient by `output` is `gradient`; a NaN in either one shows."""
    carrier = (output.float() * gradient.detach()).sum()
    return carrier - carrier.detach() + value.detach()
