"""What a training step costs, counted without running it.

The real objective takes a real step (forward, every phase, backward, optimizer) on the meta device, where the full-size
model is built in seconds (aligntok.training.monitoring.meta_device). Meanwhile `Meter` writes down

    activations    everything that operators allocate, from allocation to release, at the moment when it is most;
                   gradients of parameters, once complete, are counted apart
    saved          what autograd saves for the backward pass (saved-tensor hooks), at its highest
    FLOPs          of every operator, by the formulas of PyTorch's FlopCounterMode, recomputation included

Operators are chosen as on the device type that is asked about: what the fused kernels save there is what is counted.
Not seen: workspaces inside an operator (cuDNN, cuBLAS), the CUDA context, the allocator's fragmentation. A run that
wants to know its FLOPs for MFU (`stage_flops`, `generator_flops`) takes no step of its own for that.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.optim.swa_utils import AveragedModel

from aligntok.config import (
    GeneratorTrainingConfig,
    StageConfig,
    TokenizerTrainingConfig,
)
from aligntok.models.generator import network_of
from aligntok.models.tokenizer import StoredTokenizer
from aligntok.runtime.autocast import MetaAutocast
from aligntok.runtime.world import Place
from aligntok.training.monitoring.meta_device import (
    Built,
    build_generator,
    build_stage,
    conditioned,
    count,
    make_batch,
    on_meta,
)
from aligntok.training.monitoring.meter import Flops, Meter

T = TypeVar("T")


@dataclass(frozen=True)
class Cost:
    """One training step of one process; bytes unless said otherwise."""

    parameters: dict[str, tuple[int, int]]  # part -> (trained, frozen), in numbers
    trained: int  # weights that change, fp32
    frozen: int  # weights and buffers that do not, and buffers
    gradients: int
    optimizer: int
    averages: int  # of the moving averages, where a stage keeps them
    largest_unit: int  # trained weights of the largest block: what FSDP gathers at a time
    micro_batch: int  # images
    activations: int  # the most that is allocated at a time beside `state`
    saved: int  # that part of it which autograd keeps for the backward pass, at its highest
    flops: int  # of the micro-batch: forward, backward, recomputation; no optimizer

    @property
    def state(self) -> int:
        """What lies on a GPU between two steps, gradients included, with nothing sharded."""
        return self.trained + self.frozen + self.gradients + self.optimizer + self.averages


_counted: dict[str, Any] = {}


def once(count: Callable[..., T], *arguments: Any) -> T:
    """count(*arguments), called once in a process: recipes share parts. Arguments are equal if they print equally."""
    key = repr((count.__qualname__, arguments))
    if key not in _counted:
        _counted[key] = count(*arguments)
    return _counted[key]


def tokenizer_cost(
    config: TokenizerTrainingConfig,
    stage: StageConfig,
    image_size: int,
    micro_batch: int,
    checkpointing: str = "none",
    device_type: str = "cuda",
) -> Cost:
    """Cost of the first step of a tokenizer's stage; frozen networks run in the loop, as with random crops."""
    build = partial(build_stage, config, stage, image_size, micro_batch, looked_up=False, mode=checkpointing)
    return count(device_type, build, measure)


def generator_cost(
    config: GeneratorTrainingConfig,
    latent_shape: tuple[int, int, int],
    micro_batch: int,
    checkpointing: str = "none",
    device_type: str = "cuda",
) -> Cost:
    """Cost of a step of the generator on latents (d, h, w) that come from a cache."""
    return count(device_type, partial(build_generator, config, latent_shape, micro_batch, checkpointing), measure)


def stage_flops(
    config: TokenizerTrainingConfig, stage: StageConfig, image_size: int, looked_up: bool, device_type: str
) -> dict[int, float]:
    """FLOPs per image of a stage's steps; see `step_flops` and `build_stage`."""
    rows, mode = config.training.batch_size, config.training.checkpointing
    return count(device_type, partial(build_stage, config, stage, image_size, rows, looked_up, mode), step_flops)


