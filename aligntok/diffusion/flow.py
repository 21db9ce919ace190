"""Flow matching in the paper's direction: this module alone owns it.

    z_t = (1 - t) z_0 + t z_1,   z_0 data, z_1 ~ N(0, I),   target velocity v = z_1 - z_0,   t = 1 is noise
    L = mean((v_hat - v)^2) + w_dir * mean(1 - cos(v_hat, v))        cosine over channels (LightningDiT transport.py)

LightningDiT's code runs t from noise (0) to data (1): its time is 1 - t and its velocity is -v.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from aligntok.config import FlowConfig
from aligntok.errors import UserError


def sample_time(batch: int, kind: str, device: torch.device | str = "cpu") -> Tensor:
    """Times [B] in (0, 1): "logit_normal" is sigmoid of N(0, 1), symmetric, so the direction does not matter."""
    if kind == "logit_normal":
        return torch.sigmoid(torch.randn(batch, device=device))
    if kind == "uniform":
        return torch.rand(batch, device=device)
    raise UserError(f"flow.time_sampling is {kind!r}, expected logit_normal or uniform")


def interpolate(data: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """(z_t, target velocity) for data and noise [B, d, h, w] and times [B]."""
    t = t.view(-1, *[1] * (data.ndim - 1))
    return torch.lerp(data, noise, t), noise - data


def flow_loss(predicted: Tensor, target: Tensor, direction_weight: float) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, {"mse", "direction"}) for velocities [B, d, h, w], in float32; the direction term is 1 - cos over d."""
    predicted, target = predicted.float(), target.float()
    mse = F.mse_loss(predicted, target)
    direction = (1 - F.cosine_similarity(predicted, target, dim=1)).mean()
    return mse + direction_weight * direction, {"mse": mse.detach(), "direction": direction.detach()}


def training_loss(
    model: torch.nn.Module, data: Tensor, labels: Tensor, config: FlowConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """Flow-matching loss of `model` on normalised latents [B, d, h, w] and labels [B], with fresh times and noise."""
    t = sample_time(data.shape[0], config.time_sampling, data.device)
    z_t, target = interpolate(data, torch.randn_like(data), t)
    return flow_loss(model(z_t, t, labels), target, config.direction_weight)


def drop_labels(labels: Tensor, probability: float, null_class: int) -> Tensor:
    """Labels [B] with a share replaced by the null class, for classifier-free guidance."""
    dropped = torch.rand(labels.shape, device=labels.device) < probability
    return torch.where(dropped, null_class, labels)
