"""Adapter: token-wise map from encoder features to the latent, z = W_2 GELU(W_1 h + b_1) + b_2 (AlignTok 4.1).

No norm and no activation on the output, and no KL: the scale of the latent is free, which is why the tokenizer stores
its own latent statistics.
"""

from __future__ import annotations

from torch import Tensor, nn

from aligntok.config import AdapterConfig
from aligntok.kernels import adapter_projection


class Adapter(nn.Module):
    """Two-layer MLP with GELU ("mlp") or one linear layer ("linear").

    Args:
        width: channels C of the encoder's tokens.
        config: kind, hidden width (None = C) and latent channels d.
    """

    def __init__(self, width: int, config: AdapterConfig) -> None:
        super().__init__()
        self.latent_channels = config.latent_channels
        hidden = config.hidden or width
        self.hidden = nn.Linear(width, hidden) if config.kind == "mlp" else None
        self.projection = nn.Linear(hidden if config.kind == "mlp" else width, config.latent_channels)

    def forward(
        self, tokens: Tensor, grid: tuple[int, int], snapshot: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Tokens to latents, with the distance to a frozen adapter's latents computed on the way if they are given.

        Args:
            tokens: [B, h*w, C], row-major over the grid; a view past prefix tokens is not copied.
            grid: (h, w).
            snapshot: latents [B, d, h, w] of the frozen Stage-1 encoder and adapter for the same crops.

        Returns:
            latents [B, d, h, w]; with a snapshot (latents, sum of squared differences to it, a scalar in float32).
        """
        activation = "none"
        if self.hidden is not None:
            tokens, activation = self.hidden(tokens), "gelu"
        weight, bias = self.projection.weight, self.projection.bias
        if snapshot is None:
            latents = adapter_projection(tokens, weight, bias, activation)  # [B, h*w, d]
            return latents.transpose(1, 2).unflatten(2, grid)  # [B, d, h, w]
        target = snapshot.flatten(2).transpose(1, 2)  # [B, h*w, d], a view
        latents, distance = adapter_projection(tokens, weight, bias, activation, target)
        return latents.transpose(1, 2).unflatten(2, grid), distance
