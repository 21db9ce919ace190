"""Every operator once, forward and backward, on this device against its reference: seconds, before anything is timed.

    python -m benchmarks.smoke [OP ...]

Every workload of every operator runs at its reduced shape in its own number type (bf16), through whatever `auto` takes
here, and its results and gradients are compared with eager PyTorch's. A line says what ran and whether it agrees; one
that fails does not keep the others from running. Exit status 1 if one did.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from importlib import import_module

import torch

from aligntok.kernels import explain
from benchmarks.aot import workloads_of
from benchmarks.gpu_check import operators
from benchmarks.hardware_report import triton_operators
from benchmarks.harness import Case, Provider, disagreement
from benchmarks.machine import DEVICE, machine_line, synchronize


def comparisons(op: str) -> Iterator[tuple[Provider, Provider, Case]]:
    """(ours, the reference, inputs) of everything that an operator is benchmarked with."""
    if op in triton_operators():
        for workload in workloads_of(op):
            shape = workload.reduced_shape if DEVICE == "cuda" else workload.cpu_shape
            inputs = workload.make(DEVICE, workload.dtype, **shape)
            case = Case(workload.sized(shape), inputs, workload.tolerance)
            yield Provider("ours", workload.ours), Provider("reference", workload.reference), case
        return
    for providers, cases in import_module(f"benchmarks.bench_{op}").comparisons():
        for case in cases:
            yield next(one for one in providers if one.name == "ours"), providers[0], case


def check(op: str) -> tuple[int, str | None]:
    """(workloads, how the first that differs from the reference does, or None) of one operator."""
    count = 0
    for ours, reference, case in comparisons(op):
        count += 1
        if told := disagreement(ours, reference, case):
            return count, f"{case.label}: {told}"
        synchronize()
    return count, None


def main() -> int:
    """One line for each operator; exit status 1 if one is wrong or cannot run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"default: all, {', '.join(operators())}")
    options = parser.parse_args()
    if unknown := [op for op in options.ops if op not in operators()]:
        parser.error(f"no operator {', '.join(unknown)}: expected some of {', '.join(operators())}")
    print(machine_line())
    failed = 0
    for op in options.ops or operators():
        began = time.perf_counter()
        torch.manual_seed(0)
        try:
            count, told = check(op)
        except Exception as error:  # the device's or the compiler's: the next operator may run all the same
            count, told = 0, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        seconds, chosen = time.perf_counter() - began, explain(op, DEVICE).name
        print(f"{op} ({chosen}): {told or f'{count} workloads agree'}, {seconds:.1f} s", flush=True)
        failed += told is not None
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
