"""What torch.compile makes of a LightningDiT block for a GPU: its graph and its code, on any machine.

    python -m benchmarks.compiled_block [--size XL] [--tokens 256] [--batch 32] [--architecture 90] [--code FOLDER]

The way is the real one: Dynamo traces the block as one graph, the fused operators are taken apart into their Triton
kernels (`triton_op`), AOTAutograd differentiates, Inductor's passes put mutations in place, and Inductor writes the
code that a GPU would run. Nothing is computed and no GPU is needed: tensors have the processor's names while the graph
is traced, and a GPU's from there on. Printed are the launches of each direction, in order, for the reference operators
and the fused ones. Copies that Inductor would put around our kernels (clone, copy) make the exit status 1.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor import compile_fx, config
from torch._inductor.debug import DebugContext
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_map_only
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from aligntok.config import LightningDiTConfig
from aligntok.kernels import assume_device, use_implementation
from aligntok.models.lightning_dit import LightningDiT, dimensions
from aligntok.runtime.files import write_bytes

GPU = torch.device("cuda:0")
DIRECTIONS = ("forward", "backward")
COPIES = ("aten.clone", "aten.copy", "triton_kernel_wrapper_functional")  # the last: a kernel not put in place
_LAUNCH = re.compile(r"(?:^|[ =])(?:(\w+)\.run|(extern_kernels\.\w+)|(torch\.ops\.[\w.]+))\(", re.MULTILINE)


@dataclass
class Compiled:
    """One direction of a block."""

    operators: Counter[str]  # of the graph from which the code is written
    code: str

    @property
    def launches(self) -> list[str]:
        """Kernels that the code calls, in order."""
        body = self.code[self.code.index("def call(") :]
        return [next(filter(None, match.groups())) for match in _LAUNCH.finditer(body[: body.index("return (")])]

    @property
    def copies(self) -> dict[str, int]:
        """Operators that only move what a kernel could have read or written where it lies."""
        return {name: count for name, count in self.operators.items() if name.startswith(COPIES)}


class _Driver:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, architecture: int) -> None:
        self.target = GPUTarget("cuda", architecture, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return GPU


@contextmanager
def pretended_gpu(architecture: int) -> Iterator[None]:
    """Inside, Inductor asks for a GPU's properties and is answered; nothing can run there."""
    major, minor = divmod(architecture, 10)
    common = {"regs_per_multiprocessor": 65536, "max_threads_per_multi_processor": 2048, "warp_size": 32}
    hints = DeviceProperties(type="cuda", index=0, multi_processor_count=132, cc=architecture, major=major, **common)
    device = SimpleNamespace(name="GPU", major=major, minor=minor, total_memory=80 * 2**30, multi_processor_count=132)
    answers: dict[str, Callable[..., Any]] = {
        "torch._inductor.runtime.hints.DeviceProperties.create": lambda *_: hints,
        "torch._dynamo.device_interface.CudaInterface.raise_if_triton_unavailable": lambda *_: None,
        "torch.cuda.get_device_properties": lambda *_: device,
        "torch.cuda.get_device_capability": lambda *_: (major, minor),
        "torch.cuda.current_device": lambda: 0,
        "torch.cuda.is_available": lambda: True,
    }
    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch(name, answer))
        for module in list(sys.modules.values()):
            if getattr(module, "__name__", "").startswith("torch.") and "has_triton" in vars(module):
                stack.enter_context(mock.patch.object(module, "has_triton", lambda *_: True))
        yield


class _Reached(Exception):
    """Inductor has done its passes and begins to write code."""


def compile_for_gpu(
    function: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor, ...], architecture: int
) -> list[Compiled]:
    """Forward and backward code of a function of tensors on the CPU, which is traced as one graph.

    Raises:
        torch._dynamo.exc.Unsupported: it is not one graph.
    """
    found: list[Compiled] = []

    def inner(module: torch.fx.GraphModule, examples: list[Tensor], **options: Any) -> Callable[..., list[Any]]:
        (output,) = module.graph.find_nodes(op="output")
        results = [node.meta["val"] if isinstance(node, torch.fx.Node) else node for node in output.args[0]]
        found.append(_code(*_passed(module, examples, options), architecture))
        return make_boxed_func(lambda *_: tree_map_only(Tensor, _blank, results))

    def backend(module: torch.fx.GraphModule, examples: list[Tensor]) -> Any:
        return compile_fx.compile_fx(module, examples, inner_compile=cast("Any", inner))

    torch._dynamo.reset()
    # Without caches: what is found there would not come by here
    with mock.patch.object(driver, "_active", _Driver(architecture)), config.patch(force_disable_caches=True):
        results = torch.compile(function, backend=backend, fullgraph=True)(*inputs)
        torch.stack([result.float().sum() for result in results]).sum().backward()
    torch._dynamo.reset()
    return found


