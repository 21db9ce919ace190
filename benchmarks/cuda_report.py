"""What nvcc makes of the CUDA sources, for sm_80 and sm_90, on a machine with or without a GPU.

    python -m benchmarks.cuda_report

compiles every csrc/*.cu with -Xptxas -v and prints registers, spilled bytes, stack and shared memory of every kernel.
The exit status is 1 if something spills or does not compile, 0 otherwise, also where there is no nvcc (it says so).
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from aligntok._cuda_toolkit import find_toolkit

CSRC = Path(__file__).resolve().parent.parent / "csrc"
ARCHITECTURES = (80, 90)
_KERNEL = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\d+)\w*'")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


def missing() -> str | None:
    """Why nothing can be compiled here, or None."""
    return find_toolkit()[1]


def sources() -> list[Path]:
    """The CUDA sources, in alphabetical order."""
    return sorted(CSRC.glob("*.cu"))


def _readable(mangled: list[str]) -> list[str]:
    """C++ names without namespaces and parameters: "gan_loss_kernel<Phi 1, float>"; mangled where c++filt is absent."""
    if not mangled or shutil.which("c++filt") is None:
        return mangled
    answer = subprocess.run(["c++filt", *mangled], capture_output=True, text=True, check=True).stdout
    names = []
    for line in answer.splitlines():
        name = re.sub(r"\(anonymous namespace\)::|aligntok::|^void ", "", line)
        names.append(re.sub(r"\((\w+)\)(\d+)", r"\1 \2", name).partition("(")[0])
    return names


def parse(words: str, source: str) -> list[dict[str, Any]]:
    """One row per kernel out of what `ptxas -v` says: source, kernel, arch, registers, spilled_bytes, stack,
    shared.

    `spilled_bytes` are stored and loaded, `stack` bytes per thread, `shared` bytes per block.
    """
    found: list[dict[str, Any]] = []
    row: dict[str, Any] | None = None
    for line in words.splitlines():
        if match := _KERNEL.search(line):
            row = {"source": source, "kernel": match[1], "arch": int(match[2])}
            found.append(row)
        elif row is not None and (match := _STACK.search(line)):
            row |= {"spilled_bytes": int(match[2]) + int(match[3]), "stack": int(match[1])}
        elif row is not None and (match := _REGISTERS.search(line)):
            shared = _SHARED.search(line)
            row |= {"registers": int(match[1]), "shared": int(shared[1]) if shared else 0}
    for row, name in zip(found, _readable([row["kernel"] for row in found]), strict=True):
        row["kernel"] = name
    return found


def compile_source(source: Path, arch: int) -> list[dict[str, Any]]:
    """Compile one source for one architecture and return its rows.

    Raises:
        RuntimeError: there is no nvcc, or it refused the source; with its words.
    """
    toolkit, reason = find_toolkit()
    if toolkit is None:
        raise RuntimeError(reason)
    with tempfile.TemporaryDirectory() as folder:
        command = [str(toolkit.home / "bin" / "nvcc"), "-O3", "-std=c++17", f"-arch=sm_{arch}", "-Xptxas", "-v"]
        command += ["-cubin", str(source), "-o", str(Path(folder) / "out.cubin")]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        raise RuntimeError(f"nvcc does not compile {source.name} for sm_{arch}:\n{answer.stderr.strip()}")
    return parse(answer.stdout + answer.stderr, source.name)


def rows() -> list[dict[str, Any]]:
    """All rows of all sources and architectures, see `parse`; none where `missing()` gives a reason.

    Raises:
        RuntimeError: nvcc refused a source; with its words.
    """
    if missing():
        return []
    return [row for source in sources() for arch in ARCHITECTURES for row in compile_source(source, arch)]


def spilling(found: list[dict[str, Any]]) -> list[str]:
    """One sentence per kernel that spills registers or keeps variables in local memory."""
    return [
        f"{row['kernel']} on sm_{row['arch']}: {row['spilled_bytes']} bytes spilled, {row['stack']} bytes of stack"
        for row in found
        if row["spilled_bytes"] or row["stack"]
    ]


def table(found: list[dict[str, Any]]) -> str:
    """A Markdown table of the rows."""
    names = ("source", "kernel", "arch", "registers", "spilled_bytes", "stack", "shared")
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    return "\n".join(lines + ["| " + " | ".join(str(row[name]) for name in names) + " |" for row in found])


def main() -> int:
    """Print the table; exit status 1 on spills or a failed compilation."""
    if missing():
        print(f"CUDA sources not compiled: {missing()}")
        return 0
    try:
        found = rows()
    except RuntimeError as error:
        print(error)
        return 1
    print(table(found))
    problems = spilling(found)
    print("", *(problems or [f"{len(found)} kernels, none spills"]), sep="\n")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
