"""How fast a part trains, as a share of what the device can do: model FLOPs utilisation (MFU).

    MFU = FLOPs of the steps / seconds / peak          peak: FLOP/s of one device in matrix products

FLOPs are counted on the meta device before the first step (aligntok.training.monitoring.cost), for every kind of step
that a part has: with and without the adversarial loss. Frozen networks in the loop count, and so do activations that
are computed again in the backward pass; elementwise work does not. The peak is the data sheet's for A100 and H100,
elsewhere the rate of a square matrix product, measured at start.
"""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass
from functools import cache

import torch

from aligntok.runtime.devices import Precision

# Dense bf16 matrix products, FLOP/s: NVIDIA's data sheets. Names as torch.cuda.get_device_name gives them.
PUBLISHED = {"H100 80GB HBM3": 989e12, "H100 PCIe": 756e12, "A100": 312e12}
_LARGEST_SIDE = {"cpu": 2048, "cuda": 8192}  # larger products are not faster
_SECONDS = 0.25  # for all measured products together


@dataclass(frozen=True)
class Peak:
    """FLOP/s of one device and where the number is from."""

    rate: float
    origin: str

    def __str__(self) -> str:
        unit, factor = ("TFLOP/s", 1e12) if self.rate >= 1e12 else ("GFLOP/s", 1e9)
        return f"{self.rate / factor:.3g} {unit}, {self.origin}"


def peak(precision: Precision) -> Peak:
    """What the device can do in the precision of the run."""
    device = precision.device
    if device.type == "cuda" and precision.name == "bf16":
        name = torch.cuda.get_device_name(device)
        for part, rate in PUBLISHED.items():
            if part in name:
                return Peak(rate, f"the published bf16 peak of {name}")
    dtype = torch.bfloat16 if precision.name == "bf16" else torch.float32
    return Peak(matmul_rate(device, dtype), f"measured here with {precision.name} matrix products")


@cache
def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product, the fastest of several: other work on the machine only slows it."""
    side, seconds, began = 256, 0.0, time.monotonic()
    while True:
        generator = torch.Generator().manual_seed(0)
        a, b = (torch.randn(side, side, generator=generator).to(device, dtype) for _ in range(2))
        _product_seconds(a, b)  # the first call of a shape prepares
        seconds = _product_seconds(a, b)
        if side >= _LARGEST_SIDE.get(device.type, 4096) or 8 * seconds > _SECONDS / 8:
            break
        side *= 2
    while time.monotonic() - began < _SECONDS:
        seconds = min(seconds, _product_seconds(a, b))
    return 2 * side**3 / seconds


def _product_seconds(a: torch.Tensor, b: torch.Tensor) -> float:
    began = time.perf_counter()
    a @ b
    if a.device.type != "cpu":
        torch.accelerator.synchronize(a.device)
    return max(time.perf_counter() - began, 1e-9)


def memory_gib(device: torch.device) -> float:
    """Most memory used so far in GiB: allocated on a GPU, resident in a process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
