"""Where and in which precision to compute: device choice and autocast, with the choice explained."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from aligntok.errors import UserError


@dataclass(frozen=True)
class Precision:
    """A device and an autocast dtype; parameters, losses and latents stay float32."""

    device: torch.device
    name: str  # bf16 or fp32

    def autocast(self) -> AbstractContextManager:
        if self.name == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)


def choose_precision(device: str = "auto", precision: str = "bf16") -> Precision:
    """The device to use ("auto" = CUDA, else MPS, else CPU) with its precision.

    A CUDA device that is named by its number becomes the current one: libraries that launch on the current device would
    otherwise hand pointers of one GPU to another.

    Raises:
        UserError: an unknown or absent device, or an unknown precision.
    """
    if precision not in ("bf16", "fp32"):
        raise UserError(f"training.precision is {precision!r}, expected bf16 or fp32")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"training.device is {device!r}, expected auto, cpu, cuda or cuda:N") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"training.device is {device!r}, but torch {torch.__version__} sees no CUDA device; use auto or cpu"
        )
    if chosen.type == "cuda" and chosen.index is not None:
        if chosen.index >= torch.cuda.device_count():
            raise UserError(
                f"training.device is {device!r}, but {torch.cuda.device_count()} CUDA devices are seen here"
            )
        torch.cuda.set_device(chosen)
    return Precision(chosen, precision)


def optimizer_is_fused(device: torch.device) -> bool:
    """Whether torch's fused Adam runs on this device."""
    return device.type in ("cpu", "cuda")
