"""Search the configurations of an operator's Triton kernels around the pinned ones.

    python -m benchmarks.tune OP [--workload N] [--arch 80 90] [--kernel NAME] [--seconds 5]

Each block size is halved and doubled, and so is the number of warps; stages go down and up by one; one kernel at a
time, the others as pinned. Where a kernel has more than three sizes, one of them changes at a time. Every candidate is
compiled without a device for each architecture, and those that spill or that ask for more shared memory than a block
may have are dropped. On a GPU the rest is timed side by side, its results compared with the reference first, and the
fastest is printed as a line for the kernel's table. Without a GPU nothing is timed and no winner named: the table then
says what the compiler made of each candidate.
"""

import argparse
import itertools
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from aligntok.kernels._triton import Configuration, architecture, record_configurations, use_configurations
from benchmarks.aot import ARCHITECTURES, LIMITS, KernelCode, compile_launch, launches_of, workloads_of
from benchmarks.harness import Case, Provider, measure
from benchmarks.machine import CUDA, DEVICE, machine_line
from benchmarks.workloads import Workload

SMALLEST_BLOCK = 16  # of tl.dot
SIZES = 3  # block sizes of a kernel up to which all combinations are tried
WARPS, STAGES = (1, 16), (1, 4)  # a block has at most 32 warps; beyond 4 stages shared memory is the limit


def candidates(pinned: Configuration) -> Iterator[Configuration]:
    """The pinned configuration first, then all combinations of its neighbours, or one by one where sizes are many."""
    sizes = [name for name, value in pinned.items() if name.isupper() and not isinstance(value, bool)]
    choices: dict[str, list[Any]] = {}
    for name, value in pinned.items():
        if name in sizes:
            around = [value, value // 2, value * 2]
            choices[name] = [v for v in around if v >= min(SMALLEST_BLOCK, value)]
        elif name == "num_warps":
            choices[name] = [value, *(v for v in (value // 2, value * 2) if WARPS[0] <= v <= WARPS[1])]
        elif name == "num_stages":
            choices[name] = [value, *(v for v in (value - 1, value + 1) if STAGES[0] <= v <= STAGES[1])]
        else:
            choices[name] = [value]
    if len(sizes) > SIZES:
        yield pinned
        yield from (pinned | {name: value} for name, values in choices.items() for value in values[1:])
        return
    for values in itertools.product(*choices.values()):
        yield dict(zip(choices, values, strict=True))


def pinned_configurations(workload: Workload, arch: int) -> dict[str, Configuration]:
    """Configuration by kernel of everything that a workload launches on an architecture."""
    with record_configurations() as asked:
        launches_of(workload, arch)
    return asked


def compiled(workload: Workload, arch: int, kernel: str, configuration: Configuration) -> list[KernelCode] | str:
    """What the compiler makes of the workload's kernels with one of them configured so, or why that cannot run."""
    try:
        with use_configurations({kernel: configuration}):
            launches = list(itertools.chain.from_iterable(launches_of(workload, arch)))
        codes = [compile_launch(launch, arch)[0] for launch in launches]
    except Exception as error:  # the compiler refuses in many ways: say it in the candidate's row
        return f"{type(error).__name__}: {str(error).splitlines()[-1]}"
    for code in codes:
        if code.spilled_bytes:
            return f"{code.kernel} spills {code.spilled_bytes} bytes"
        if code.shared > LIMITS[arch]["shared_block"]:
            return f"{code.kernel} needs {code.shared} bytes of shared memory"
    return codes


def timed(workload: Workload, usable: list[tuple[str, Configuration]], seconds: float) -> dict[str, float | str]:
    """Median seconds per call by kernel and configuration, or why its results are wrong; on the GPU at hand."""

    def run(kernel: str, configuration: Configuration, *inputs: Any) -> Any:
        with use_configurations({kernel: configuration}):
            return workload.ours(*inputs, implementation="triton")

    providers = [Provider("eager", workload.reference)]
    providers += [Provider(_name(*one), partial(run, *one)) for one in usable]
    case = Case(workload.label, workload.make(DEVICE, workload.dtype, **workload.shape), workload.tolerance)
    results = measure(case, "both" if case.leaves else "forward", providers, seconds)
    return {r.provider: r.refusal or r.median for r in results}


def _name(kernel: str, configuration: Configuration) -> str:
    return f"{kernel} {' '.join(f'{k}={v}' for k, v in configuration.items())}"


def tune(workload: Workload, arch: int, only: str | None, seconds: float) -> None:
    """Print the table of one workload on one architecture, and the fastest of each kernel where a GPU timed them."""
    print(f"\n{workload.op} {workload.label}, sm_{arch}")
    usable: list[tuple[str, Configuration]] = []
    for kernel, pinned in pinned_configurations(workload, arch).items():
        if only not in (None, kernel):
            continue
        for configuration in candidates(pinned):
            codes = compiled(workload, arch, kernel, configuration)
            if isinstance(codes, str):
                print(f"  {_name(kernel, configuration)} | dropped: {codes}", flush=True)
                continue
            usable.append((kernel, configuration))
            figures = "; ".join(f"{c.kernel} {c.registers} registers, {c.occupancy:.0%} occupancy" for c in codes)
            mark = " | pinned" if configuration == pinned else ""
            print(f"  {_name(kernel, configuration)} | {figures}{mark}", flush=True)
    if CUDA and arch == architecture(torch.device(DEVICE)):
        _print_fastest(timed(workload, usable, seconds), usable)
    else:
        print(f"  not timed: no GPU of sm_{arch} here, so no winner is named")


def _print_fastest(times: dict[str, float | str], usable: list[tuple[str, Configuration]]) -> None:
    for kernel in dict.fromkeys(kernel for kernel, _ in usable):
        own = [c for k, c in usable if k == kernel]
        for configuration in own:
            time = times[_name(kernel, configuration)]
            shown = f"wrong: {time}" if isinstance(time, str) else f"{time * 1e6:.1f} us"
            print(f"  {_name(kernel, configuration)} | {shown}")
        right = [c for c in own if isinstance(times[_name(kernel, c)], float)]
        if right:
            best = min(right, key=lambda c: times[_name(kernel, c)])
            print(f"  fastest {kernel}: {best}  (pinned: {own[0]})")


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("op", help="name of the operator: benchmarks/bench_<op>.py")
    parser.add_argument("--workload", type=int, default=0, help="its number in WORKLOADS (default: 0)")
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHITECTURES, default=[80, 90])
    parser.add_argument("--kernel", default=None, help="only this kernel")
    parser.add_argument("--seconds", type=float, default=5.0, help="on a GPU: time for all candidates (default: 5)")
    options = parser.parse_args()
    workloads = workloads_of(options.op)
    if not 0 <= options.workload < len(workloads):
        parser.error(f"--workload is {options.workload}, but {options.op} has the workloads 0 to {len(workloads) - 1}")
    print(machine_line())
    for arch in options.arch:
        tune(workloads[options.workload], arch, options.kernel, options.seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
