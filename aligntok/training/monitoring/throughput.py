"""How fast a part trains, as a share of what the device can do: model FLOPs utilisation (MFU).

    MFU = FLOPs of the steps / seconds / peak          peak: FLOP/s of one device in matrix products

FLOPs are counted by PyTorch's counter while one real step runs, once for every kind of step that a part has (with and
without the discriminator), and divided by the step's images. Frozen networks in the loop count, and so do activations
that are computed again in the backward pass; elementwise work does not. The peak is the data sheet's for A100 and H100,
elsewhere the rate of a square matrix product, measured at start.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path

import torch
from torch.utils.flop_counter import (
    FlopCounterMode,
    register_flop_formula,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

import aligntok.kernels  # noqa: F401 (registers the operators below)
from aligntok.errors import UserError
from aligntok.runtime.devices import Precision
from aligntok.runtime.files import write_bytes

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


class _NoModules:
    """Stands in for the counter's attribution to modules, whose hooks refuse autograd.grad at an image."""

    parents = ("Global",)

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


# The counter takes an operator apart where it can, which rounds SiLU's gradient otherwise than its kernel does: a
# resumed run counts other steps than an uninterrupted one and would end with other bits.
_WHOLE = {torch.ops.aten.silu_backward.default: lambda *shapes, **options: 0}


class FlopLedger:
    """FLOPs per image of every kind of step of one part, counted once and kept in a file for resumed runs.

    `begin` and `end` enclose a step. The first step is counted, and the first that follows one of a new kind.

    Args:
        file: the record of all parts; a part that starts from the beginning is counted anew.
        part: its name.
        start: step at which this run begins.
    """

    def __init__(self, file: Path, part: str, start: int) -> None:
        self.file, self.part = file, part
        self.known: dict[str, float] = _read(file).get(part, {}) if start else {}
        self._wanted = not self.known
        self._counter: FlopCounterMode | None = None

    def begin(self) -> None:
        if self._wanted:
            self._counter = FlopCounterMode(display=False, custom_mapping=_WHOLE)
            self._counter.mod_tracker = _NoModules()
            self._counter.__enter__()

    def end(self, kind: str, images: int) -> float | None:
        """FLOPs of the step that ends here, None while its kind is unknown."""
        counter = self.abandon()
        if counter is not None and kind not in self.known:
            self.known[kind] = counter.get_total_flops() / images
            self._save()
        self._wanted = kind not in self.known
        return None if self._wanted else self.known[kind] * images

    def abandon(self) -> FlopCounterMode | None:
        """Stop counting, also in the middle of a step that failed."""
        counter, self._counter = self._counter, None
        if counter is not None:
            counter.__exit__(None, None, None)
        return counter

    def _save(self) -> None:
        try:
            write_bytes(self.file, json.dumps(_read(self.file) | {self.part: self.known}, indent=1).encode())
        except UserError:
            pass  # the next start counts again; a disk that refuses is reported by the records


def _read(file: Path) -> dict[str, dict[str, float]]:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return {}


def step_kind(names: Iterable[str]) -> str:
    """The phases that a step consisted of, from the names of its values: "autoencoder+discriminator"."""
    return "+".join(sorted(name.removeprefix("grad_norm_") for name in names if name.startswith("grad_norm_")))


# What PyTorch's counter does not know: the CPU's fused attention, and our operators that contain matrix products.
@register_flop_formula(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu)
def _cpu_attention(q: tuple, k: tuple, v: tuple, *_: object, **__: object) -> int:
    return sdpa_flop_count(q, k, v)


@register_flop_formula(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward)
def _cpu_attention_backward(dout: tuple, q: tuple, k: tuple, v: tuple, *_: object, **__: object) -> int:
    return sdpa_backward_flop_count(dout, q, k, v)


def _heads(qkv: tuple) -> tuple[int, int, int, int]:
    B, N, _, H, D = qkv
    return B, H, N, D


@register_flop_formula(torch.ops.aligntok.qknorm_attention_triton)
def _attention(qkv: tuple, *_: object, **__: object) -> int:
    return sdpa_flop_count(*[_heads(qkv)] * 3)


@register_flop_formula(torch.ops.aligntok.qknorm_attention_triton_backward)
def _attention_backward(dout: tuple, qkv: tuple, *_: object, **__: object) -> int:
    return sdpa_backward_flop_count(*[_heads(qkv)] * 4)


@register_flop_formula(torch.ops.aligntok.adapter_projection_triton)
def _projection(p: tuple, weight: tuple, *_: object, **__: object) -> int:
    return 2 * prod(p) * weight[0]


@register_flop_formula(torch.ops.aligntok.adapter_projection_triton_backward)
def _projection_backward(p: tuple, weight: tuple, *others: object, **_: object) -> int:
    input_gradient = others[-1]
    return 2 * prod(p) * weight[0] * (2 if input_gradient else 1)
