"""Assumptions replaced by what `make gpu-check` measured: gpu_check_<device>.json (benchmarks/gpu_check.py).

    product_share     rate of the matrix products of a training step, run alone, over the data sheet's peak
    an operator       its share of what the bandwidth and the matmul rate there allow: the median of its benchmark
    any other         from an entry "assumptions": {"kernel_us": 2.1, ...} of the file, added by whoever measured it

Whatever the file does not have stays assumed, and is named.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aligntok.errors import UserError
from aligntok.training.monitoring.ledger.assumptions import NAMES, Assumptions, Gpu

_RATE = re.compile(r"measured matmul rate: ([\d.]+) GFLOP/s")
_ALONE = re.compile(r"matrix products alone: [\d.]+ s, (\d+)% of the matmul\s+rate")
_STEP = re.compile(r"^(LightningDiT-\S+, \d+ tokens, batch \d+):", re.MULTILINE)
_SECONDS = re.compile(r"^((?:reference|fused)(?:, compiled)?): ([\d.]+) s \(", re.MULTILINE)
_SHARE = re.compile(r"(\d+)% of peak")
STEP = "training step "  # how the names of such parts begin; the largest comes first


@dataclass(frozen=True)
class Measured:
    """What a file of measurements has to say.

    Attributes:
        device: the GPU that it was measured on.
        steps: lines to print, each a training step that was timed there.
        missing: what had to stay assumed.
    """

    assumed: Assumptions
    device: str
    file: str
    steps: list[str]
    missing: list[str]


def read(path: str, gpu: Gpu, assumed: Assumptions) -> Measured:
    """Assumptions with what a file has measured in their place.

    Raises:
        UserError: a file that cannot be read, or that gpu-check did not write.
    """
    found = _load(path)
    outputs = {part["name"]: part["output"] for part in found["parts"] if part.get("status") == 0}
    values = _products(outputs, gpu) | _by_hand(found, path)
    operators = {name[6:]: share for name, text in outputs.items() if (share := _share(name, text)) is not None}
    date = f", {found['date']}" if isinstance(found.get("date"), str) else ""
    missing = [name for name in NAMES if name not in values]
    assumed = assumed.with_measured(values, operators, f"measured on {found['device']}{date}")
    return Measured(assumed, found["device"], Path(path).name, _steps(outputs), missing)


def _load(path: str) -> dict[str, Any]:
    what = "expected a gpu_check_<device>.json, as make gpu-check writes it"
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--measured {path} cannot be read ({error.strerror or error}): {what}") from error
    except ValueError as error:  # no JSON, or no UTF-8
        raise UserError(f"--measured {path} is no JSON: {what}") from error
    parts = found.get("parts") if isinstance(found, dict) else None
    if not isinstance(parts, list) or not isinstance(found.get("device"), str):
        raise UserError(f"--measured {path} has no device and parts: {what}")
    for part in parts:
        if not isinstance(part, dict) or not all(isinstance(part.get(key), str) for key in ("name", "output")):
            raise UserError(f"--measured {path} has a part without name and output: {what}")
    return found


def _products(outputs: dict[str, str], gpu: Gpu) -> dict[str, float]:
    """The share of the peak that the products of a step reach, of the largest step that was timed."""
    for text in _of_steps(outputs):
        rate, alone = _RATE.search(text), _ALONE.search(text)
        if rate and alone and "bf16" in text:
            return {"product_share": float(rate[1]) * 1e9 * float(alone[1]) / 100 / gpu.peak["bf16"]}
    return {}


def _by_hand(found: dict[str, Any], path: str) -> dict[str, float]:
    values = found.get("assumptions", {})
    if not isinstance(values, dict):
        raise UserError(f"--measured {path}: assumptions is {values!r}, expected names with numbers")
    for name, value in values.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if name not in NAMES or not number or not (math.isfinite(value) and value > 0):
            raise UserError(
                f"--measured {path}: assumptions.{name} is {value!r}, expected a positive number for one of "
                f"{', '.join(NAMES)}"
            )
    return {name: float(value) for name, value in values.items()}


def _share(name: str, text: str) -> float | None:
    """The median share of the bound in an operator's own column; of both passes together where they were timed."""
    if not name.startswith("bench_"):
        return None
    column: int | None = None
    shares: dict[str, list[float]] = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if cells[:2] == ["case", "phase"]:
            column = cells.index("ours") if "ours" in cells else None
        elif column is not None and len(cells) > column and (share := _SHARE.search(cells[column])):
            shares.setdefault(cells[1], []).append(int(share[1]) / 100)
    chosen = shares.get("both") or [share for some in shares.values() for share in some]
    return statistics.median(chosen) if chosen and statistics.median(chosen) > 0 else None


def _of_steps(outputs: dict[str, str]) -> list[str]:
    return [text for name, text in outputs.items() if name.startswith(STEP)]


def _steps(outputs: dict[str, str]) -> list[str]:
    lines = []
    for text in _of_steps(outputs):
        what, seconds = _STEP.search(text), _SECONDS.findall(text)
        if what and seconds:
            lines.append(f"{what[1]}: " + "; ".join(f"{name} {float(value) * 1e3:.1f} ms" for name, value in seconds))
    return lines
