"""Random weights of the Inception network, for tests: the published ones are in no package."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
from torch import nn
from torch_fidelity import feature_extractor_inceptionv3 as theirs

from aligntok.evaluation.inception import PUBLISHED, SPATIAL_DIMENSION, Inception, InceptionFeatures


class _Blank(theirs.FeatureExtractorInceptionV3):
    def load_state_dict(self, *arguments, **options):  # keeps its initial values
        return None


def write_random_weights(path: Path) -> Path:
    """A weight file in torch-fidelity's layout: He initialisation, so that features differ from image to image."""
    torch.manual_seed(0)
    with patch.object(theirs, "load_state_dict_from_url", lambda *arguments, **options: {}):
        network = _Blank("blank", ["2048"])
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
    torch.save(network.state_dict(), path)
    return path


class TinyInception(Inception):
    """Random projections of the downscaled image in the place of the network: the protocol at a thousandth of the cost.

    It claims the published weights, so that numbers have their plain names.
    """

    def __init__(self) -> None:
        nn.Module.__init__(self)
        torch.manual_seed(0)
        self.path, self.sha256 = Path("tiny.pth"), PUBLISHED + "0" * 56
        self.network = nn.Module()
        self.network.fc = nn.Linear(2048, 10)
        self.project = nn.Linear(192, 2048 + SPATIAL_DIMENSION).requires_grad_(False)

    @torch.no_grad()
    def everything(self, images: torch.Tensor) -> InceptionFeatures:
        found = self.project(nn.functional.adaptive_avg_pool2d(images, 8).flatten(1)).relu()
        pooled, spatial = found.split([2048, SPATIAL_DIMENSION], dim=1)
        return InceptionFeatures(pooled, spatial, 10 * pooled[:, :10])


class SmallExtractor(nn.Module):
    """Stands for EfficientNet-Lite0 where it is not what a test is about."""

    name, dimension, protocol = "EffNetLite0", 12, "twelve numbers"

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)


def use_small_networks(monkeypatch) -> None:
    """`aligntok evaluate` with networks of few features: a TinyInception that counts as published, SmallExtractor."""
    whole = TinyInception.everything

    def fewer(self, images: torch.Tensor) -> InceptionFeatures:
        found = whole(self, images)
        return replace(found, pooled=found.pooled[:, :16], spatial=found.spatial[:, :12])

    monkeypatch.setattr(TinyInception, "everything", fewer)
    monkeypatch.setattr(TinyInception, "dimension", 16)
    monkeypatch.setattr("aligntok.evaluation.generated.SPATIAL_DIMENSION", 12)
    monkeypatch.setattr("aligntok.commands.evaluate.find_inception", lambda given: (TinyInception(), "tiny"))
    for place in ("commands.evaluate", "evaluation.sample_sources"):
        monkeypatch.setattr(f"aligntok.{place}.EfficientNetLite0", SmallExtractor)
