"""Fused operators, one file each: the formula, the PyTorch reference, the compiled implementations, the
public function.

Nothing here knows of the rest of the package. Which implementation runs is decided in `_dispatch`; `aligntok
doctor` prints the decisions with their reasons.
"""

import warnings

from . import _extension
from ._dispatch import Selection, explain, operators, use_implementation
from .gan_loss import discriminator_loss, generator_loss
from .group_norm_silu import group_norm_silu
from .swiglu import swiglu

__all__ = [
    "Selection",
    "discriminator_loss",
    "explain",
    "generator_loss",
    "group_norm_silu",
    "operators",
    "swiglu",
    "use_implementation",
]

if _extension.unavailable():
    warnings.warn(f"{_extension.unavailable()}. The PyTorch references are used.", RuntimeWarning, stacklevel=2)
