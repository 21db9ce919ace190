"""Compare implementations of one operator so that the ratio can be trusted.

- Before anything is timed, every provider's results and gradients are compared with the baseline's. A
  provider that differs gets no time and no ratio, and the benchmark ends with exit status 1.
- Runs are interleaved: one of each provider per round, so that a busy machine slows all of them alike. In
  each round the order is another rotation.
- The figure is the median over rounds, with the 20 % and 80 % quantiles beside it.
- Cases that a provider loses are printed like all others and listed once more at the end.
"""

import argparse
import csv
import datetime
import gc
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

PHASES = ("forward", "backward", "both")
# A measurement shorter than this is repeated inside the timed region: perf_counter resolves far less, but an
# interrupt of some microseconds then stays below a hundredth of the sample.
_MIN_SAMPLE_S = 1e-3


@dataclass(frozen=True)
class Provider:
    """An implementation: takes the case's inputs, returns tensors of which the first is the scalar to
    differentiate.

    It may return fewer outputs than the baseline (its column is then named accordingly); gradients are always
    compared.
    """

    name: str
    run: Callable[..., Sequence[Tensor]]


@dataclass(frozen=True)
class Case:
    """One row: a label, the inputs (those that require a gradient get one), and the tolerance of the
    comparison.

    `tolerance` is the largest accepted difference relative to the largest magnitude in the baseline's tensor.
    """

    label: str
    inputs: tuple[Tensor, ...]
    tolerance: float


@dataclass
class Measurement:
    """Seconds per call, or the reason why there are none."""

    case: str
    phase: str
    provider: str
    samples: list[float] = field(default_factory=list)
    refusal: str | None = None

    def quantile(self, share: float) -> float:
        """The sample below which `share` of all samples lie."""
        ordered = sorted(self.samples)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    @property
    def median(self) -> float:
        """Median seconds per call."""
        return statistics.median(self.samples)


