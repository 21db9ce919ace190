"""A network's calls recorded once per shape as a CUDA graph and replayed, which spares the host the launches.

A graph reads its inputs where they lay when it was recorded and writes its output to one place: inputs are copied
there, and an output holds until the next call with the same shapes. `graphed` keeps a network's recordings from one
call of a sampler to the next, with the memory of their activations, as long as the network lives.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary, proxy

import torch
from torch import Tensor, nn

from aligntok.kernels import requested, transformed
from aligntok.runtime.autocast import autocast_dtype

Result = TypeVar("Result")
WARM_UPS = 3  # calls before a recording: libraries allocate and Triton compiles in the first ones (PyTorch's advice)


class Recording(NamedTuple):
    """What a graph reads and writes, and how it is run."""

    inputs: tuple[Tensor, ...]
    output: Tensor
    replay: Callable[[], None]
    alive: tuple[Any, ...] = ()  # what the graph reads beside weights: tables of positions that a network keeps


def record(work: Callable[[], Result]) -> tuple[Result, Callable[[], None]]:
    """Do `work` a few times on another stream of the current device, then record its launches as a CUDA graph.

    Returns:
        what it gave while it was recorded, which every replay overwrites; and the replay.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = work()
    return result, graph.replay


class GraphedCalls:
    """`network` with its calls replayed; without gradients, for tensors on one CUDA device. Inside forward mode and
    the transforms of torch.func, of which a recording would know nothing, it is called as it is.

    The network's weights may change between calls, but not move in memory.
    """

    def __init__(self, network: Callable[..., Tensor]) -> None:
        self.network = network
        self.recordings: dict[tuple[Any, ...], Recording] = {}  # by shapes, dtypes and autocast's dtype
        self.state: tuple[Any, ...] = ()  # of the network and around it, where `graphed` looks after it

    def __call__(self, *inputs: Tensor) -> Tensor:
        if transformed():
            return self.network(*inputs)
        key = (autocast_dtype(inputs[0].device.type), *((x.shape, x.dtype) for x in inputs))
        if key not in self.recordings:
            self.recordings[key] = self.record(tuple(x.clone() for x in inputs))
        recording = self.recordings[key]
        for place, given in zip(recording.inputs, inputs, strict=True):
            place.copy_(given)
        recording.replay()
        return recording.output

    def record(self, inputs: tuple[Tensor, ...]) -> Recording:
        """Run the network on `inputs` a few times on another stream, then record a run, on the device of `inputs`."""
        with torch.cuda.device(inputs[0].device):
            return self._record(inputs)

    def _record(self, inputs: tuple[Tensor, ...]) -> Recording:
        cached = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(
            False
        )  # weights that were cast before the recording would not outlive autocast
        try:
            output, replay = record(lambda: self.network(*inputs))
        finally:
            torch.set_autocast_cache_enabled(cached)
        alive = tuple(vars(self.network).values()) if isinstance(self.network, nn.Module) else ()
        return Recording(inputs, output, replay, alive)


_kept: WeakKeyDictionary[nn.Module, GraphedCalls] = WeakKeyDictionary()


def graphed(network: Callable[..., Tensor]) -> GraphedCalls:
    """The recordings of a network: those of the last call, if its weights still lie where they lay then and the same
    implementation of our operators is asked for."""
    if not isinstance(network, nn.Module):
        return GraphedCalls(network)
    places = (tensor.data_ptr() for tensor in chain(network.parameters(), network.buffers()))
    state = (requested(), network.training, *places)
    kept = _kept.get(network)
    if kept is None or kept.state != state:
        kept = _kept[network] = GraphedCalls(proxy(network))
        kept.state = state
    return kept
