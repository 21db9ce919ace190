"""A small objective with its checkpoints, for tests that need no images."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from aligntok.config import DataConfig, TrainingConfig
from aligntok.runtime.devices import choose_precision
from aligntok.training.ema import build_ema
from aligntok.training.recovery.checkpoint import Checkpoints
from aligntok.training.recovery.course import course


class Small:
    """Everything that a checkpoint holds: buffers, averages, a fused Adam, and one that has no state yet.

    Args:
        seed: of the weights.
        shard: applied to every module, to spread it over processes.
    """

    steps = 100

    def __init__(self, seed: int = 0, shard: Callable[[nn.Module], object] | None = None) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 3))
        self.critic = nn.Linear(2, 1)
        self.average = build_ema(self.model, 0.9)
        if shard is None:
            self.model.to(memory_format=torch.channels_last)
        else:
            for module in (self.model, self.critic, self.average.module):
                shard(module)
        self.adam = torch.optim.Adam(self.model.parameters(), fused=True)
        self.idle = torch.optim.Adam(self.critic.parameters())

    def modules(self) -> dict[str, nn.Module]:
        return {"model": self.model, "critic": self.critic, "ema": self.average}

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {"model": self.adam, "critic": self.idle}

    def step(self) -> None:
        self.adam.zero_grad()
        self.model(torch.randn(2, 3, 8, 8)).square().mean().backward()
        self.adam.step()
        self.average.update_parameters(self.model)


def mark(seed: int = 0, workers: int = 8, learning_rate: float = 1e-3) -> dict:
    """The course of a run."""
    return course(
        TrainingConfig(seed=seed),
        choose_precision("cpu"),
        DataConfig(workers=workers),
        stage={"learning_rate": learning_rate},
    )


def checkpoints(folder: Path, course: dict | None = None, **training) -> Checkpoints:
    """Those in FOLDER/part, with the given fields of TrainingConfig."""
    return Checkpoints(folder / "part", TrainingConfig(**training), course or mark())
