"""A CUDA device that is not there, for every branch that says 'cuda' to be taken once on any machine.

Inside `faked_cuda()` torch.cuda answers as one GPU does. A tensor that is sent to "cuda" becomes an `OnCuda`, whose
numbers lie in host memory: it says `device="cuda:0"`, plain tensors go on saying "cpu", and an operation on both fails
as it does on a GPU; so do `.numpy()` of what is on the device and pinning it. Streams and events are written down.
A CUDA graph is a list of the operators that ran while it was recorded; a replay runs them again on the same memory,
so that whatever Python did in between is left out, as on a GPU.

Not faked, because nothing here could tell: the order of work on different streams, memory that is handed out again too
early (`record_stream`), CUDA's own lists of what autocast lowers (the processor's are used), cuDNN, NCCL, the kernels
in CUDA C++, DALI on a GPU, and the seconds of anything.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch._dynamo  # reads torch.cuda's functions while it is imported, which has to be before they are replaced
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

GPU = torch.device("cuda", 0)
_seen: Counter[str] = Counter()  # what was done that only a GPU has, by name
_recording: list[Graph] = []  # the graph that is being recorded, if any
_here = threading.local()  # .stream, the current one of a thread

# What PyTorch takes from both devices: copies, and numbers or indices from the host.
_MIXING = {"copy_", "to", "__getitem__", "__setitem__", "index_select", "set_data", "type_as", "__get__", "__set__"}


def _waits() -> bool:
    """Whether a copy to the host is one on a GPU too: PyTorch's clipping asks C++ where gradients lie, and C++ knows
    nothing of a faked device."""
    return not sys._getframe(2).f_code.co_filename.endswith("clip_grad.py")


def _is_cuda(device: Any) -> bool:
    return device is not None and not isinstance(device, int) and torch.device(device).type == "cuda"


def _numbered(device: str | torch.device) -> str | torch.device:
    return GPU if _is_cuda(device) else device


class OnCuda(Tensor):
    """A tensor of the faked device. For PyTorch's C++ it lies on the CPU, which its autograd can do without a GPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> OnCuda:
        made = Tensor._make_wrapper_subclass(
            cls, host.shape, strides=host.stride(), storage_offset=host.storage_offset(), dtype=host.dtype
        )
        made.host = host
        return made

    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(function, args, kwargs or {})

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        if args and isinstance(args[0], Tensor):
            args = (args[0].device, args[0].dtype, *args[1:])
        copy = kwargs.pop("copy", False)
        device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        layout = {} if memory_format is None else {"memory_format": memory_format}
        if device is None or device.type == "cuda":
            return super().to(dtype or self.dtype, copy=copy, **layout)
        assert not (self.requires_grad and torch.is_grad_enabled()), (
            "a gradient through a copy to the host is not faked"
        )
        assert not _recording, "a copy to the host while a CUDA graph is recorded"
        _seen["read back"] += not non_blocking and _waits()
        return self.host.detach().clone().to(dtype or self.dtype, **layout)

    def cpu(self) -> Tensor:
        return self.to("cpu")

    def cuda(self, *_: Any, **__: Any) -> OnCuda:
        return self

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    def tolist(self) -> Any:
        _seen["read back"] += 1
        return self.host.tolist()

    def data_ptr(self) -> int:
        return self.host.data_ptr()

    def untyped_storage(self) -> Any:
        return self.host.untyped_storage()

    def pin_memory(self, *_: Any) -> Tensor:
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor', only dense CPU tensors can be pinned")

    def record_stream(self, stream: Stream) -> None:
        _seen["record_stream"] += 1

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copy = OnCuda(self.host.detach().clone())
        made = nn.Parameter(copy, self.requires_grad) if isinstance(self, nn.Parameter) else copy
        memo[id(self)] = made.requires_grad_(self.requires_grad)
        return made

    def __repr__(self, **_: Any) -> str:
        return f"{self.host!r} on cuda:0"

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        assert isinstance(value, OnCuda) and value.dtype == self.dtype and value.shape == self.shape
        if value.host.data_ptr() != self.host.data_ptr():
            self.host.set_(value.host)


