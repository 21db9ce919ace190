"""Compile a recorded kernel launch for an architecture without a device, and read the machine code.

    python -m benchmarks.aot swiglu [--arch 80 90 ...] [--sass FOLDER]

prints one line per kernel of an operator's workloads: registers, spills, shared memory, occupancy, tensor-core
instructions, widths of the loads. `benchmarks.hardware_report` does the same for all operators and adds traffic.
TRITON_INTERPRET must not be set.
"""

import argparse
import hashlib
import importlib
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from aligntok.kernels._triton import ARCHITECTURES, Launch, record_launches
from benchmarks.workloads import Workload

PASSES = ("forward", "backward")
_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float64: "fp64",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
    torch.bool: "i1",
}
# Per multiprocessor: registers, shared memory in bytes (and the most that one block may use), warps, blocks.
# NVIDIA, CUDA C++ Programming Guide, table "Technical Specifications per Compute Capability".
_SMALL = {"registers": 65536, "shared": 100 * 1024, "shared_block": 99 * 1024, "warps": 48, "blocks": 24}
_LARGE = {"registers": 65536, "shared": 228 * 1024, "shared_block": 227 * 1024, "warps": 64, "blocks": 32}
LIMITS = {
    80: _LARGE | {"shared": 164 * 1024, "shared_block": 163 * 1024},
    86: _SMALL | {"blocks": 16},
    89: _SMALL,
    90: _LARGE,
    100: _LARGE,
    120: _SMALL,
}
SHARED_RESERVED = 1024  # bytes of shared memory that the driver keeps per block, same table


@dataclass(frozen=True)
class KernelCode:
    """What the compiler made of one launch on one architecture."""

    kernel: str
    arch: int
    grid: tuple[int, ...]
    configuration: dict
    registers: int
    spilled_bytes: int
    shared: int
    occupancy: float  # share of the multiprocessor's warps
    hmma: int  # tensor-core instructions of sm_80, also used by small tiles on sm_90
    hgmma: int  # warp-group tensor-core instructions of sm_90
    utcmma: int  # those of sm_100, whose accumulators lie in tensor memory
    dots: int  # tt.dot in the source: each has to become one of the three
    loads: dict[str, int]  # width in bits -> global load instructions (asynchronous copies included)
    stores: dict[str, int]
    atomics: int


def _tool(name: str) -> str:
    found = sorted(Path(triton.__file__).parent.rglob(f"bin/{name}"))
    if not found:
        raise FileNotFoundError(f"{name} does not come with triton {triton.__version__}")
    return str(found[0])


def source(launch: Launch) -> ASTSource:
    """The kernel with the types, constants and alignments that a real launch would specialise it for."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
        elif isinstance(value, Tensor):
            signature[parameter.name] = f"*{_TYPES[value.dtype]}"
            aligned = value.storage_offset() * value.element_size() % 16 == 0
            if aligned:
                attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, bool):
            signature[parameter.name] = "i1"
        elif isinstance(value, int):
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            assert isinstance(value, float), (parameter.name, type(value))
            signature[parameter.name] = "fp32"
    return ASTSource(launch.kernel, signature, constants, attributes)


def disassemble(cubin: bytes) -> tuple[str, str]:
    """SASS, and the resource usage line(s), of a cubin."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        sass = subprocess.run([_tool("nvdisasm"), "-c", str(file)], capture_output=True, text=True, check=True).stdout
        usage = [_tool("cuobjdump"), "--dump-resource-usage", str(file)]
        return sass, subprocess.run(usage, capture_output=True, text=True, check=True).stdout


