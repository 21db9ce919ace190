"""Adapter: token-wise map from encoder features to the latent, z = W_2 GELU(W_1 h + b_1) + b_2 (AlignTok 4.1).

No norm and no activation on the output, and no KL: the scale of the latent is free, which is why the tokenizer stores
its own latent statistics.
"""

from __future__ import annotations

from torch import Tensor, nn

from aligntok.config import AdapterConfig


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
        self.activation = nn.GELU() if config.kind == "mlp" else None
        self.projection = nn.Linear(hidden if config.kind == "mlp" else width, config.latent_channels)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens [B, h*w, C] on a grid (h, w) -> latents [B, d, h, w]."""
        if self.hidden is not None:
            tokens = self.activation(self.hidden(tokens))
        latents = self.projection(tokens)  # [B, h*w, d]
        return latents.transpose(1, 2).unflatten(2, grid)  # [B, d, h, w]