def run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operator on host memory. Its result is on the faked device if an argument is, or if it is asked to be."""
    given = {id(x.host): x for x in tree_flatten((args, kwargs))[0] if isinstance(x, OnCuda)}
    on_cuda = bool(given) or _is_cuda(kwargs.get("device"))
    args, kwargs = tree_map_only(OnCuda, lambda x: x.host, (args, kwargs))
    if _is_cuda(kwargs.get("device")):
        kwargs = kwargs | {"device": torch.device("cpu")}
    if kwargs.pop("pin_memory", None):
        _seen["pinned"] += 1
    if _recording and on_cuda and function is torch.ops.aten._local_scalar_dense.default:
        raise AssertionError("a value is read while a CUDA graph is recorded")
    if _recording and not given and function is torch.ops.aten._to_copy.default:
        raise AssertionError("a copy from the host while a CUDA graph is recorded")
    _seen["read back"] += on_cuda and function is torch.ops.aten._local_scalar_dense.default
    found = function(*args, **kwargs)
    if _recording and on_cuda:
        _recording[-1].operators.append((function, args, kwargs, found))
    if not on_cuda or function is torch.ops.aten.is_pinned.default:
        return found
    # What an operator wrote to in place it returns: the same tensor here too. A copy to the host stays there.
    plain = {id(x) for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)} - given.keys()
    return tree_map_only(
        Tensor, lambda x: given[id(x)] if id(x) in given else x if id(x) in plain else OnCuda(x), found
    )


class _Dispatch(TorchDispatchMode):
    """Makes and copies tensors on the faked device."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(function, args, kwargs or {})


class _Together(TorchFunctionMode):
    """Refuses what a GPU refuses: one operation on tensors of both devices, single numbers excepted."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        if name == "to":  # a device without a number would be asked of the driver
            args, kwargs = tree_map_only((str, torch.device), _numbered, (args, kwargs or {}))
        if name not in _MIXING:
            tensors = [x for x in tree_flatten((args, kwargs or {}))[0] if isinstance(x, Tensor)]
            plain = [x for x in tensors if not isinstance(x, OnCuda) and x.ndim and x.device.type == "cpu"]
            if plain and len(plain) < len(tensors) and any(isinstance(x, OnCuda) for x in tensors):
                raise RuntimeError(f"{name}: expected all tensors to be on the same device, found cuda:0 and cpu")
        return function(*args, **(kwargs or {}))


class Stream:
    """A queue that is always empty."""

    def __init__(self, device: Any = None, **_: Any) -> None:
        _seen["stream"] += 1

    def wait_stream(self, other: Stream) -> None:
        assert isinstance(other, Stream)
        _seen["wait_stream"] += 1

    def synchronize(self) -> None:
        pass

    def is_capturing(self) -> bool:
        return bool(_recording)


class Event:
    """A mark that has always been reached."""

    def __init__(self, **_: Any) -> None:
        self.recorded = False

    def record(self, stream: Stream | None = None) -> None:
        self.recorded = True
        _seen["event"] += 1

    def synchronize(self) -> None:
        assert self.recorded
        _seen["event waited for"] += 1


class Graph:
    """The operators that ran while it was recorded, with the memory that they read and wrote."""

    def __init__(self) -> None:
        self.operators: list[tuple[Any, Any, Any, Any]] = []

    def replay(self) -> None:
        _seen["replay"] += 1
        for function, args, kwargs, found in self.operators:
            again = tree_flatten(function(*args, **kwargs))[0]
            for old, new in zip(tree_flatten(found)[0], again, strict=True):
                if isinstance(old, Tensor) and old is not new:
                    old.copy_(new)


@contextmanager
def _record(graph: Graph, **_: Any) -> Iterator[None]:
    _seen["graph"] += 1
    _recording.append(graph)
    try:
        yield
    finally:
        _recording.pop()


@contextmanager
def _on_stream(stream: Stream | None) -> Iterator[None]:
    before, _here.stream = _current_stream(), stream
    try:
        yield
    finally:
        _here.stream = before


def _current_stream(device: Any = None) -> Stream:
    if getattr(_here, "stream", None) is None:
        _here.stream = Stream()
    return _here.stream


class _Autocast:
    """torch.autocast for "cuda": that, and the processor's, which is what lowers tensors whose numbers lie there."""

    real = torch.autocast

    def __init__(
        self, device_type: str, dtype: torch.dtype | None = None, enabled: bool = True, **options: Any
    ) -> None:
        self._both = [device_type, "cpu"] if device_type == "cuda" else [device_type]
        self._arguments = {"dtype": dtype, "enabled": enabled, **options}
        _seen["autocast"] += device_type == "cuda" and enabled

    def __enter__(self) -> None:
        self._stack = ExitStack()
        for kind in self._both:
            self._stack.enter_context(self.real(kind, **self._arguments))

    def __exit__(self, *raised: Any) -> None:
        self._stack.close()

    def __call__(self, function: Callable) -> Callable:
        def inside(*args: Any, **kwargs: Any) -> Any:
            with _Autocast(self._both[0], **self._arguments):
                return function(*args, **kwargs)

        return inside


