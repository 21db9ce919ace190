"""Execute the compiled kernels without a GPU: every access inside its tensor, no two programs on one element.

    python -m benchmarks.sanitize [--quick] [--part tests|operators|steps] [OP ...]        (make sanitize)

The package `ttsem` (Python 3.12 or 3.13, Triton 3.8) runs the IR that Triton's own compiler makes of a kernel, on the
CPU. A launch that leaves its tensors, a race between programs and an undefined result end at the kernel's line; memory
that nobody wrote is NaN. Unlike Triton's interpreter it knows bf16. Three parts, each a process of its own:

- tests: the kernel tests as they are, on a faked CUDA device. What cannot work there is in EXCEPTIONS, with the reason.
- operators: every workload in bf16, at its reduced shape and at ragged ones several blocks long, forward and backward,
  with the block sizes of sm_80 and sm_90, twice for equal bits. The largest error against fp64 may be 2 times that of
  eager bf16 (`benchmarks/sanitized.py`).
- steps: steps of Stage 1, 2, 3 and of the generator, and guided sampling, with `device: cuda`
  (`tests/training/test_faked_cuda.py`, which the ordinary suite runs through Triton's interpreter).

`--quick`, for CI: the ragged shapes with sm_80's block sizes, and the steps. Exit status 1 on any fault. Nothing here
is a time or a measurement of a GPU.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CAPABILITY = 90  # that kernels are compiled for
ARCHITECTURES = (80, 90)  # whose block sizes are taken
STEPS = "tests/training/test_faked_cuda.py"
MARK = "RESULT "  # before the line that a part ends with

_CPU_ONLY = "an operator in C++ on CPU tensors, which the faked device passes off as CUDA's"
_COMPILES = "torch.compile asks a real device for its properties"
_DEVICES = "about tensors of another device: the faked one calls every tensor its own"
# Kernel tests that do not run under the faked device: a file, or a test of a file -> why.
EXCEPTIONS: dict[str, str] = {
    "test_adaln_cpp.py": _CPU_ONLY,
    "test_gan_loss.py": _CPU_ONLY,
    "test_group_norm_silu.py": _CPU_ONLY,
    "test_instruction_sets_cpp.py": _CPU_ONLY,
    "test_lpips_distance_cpp.py": _CPU_ONLY,
    "test_norm_ratio.py": _CPU_ONLY,
    "test_qknorm_rope_cpp.py": _CPU_ONLY,
    "test_swiglu_cpp.py": _CPU_ONLY,
    "test_triton.py": "fakes two GPUs itself",
    "test_adaln.py::test_refusals[change7-weight: expected on cpu like x, got meta]": _DEVICES,
    "test_adapter_projection.py::test_reference_on_the_cpu_is_the_unfused_path_bit_for_bit": _DEVICES,
    "test_adapter_projection.py::test_refusals[change5-like p]": _DEVICES,
    "test_derivatives.py::test_a_transform_inside_compiled_code_sees_the_reference": _COMPILES,
    "test_joint_attention.py::test_refusals[change11-one device]": _DEVICES,
    "test_lpips_distance.py::test_refusals[fx6-fy6-head6-one device]": _DEVICES,
    "test_qknorm_rope.py::test_refusals[change7-on cpu]": _DEVICES,
}
# Tests of every file whose names begin so, and why they do not run there.
COMPILED = {
    "test_compile": _COMPILES,
    "test_operator_contract": "torch.library.opcheck compiles too",
}


def refusal() -> str | None:
    """Why nothing can be executed here, or None."""
    if not (3, 12) <= sys.version_info[:2] <= (3, 13):
        return f"ttsem needs Python 3.12 or 3.13, this is {sys.version.split()[0]}"
    try:
        import ttsem  # noqa: F401
    except ImportError as error:
        return f"{error}: pip install ttsem==0.1.0, or make sanitize"
    return None


def kernel_tests() -> list[str]:
    """Arguments for pytest: every file of kernel tests less the exceptions."""
    files = sorted(file.name for file in (ROOT / "tests/kernels").glob("test_*.py"))
    chosen = [f"tests/kernels/{file}" for file in files if file not in EXCEPTIONS]
    left_out = [f"tests/kernels/{name}" for name in EXCEPTIONS if "::" in name]
    left_out += [f"{file}::{test}" for file in chosen for test in COMPILED]  # pytest compares beginnings
    return [*chosen, *(f"--deselect={name}" for name in left_out)]


class _Counts:
    """A plugin of pytest: what became of the tests."""

    def __init__(self) -> None:
        self.passed, self.failed = 0, []  # type: int, list[str]

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            lines = str(report.longrepr).strip().splitlines()
            self.failed.append(f"{report.nodeid}: {next((x for x in lines if x.startswith('E  ')), lines[-1]).strip()}")
        elif report.when == "call" and report.passed:
            self.passed += 1

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.failed.append(f"{report.nodeid}: {str(report.longrepr).strip().splitlines()[-1]}")


def run_tests(quick: bool, ops: Sequence[str]) -> dict[str, Any]:
    """The kernel tests as `python -m ttsem.sanitize pytest` runs them, counted."""
    return _tested([test for test in kernel_tests() if not ops or any(op in test for op in ops)])


def _tested(chosen: Sequence[str], **options: Any) -> dict[str, Any]:
    """Arguments of pytest, run in a session of ttsem with some options."""
    import pytest
    from ttsem.sanitize import session

    counts = _Counts()
    with session(CAPABILITY, "<pytest>", **options) as state:
        status = pytest.main(["-q", "-p", "no:cacheprovider", *chosen], plugins=[counts])
    if status and not counts.failed:
        counts.failed.append(f"pytest ended with {status}")
    return {"launches": state.launches, "unchecked": state.races_unchecked, **vars(counts)}


def run_operators(quick: bool, ops: Sequence[str]) -> dict[str, Any]:
    """Every operator's workloads. What is imported here before the session makes its tensors on the CPU."""
    from ttsem.sanitize import session

    from benchmarks.hardware_report import triton_operators
    from benchmarks.sanitized import judge

    rows = []
    for op in ops or triton_operators():
        began = time.perf_counter()
        with session(CAPABILITY, op) as state:
            judged = judge(op, state, ARCHITECTURES[:1] if quick else ARCHITECTURES, ragged_only=quick)
        print(f"{operator_line(asdict(judged))}, {time.perf_counter() - began:.0f} s", flush=True)
        rows.append(asdict(judged))
    return {"operators": rows}


