"""Compare implementations of one operator so that the ratio can be trusted.

- Before anything is timed, every provider's results and gradients are compared with the baseline's. A
  provider that differs gets no time and no ratio, and the benchmark ends with exit status 1.
- Runs are interleaved: one of each provider per round, so that a busy machine slows all of them alike. In
  each round the order is another rotation.
- The figure is the median over rounds, with the 20 % and 80 % quantiles beside it.
- On a GPU every fused and compiled column stands twice: with plain calls, and replayed from a CUDA graph, where the
  host's part is gone, as in a recorded step. (The backward pass alone is timed with plain calls.)
- On a GPU the clock is a pair of CUDA events, the L2 cache is flushed before every sample, and the peak of allocated
  memory beyond the inputs is measured in a run of its own.
- Cases that a provider loses are printed like all others and listed once more at the end; so is what was left out.
"""

import argparse
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from aligntok.diffusion.cuda_graph import record
from aligntok.kernels import explain
from benchmarks.machine import CUDA, DEVICE, bandwidth, machine_line, matmul_rate
from benchmarks.results import Measurement, plot, remarks, table, write_csv
from benchmarks.workloads import Workload

PHASES = ("forward", "backward", "both")
ROUNDS = 5  # that a figure is at least a median of
# A measurement shorter than this is repeated inside the timed region: perf_counter resolves far less, but an
# interrupt of some microseconds then stays below a hundredth of the sample.
_MIN_SAMPLE_S = 1e-3
_FLUSHED_BYTES = 256 * 2**20  # five times the L2 cache of an H100


@dataclass(frozen=True)
class Provider:
    """An implementation: takes the case's inputs, returns a tensor or tensors.

    It may return fewer outputs than the baseline (its column is then named accordingly); gradients are always
    compared.
    """

    name: str
    run: Callable[..., Tensor | Sequence[Tensor]]
    recorded: bool = False  # timed as the replay of a CUDA graph


@dataclass(frozen=True)
class Case:
    """One row: a label, the inputs (tensors that require a gradient get one), and the tolerance of the comparison.

    `tolerance` is the largest accepted difference relative to the largest magnitude in the baseline's tensor.
    `ideal(phase)` gives the seconds that the measured bandwidth or matmul rate of this machine would allow.
    """

    label: str
    inputs: tuple
    tolerance: float
    ideal: Callable[[str], float] | None = None

    @property
    def leaves(self) -> list[Tensor]:
        """The inputs that get a gradient."""
        return [x for x in self.inputs if isinstance(x, Tensor) and x.requires_grad]