def occupancy(arch: int, registers: int, shared: int, warps: int) -> float:
    """Share of a multiprocessor's warps that can be resident; registers are handed out in units of 256 per warp."""
    limit = LIMITS[arch]
    per_warp = -(-registers * 32 // 256) * 256
    blocks = min(
        limit["registers"] // (per_warp * warps),
        limit["shared"] // (shared + SHARED_RESERVED),
        limit["warps"] // warps,
        limit["blocks"],
    )
    return blocks * warps / limit["warps"]


def _widths(sass: str, pattern: str) -> dict[str, int]:
    found: Counter[str] = Counter()
    for suffixes in re.findall(pattern, sass):
        width = re.search(r"\.(128|64|U16|S16|U8|S8)\b", suffixes)
        found[{"U16": "16", "S16": "16", "U8": "8", "S8": "8"}.get(width[1], width[1]) if width else "32"] += 1
    return dict(sorted(found.items(), key=lambda item: -int(item[0])))


def _figure(name: str, usage: str) -> int:
    found = re.search(rf"\b{name}:(\d+)", usage)
    assert found is not None, f"no {name} in {usage!r}"
    return int(found[1])


def compile_launch(launch: Launch, arch: int) -> tuple[KernelCode, str]:
    """Compile one launch and read its SASS.

    Returns:
        the figures and the SASS. Nothing is checked here: the report decides what is an error.
    """
    target = GPUTarget("cuda", arch, 32)
    compiled = triton.compile(source(launch), target=target, options=launch.options)
    sass, usage = disassemble(compiled.asm["cubin"])
    registers, stack, local = (_figure(name, usage) for name in ("REG", "STACK", "LOCAL"))
    shared = compiled.metadata.shared
    warps = compiled.metadata.num_warps
    configuration = {p.name: launch.arguments[p.name] for p in launch.kernel.params if p.is_constexpr}
    code = KernelCode(
        kernel=launch.kernel.__name__,
        arch=arch,
        grid=launch.grid,
        configuration=configuration | launch.options,
        registers=registers,
        spilled_bytes=stack + local,
        shared=shared,
        occupancy=occupancy(arch, registers, shared, warps),
        hmma=len(re.findall(r"\bHMMA\b", sass)),
        hgmma=len(re.findall(r"\bHGMMA\b", sass)),
        utcmma=len(re.findall(r"\bUTC\w*MMA\b", sass)),
        dots=len(re.findall(r"tt\.dot\b", compiled.asm["ttir"])),
        loads=_widths(sass, r"\b(?:LDGSTS|LDG)((?:\.\w+)*)"),
        stores=_widths(sass, r"\bSTG((?:\.\w+)*)"),
        atomics=len(re.findall(r"\b(?:ATOMG?|RED)\b", sass)),
    )
    return code, sass


def launches_of(workload: Workload, arch: int) -> tuple[list[Launch], list[Launch]]:
    """The launches of the forward and of the backward pass of a workload, recorded on the meta device."""
    with record_launches(arch) as launches:
        inputs = workload.make("meta", workload.dtype, **workload.shape)
        outputs = workload.ours(*inputs, implementation="triton")
        forward = len(launches)
        if workload.differentiable():
            results = [y for y in ([outputs] if isinstance(outputs, Tensor) else outputs) if y.requires_grad]
            wanted = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
            torch.autograd.grad(results, wanted, [torch.empty_like(y) for y in results])
    return launches[:forward], launches[forward:]


def key(launch: Launch, arch: int) -> str:
    """Equal for launches that compile to the same code."""
    kernel = source(launch)
    parts = (launch.kernel.__name__, arch, kernel.signature, kernel.constants, kernel.attrs, launch.options)
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def workloads_of(op: str) -> list[Workload]:
    """WORKLOADS of benchmarks/bench_<op>.py."""
    return list(importlib.import_module(f"benchmarks.bench_{op}").WORKLOADS)


def distinct_launches(op: str, architectures: Iterable[int]) -> Iterator[tuple[Workload, str, Launch, int, str]]:
    """(first workload that launches it, pass, launch, architecture, key) of every distinct code of an operator."""
    seen: set[str] = set()
    for workload in workloads_of(op):
        for arch in architectures:
            for name, launches in zip(PASSES, launches_of(workload, arch), strict=True):
                for launch in launches:
                    identity = key(launch, arch)
                    if identity not in seen:
                        seen.add(identity)
                        yield workload, name, launch, arch, identity


def main() -> int:
    """Print the code figures of one operator."""
    parser = argparse.ArgumentParser(description="Compile an operator's kernels without a device.")
    parser.add_argument("op", help="name of the operator: benchmarks/bench_<op>.py")
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHITECTURES, default=[80, 90])
    parser.add_argument("--sass", type=Path, default=None, help="folder to write the SASS of every kernel to")
    options = parser.parse_args()
    for workload, _, launch, arch, identity in distinct_launches(options.op, options.arch):
        code, sass = compile_launch(launch, arch)
        print(workload.label, "|", *(f"{k}={v}" for k, v in asdict(code).items()), flush=True)
        if options.sass:
            options.sass.mkdir(parents=True, exist_ok=True)
            (options.sass / f"{code.kernel}_sm{arch}_{identity[:8]}.sass").write_text(sass)
    return 0


if __name__ == "__main__":
    sys.exit(main())