def operator_line(row: dict[str, Any]) -> str:
    """One operator's outcome."""
    faults = "no fault" if not row["faults"] else f"{len(row['faults'])} FAULTS"
    error = f"largest error {row['ratio']:.2f} times that of eager bf16 ({row['where']})"
    return f"{row['op']}: {row['launches']} launches, {row['unchecked']} too large for races, {faults}, {error}"


def run_steps(quick: bool, ops: Sequence[str]) -> dict[str, Any]:
    """Whole steps. The test fakes the device itself, so that a forgotten copy to it is an error there."""
    return _tested([STEPS], cuda_is_cpu=False)


PARTS: dict[str, Callable[[bool, Sequence[str]], dict[str, Any]]] = {
    "tests": run_tests,
    "operators": run_operators,
    "steps": run_steps,
}


def parse(output: Iterable[str]) -> dict[str, Any] | None:
    """The result that a part printed last, or None if it did not get there."""
    found = [line for line in output if line.startswith(MARK)]
    return json.loads(found[-1].removeprefix(MARK)) if found else None


def faults_of(part: str, result: dict[str, Any] | None) -> list[str]:
    """Everything that a part found wrong."""
    if result is None:
        return [f"{part}: ended without a result"]
    told = [*result.get("failed", []), *(fault for row in result.get("operators", []) for fault in row["faults"])]
    if not all(row["launches"] for row in result.get("operators", [result])):
        told.append("nothing was launched")
    return [f"{part}: {fault}" for fault in told]


def summary(part: str, result: dict[str, Any]) -> str:
    """One line of a part for the end of the output."""
    rows = result.get("operators")
    if rows is None:
        return (
            f"{part}: {result['passed']} tests passed, {len(result['failed'])} failed, {result['launches']} launches, "
            f"{result['unchecked']} of them too large to look for races"
        )
    launches, unchecked = (sum(row[name] for row in rows) for name in ("launches", "unchecked"))
    worst = max(rows, key=lambda row: row["ratio"])
    return (
        f"{part}: {len(rows)} operators, {launches} launches, {unchecked} of them too large to look for races, "
        f"largest error {worst['ratio']:.2f} times that of eager bf16 ({worst['op']})"
    )


def run_part(part: str, options: argparse.Namespace) -> tuple[dict[str, Any] | None, float]:
    """A part in a process of its own, its output shown as it comes; (its result, seconds)."""
    command = [sys.executable, "-u", "-m", "benchmarks.sanitize", "--part", part, "--child", *options.ops]
    command += ["--quick"] * options.quick
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    began, lines = time.perf_counter(), []
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if not line.startswith(MARK):
                print(line, end="", flush=True)
    return parse(lines), time.perf_counter() - began


def main() -> int:
    """Run the parts; print what each found; exit status 1 on a fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", metavar="OP", help="operators of the first two parts (default: all)")
    parser.add_argument("--part", choices=PARTS, action="append", help="default: all; with --quick not the tests")
    parser.add_argument("--quick", action="store_true", help="fewer shapes: two minutes")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if reason := refusal():
        print(f"not run: {reason}")
        return 1
    if options.child:
        print(f"{MARK}{json.dumps(PARTS[options.part[0]](options.quick, options.ops))}", flush=True)
        return 0
    lines, faults = [], []
    for part in options.part or [one for one in PARTS if one != "tests" or not options.quick]:
        result, seconds = run_part(part, options)
        faults += faults_of(part, result)
        lines += [f"{summary(part, result)}, {seconds:.0f} s"] if result else []
    print("", *lines, *faults, "no fault" if not faults else f"{len(faults)} faults", sep="\n")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
