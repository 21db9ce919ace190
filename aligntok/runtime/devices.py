"""Where and in which precision to compute: device choice and autocast, with the choice explained."""

from __future__ import annotations

import platform
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import get_args

import torch

from aligntok.config.run import PrecisionChoice
from aligntok.errors import UserError

PRECISIONS: tuple[str, ...] = get_args(PrecisionChoice)


@dataclass(frozen=True)
class Precision:
    """A device and an autocast dtype; parameters, losses and latents stay float32."""

    device: torch.device
    name: str  # bf16, tf32 or fp32
    reason: str = ""  # where the device has no instructions for another

    def __str__(self) -> str:
        """As a run's first lines and a metric's protocol name it: "bf16 autocast", "fp32", with the reason if any."""
        name = "bf16 autocast" if self.name == "bf16" else self.name
        return f"{name} ({self.reason})" if self.reason else name

    def autocast(self) -> AbstractContextManager:
        if self.name != "bf16":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)


def choose_precision(device: str = "auto", precision: str = "auto") -> Precision:
    """The device to use ("auto" = CUDA, else MPS, else CPU) with its precision ("auto" = bf16 where it is not slower).

    "tf32" is fp32 whose matrix products take TensorFloat-32 on a GPU (10 bits of mantissa, 8 times the rate); under
    "bf16" what is left of fp32 takes it too. "fp32" is PyTorch's default: convolutions alone take it.

    On CUDA this sets the process up: matrix products as the precision says, cuDNN's search for the fastest convolution
    (shapes stay the same here), and a device that is named by its number becomes the current one: libraries that launch
    on the current device would otherwise hand pointers of one GPU to another.

    Raises:
        UserError: an unknown or absent device, or an unknown precision.
    """
    if precision not in PRECISIONS:
        raise UserError(
            f"training.precision is {precision!r}, expected {', '.join(PRECISIONS[:-1])} or {PRECISIONS[-1]}"
        )
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
    found = _met(chosen, precision)
    if chosen.type == "cuda":
        torch.set_float32_matmul_precision("highest" if found.name == "fp32" else "high")
        torch.backends.cudnn.benchmark = True
    return found


def _met(device: torch.device, precision: str) -> Precision:
    """What a request becomes on a device."""
    kind = "GPU" if device.type == "cuda" else "processor"
    if precision == "fp32":
        return Precision(device, "fp32")
    if precision == "tf32":
        if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
            return Precision(device, "tf32")
        return Precision(device, "fp32", f"this {kind} has no TF32")
    if computes_bf16(device):
        return Precision(device, "bf16")
    if precision == "bf16":
        return Precision(device, "bf16", f"this {kind} has no instructions for it: fp32 is faster")
    return Precision(device, "fp32", f"this {kind} has no instructions for bf16")


def computes_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for bf16 products.

    Without them PyTorch takes loops: a bf16 matrix product on two AVX2 cores ran at 1.3 GFLOP/s, in fp32 at 100.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return True
    if platform.machine().lower() in ("x86_64", "amd64"):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def optimizer_is_fused(device: torch.device) -> bool:
    """Whether torch's fused Adam runs on this device."""
    return device.type in ("cpu", "cuda")
