"""One training step of a LightningDiT: PyTorch's operators and the fused ones, plain and compiled, in one run.

    python -m benchmarks.bench_training_step [--size S] [--tokens 256] [--batch 16] [--rounds 7] [--paths NAME ...]

A step is forward, flow-matching loss, backward and fused AdamW in a run's precision (bf16 autocast where the device
has it), on random latents of 32 channels. "reference" is PyTorch with scaled_dot_product_attention; compiled, block
by block as in training, it is what one would otherwise use, and on a GPU the baseline of the ratios. All paths start
from the same weights and see the same batches; their first losses must agree before anything is timed. Steps
alternate between the paths. FLOPs are counted by PyTorch's counter on the reference path; the share is against the
rate of one large matrix product of that type measured in the same run. The step's matrix products are also timed
alone, on operands of the same shapes, strides and types with nothing in between: a step that keeps them cannot be
faster.
"""

import argparse
import copy
import statistics
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from aligntok.config import FlowConfig, LightningDiTConfig
from aligntok.diffusion.flow import training_loss
from aligntok.kernels import use_implementation
from aligntok.models.blocks import prepare
from aligntok.models.lightning_dit import LightningDiT
from aligntok.runtime.devices import PRECISIONS, Precision, choose_precision
from benchmarks.machine import DEVICE, machine_line, matmul_rate, seconds_of

CHANNELS = 32
CLASSES = 1000
PATHS = {  # name: implementation of the operators, and whether blocks are compiled
    "reference": ("reference", False),
    "fused": ("auto", False),
    "reference, compiled": ("reference", True),
    "fused, compiled": ("auto", True),
}
# Two paths in bf16 round differently; after one step the losses have been seen to agree to about 1e-3
LOSS_TOLERANCE = 1e-2


class Path:
    """A model with its optimizer, stepped under one choice of implementations."""

    def __init__(self, model: LightningDiT, implementation: str, compiled: bool, precision: Precision) -> None:
        self.model = copy.deepcopy(model)
        prepare(self.model.blocks, "none", compiled)
        self.precision = precision
        self.implementation = implementation
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)
        self.samples: list[float] = []

    def loss(self, seed: int, data: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The loss of one batch, with times and noise from a seed."""
        torch.manual_seed(seed)
        with use_implementation(self.implementation), self.precision.autocast():
            return training_loss(self.model, data, (labels,), FlowConfig())[0]

    def step(self, seed: int, data: torch.Tensor, labels: torch.Tensor) -> float:
        """One whole training step; returns its loss."""
        loss = self.loss(seed, data, labels)
        with use_implementation(self.implementation):
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def timed_step(self, seed: int, data: torch.Tensor, labels: torch.Tensor) -> None:
        """A step whose seconds are kept."""
        self.samples.append(seconds_of(lambda: self.step(seed, data, labels)))


class Products(TorchDispatchMode):
    """Counts the matrix products of what runs inside it, by operator and by the layout of their operands."""

    OPERATORS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.baddbmm)

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[Callable, tuple[tuple[Any, ...], ...]]] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.overloadpacket in self.OPERATORS:
            layouts = tuple((x.shape, x.stride(), x.dtype) for x in args if isinstance(x, Tensor))
            self.found[function, layouts] += 1
        return function(*args, **kwargs or {})

    def seconds(self, rounds: int) -> float:
        """Median time of each product alone, times how often it occurs."""
        total = 0.0
        for (function, layouts), count in self.found.items():
            operands = [torch.empty_strided(*layout[:2], dtype=layout[2], device=DEVICE) for layout in layouts]
            for operand in operands:
                operand.normal_()
            times = [seconds_of(partial(function, *operands)) for _ in range(rounds + 1)]
            total += count * statistics.median(times[1:])
        return total


def batch(size: int, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random latents [B, 32, side, side] and labels [B]."""
    generator = torch.Generator().manual_seed(3)
    data = torch.randn(size, CHANNELS, side, side, generator=generator).to(DEVICE)
    return data, torch.randint(CLASSES, (size,), generator=generator).to(DEVICE)


@torch.no_grad()
def perturb(model: LightningDiT) -> LightningDiT:
    """Make zero-initialised modulations random, so that every operator does real work."""
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.any():
            parameter.normal_(std=0.02)
    return model


def profile(path: Path, inputs: tuple[torch.Tensor, torch.Tensor]) -> str:
    """The operators that take most of a step's time."""
    with torch.profiler.profile() as found:
        path.step(0, *inputs)
    return found.key_averages().table(sort_by="self_cpu_time_total", row_limit=20, max_name_column_width=60)


def agree(paths: dict[str, Path], inputs: tuple[Tensor, Tensor]) -> bool:
    """Print the losses of two steps on every path; False if one differs from the first path's."""
    agreed = True
    for seed in range(2):
        losses = {name: path.step(seed, *inputs) for name, path in paths.items()}
        print("loss: " + "; ".join(f"{name} {loss:.6f}" for name, loss in losses.items()))
        expected = next(iter(losses.values()))
        agreed = agreed and all(abs(loss - expected) <= LOSS_TOLERANCE * abs(expected) for loss in losses.values())
    return agreed


def report(paths: dict[str, Path], images: int, flops: float, rate: float) -> None:
    """Print each path's median, and its ratio to the baseline."""
    baseline = "reference, compiled" if "reference, compiled" in paths else "reference"
    expected = statistics.median(paths[baseline].samples)
    for name, path in paths.items():
        seconds = statistics.median(path.samples)
        print(
            f"{name}: {seconds:.4f} s ({min(path.samples):.4f} .. {max(path.samples):.4f}), {images / seconds:.1f} "
            f"img/s, {flops / seconds / rate:.0%} of the matmul rate, {expected / seconds:.2f}x {baseline}"
        )


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="S", choices=["S", "B", "L", "XL"], help="of the LightningDiT, patch size 1")
    parser.add_argument("--tokens", type=int, default=256, help="a square number")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each path")
    parser.add_argument("--precision", default="auto", choices=PRECISIONS)
    some = [name for name, (_, compiled) in PATHS.items() if DEVICE == "cuda" or not compiled]
    parser.add_argument("--paths", nargs="+", default=some, choices=PATHS, help=f"default here: {'; '.join(some)}")
    parser.add_argument("--qk-norm", action="store_true", help="with QK-norm")
    parser.add_argument("--profile", action="store_true", help="print where the last path spends its time")
    return parser.parse_args()


