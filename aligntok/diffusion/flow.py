"""Flow matching in the paper's direction: this module alone owns it.

    z_t = (1 - t) z_0 + t z_1,   z_0 data, z_1 ~ N(0, I),   target velocity v = z_1 - z_0,   t = 1 is noise
    L = mean((v_hat - v)^2) + w_dir * mean(1 - cos(v_hat, v))        cosine over channels (LightningDiT transport.py)

z_t and L are the fused operators `flow_interpolate` and `flow_loss`, which keep to this direction and draw the same z_1
from a common key instead of storing it.

LightningDiT's code runs t from noise (0) to data (1): its time is 1 - t and its velocity is -v.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aligntok.config import FlowConfig
from aligntok.errors import UserError
from aligntok.kernels import flow_interpolate, flow_loss, noise_key
from aligntok.runtime.autocast import autocast_dtype
from aligntok.runtime.world import Place


def sample_time(batch: int, kind: str, device: torch.device | str = "cpu") -> Tensor:
    """Times [B] in (0, 1): "logit_normal" is sigmoid of N(0, 1), symmetric, so the direction does not matter."""
    if kind == "logit_normal":
        return torch.sigmoid(torch.randn(batch, device=device))
    if kind == "uniform":
        return torch.rand(batch, device=device)
    raise UserError(f"flow.time_sampling is {kind!r}, expected logit_normal or uniform")


def shift_time(t: Tensor, shift: float) -> Tensor:
    """s t / (1 + (s - 1) t): times in [0, 1], for s > 1 moved towards noise (latents of many values: SD3, RAE)."""
    return shift * t / (1 + (shift - 1) * t)


def training_loss(
    model: torch.nn.Module,
    data: Tensor,
    condition: tuple[Tensor, ...],
    config: FlowConfig,
    place: Place | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Flow-matching loss of `model` on normalised latents [B, d, h, w], with fresh times and noise.

    `condition` is what the model takes behind z_t and t: (labels [B],), for example.

    The latents are the rows at `place` of a batch (None = all of it), for which times and noise are drawn. Under
    autocast the model gets z_t in the autocast's dtype; the loss is float32.

    Returns:
        the loss and {"mse", "direction"}, the two parts without weight or gradient.
    """
    place = place or Place(0, len(data), len(data))
    t = place.of(sample_time(place.batch_size, config.time_sampling, data.device))
    t = shift_time(t, config.time_shift)
    key = noise_key(data.device)
    noisy = flow_interpolate(data, t, key, dtype=_working_dtype(data), first_image=place.first)
    loss, parts = flow_loss(model(noisy, t, *condition), data, key, config.direction_weight, first_image=place.first)
    mse, direction = parts.unbind()
    return loss, {"mse": mse, "direction": direction}


def _working_dtype(data: Tensor) -> torch.dtype:
    return autocast_dtype(data.device.type) or data.dtype