def _pin(tensor: Tensor, *_: Any) -> Tensor:
    _seen["pinned"] += 1
    return tensor.clone()


def _properties(device: Any = None) -> SimpleNamespace:
    names = {"name": "faked sm_90", "major": 9, "minor": 0, "multi_processor_count": 132}
    return SimpleNamespace(total_memory=80 * 2**30, L2_cache_size=50 * 2**20, **names)


def _answers(capability: tuple[int, int]) -> dict[str, Any]:
    """torch.cuda's functions on a machine with one idle GPU."""
    nothing = lambda *_, **__: None  # noqa: E731
    return {
        **dict.fromkeys(("_lazy_init", "init", "set_device", "synchronize", "empty_cache", "manual_seed"), nothing),
        **dict.fromkeys(("manual_seed_all", "set_rng_state", "reset_peak_memory_stats"), nothing),
        **dict.fromkeys(("is_available", "is_initialized"), lambda: True),
        **dict.fromkeys(("memory_allocated", "max_memory_allocated", "memory_reserved"), lambda *_: 2**20),
        "is_bf16_supported": lambda including_emulation=True: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "device": lambda chosen=None: nullcontext(),
        "get_device_capability": lambda device=None: capability,
        "get_device_name": lambda device=None: _properties().name,
        "get_device_properties": _properties,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "mem_get_info": lambda device=None: (79 * 2**30, 80 * 2**30),
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": _record,
        "stream": _on_stream,
        "current_stream": _current_stream,
        "is_current_stream_capturing": lambda: bool(_recording),
    }


@contextmanager
def _modes() -> Iterator[None]:
    with _Together(), _Dispatch():
        yield


@contextmanager
def faked_cuda(capability: tuple[int, int] = (9, 0)) -> Iterator[Counter[str]]:
    """Inside, there is one GPU. Gives the counts of what was done that only a GPU has."""
    _seen.clear()
    start, compatible = threading.Thread.run, torch._has_compatible_shallow_copy_type

    def run_thread(thread: threading.Thread) -> None:
        with _modes():
            start(thread)

    with ExitStack() as stack:
        for name, answer in _answers(capability).items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        stack.enter_context(mock.patch.object(torch, "autocast", _Autocast))
        stack.enter_context(mock.patch.object(torch.accelerator, "synchronize", lambda *_: None))
        stack.enter_context(mock.patch.object(torch.accelerator, "current_stream", _current_stream))
        stack.enter_context(mock.patch.object(Tensor, "pin_memory", _pin))
        stack.enter_context(mock.patch.object(threading.Thread, "run", run_thread))
        # nn.Module.to: a parameter that changes its device becomes another object
        stack.enter_context(
            mock.patch.object(
                torch, "_has_compatible_shallow_copy_type", lambda a, b: type(a.data) is type(b) and compatible(a, b)
            )
        )
        stack.enter_context(_modes())
        yield _seen
