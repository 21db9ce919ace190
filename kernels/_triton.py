"""What all Triton kernels here share: the import, the operator, the launch, the pinned configuration.

Triton is absent on some platforms (macOS), interpreted in tests (TRITON_INTERPRET=1), and used without any device
when the hardware report compiles every kernel ahead of time. The kernels' files need not know: they say
`from ._triton import configuration, launch, operator, tl, triton, wrap_triton`, launch with
`launch(wrap_triton(kernel), ...)`, and take block sizes from `configuration`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import torch
import torch.library
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.library import custom_op, triton_op

OLDEST_TRITON = (3, 4)  # that of torch 2.8: the first with triton.knobs


def release(version: str) -> tuple[int, ...]:
    """(major, minor) of a version such as "3.4.0+git1234"."""
    return tuple(map(int, re.findall(r"\d+", version)[:2]))


def version_refusal(version: str) -> str | None:
    """Why a release of Triton such as "3.3.1" cannot be used, or None."""
    if release(version) >= OLDEST_TRITON:
        return None
    return f"it is version {version}, the kernels need {'.'.join(map(str, OLDEST_TRITON))} or newer (torch 2.8)"


try:
    import triton

    _refused = version_refusal(triton.__version__)
    if _refused:
        raise ImportError(_refused)
    import triton.language as tl

    ABSENT: str | None = None
    RELEASE = release(triton.__version__)
    INTERPRETED: bool = triton.knobs.runtime.interpret
except ImportError as error:

    class _Absent:
        """Lets modules with kernels be imported without Triton; `refusal` keeps the kernels from being called."""

        constexpr = None

        @staticmethod
        def jit(function: Callable) -> Callable:
            return function

        @staticmethod
        def cdiv(a: int, b: int) -> int:
            return -(-a // b)

        @staticmethod
        def next_power_of_2(n: int) -> int:
            return 1 << (n - 1).bit_length()

    triton = tl = _Absent()
    ABSENT = f"Triton cannot be used ({error}); it exists for Linux: pip install triton"
    INTERPRETED = False
    RELEASE = OLDEST_TRITON

ARCHITECTURES = (80, 86, 89, 90, 100, 120)  # A100; RTX 30 and A10; RTX 40, L4 and L40; H100; B200; RTX 50
# Whose configurations an architecture without its own takes. 86, 89 and 120 have the tensor-core instructions of 80 and
# 99 KiB of shared memory for a block, where it has 163; 100 has the shared memory of 90 and keeps accumulators outside
# the registers.
LIKE = {86: 80, 89: 86, 100: 90, 120: 86}
Configuration = dict[str, Any]  # block sizes (upper case), num_warps, num_stages
Pinned = TypeVar("Pinned")


@dataclass(frozen=True)
class Launch:
    """One kernel launch: `arguments` by parameter name (tensors on the meta device), `options` such as num_warps."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]


_recorder: ContextVar[tuple[int, list[Launch]] | None] = ContextVar("aligntok_recorder", default=None)
_asked: ContextVar[dict[str, Configuration] | None] = ContextVar("aligntok_asked_configurations", default=None)
_overrides: ContextVar[Mapping[str, Configuration] | None] = ContextVar("aligntok_configurations", default=None)


def operator(name: str, mutates_args: Sequence[str] = ()) -> Callable[[Callable], Any]:
    """Register `aligntok::name`: a `triton_op`, so that the compiler sees the kernels inside.

    Under the interpreter, which no compiler can trace, an opaque `custom_op`. The body doubles as the fake
    implementation: `launch` does nothing for fake and meta tensors, so that shapes and strides cannot differ.
    """

    def register(body: Callable) -> Any:
        if not (INTERPRETED or ABSENT):
            return triton_op(f"aligntok::{name}", body, mutates_args=mutates_args)
        op = custom_op(f"aligntok::{name}", body, mutates_args=mutates_args)
        op.register_fake(body)
        return op

    return register