def main() -> int:
    """Print medians, ratios and the share of the matmul rate; exit status 1 if the losses differ."""
    options = parse()
    side = round(options.tokens**0.5)
    config = LightningDiTConfig(size=options.size, patch_size=1, classes=CLASSES, qk_norm=options.qk_norm)
    torch.manual_seed(0)
    model = perturb(LightningDiT(config, CHANNELS, (side, side)).to(DEVICE))
    inputs, precision = batch(options.batch, side), choose_precision(DEVICE, options.precision)
    counted = Path(model, "reference", False, precision)
    with FlopCounterMode(display=False) as counter, Products() as products:
        counted.loss(0, *inputs).backward()
    del counted
    paths = {name: Path(model, *PATHS[name], precision) for name in PATHS if name in ("reference", *options.paths)}
    print(machine_line())
    if not agree(paths, inputs):
        print("the losses differ: nothing is timed")
        return 1
    for seed in range(options.rounds):
        for path in paths.values():
            path.timed_step(seed, *inputs)
    flops, rate = counter.get_total_flops(), matmul_rate(torch.bfloat16 if precision.name == "bf16" else torch.float32)
    print(
        f"LightningDiT-{options.size}/1, {options.tokens} tokens, batch {options.batch}: {flops / 1e9:.0f} GFLOP a step"
    )
    print(f"{precision}; measured matmul rate: {rate / 1e9:.0f} GFLOP/s")
    report(paths, options.batch, flops, rate)
    alone, of_all = products.seconds(options.rounds), counter.get_flop_counts()["Global"]
    share = sum(of_all[operator] for operator in of_all if operator in Products.OPERATORS) / alone / rate
    last = list(paths)[-1]
    print(
        f"the reference's {products.found.total()} matrix products alone: {alone:.4f} s, {share:.0%} of the matmul "
        f"rate, {alone / statistics.median(paths[last].samples):.0%} of the step: {last}"
    )
    if options.profile:
        print(profile(paths[last], inputs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
