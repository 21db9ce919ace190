"""What the training loop knows of a training task.

An objective offers one or more phases per step (the generator has one; a tokenizer stage has the autoencoder's and,
once the adversarial loss is on, the discriminator's). A phase is a loss over some parameters with their optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from aligntok.config import TrainingConfig
from aligntok.data.sources import Batch
from aligntok.errors import UserError
from aligntok.runtime.devices import optimizer_is_fused

Values = dict[str, Tensor]  # detached scalars for the log


@dataclass
class Phase:
    """One optimizer step: loss(batch) -> (loss, values), then backward, clip, step.

    `trained` holds the parameters behind DDP or FSDP2 (aligntok.training.distributed); without it the phase runs in a
    single process. `accumulate` is the number of micro-batches that a process's rows are divided into. `taken` is
    called after the optimizer's step, and not when that was skipped.
    """

    name: str
    optimizer: Optimizer
    loss: Callable[[Batch], tuple[Tensor, Values]]
    gradient_clip: float | None = None
    trained: nn.Module | None = None
    accumulate: int = 1
    taken: Callable[[], None] | None = None

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    @property
    def skips_itself(self) -> bool:
        """Whether the optimizer leaves a step out where a number on the device says so: PyTorch's fused ones."""
        return all(group.get("fused") for group in self.optimizer.param_groups)

    def clear(self) -> None:
        """Forget all gradients. Not by the optimizer's zero_grad, whose arguments differ: apex's takes none."""
        for parameter in self.parameters:
            parameter.grad = None


class Objective(Protocol):
    steps: int

    def phases(self, step: int) -> Iterable[Phase]:
        """The phases of a step, in order, with the learning rates of that step set."""

    def turns(self) -> list[int]:
        """The steps, in order and beginning with 0, from which on a step consists of other work than before."""

    def blocks(self) -> Iterable[nn.Module]:
        """The trained transformer blocks, which training.checkpointing and training.compile are about."""

    def after_step(self) -> None:
        """Called when all phases of a step are done (moving averages)."""

    def modules(self) -> dict[str, nn.Module]:
        """Everything whose weights or buffers change, by name, for the checkpoint and for naming bad layers."""

    def optimizers(self) -> dict[str, Optimizer]:
        """All optimizers by name, for the checkpoint."""


@dataclass(frozen=True)
class Schedule:
    """Learning-rate factor over steps: linear warm-up, then a cosine from 1 to `final`."""

    steps: int
    warmup_steps: int = 0
    final: float = 1.0

    def factor(self, step: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    def apply(self, optimizer: Optimizer, step: int) -> None:
        """Set every group's lr to its own base_lr times the factor of `step`."""
        factor = self.factor(step)
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor


def parameter_group(parameters: Iterable[nn.Parameter], learning_rate: float) -> dict[str, Any]:
    """An optimizer group of what trains, which remembers its base rate for `Schedule.apply`."""
    return {"params": [p for p in parameters if p.requires_grad], "lr": learning_rate, "base_lr": learning_rate}


def apex_can_run(device: torch.device, training: TrainingConfig) -> bool:
    """Whether apex's FusedAdam, which knows neither CPUs nor shares of weights, can train so."""
    return device.type == "cuda" and training.parallel != "fsdp"


def build_optimizer(
    groups: list[dict[str, Any]], betas: tuple[float, float], training: TrainingConfig, device: torch.device
) -> Optimizer:
    """AdamW without weight decay, which is Adam: PyTorch's fused one or, by `training.optimizer`, apex's.

    Raises:
        UserError: an unknown optimizer; apex's is not installed, or cannot run here.
    """
    if training.optimizer == "adamw":
        return AdamW(groups, betas=betas, weight_decay=0.0, fused=optimizer_is_fused(device))
    if training.optimizer != "apex":
        raise UserError(f"training.optimizer is {training.optimizer!r}, expected adamw or apex")
    if not apex_can_run(device, training):
        raise UserError(
            f"training.optimizer is apex, which runs on CUDA and not under fsdp; this run is on {device.type} "
            f"with training.parallel={training.parallel}: use adamw"
        )
    try:
        from apex.optimizers import FusedAdam
    except ImportError as error:
        raise UserError(
            f"training.optimizer is apex, but its FusedAdam cannot be imported ({error}): use adamw, or build it from "
            "https://github.com/NVIDIA/apex with --cpp_ext and --cuda_ext (apex on PyPI is another package)"
        ) from error
    return FusedAdam(groups, betas=betas, weight_decay=0.0, adam_w_mode=True)
