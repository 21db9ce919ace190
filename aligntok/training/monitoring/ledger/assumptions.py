"""Everything that the ledger takes for granted, with where it is from: GPUs by data sheet, the rest by assumption.

`--measured FILE` replaces some of it (aligntok.training.monitoring.ledger.measured). What has no source but "assumed"
is a round number that fits what is commonly seen, and nobody has measured it for this project.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class Gpu:
    """One GPU by its data sheet: dense rates, without structured sparsity."""

    memory: float  # bytes
    peak: Mapping[str, float]  # FLOP/s in matrix products by number type; no fp8: the GPU has none
    bandwidth: float  # bytes/s of its memory
    link: float  # bytes/s to the other GPUs of its machine, in one direction
    architecture: int  # of the pinned block sizes (kernels/_triton.py)
    source: str

    @property
    def has_fp8(self) -> bool:
        return "fp8" in self.peak


GPUS = {
    "a100-80gb": Gpu(
        80e9,
        {"bf16": 312e12, "tf32": 156e12, "fp32": 19.5e12},
        *(2.039e12, 300e9, 80),
        "NVIDIA A100 data sheet, 80 GB SXM",
    ),
    "h100-sxm": Gpu(
        80e9,
        {"bf16": 989e12, "tf32": 495e12, "fp32": 67e12, "fp8": 1979e12},
        *(3.35e12, 450e9, 90),
        "NVIDIA H100 data sheet, SXM",
    ),
    "h200": Gpu(
        141e9,
        {"bf16": 989e12, "tf32": 495e12, "fp32": 67e12, "fp8": 1979e12},
        *(4.8e12, 450e9, 90),
        "NVIDIA H200 data sheet, SXM",
    ),
    "l40s": Gpu(
        48e9,
        {"bf16": 362e12, "tf32": 183e12, "fp32": 91.6e12, "fp8": 733e12},
        *(0.864e12, 32e9, 89),
        "NVIDIA L40S data sheet, PCIe 4",
    ),
}


def _assumed(value: float, unit: str, source: str) -> Any:
    return field(default=value, metadata={"unit": unit, "source": source})


FLASH3 = "FlashAttention-2 on H100 (FlashAttention-3, arXiv 2407.08608, abstract)"
NOBODY = "assumed; not measured"


@dataclass(frozen=True)
class Assumptions:
    """Numbers that no data sheet has. Shares are of the data sheet's peak or bandwidth, times are microseconds."""

    product_share: float = _assumed(0.70, "of peak", f"large bf16 products of cuBLAS; {NOBODY}")
    convolution_share: float = _assumed(0.50, "of peak", f"bf16 convolutions of cuDNN, channels last; {NOBODY}")
    attention_share: float = _assumed(0.35, "of peak", f"{FLASH3}; taken for our kernels too")
    fp8_share: float = _assumed(0.60, "of fp8 peak", f"scaled fp8 products; {NOBODY}")
    bandwidth_share: float = _assumed(0.85, "of bandwidth", f"kernels that stream; {NOBODY}")
    column_share: float = _assumed(0.60, "of bandwidth", f"PyTorch's sums over rows, as for biases; {NOBODY}")
    link_share: float = _assumed(0.75, "of link", f"NCCL's ring over many buckets; {NOBODY}")
    bucket: float = _assumed(25e6, "bytes", "DDP's bucket_cap_mb, whose last one nothing hides")
    kernel_us: float = _assumed(3.0, "us", f"least device time of a kernel in a stream; {NOBODY}")
    graph_kernel_us: float = _assumed(1.5, "us", f"least device time of a kernel in a CUDA graph; {NOBODY}")
    operator_us: float = _assumed(6.0, "us", f"host time of a PyTorch operator in training; {NOBODY}")
    view_us: float = _assumed(1.5, "us", f"host time of a view; {NOBODY}")
    own_us: float = _assumed(40.0, "us", f"host time of one of our operators, Python and one launch; {NOBODY}")
    launch_us: float = _assumed(12.0, "us", f"host time of each further Triton launch; {NOBODY}")
    compiled_us: float = _assumed(5.0, "us", f"host time of a launch from compiled code; {NOBODY}")
    tensor_us: float = _assumed(1.5, "us", f"host time of a tensor in an operator on lists; {NOBODY}")
    replay_us: float = _assumed(20.0, "us", f"host time to replay a CUDA graph; {NOBODY}")
    operators: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))  # op -> share, measured
    measured: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))  # name -> where

    def with_measured(self, values: Mapping[str, float], operators: Mapping[str, float], origin: str) -> Assumptions:
        """The same with some numbers measured; `origin` becomes their source."""
        where = {**self.measured, **dict.fromkeys([*values, *operators], origin)}
        changes: dict[str, Any] = {**values, "operators": {**self.operators, **operators}, "measured": where}
        return replace(self, **changes)

    def rows(self) -> list[dict[str, Any]]:
        """name, value, unit and source of every number."""
        found = []
        for name in NAMES:
            described = _FIELDS[name].metadata
            source = self.measured.get(name, described["source"])
            found.append({"name": name, "value": getattr(self, name), "unit": described["unit"], "source": source})
        for op, share in self.operators.items():
            found.append({"name": op, "value": share, "unit": "of bound", "source": self.measured[op]})
        return found


_FIELDS = {one.name: one for one in fields(Assumptions)}
NAMES = tuple(name for name, one in _FIELDS.items() if one.default is not MISSING)
