"""The generators' networks as transformers of diffusers: velocity for its FlowMatchEulerDiscreteScheduler.

Its time is ours times 1000 (sigma = t, noise at 1), its velocity ours: noise minus data.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

from aligntok.config import FluxTransformerConfig, LightningDiTConfig
from aligntok.config.from_dict import from_dict
from aligntok.errors import UserError
from aligntok.models.dit_dh import FourierTime
from aligntok.models.generator import Network, build_network

if TYPE_CHECKING:
    from typing_extensions import Self

TIMESTEPS = 1000.0  # diffusers' number for t = 1


class _Transformer(ModelMixin, ConfigMixin):
    """What both have in common: one of our networks, and diffusers' way to call it."""

    _supports_gradient_checkpointing = False
    _keep_in_fp32_modules: ClassVar[list[str]] = [*FourierTime.kept_buffers]
    network: Network

    @classmethod
    def of(cls, network: Network, **config: Any) -> Self:
        """Around a network that is there, and the arguments that would build it."""
        made = cls(**config)
        made.network = network
        return made.eval()

    def _velocity(self, z: Tensor, timestep: Tensor | float, condition: tuple[Tensor, ...], return_dict: bool) -> Any:
        times = torch.as_tensor(timestep, dtype=torch.float32, device=z.device).expand(len(z)) / TIMESTEPS
        sample = self.network(z, times, *condition)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)


class LightningDiTTransformer2DModel(_Transformer):
    """LightningDiT, or DiT^DH where the configuration has a head.

    Args:
        network_config: as in a generator folder's config.json.
        in_channels: d of the latents.
        sample_size: (h, w) of the latents that it was trained on.
    """

    @register_to_config
    def __init__(
        self,
        network_config: dict[str, Any] | None = None,
        in_channels: int = 32,
        sample_size: tuple[int, int] = (16, 16),
    ) -> None:
        super().__init__()
        config = from_dict(LightningDiTConfig, dict(network_config or {}))
        if config.classes is None:
            raise UserError("network_config.classes is null, expected the number of classes that the generator knows")
        self.network = build_network(config, in_channels, _pair(sample_size), None)

    def forward(
        self, hidden_states: Tensor, timestep: Tensor | float, class_labels: Tensor, return_dict: bool = True
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Latents [B, d, h, w], timestep of 1000 (noise) to 0, classes [B] -> velocity like the latents.

        The number behind the last class asks for nothing (classifier-free guidance).
        """
        return self._velocity(hidden_states, timestep, (class_labels,), return_dict)


class AlignTokFluxTransformer2DModel(_Transformer):
    """The FLUX-type transformer that reads a caption's features.

    Args:
        network_config: as in a generator folder's config.json.
        in_channels: d of the latents.
        sample_size: (h, w) of the latents that it was trained on.
        text_width: of the features.
    """

    @register_to_config
    def __init__(
        self,
        network_config: dict[str, Any] | None = None,
        in_channels: int = 32,
        sample_size: tuple[int, int] = (16, 16),
        text_width: int = 1024,
    ) -> None:
        super().__init__()
        config = from_dict(FluxTransformerConfig, dict(network_config or {}))
        self.network = build_network(config, in_channels, _pair(sample_size), text_width)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        encoder_lengths: Tensor,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Latents [B, d, h, w], timestep of 1000 (noise) to 0, features [B, L, text_width] and how many tokens of them
        are the caption's [B] -> velocity like the latents."""
        return self._velocity(hidden_states, timestep, (encoder_hidden_states, encoder_lengths), return_dict)


def _pair(size: Any) -> tuple[int, int]:
    height, width = size
    return height, width
