"""What can be known of the kernels without a GPU: their machine code, their traffic, their roofline.

    python -m benchmarks.hardware_report [--op NAME ...] [--output FOLDER]          (make kernel-report)

Every Triton kernel is compiled for sm_80, 86, 89, 90, 100 and 120 at every workload of its benchmark and the SASS is
read; the CUDA sources of csrc/ go through nvcc and `ptxas -v`; bytes and FLOPs are counted as benchmarks/traffic.py
says. The roofline times are PREDICTIONS: the larger of bytes over the data sheet's bandwidth and FLOPs over its dense
bf16 rate, launches and everything else left out. Measured times come from `make gpu-check`.

Exit status 1, with a list, if a kernel spills registers, multiplies matrices without tensor cores, needs more shared
memory than a block can have, uses atomics, or moves more than 1.1 times what its benchmark plans for it. Where the plan
itself is more than 1.1 times what any implementation must move, the report prints the reason.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton

from aligntok import kernels
from aligntok.runtime.files import write_bytes
from benchmarks import bench_qknorm_attention, cuda_report, step_counts
from benchmarks.aot import ARCHITECTURES, LIMITS, PASSES, compile_launch, distinct_launches

RESULTS = Path(__file__).parent / "results"
# Name, bytes per second, dense bf16 tensor-core FLOPs per second: NVIDIA's data sheets (both SXM)
DEVICES = {80: ("A100-80GB", 2.039e12, 312e12), 90: ("H100-SXM", 3.35e12, 989e12)}
TRAFFIC_LIMIT = 1.1


def triton_operators() -> list[str]:
    """The operators that have a Triton implementation."""
    return [op for op in kernels.operators() if kernels.explain(op, "cuda").name == "triton"]


QUICK_ARCHITECTURES = (90,)


def code_rows(op: str, architectures: Sequence[int] = ARCHITECTURES) -> list[dict[str, Any]]:
    """One row per distinct kernel code of an operator: op, the first workload that launches it, the figures."""
    rows = []
    for workload, name, launch, arch, _ in distinct_launches(op, architectures):
        code, _ = compile_launch(launch, arch)
        rows.append({"op": op, "workload": workload.label, "pass": name, **asdict(code)})
    return rows


def traffic_rows(op: str, quick: bool) -> list[dict[str, Any]]:
    """What benchmarks.traffic counts for an operator, in a process with the interpreter."""
    command = [sys.executable, "-m", "benchmarks.traffic", op, *(["--no-compiled"] if quick else [])]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    answer = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if answer.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{answer.stderr[-3000:]}")
    return [{"op": op, **row, **_at_production_shape(row)} for row in json.loads(answer.stdout)]


def _at_production_shape(row: dict[str, Any]) -> dict[str, Any]:
    """Ours and compiled, scaled from the reduced shape by the ratio of what our kernels are planned to move."""
    names = ("of_plan", "ratio", "bytes", "total_bytes", "executed_flops", "compiled_bytes")
    found: dict[str, Any] = {name: [] for name in names}
    for index, name in enumerate(PASSES):
        minimum, planned, reduced = row["minimum"][index], row["plan"][index], row["reduced_plan"][index]
        if not minimum:
            continue
        launches = row["kernels"][name]
        unique, total, flops = (sum(launch[what] for launch in launches) for what in ("unique", "total", "flops"))
        executed = flops / row["reduced_flops"][index] * row["flops"][index] if flops else 0.0
        found["executed_flops"].append(executed)
        found["of_plan"].append(unique / reduced)
        found["ratio"].append(unique / reduced * planned / minimum)
        found["bytes"].append(unique / reduced * planned)
        found["total_bytes"].append(total / reduced * planned)
        if not isinstance(row["compiled"], str):
            found["compiled_bytes"].append(row["compiled"][index] / reduced * planned)
    return found


def _examined(op: str, quick: bool) -> tuple[str, list[dict], list[dict], float]:
    start = time.monotonic()
    code = code_rows(op, QUICK_ARCHITECTURES if quick else ARCHITECTURES)
    return op, code, traffic_rows(op, quick), time.monotonic() - start


def problems(code: list[dict], traffic: list[dict], cuda: list[dict]) -> list[str]:
    """Every broken rule, as a sentence."""
    found = []
    for row in code:
        where = f"{row['op']}: {row['kernel']} at {row['workload']}, sm_{row['arch']}"
        limit = LIMITS[row["arch"]]["shared_block"]
        if row["spilled_bytes"]:
            found.append(f"{where}: {row['spilled_bytes']} bytes of registers are spilled")
        if row["dots"] and not row["hmma"] + row["hgmma"] + row["utcmma"]:
            found.append(f"{where}: a matrix product without tensor cores")
        if row["shared"] > limit:
            found.append(f"{where}: {row['shared']} bytes of shared memory, a block can have {limit}")
        if row["atomics"]:
            found.append(f"{where}: {row['atomics']} atomics")
    for row in traffic:
        for name, of_plan, ratio in zip(PASSES, row["of_plan"], row["ratio"], strict=False):
            if of_plan > TRAFFIC_LIMIT:
                found.append(f"{row['op']} at {row['label']}, {name}: {of_plan:.2f} of the planned traffic")
            if ratio > TRAFFIC_LIMIT and not row["reason"]:
                found.append(f"{row['op']} at {row['label']}, {name}: {ratio:.2f} of the minimum, without a reason")
    for row in cuda:
        if row["spilled_bytes"]:
            found.append(f"{row['kernel']} ({row['source']}), sm_{row['arch']}: {row['spilled_bytes']} bytes spilled")
    return found


def roofline(arch: int, amount: float, flops: float) -> float:
    """Predicted seconds: the slower of memory and tensor cores."""
    _, bandwidth, rate = DEVICES[arch]
    return max(amount / bandwidth, flops / rate)


def _code_table(rows: list[dict]) -> list[str]:
    lines = [
        "| op | kernel | workload | sm | configuration | registers | spilled | shared KiB | occupancy | HMMA | HGMMA "
        "| UTCMMA | loads | stores |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        configuration = " ".join(f"{name}={value}" for name, value in row["configuration"].items())
        loads, stores = (
            " ".join(f"{count}x{width}" for width, count in row[what].items()) for what in ("loads", "stores")
        )
        lines.append(
            f"| {row['op']} | `{row['kernel']}` | {row['workload']} | {row['arch']} | {configuration} "
            f"| {row['registers']} | {row['spilled_bytes']} | {row['shared'] / 1024:.1f} | {row['occupancy']:.0%} "
            f"| {row['hmma']} | {row['hgmma']} | {row['utcmma']} | {loads} | {stores} |"
        )
    return lines


def _microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:.0f}" if seconds >= 1e-5 else f"{seconds * 1e6:.1f}"


def traffic_table(rows: list[dict]) -> list[str]:
    """Bytes of our path, of eager and of torch.compile, and the predicted times, forward and backward together.

    The baseline is torch.compile, or eager PyTorch where matrix products are part of it, whose bytes torch.compile's
    counter leaves out.
    """
    names = [device for device, _, _ in DEVICES.values()]
    lines = [
        "| op | workload | ours MB | of minimum | with re-reads MB | eager MB | torch.compile MB "
        "| GFLOP ours / eager | "
        + " | ".join(f"{name}: ours / baseline us, ratio (predicted)" for name in names)
        + " | measured |",
        "|---|---|---|---|---|---|---|---|" + "---|" * len(names) + "---|",
    ]
    for row in rows:
        ours, eager = sum(row["bytes"]), sum(row["eager"]["bytes"])
        compiled = f"{sum(row['compiled_bytes']) / 1e6:.0f}" if row["compiled_bytes"] else row["compiled"]
        ratio = " / ".join(f"{value:.2f}" for value in row["ratio"])
        flops, executed = row["eager"]["flops"], row["executed_flops"]
        counted = row["compiled_bytes"] and not sum(flops)
        baseline = row["compiled_bytes"] if counted else row["eager"]["bytes"]
        times = []
        for arch in DEVICES:
            own = sum(roofline(arch, b, f) for b, f in zip(row["bytes"], executed, strict=False))
            theirs = sum(roofline(arch, b, f) for b, f in zip(baseline, flops, strict=False))
            name = "torch.compile" if counted else "eager"
            times.append(f"{_microseconds(own)} / {_microseconds(theirs)} ({name}), {theirs / own:.1f}x")
        lines.append(
            f"| {row['op']} | {row['label']} | {ours / 1e6:.0f} | {ratio} | {sum(row['total_bytes']) / 1e6:.0f} "
            f"| {eager / 1e6:.0f} | {compiled} "
            f"| {sum(executed) / 1e9:.1f} / {sum(flops) / 1e9:.1f} | " + " | ".join(times) + " | not measured |"
        )
    return lines


def _reasons(rows: list[dict]) -> list[str]:
    """Why an operator moves more than any implementation must, once for each reason."""
    above = [row for row in rows if max(row["ratio"]) > TRAFFIC_LIMIT]
    return [f"- {op}: {reason}." for op, reason in dict.fromkeys((row["op"], row["reason"]) for row in above)]


def _cuda_table(rows: list[dict]) -> list[str]:
    lines = ["| source | kernel | sm | registers | spilled | shared bytes |", "|---|---|---|---|---|---|"]
    for row in rows:
        cells = (row[name] for name in ("source", "kernel", "arch", "registers", "spilled_bytes", "shared"))
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return lines


def _padding_table(rows: list[dict]) -> list[str]:
    lines = ["| kernel | sm | heads of 72 as | HMMA | HGMMA | spilled |", "|---|---|---|---|---|---|"]
    for row in rows:
        names = ("kernel", "arch", "heads of 72 as", "hmma", "hgmma", "spilled_bytes")
        lines.append("| " + " | ".join(str(row[name]) for name in names) + " |")
    return lines


def markdown(
    code: list[dict],
    traffic: list[dict],
    cuda: list[dict],
    padding: list[dict],
    counts: list[dict],
    broken: list[str],
    command: str,
) -> str:
    """The report as a page."""
    machine = f"{platform.machine()}, torch {torch.__version__}, triton {triton.__version__}"
    parts = [
        "# Hardware report",
        f"Compiled without a GPU ({machine}, {date.today().isoformat()}, `{command}`).",
        "Broken rules: " + ("none." if not broken else ""),
        *(f"- {line}" for line in broken),
        "## Traffic and roofline",
        "Forward and backward together. Bytes of our path and of torch.compile are counted at reduced shapes (Triton's "
        "interpreter; Inductor's scheduler for the CPU, which counts no bytes of library calls such as matrix "
        "products) and scaled to the production shape. *Of minimum*: every address counted once per launch, against "
        "what any implementation must move, forward / backward. *With re-reads*: every access counted, most of which a "
        "cache serves. *GFLOP*: of matrix products, ours with the padding and the recomputation that the kernels "
        "execute. The baseline of the times is torch.compile, or eager PyTorch where matrix products are part of the "
        "operator; eager attention is one operator that keeps its scores on the chip, as PyTorch's flash kernels do. "
        "**Times are predictions from data sheets, not measurements.**",
        "\n".join(traffic_table(traffic)),
        "More than 1.1 times the minimum, and why:\n" if _reasons(traffic) else "",
        "\n".join(_reasons(traffic)),
        "## Machine code of the Triton kernels",
        "One row per distinct code. Loads and stores: instructions x width in bits, in global memory.",
        "\n".join(_code_table(code)),
        "## Heads of 72 channels",
        "Tensor-core instructions in the code of `qknorm_attention` at 256 tokens, as shipped and with one padded tile "
        "of 128 columns, which is compiled for this comparison only. An HGMMA instruction covers more columns in the "
        "wider tile: compare HMMA.",
        "\n".join(_padding_table(padding)) if padding else "Left out.",
        "## Launches and waits of a step",
        "What the host launches in a step of the recipes' generators on one GPU, and how often it waits for a number "
        "from there (`python -m benchmarks.step_counts`). A sampler's step is replayed from a CUDA graph as one launch "
        "and `flow_step`.",
        "\n".join(step_counts.table(counts)) if counts else "Left out.",
        "## CUDA sources",
        "\n".join(_cuda_table(cuda)) if cuda else "nvcc was not found.",
    ]
    return "\n\n".join(parts) + "\n"


def main() -> int:
    """Write hardware_report.md and hardware_report.json; exit status 1 if a rule is broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", nargs="+", default=None, help="these operators only (default: all)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the two files")
    parser.add_argument("--quick", action="store_true", help="sm_90 alone, without torch.compile's column")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="operators compiled at once")
    options = parser.parse_args()
    wanted = options.op or triton_operators()
    code, traffic = [], []
    with ProcessPoolExecutor(options.jobs) as pool:
        for op, code_part, traffic_part, seconds in pool.map(partial(_examined, quick=options.quick), wanted):
            print(f"{op}: {len(code_part)} kernels, {len(traffic_part)} workloads, {seconds:.0f} s", flush=True)
            code += code_part
            traffic += traffic_part
    cuda = [] if options.op else cuda_report.rows()
    padding = []
    if "qknorm_attention" in wanted:
        padding = [row for arch in DEVICES for row in bench_qknorm_attention.padding_comparison(arch)]
    counts = [] if options.op else [row for name in step_counts.RECIPES for row in step_counts.rows_of(name)]
    broken = problems(code, traffic, cuda)
    chosen = ["--op", *options.op] if options.op else []
    command = " ".join(["python -m benchmarks.hardware_report", *chosen, *(["--quick"] if options.quick else [])])
    options.output.mkdir(parents=True, exist_ok=True)
    page = markdown(code, traffic, cuda, padding, counts, broken, command)
    write_bytes(options.output / "hardware_report.md", page.encode())
    data = {"code": code, "traffic": traffic, "cuda": cuda, "padding": padding, "steps": counts, "broken": broken}
    write_bytes(options.output / "hardware_report.json", json.dumps(data, indent=1).encode())
    print(f"wrote {options.output / 'hardware_report.md'}")
    print("\n".join(broken) or "no rule is broken")
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