def machine_line() -> str:
    """Processor, threads, torch, date and command, in one line to print above every table."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    capability = torch.backends.cpu.get_cpu_capability()
    date = datetime.date.today().isoformat()
    module = Path(sys.argv[0]).stem
    command = shlex.join(["python", "-m", f"benchmarks.{module}", *sys.argv[1:]])
    threads = f"{torch.get_num_threads()} threads"
    return f"{model}, {capability}, {threads}, torch {torch.__version__}, {date}, `{command}`"


def _clear_gradients(case: Case) -> None:
    for tensor in case.inputs:
        tensor.grad = None


def _results(provider: Provider, case: Case) -> dict[str, Tensor]:
    _clear_gradients(case)
    outputs = provider.run(*case.inputs)
    outputs[0].backward()
    found = {f"output {index}": tensor for index, tensor in enumerate(outputs)}
    found |= {f"gradient {index}": t.grad for index, t in enumerate(case.inputs) if t.requires_grad}
    _clear_gradients(case)
    return {name: tensor.detach().double() for name, tensor in found.items()}


def disagreement(provider: Provider, baseline: Provider, case: Case) -> str | None:
    """How the provider's results differ from the baseline's, or None where they agree."""
    try:
        found, expected = _results(provider, case), _results(baseline, case)
    except Exception as error:  # a provider that cannot run is a row without figures, not a crash
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    for name, one in found.items():
        other = expected[name]
        if one.shape != other.shape:
            return f"{name} has shape {tuple(one.shape)}, the baseline's {tuple(other.shape)}"
        difference, scale = (one - other).abs().max().item(), other.abs().max().item()
        if not difference <= case.tolerance * scale:
            return f"{name} differs by {difference:.2e} where {case.tolerance:.0e} of {scale:.2e} is accepted"
    return None


def _timer(provider: Provider, case: Case, phase: str) -> Callable[[int], float]:
    """A function that runs the phase `repeats` times and returns seconds per run; set-up is outside the
    clock.
    """

    def forward(repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            provider.run(*case.inputs)
        return (time.perf_counter() - start) / repeats

    def backward(repeats: int) -> float:
        losses = [provider.run(*case.inputs)[0] for _ in range(repeats)]
        start = time.perf_counter()
        for loss in losses:
            _clear_gradients(case)
            loss.backward()
        return (time.perf_counter() - start) / repeats

    def both(repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            _clear_gradients(case)
            provider.run(*case.inputs)[0].backward()
        return (time.perf_counter() - start) / repeats

    return {"forward": forward, "backward": backward, "both": both}[phase]


def measure(case: Case, phase: str, providers: Sequence[Provider], budget_s: float) -> list[Measurement]:
    """Time all providers on one case; `providers[0]` is the baseline. About `budget_s` seconds for all
    together.
    """
    results = [Measurement(case.label, phase, provider.name) for provider in providers]
    timers: list[tuple[Measurement, Callable[[int], float], int]] = []
    for provider, result in zip(providers, results, strict=True):
        result.refusal = disagreement(provider, providers[0], case)
        if result.refusal is None:
            timer = _timer(provider, case, phase)
            timer(1)
            repeats = max(1, min(100, round(_MIN_SAMPLE_S / timer(3))))
            timers.append((result, timer, repeats))
    deadline = time.perf_counter() + budget_s
    gc.disable()
    try:
        rounds = 0
        while rounds < 5 or time.perf_counter() < deadline:
            shift = rounds % len(timers)
            for result, timer, repeats in timers[shift:] + timers[:shift]:
                result.samples.append(timer(repeats))
            rounds += 1
    finally:
        gc.enable()
    _clear_gradients(case)
    return results


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def _cell(result: Measurement, baseline: Measurement) -> str:
    if result.refusal:
        return "refused"
    spread = f"{_time(result.median)} ({_time(result.quantile(0.2))} .. {_time(result.quantile(0.8))})"
    return spread if result is baseline else f"{spread} **{baseline.median / result.median:.2f}x**"


def table(rows: Sequence[Sequence[Measurement]]) -> str:
    """A Markdown table: one row per case and phase, one column per provider, ratios against the first."""
    names = [result.provider for result in rows[0]]
    lines = [
        "| case | phase | " + " | ".join(names) + " |",
        "|---|---|" + "---|" * len(names),
    ]
    for row in rows:
        cells = [_cell(result, row[0]) for result in row]
        lines.append(f"| {row[0].case} | {row[0].phase} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def remarks(rows: Sequence[Sequence[Measurement]], ours: str) -> list[str]:
    """Refused providers with the reason, and every case that `ours` loses against any other column."""
    lines = []
    for row in rows:
        own = next(result for result in row if result.provider == ours)
        for result in row:
            if result.refusal:
                lines.append(f"refused: {result.provider} at {result.case}, {result.phase}: {result.refusal}")
            elif own.samples and result is not own and result.median < own.median:
                ratio = result.median / own.median
                lines.append(f"losing: {ours} at {row[0].case}, {row[0].phase}: {ratio:.2f}x against {result.provider}")
    return lines


def write_csv(path: Path, rows: Sequence[Sequence[Measurement]]) -> None:
    """Write one line per case, phase and provider, times in microseconds."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with unfinished.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["case", "phase", "provider", "median_us", "q20_us", "q80_us", "samples", "refusal"])
        for result in (result for row in rows for result in row):
            times = [result.median, result.quantile(0.2), result.quantile(0.8)] if result.samples else [None] * 3
            cells = [f"{seconds * 1e6:.3f}" if seconds is not None else "" for seconds in times]
            head = [result.case, result.phase, result.provider]
            writer.writerow([*head, *cells, len(result.samples), result.refusal or ""])
    os.replace(unfinished, path)


def arguments(description: str) -> argparse.ArgumentParser:
    """The options that all benchmarks share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--phase", choices=[*PHASES, "all"], default="both", help="what is timed (default: both)")
    parser.add_argument("--seconds", type=float, default=2.0, help="time per row, all providers together (default: 2)")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's)")
    parser.add_argument("--csv", type=Path, default=None, help="also write the figures to this file")
    return parser


def compare(parts: Sequence[tuple[Sequence[Provider], Sequence[Case]]], ours: str, options: argparse.Namespace) -> int:
    """Measure every case with its providers; print machine line, table and remarks.

    Returns:
        The exit status: 1 if a provider was refused, else 0.
    """
    if options.threads:
        torch.set_num_threads(options.threads)
    phases = PHASES if options.phase == "all" else (options.phase,)
    rows = [
        measure(case, phase, providers, options.seconds)
        for providers, cases in parts
        for case in cases
        for phase in phases
    ]
    print(machine_line())
    print("Median per call (20 % .. 80 % quantile) and ratio against the first column.\n")
    print(table(rows))
    print("", *remarks(rows, ours), sep="\n")
    if options.csv:
        write_csv(options.csv, rows)
    return int(any(result.refusal for row in rows for result in row))
