"""Fused operators, one file each: the formula, the PyTorch reference, the compiled implementations, the
public function.

Nothing here knows of the rest of the package. Which implementation runs is decided in `_dispatch`; `aligntok
doctor` prints the decisions with their reasons.
"""

import warnings

from . import _extension
from ._dispatch import (
    Selection,
    assume_device,
    device_type,
    explain,
    operators,
    requested,
    select,
    transformed,
    use_implementation,
)
from ._philox import flow_noise, noise_key
from .adaln import adaln
from .adapter_projection import adapter_projection
from .flow_interpolate import flow_interpolate
from .flow_loss import flow_loss
from .flow_step import flow_step
from .gan_loss import discriminator_loss, generator_loss
from .group_norm_silu import group_norm_silu
from .joint_attention import joint_attention
from .lpips_distance import lpips_distance
from .norm_ratio import norm_ratio
from .qknorm_attention import qknorm_attention
from .qknorm_rope import qknorm_rope
from .swiglu import swiglu

__all__ = [
    "Selection",
    "adaln",
    "adapter_projection",
    "assume_device",
    "device_type",
    "discriminator_loss",
    "explain",
    "flow_interpolate",
    "flow_loss",
    "flow_noise",
    "flow_step",
    "generator_loss",
    "group_norm_silu",
    "joint_attention",
    "lpips_distance",
    "noise_key",
    "norm_ratio",
    "operators",
    "qknorm_attention",
    "qknorm_rope",
    "requested",
    "select",
    "swiglu",
    "transformed",
    "use_implementation",
]

if _extension.unavailable():
    warnings.warn(f"{_extension.unavailable()}. The PyTorch references are used.", RuntimeWarning, stacklevel=2)
