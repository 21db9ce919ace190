"""What the tests of objectives in aligntok.zoo need: a small frozen encoder and a run of the real loop in memory."""

from pathlib import Path
from typing import Any

import torch

from aligntok.config import EncoderConfig, TrainingConfig
from aligntok.data.sources import MemorySource
from aligntok.models.encoder import Encoder
from aligntok.training.loop import train
from aligntok.training.monitoring.telemetry import Telemetry
from aligntok.training.objective import Objective
from aligntok.training.recovery.checkpoint import Checkpoints


def tiny_encoder(downsample: int = 16) -> Encoder:
    """One block of a random ViT-Ti, 192 channels."""
    name = "vit_tiny_patch16_224.augreg_in21k"
    return Encoder(EncoderConfig(name=name, weights="random", layer=0, downsample=downsample))


def tiny_run(
    objective: Objective, folder: Path, size: int = 32, classes: int = 2, checkpoint_every: int = 100
) -> dict[str, Any]:
    """All steps of `objective` on six random pictures, four at a time; the last record of its log."""
    random = torch.Generator().manual_seed(5)
    images = torch.randint(0, 256, (6, 3, size, size), generator=random, dtype=torch.uint8)
    labels = torch.randint(0, classes, (6,), generator=random)
    source = MemorySource(images, labels, batch_size=4, seed=0, flip=True)
    training = TrainingConfig(batch_size=4, precision="fp32", log_every=1, checkpoint_every=checkpoint_every)
    telemetry = Telemetry(folder, training.log_every)
    checkpoints = Checkpoints(folder / "checkpoints", training, {"part": "tiny"})
    train("tiny", objective, source, training, torch.device("cpu"), telemetry, checkpoints)
    return telemetry.records()[-1]