def _blank(fake: Tensor) -> Tensor:
    """A result of the forward pass, for AOTAutograd to go on with; its values are never looked at."""
    return torch.empty_strided(tuple(map(int, fake.shape)), tuple(map(int, fake.stride())), dtype=fake.dtype)


def _passed(
    module: torch.fx.GraphModule, examples: list[Tensor], options: dict[str, Any]
) -> tuple[torch.fx.GraphModule, dict[str, Any]]:
    """The graph behind all of Inductor's passes, and the options with which it would be lowered."""
    reached: list[tuple[torch.fx.GraphModule, dict[str, Any]]] = []

    def stop(self: GraphLowering, passed: torch.fx.GraphModule, *_: Any, **lowering: Any) -> None:
        lowering.pop("example_inputs", None)
        reached.append((passed, lowering))
        raise _Reached

    with mock.patch.object(GraphLowering, "__init__", stop):
        try:
            compile_fx.compile_fx_inner(module, examples, **options)
        except Exception:  # Inductor wraps ours
            if not reached:
                raise
    return reached[0]


def _code(module: torch.fx.GraphModule, lowering: dict[str, Any], architecture: int) -> Compiled:
    """Write the code of a graph for a GPU."""
    for node in module.graph.nodes:
        if "val" in node.meta:
            node.meta["val"] = tree_map_only(FakeTensor, _on_gpu, node.meta["val"])
        if node.kwargs.get("device") == torch.device("cpu"):
            node.kwargs = {**node.kwargs, "device": GPU}
    module.recompile()
    inputs = [node.meta["val"] for node in module.graph.find_nodes(op="placeholder")]
    fake_mode = next(x.fake_mode for x in inputs if isinstance(x, FakeTensor))
    with pretended_gpu(architecture), V.set_fake_mode(fake_mode), DebugContext():
        graph = GraphLowering(module, example_inputs=inputs, **lowering)
        with V.set_graph_handler(graph):
            graph.run(*inputs)
            wrapper, _ = graph.codegen()
    return Compiled(Counter(str(n.target) for n in module.graph.nodes if n.op == "call_function"), wrapper.value)


def _on_gpu(fake: FakeTensor) -> FakeTensor:
    shape, stride = tuple(map(int, fake.shape)), tuple(map(int, fake.stride()))
    return FakeTensor(fake.fake_mode, torch.empty_strided(shape, stride, dtype=fake.dtype, device="meta"), GPU)


def compiled_block(
    config: LightningDiTConfig, tokens: int, batch: int, fused: bool, architecture: int
) -> list[Compiled]:
    """Forward and backward of a block inside a generator, under bf16 autocast."""
    side = round(tokens**0.5)
    model = LightningDiT(config, 32, (side, side))
    block, rope = model.blocks[0], model._rope((side, side), torch.device("cpu"))
    width = model.patches.out_channels
    shapes = ((batch, tokens, width), (batch, tokens, width), (batch, width), (batch, width))
    x, branch, gate, condition = (torch.zeros(shape, requires_grad=True) for shape in shapes)

    def run(x: Tensor, branch: Tensor, gate: Tensor, condition: Tensor) -> tuple[Tensor, ...]:
        y, (left, by) = block(x, (branch.bfloat16(), gate.bfloat16()), condition, rope)
        return y, left, by

    requested = use_implementation("triton" if fused else "reference")
    with assume_device("cuda"), requested, torch.autocast("cpu", torch.bfloat16):
        return compile_for_gpu(run, (x, branch, gate, condition), architecture)


def main() -> int:
    """Print the launches; exit status 1 where Inductor copies around our kernels."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="XL", choices=["S", "B", "L", "XL"])
    parser.add_argument("--tokens", type=int, default=256, help="a square number")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--qk-norm", action="store_true")
    parser.add_argument("--architecture", type=int, default=90, help="compute capability, without the dot")
    parser.add_argument("--code", type=Path, help="folder for the generated code")
    options = parser.parse_args()
    _, width, heads = dimensions(LightningDiTConfig(size=options.size))
    copied = False
    for name, fused in (("reference", False), ("fused", True)):
        config = LightningDiTConfig("custom", 1, width, heads, classes=10, qk_norm=options.qk_norm)
        config.attention = "fused" if fused else "sdpa"
        found = compiled_block(config, options.tokens, options.batch, fused, options.architecture)
        for direction, compiled in zip(DIRECTIONS, found, strict=True):
            launches = compiled.launches
            print(f"{name}, {direction}: {len(launches)} launches, {compiled.copies or 'no copies'}")
            print("".join(f"  {launch}\n" for launch in launches), end="")
            copied = copied or (fused and bool(compiled.copies))
            if options.code is not None:
                write_bytes(options.code / f"{name}_{direction}.py", compiled.code.encode())
    return int(copied)


if __name__ == "__main__":
    sys.exit(main())
