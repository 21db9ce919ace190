"""A network's calls recorded once per shape as a CUDA graph and replayed, which spares the host the launches.

A graph reads its inputs where they lay when it was recorded and writes its output to one place: inputs are copied
there, and an output holds until the next call with the same shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from aligntok.kernels import transformed

WARM_UPS = 3  # calls before a recording: libraries allocate and Triton compiles in the first ones (PyTorch's advice)


class Recording(NamedTuple):
    """What a graph reads and writes, and how it is run."""

    inputs: tuple[Tensor, ...]
    output: Tensor
    replay: Callable[[], None]


class GraphedCalls:
    """`network` with its calls replayed; without gradients, for tensors on one CUDA device. Inside forward mode and
    the transforms of torch.func, of which a recording would know nothing, it is called as it is.

    The network's weights may change between calls, but not move in memory.
    """

    def __init__(self, network: Callable[..., Tensor]) -> None:
        self.network = network
        self.recordings: dict[tuple[tuple[torch.Size, torch.dtype], ...], Recording] = {}

    def __call__(self, *inputs: Tensor) -> Tensor:
        if transformed():
            return self.network(*inputs)
        key = tuple((x.shape, x.dtype) for x in inputs)
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
        stream = torch.cuda.Stream(inputs[0].device)
        stream.wait_stream(torch.cuda.current_stream(inputs[0].device))
        cached = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(
            False
        )  # weights that were cast before the recording would not outlive autocast
        try:
            with torch.cuda.stream(stream):
                for _ in range(WARM_UPS):
                    self.network(*inputs)
            torch.cuda.current_stream(inputs[0].device).wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                output = self.network(*inputs)
        finally:
            torch.set_autocast_cache_enabled(cached)
        return Recording(inputs, output, graph.replay)