def generator_flops(
    config: GeneratorTrainingConfig,
    latent_shape: tuple[int, int, int],
    device_type: str,
    tokenizer: tuple[type[StoredTokenizer], Any] | None = None,
    image_size: int = 0,
) -> dict[int, float]:
    """FLOPs per image of the generator's steps; see `step_flops` and `build_generator`."""
    rows, mode = config.training.batch_size, config.training.checkpointing
    build = partial(build_generator, config, latent_shape, rows, mode, tokenizer, image_size)
    return count(device_type, build, step_flops)


def step_flops(built: Built) -> dict[int, float]:
    """FLOPs per image of every kind of step, as {first step of the kind: FLOPs}; inside `on_meta`.

    The batch is that of a whole step: what is taken of a share of it (LPIPS) is then counted exactly, however many
    processes and micro-batches the step is divided into.
    """
    objective, found = built.objective, {}
    for step in objective.turns():
        with Flops() as counter:
            for phase in objective.phases(step):
                phase.clear()
                phase.loss(built.batch)[0].backward()
        found[step] = counter.flops / len(built.batch["labels"])
    return found


def forward_flops(kind: type[StoredTokenizer], config: Any, image_size: int) -> dict[str, int]:
    """FLOPs of encoding and of decoding one image by a tokenizer of a class and its configuration."""
    with on_meta("cuda"), torch.no_grad():
        tokenizer, images = kind(config).eval(), torch.empty(1, 3, image_size, image_size)
        with MetaAutocast(torch.bfloat16):
            with Flops() as encoding:
                latents = tokenizer.raw_latents(images)
            with Flops() as decoding:
                tokenizer.reconstruct(latents)
    return {"encode": encoding.flops, "decode": decoding.flops}


def generator_forward_flops(config: GeneratorTrainingConfig, latent_shape: tuple[int, int, int]) -> int:
    """FLOPs of one network evaluation for one latent."""
    with on_meta("cuda"), torch.no_grad():
        model = network_of(config, latent_shape[0], latent_shape[1:]).eval()
        data = torch.empty(1, *latent_shape)
        batch = make_batch(data, 1)
        condition = conditioned(config, batch)(batch, Place(0, 1, 1))
        with MetaAutocast(torch.bfloat16), Flops() as counter:
            model(data, torch.empty(1), *condition)
    return counter.flops


def measure(built: Built) -> Cost:
    """Take the first step of an objective on the meta device, and count."""
    objective, batch, parts, units = built
    weights = {id(p): p for part in parts.values() for p in part.parameters()}
    buffers = [b for part in parts.values() for b in part.buffers()]
    trained = [p for p in weights.values() if p.requires_grad]
    meter = Meter([*weights.values(), *buffers, *batch.values()])
    hooks = [p.register_post_accumulate_grad_hook(meter.gradient) for p in trained]
    for phase in objective.phases(0):
        phase.clear()
        with meter, saved_tensors_hooks(meter.pack, attrgetter("tensor")), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # selective checkpointing does not call these hooks yet
            loss, values = phase.loss(batch)
            loss.backward()
        nn.utils.clip_grad_norm_(phase.parameters, phase.gradient_clip or float("inf"))
        phase.optimizer.step()
        del loss, values
    for hook in hooks:
        hook.remove()
    states = [value for optimizer in objective.optimizers().values() for value in optimizer.state.values()]
    averages = [m.module for m in objective.modules().values() if isinstance(m, AveragedModel)]
    return Cost(
        parameters={name: _numbers(part) for name, part in parts.items()},
        trained=_bytes(trained),
        frozen=_bytes([*weights.values(), *buffers]) - _bytes(trained),
        gradients=_bytes(p.grad for p in trained if p.grad is not None),
        optimizer=_bytes(x for state in states for x in state.values() if isinstance(x, Tensor)),
        averages=_bytes(x for module in averages for x in (*module.parameters(), *module.buffers())),
        largest_unit=max(_bytes(p for p in unit.parameters() if p.requires_grad) for unit in units),
        micro_batch=len(batch["labels"]),
        activations=meter.peak_live,
        saved=meter.peak_saved,
        flops=meter.flops,
    )


def _numbers(part: nn.Module) -> tuple[int, int]:
    counts = [0, 0]
    for parameter in part.parameters():
        counts[not parameter.requires_grad] += parameter.numel()
    return counts[0], counts[1]


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