def wrap_triton(kernel: Any) -> Any:
    """torch's `wrap_triton`, which before torch 2.14 refuses interpreted kernels: those need no wrapping.

    torch finds the kernels of an operator by this very name in the operator's body, so it must be written there.
    """
    return kernel if INTERPRETED else torch.library.wrap_triton(kernel)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **meta: Any) -> None:
    """kernel[grid](*arguments, **meta), where `kernel` comes out of `wrap_triton`. A kernel of many arguments gets them
    all by name, so that none can take another's place.

    The tensors' GPU is the one that it runs on, whichever is current: Triton itself would launch on the current one.
    Meta and fake tensors are not computed on; inside `record_launches` the launch is written down.
    """
    tensors = [a for a in (*arguments, *meta.values()) if isinstance(a, Tensor)]
    if any(a.is_meta or isinstance(a, FakeTensor) for a in tensors):
        recorder = _recorder.get()
        if recorder is not None:
            recorder[1].append(_described(kernel, grid, arguments, meta))
        return
    with _current(tensors):
        kernel[grid](*arguments, **meta)


def _current(tensors: Sequence[Tensor]) -> AbstractContextManager:
    """Inside, the GPU of the tensors is the current one. Nothing while the compiler traces: its code does the same."""
    device = next((tensor.device for tensor in tensors), torch.device("cpu"))
    traced = any(isinstance(tensor, FunctionalTensor) for tensor in tensors)
    if device.type != "cuda" or traced or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def _described(kernel: Any, grid: tuple[int, ...], arguments: Sequence[Any], meta: dict[str, Any]) -> Launch:
    kernel = getattr(kernel, "kernel", kernel)  # out of torch's traceable wrapper
    options = {name: value for name, value in meta.items() if name not in kernel.arg_names}
    named = dict(zip(kernel.arg_names, arguments, strict=False)) | {n: v for n, v in meta.items() if n not in options}
    return Launch(kernel, tuple(grid), named, options)


@contextmanager
def record_launches(architecture: int) -> Iterator[list[Launch]]:
    """Collect the launches that operators make for meta tensors, configured for one of ARCHITECTURES."""
    assert architecture in ARCHITECTURES, architecture
    launches: list[Launch] = []
    token = _recorder.set((architecture, launches))
    try:
        yield launches
    finally:
        _recorder.reset(token)


@cache
def _capability(index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def architecture(device: torch.device) -> int:
    """The architecture to configure for: the newest in ARCHITECTURES that is not newer than the device."""
    recorder = _recorder.get()
    if recorder is not None:
        return recorder[0]
    if device.type != "cuda" or not torch.cuda.is_available():
        return ARCHITECTURES[0]
    major, minor = _capability(device.index)
    return max((a for a in ARCHITECTURES if a <= 10 * major + minor), default=ARCHITECTURES[0])


def pinned(table: Mapping[int, Pinned], device: torch.device) -> Pinned:
    """A device's entry in a table by architecture: its own, or that of the architecture that it is LIKE."""
    found = architecture(device)
    while found not in table:
        found = LIKE[found]
    return table[found]


def configuration(kernel: str, table: Mapping[int, Configuration], device: torch.device) -> Configuration:
    """The pinned block sizes and options of a kernel on a device, unless `use_configurations` says otherwise."""
    overrides = _overrides.get() or {}
    chosen = dict(overrides[kernel] if kernel in overrides else pinned(table, device))
    asked = _asked.get()
    if asked is not None:
        asked[kernel] = chosen
    return chosen


@contextmanager
def record_configurations() -> Iterator[dict[str, Configuration]]:
    """Collect the configurations that operators ask for inside the block, by the names of their kernels."""
    asked: dict[str, Configuration] = {}
    token = _asked.set(asked)
    try:
        yield asked
    finally:
        _asked.reset(token)


@contextmanager
def use_configurations(configurations: Mapping[str, Configuration]) -> Iterator[None]:
    """Inside the block, launch the named kernels with these configurations: for tuning, and for small test shapes."""
    token = _overrides.set({**(_overrides.get() or {}), **configurations})
    try:
        yield
    finally:
        _overrides.reset(token)


def dot_precision(dtype: torch.dtype) -> str:
    """`input_precision` for tl.dot: fp32 operands follow torch's float32 matmul precision, others have no choice."""
    return "tf32" if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest" else "ieee"


def refusal(device: torch.device) -> str | None:
    """Why no Triton kernel can run on a device, or None."""
    if ABSENT:
        return ABSENT
    if device.type == "cuda":
        if not torch.cuda.is_available() or _capability(device.index) >= (8, 0):  # a faked device is taken for real
            return None
        return "the Triton kernels need compute capability 8.0 (A100) or newer"
    if INTERPRETED and device.type == "cpu":
        return None
    if _recorder.get() is not None and device.type == "meta":
        return None
    return f"the Triton kernels are for CUDA devices, not for {device.type!r}"
