"""Which releases of PyTorch and Triton the kernels work with.

    python -m benchmarks.version_matrix [--versions 2.8.0 2.14.1/3.9.0 ...] [--folder .matrix] [--keep]   (make matrix)
    python -m benchmarks.version_matrix --versions 2.8.0 --op swiglu --tests tests/kernels/test_swiglu.py

A pair is a release of torch with the Triton that it asks for, or, after a slash, with another. For each, one after the
other: a virtual environment is made in the folder and what it installs is printed; the tracked sources are copied
beside it and installed with their C++ extension; every kernel is compiled for every architecture as the hardware report
does; tests/kernels run in Triton's interpreter. Less of that with --op, --architectures and --tests. Then the
environment (about 6 GB) is removed, unless --keep is given.

Exit status 1 if in any of them a kernel does not compile, spills or asks for too much shared memory, or a test fails.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
VERSIONS = ("2.8.0", "2.11.0", "2.14.1", "2.14.1/3.9.0")  # the oldest, one between, the pinned one, the newest Triton
# numpy: from 2.4 on it turns no array of one number into a Python number, as the interpreter of Triton 3.4 asks.
TOOLS = ("setuptools>=77", "ninja", "packaging", "pytest", "hypothesis", "numpy<2.4")
COUNTS = ("failed", "passed", "skipped", "error")


@dataclass(frozen=True)
class Pair:
    """A release of torch, and of Triton where it is not the one that torch asks for."""

    torch: str
    triton: str | None = None

    @property
    def name(self) -> str:
        """A name for folders: torch-2.14.1-triton-3.9.0."""
        return f"torch-{self.torch}" + (f"-triton-{self.triton}" if self.triton else "")


def parsed(text: str) -> Pair:
    """The pair that "2.8.0" or "2.14.1/3.9.0" names.

    Raises:
        ValueError: it is neither.
    """
    found = re.fullmatch(r"(\d+\.\d+\.\d+)(?:/(\d+\.\d+\.\d+))?", text)
    if found is None:
        raise ValueError(f"{text!r}: expected TORCH or TORCH/TRITON, such as 2.8.0 or 2.14.1/3.9.0")
    return Pair(found[1], found[2])


@dataclass
class Outcome:
    """What was found for a pair: versions, a row per kernel and architecture (`code_of`), the counts of the tests."""

    torch: str
    triton: str
    code: list[dict[str, Any]] = field(default_factory=list)
    tests: dict[str, int] = field(default_factory=dict)


def broken(row: dict[str, Any]) -> bool:
    """Whether a kernel does not compile, spills, or asks for more shared memory than a block can have."""
    return "error" in row or row["spilled_bytes"] > 0 or row["shared"] > row["shared_limit"]


def counts_of(output: str) -> dict[str, int]:
    """The counts in the last line of pytest, {"passed": 12, ...}; {"error": 1} where there is no such line."""
    for line in reversed(output.splitlines()):
        found = {name: int(count) for count, name in re.findall(rf"(\d+) ({'|'.join(COUNTS)})", line)}
        if found and " in " in line:
            return found
    return {"error": 1}


def succeeded(outcome: Outcome) -> bool:
    """Whether no kernel is `broken` and no test failed."""
    failed = outcome.tests.get("failed", 0) + outcome.tests.get("error", 0)
    return bool(outcome.code) and not any(broken(row) for row in outcome.code) and failed == 0


def table(outcomes: Iterable[Outcome]) -> str:
    """One line for each pair, as Markdown."""
    lines = [
        "| torch | Triton | architectures | kernels | not compiled | spills (most bytes) | too much shared memory "
        "| at 255 registers | tests of the kernels |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for outcome in outcomes:
        compiled = [row for row in outcome.code if "error" not in row]
        spills = [row["spilled_bytes"] for row in compiled if row["spilled_bytes"]]
        shared = sum(row["shared"] > row["shared_limit"] for row in compiled)
        full = sum(row["registers"] == 255 for row in compiled)
        architectures = ", ".join(str(a) for a in sorted({row["arch"] for row in outcome.code}))
        tests = ", ".join(f"{count} {name}" for name, count in outcome.tests.items()) or "not run"
        lines.append(
            f"| {outcome.torch} | {outcome.triton} | {architectures} | {len(compiled)} "
            f"| {len(outcome.code) - len(compiled)} | {f'{len(spills)} ({max(spills)})' if spills else '0'} "
            f"| {shared} | {full} | {tests} |"
        )
    return "\n".join(lines)


def code_of(op: str, architectures: list[int]) -> list[dict[str, Any]]:
    """A row per distinct code of an operator: op, kernel, workload, arch, and the figures or the compiler's error."""
    from benchmarks import aot

    rows = []
    for workload, _, launch, arch, _ in aot.distinct_launches(op, architectures):
        row = {"op": op, "kernel": launch.kernel.__name__, "workload": workload.label, "arch": arch}
        rows.append(row | _figures(launch, arch))
    return rows


