"""Fused operators, one file each: the formula, the PyTorch reference, the compiled implementations, the
public function.

Nothing here knows of the rest of the package. Which implementation runs is decided in `_dispatch`; `aligntok
doctor` prints the decisions with their reasons.

Imports are absolute: in the root of a checkout other packages find this folder by the name `kernels` alone
(transformers looks for one), and get the same operators then instead of a second set that nothing knows of.
"""

import warnings

from aligntok.kernels import _extension
from aligntok.kernels._dispatch import (
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
from aligntok.kernels._philox import flow_noise, noise_key
from aligntok.kernels.adaln import adaln
from aligntok.kernels.adapter_projection import adapter_projection
from aligntok.kernels.flow_interpolate import flow_interpolate
from aligntok.kernels.flow_loss import flow_loss
from aligntok.kernels.flow_step import flow_step
from aligntok.kernels.gan_loss import discriminator_loss, generator_loss
from aligntok.kernels.group_norm_silu import group_norm_silu
from aligntok.kernels.joint_attention import joint_attention
from aligntok.kernels.lpips_distance import lpips_distance
from aligntok.kernels.norm_ratio import norm_ratio
from aligntok.kernels.qknorm_attention import qknorm_attention
from aligntok.kernels.qknorm_rope import qknorm_rope
from aligntok.kernels.swiglu import swiglu

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
