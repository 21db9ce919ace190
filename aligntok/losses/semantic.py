"""Semantic preservation: Stage 2's latents stay where Stage 1 put them.

    l2:      L_sp = mean((z - z_0)^2)            over all elements (AlignTok 4.2; see docs/decisions.md for the mean)
    cosine:  L_sp = mean(1 - cos(z, z_0))        over tokens, cosine over channels (the paper's ablation)

z_0 is the latent (or, before the adapter, the feature) that the frozen Stage-1 encoder and adapter give for the same
crop. On latents, training takes the sum of the L2 form from the adapter's own pass
(aligntok.kernels.adapter_projection) and divides it by the number of elements; the function here is for the rest.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from aligntok.errors import UserError


def semantic_loss(current: Tensor, target: Tensor, kind: str = "l2", channel_dim: int = 1) -> Tensor:
    """Scalar loss, float32, between tensors of one shape; `channel_dim` matters to "cosine" only."""
    current, target = current.float(), target.float()
    if kind == "l2":
        return (current - target).square().mean()  # F.mse_loss's gradient has no forward mode
    if kind == "cosine":
        return (1 - F.cosine_similarity(current, target, dim=channel_dim)).mean()
    raise UserError(f"semantic.kind is {kind!r}, expected l2 or cosine")