def _figures(launch: Any, arch: int) -> dict[str, Any]:
    from benchmarks import aot

    try:
        code, _ = aot.compile_launch(launch, arch)
    except Exception as error:  # the compiler refuses in many ways: the row says in which
        return {"error": f"{type(error).__name__}: {str(error)[-500:]}"}
    limit = aot.LIMITS[arch]["shared_block"]
    figures = {"registers": code.registers, "spilled_bytes": code.spilled_bytes, "shared": code.shared}
    return figures | {"shared_limit": limit, "configuration": code.configuration}


def compile_all(operators: list[str] | None, architectures: list[int], output: Path, jobs: int) -> None:
    """Inside an environment: write an `Outcome` without tests, of the operators' Triton kernels, as JSON; None: all."""
    import torch
    import triton

    from benchmarks.hardware_report import triton_operators

    with ProcessPoolExecutor(jobs) as pool:
        parts = pool.map(partial(code_of, architectures=architectures), operators or triton_operators())
        code = [row for part in parts for row in part]
    output.write_text(json.dumps({"torch": torch.__version__, "triton": triton.__version__, "code": code}))


def _copied_sources(target: Path) -> None:
    """The tracked files, as they lie in the working tree, in a folder of their own: the build writes beside them."""
    shutil.rmtree(target, ignore_errors=True)
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name, follow_symlinks=False)


def _install(pair: Pair, folder: Path, sources: Path) -> Path:
    """The Python of the pair's environment, made where there is none, with the sources installed into it."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        _pip(python, "install", f"torch=={pair.torch}", "torchvision")
    _pip(python, "install", *TOOLS)
    _copied_sources(sources)
    build = {"SKIP_CUDA_BUILD": "TRUE", "FORCE_BUILD": "TRUE"}
    _pip(python, "install", "--no-build-isolation", "-e", str(sources), **build)
    if pair.triton:  # last and without asking: torch's own is what pip would put back
        _pip(python, "install", "--no-deps", f"triton=={pair.triton}")
    _pip(python, "list")
    return python


def _pip(python: Path, *arguments: str, **environment: str) -> None:
    command = [str(python), "-m", "pip", "--disable-pip-version-check", *arguments]
    subprocess.run(command, env={**os.environ, **environment}, check=True)


def examined(pair: Pair, folder: Path, options: argparse.Namespace) -> Outcome:
    """Install, compile, test; the environment is removed afterwards unless `options.keep`."""
    home, sources, result = folder / pair.name, folder / f"{pair.name}-sources", folder / f"{pair.name}.json"
    try:
        python = _install(pair, home, sources)
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment |= {"OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(folder / f"{pair.name}-cache")}
        command = [str(python), "-W", "ignore", "-m", "benchmarks.version_matrix", "--compile-here", str(result)]
        command += ["--jobs", str(options.jobs), "--architectures", *map(str, options.architectures)]
        command += ["--op", *options.op] if options.op else []
        subprocess.run(command, cwd=sources, env=environment, check=True)
        outcome = Outcome(**json.loads(result.read_text()))
        tests = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", *options.tests]
        done = subprocess.run(tests, cwd=sources, env=environment, capture_output=True, text=True, check=False)
        print(done.stdout[-3000:], flush=True)
        outcome.tests = counts_of(done.stdout)
        return outcome
    finally:
        if not options.keep:
            for path in (home, sources, folder / f"{pair.name}-cache"):
                shutil.rmtree(path, ignore_errors=True)


def main() -> int:
    """The command line."""
    from benchmarks.aot import ARCHITECTURES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--versions", nargs="+", default=list(VERSIONS), metavar="TORCH[/TRITON]")
    parser.add_argument("--architectures", type=int, nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--op", nargs="+", default=None, help="operators to compile (default: all)")
    parser.add_argument("--tests", nargs="+", default=["tests/kernels"], help="what pytest runs")
    parser.add_argument("--folder", type=Path, default=ROOT / ".matrix", help="for environments and results")
    parser.add_argument("--keep", action="store_true", help="leave the environments there, to be used again")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="operators compiled at once")
    parser.add_argument("--compile-here", type=Path, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.compile_here:
        compile_all(options.op, options.architectures, options.compile_here, options.jobs)
        return 0
    try:
        pairs = [parsed(text) for text in options.versions]
    except ValueError as error:
        parser.error(str(error))
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    outcomes = []
    for pair in pairs:
        outcomes.append(examined(pair, folder, options))
        (folder / "matrix.md").write_text(table(outcomes) + "\n")
    for row in (row for outcome in outcomes for row in outcome.code if broken(row)):
        print(json.dumps(row))
    print(table(outcomes))
    return int(not all(succeeded(outcome) for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