def _differentiable(outputs: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [y for y in ([outputs] if isinstance(outputs, Tensor) else outputs) if y.requires_grad]


def _cotangents(outputs: Sequence[Tensor]) -> list[Tensor]:
    """One for scalars, else normal numbers, the same for every provider whatever the strides."""
    generator = torch.Generator(DEVICE).manual_seed(1)

    def normal(y: Tensor) -> Tensor:
        return torch.empty_like(y).copy_(torch.randn(y.shape, generator=generator, device=DEVICE))

    return [torch.ones_like(y) if y.ndim == 0 else normal(y) for y in outputs]


def _fresh(case: Case) -> list:
    """The inputs, with copies of those that an operator may write to in place (no gradient, floating point)."""
    return [x.clone() if isinstance(x, Tensor) and not x.requires_grad else x for x in case.inputs]


def _results(provider: Provider, case: Case) -> dict[str, Tensor]:
    outputs = provider.run(*_fresh(case))
    found = {f"output {i}": y for i, y in enumerate([outputs] if isinstance(outputs, Tensor) else outputs)}
    differentiable = _differentiable(outputs)
    if case.leaves and differentiable:
        gradients = torch.autograd.grad(differentiable, case.leaves, _cotangents(differentiable))
        found |= {f"gradient {i}": g for i, g in enumerate(gradients)}
    return {name: tensor.detach().double() for name, tensor in found.items()}


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def disagreement(provider: Provider, baseline: Provider, case: Case) -> str | None:
    """How the provider's results differ from the baseline's, or None where they agree."""
    try:
        found, expected = _results(provider, case), _results(baseline, case)
    except Exception as error:  # a provider that cannot run is a row without figures, not a crash
        return _told(error)
    if case.leaves and any(n.startswith("gradient") for n in expected) and "gradient 0" not in found:
        return "has no gradient"
    for name, one in found.items():
        other = expected[name]
        if one.shape != other.shape:
            return f"{name} has shape {tuple(one.shape)}, the baseline's {tuple(other.shape)}"
        difference, scale = (one - other).abs().max().item(), other.abs().max().item()
        if not difference <= case.tolerance * scale:
            return f"{name} differs by {difference:.2e} where {case.tolerance:.0e} of {scale:.2e} is accepted"
    return None


class _Clock:
    """Seconds between start() and stop(): CUDA events behind a flushed cache on a GPU, perf_counter elsewhere."""

    def __init__(self) -> None:
        self._flushed = torch.empty(_FLUSHED_BYTES, dtype=torch.uint8, device=DEVICE) if CUDA else None

    def start(self) -> None:
        if self._flushed is None:
            self._start = time.perf_counter()
            return
        self._flushed.zero_()
        self._events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._events[0].record()

    def stop(self) -> float:
        if self._flushed is None:
            return time.perf_counter() - self._start
        self._events[1].record()
        torch.cuda.synchronize()
        return self._events[0].elapsed_time(self._events[1]) / 1e3


def with_replays(providers: Sequence[Provider], phase: str) -> list[Provider]:
    """The providers, on a GPU also the fused and compiled ones as replays."""
    names = ("torch.compile", "ours") if CUDA and phase != "backward" else ()
    replays = [replace(one, name=f"{one.name}, replayed", recorded=True) for one in providers if one.name in names]
    return [*providers, *replays]


def _timer(provider: Provider, case: Case, phase: str) -> Callable[[int], float]:
    """A function that runs the phase `repeats` times and returns seconds per run; set-up is outside the
    clock.
    """
    clock = _Clock()
    leaves = case.leaves
    replay: list[Callable[[], object]] = []  # recorded once, with the inputs of the first call

    def timed(work: Callable[[], object], repeats: int) -> float:
        if provider.recorded:
            if not replay:
                replay.append(record(work)[1])
            [work] = replay
        clock.start()
        for _ in range(repeats):
            work()
        return clock.stop() / repeats

    def forward(repeats: int) -> float:
        inputs = _fresh(case)
        return timed(lambda: provider.run(*inputs), repeats)

    def backward(repeats: int) -> float:
        graphs = [_differentiable(provider.run(*_fresh(case))) for _ in range(repeats)]
        cotangents = _cotangents(graphs[0])
        clock.start()
        for outputs in graphs:
            torch.autograd.grad(outputs, leaves, cotangents)
        return clock.stop() / repeats

    def both(repeats: int) -> float:
        inputs = _fresh(case)
        cotangents = _cotangents(_differentiable(provider.run(*inputs)))
        return timed(lambda: torch.autograd.grad(_differentiable(provider.run(*inputs)), leaves, cotangents), repeats)

    return {"forward": forward, "backward": backward, "both": both}[phase]


def _peak_bytes(timer: Callable[[int], float]) -> int | None:
    if not CUDA:
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    timer(1)
    return torch.cuda.max_memory_allocated() - before


def measure(
    case: Case, phase: str, providers: Sequence[Provider], budget_s: float, least: int = ROUNDS
) -> list[Measurement]:
    """Time all providers on one case; `providers[0]` is the baseline.

    Args:
        budget_s: seconds for all together.
        least: rounds that are taken however long they last.
    """
    results = [Measurement(case.label, phase, provider.name) for provider in providers]
    timers: list[tuple[Measurement, Callable[[int], float], int]] = []
    for provider, result in zip(providers, results, strict=True):
        result.refusal = disagreement(provider, providers[0], case)
        if result.refusal is None:
            timer = _timer(provider, case, phase)
            try:
                timer(1)
            except Exception as error:  # what cannot be recorded is a row without figures, not a crash
                result.refusal = _told(error)
                continue
            result.peak_bytes = _peak_bytes(timer)
            repeats = 1 if CUDA or least == 1 else max(1, min(100, round(_MIN_SAMPLE_S / timer(3))))
            timers.append((result, timer, repeats))
    deadline = time.perf_counter() + budget_s
    gc.disable()
    try:
        rounds = 0
        while timers and (rounds < least or time.perf_counter() < deadline):
            shift = rounds % len(timers)
            for result, timer, repeats in timers[shift:] + timers[:shift]:
                result.samples.append(timer(repeats))
            rounds += 1
    finally:
        gc.enable()
    for result in results:
        if case.ideal and result.samples:
            result.share = case.ideal(phase) / result.median
    return results


def arguments(description: str) -> argparse.ArgumentParser:
    """The options that all benchmarks share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--phase", choices=[*PHASES, "all"], default="both", help="what is timed (default: both)")
    parser.add_argument("--seconds", type=float, default=2.0, help="time per row, all providers together (default: 2)")
    parser.add_argument("--smallest", action="store_true", help="one round at the smallest sizes: a rehearsal")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's)")
    parser.add_argument("--csv", type=Path, default=None, help="also write the figures to this file")
    parser.add_argument("--plot", type=Path, default=None, help="also draw the ratios into this PNG file")
    return parser


Parts = Sequence[tuple[Sequence[Provider], Sequence[Case]]]


def compare(parts: Parts, ours: str, options: argparse.Namespace, left_out: Sequence[str] = ()) -> int:
    """Measure every case with its providers; print machine line, table and remarks.

    Returns:
        The exit status: 1 if a provider was refused, else 0.
    """
    if options.threads:
        torch.set_num_threads(options.threads)
    rows = []
    for providers, cases in parts:
        for case in cases:
            wanted = PHASES if options.phase == "all" else (options.phase,)
            wanted = wanted if case.leaves else ("forward",)
            rounds = 1 if options.smallest else ROUNDS
            for phase in wanted:
                rows.append(measure(case, phase, with_replays(providers, phase), options.seconds, rounds))
    print(machine_line())
    print("Median per call (20 % .. 80 % quantile) and ratio against the first column.\n")
    print(table(rows))
    print("", *remarks(rows, ours), *dict.fromkeys(left_out), sep="\n")
    if options.csv:
        write_csv(options.csv, rows)
    if options.plot:
        plot(options.plot, rows, machine_line())
    return int(any(result.refusal for row in rows for result in row))


def _ideal(workload: Workload, shape: dict[str, int]) -> Callable[[str], float]:
    """Seconds that the slower of memory and tensor cores needs at the rates measured on this machine."""
    itemsize = workload.dtype.itemsize
    amounts = zip(workload.minimum(itemsize, **shape), workload.flops(**shape), strict=True)
    passes = [max((b or 0) / bandwidth(), f / matmul_rate(workload.dtype) if f else 0.0) for b, f in amounts]
    return lambda phase: {"forward": passes[0], "backward": passes[1], "both": sum(passes)}[phase]


def _part(
    workload: Workload, compiled: bool, smallest: bool
) -> tuple[tuple[Sequence[Provider], Sequence[Case]], list[str]]:
    """Providers and case of a workload on this machine, and what had to be left out."""
    selection = explain(workload.op, DEVICE)
    shape = workload.reduced_shape if smallest else workload.shape if CUDA else workload.cpu_shape
    providers, left_out = [Provider("eager", workload.reference)], []
    if compiled:
        providers.append(Provider("torch.compile", torch.compile(workload.reference, fullgraph=True, dynamic=False)))
    for name, run in workload.providers.items():
        if isinstance(run, str):
            left_out.append(f"left out: {name}: {run}")
        else:
            providers.append(Provider(name, run))
    if selection.name == "reference":
        reasons = "; ".join(f"{name}: {reason}" for name, reason in selection.rejected.items())
        left_out.append(f"left out: {workload.op}'s fused kernels ({reasons}); only PyTorch was run")
    else:
        providers.append(Provider("ours", workload.ours))
    if shape != workload.shape:
        left_out.append(f"reduced: {workload.label} ran at {workload.sized(shape)}")
    inputs = workload.make(DEVICE, workload.dtype, **shape)
    ideal = _ideal(workload, shape) if CUDA else None
    return (providers, [Case(workload.sized(shape), inputs, workload.tolerance, ideal)]), left_out


def run_workloads(description: str, workloads: Sequence[Workload]) -> int:
    """The command line of a benchmark: every workload, on the GPU if there is one, else reduced on the CPU.

    Returns:
        The exit status: 1 if a provider's results were wrong.
    """
    parser = arguments(description)
    parser.add_argument("--no-compile", action="store_true", help="leave the column of torch.compile out")
    options = parser.parse_args()
    torch._dynamo.config.recompile_limit = 4 * len(workloads) + 8
    torch.manual_seed(0)
    found = [_part(workload, not options.no_compile, options.smallest) for workload in workloads]
    left_out = [line for _, lines in found for line in lines]
    return compare([part for part, _ in found], "ours", options, left_out)
