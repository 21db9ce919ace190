"""Image features that Frechet and kernel distances are computed from, behind one small protocol.

A distance carries the name of its extractor (rFD-EffNetLite0): "FID" is reserved for the Inception network
of the ADM protocol. Images are quantised to 8 bits before any network sees them, exactly as if they had
been saved to a file.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import timm
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from timm.models.efficientnet import EfficientNet
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from aligntok.errors import UserError
from aligntok.runtime import assets

INCEPTION = "Inception"  # the name that the Inception network has with the published weights, and only with them


class FeatureExtractor(Protocol):
    """What a Frechet or kernel distance needs to know of a network."""

    @property
    def name(self) -> str:
        """Goes into the metric's name: rFD-<name>."""

    @property
    def dimension(self) -> int:
        """Width of the features."""

    @property
    def protocol(self) -> str:
        """Input size, resize filter, layer, weights: printed with every number."""

    def __call__(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> features [B, dimension], float32, without gradient."""


def metric_name(metric: str, extractor: FeatureExtractor) -> str:
    """What a number may be called: "gFID" becomes "gFD-EffNetLite0", "IS" "IS-..." for features other than ADM's."""
    if extractor.name == INCEPTION:
        return metric
    return f"{metric.replace('ID', 'D')}-{extractor.name}"


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] -> 0..255, rounded to nearest as floor(127.5 x + 128), clipped (LightningDiT,
    tokenizer/vavae.py)."""
    return (images.float() * 127.5 + 128).clamp_(0, 255).to(torch.uint8)


def extract(extractor: FeatureExtractor, batches: Iterable[Tensor]) -> Tensor:
    """Features [n, dimension] of all images of `batches` ([B, 3, H, W] in [-1, 1] each), float32 on the
    CPU."""
    features = [extractor(images).cpu() for images in batches]
    if not features:
        raise UserError(f"no images were given to {extractor.name}: at least one batch is needed")
    return torch.cat(features)


class EfficientNetLite0(nn.Module):
    """1280 pooled features of EfficientNet-Lite0, trained on ImageNet-1k, from the asset
    "efficientnet-lite0".

    Images are stretched to 224 x 224 px (bicubic, antialiased, clipped to 0..255) and enter as (v - 127) /
    128. `path` gives the weight file instead of fetching it.
    """

    name = "EffNetLite0"
    dimension = 1280
    size = 224  # training resolution

    def __init__(self, path: str | Path | None = None) -> None:
        super().__init__()
        # tf_*: SAME padding and a BatchNorm eps of 1e-3, as the weights were trained with
        network = timm.create_model("tf_efficientnet_lite0")
        assert isinstance(network, EfficientNet)
        self.network = network
        file = assets.fetch("efficientnet-lite0", path)
        self.network.load_state_dict(_timm_names(torch.load(file, map_location="cpu", weights_only=True)))
        self.requires_grad_(False).eval()
        _fold_norms(self.network)
        self.network.to(memory_format=torch.channels_last)  # five times as fast as the default on a CPU

    @property
    def protocol(self) -> str:
        return (
            f"{assets.ASSETS['efficientnet-lite0'].what}, {self.dimension} pooled features; 8-bit images, "
            f"bicubic antialiased resize to {self.size}x{self.size} px"
        )

    def train(self, mode: bool = True) -> EfficientNetLite0:
        """Stays in evaluation mode: BatchNorm uses its stored statistics."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> pooled features [B, 1280]."""
        return self._run(images, features=True)

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> ImageNet-1k logits [B, 1000]."""
        return self._run(images, features=False)

    def _run(self, images: Tensor, features: bool) -> Tensor:
        if images.ndim != 4 or images.shape[1] != 3:
            raise UserError(f"expected images [B, 3, H, W], got {list(images.shape)}")
        values = to_uint8(images.to(self.network.conv_stem.weight.device)).float()
        if values.shape[2:] != (self.size, self.size):
            values = F.interpolate(values, size=(self.size, self.size), mode="bicubic", antialias=True)
        maps = self.network.forward_features((values.clamp_(0, 255) - 127) / 128)
        return self.network.forward_head(maps, pre_logits=features).float()


def _fold_norms(network: nn.Module) -> None:
    """Multiply each BatchNorm of an evaluation-mode network into the convolution before it; its activation
    stays."""
    convolution: tuple[str, nn.Conv2d] | None = None
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.Conv2d):
            convolution = name, module
        elif isinstance(module, BatchNormAct2d):
            assert convolution is not None and convolution[1].out_channels == module.num_features
            network.set_submodule(convolution[0], fuse_conv_bn_eval(convolution[1], module))
            network.set_submodule(name, module.act)


# The asset's names inside a block -> timm's. The first block has no expansion, which shifts the numbers of
# its norms.
_FIRST_BLOCK = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_OTHER_BLOCKS = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
_OUTSIDE = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
_STAGES = (1, 2, 2, 3, 3, 4, 1)  # blocks per stage of EfficientNet-Lite0; the asset numbers them through


def _timm_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    places = [f"blocks.{stage}.{index}" for stage, count in enumerate(_STAGES) for index in range(count)]
    renamed = {}
    for key, value in state.items():
        parts = key.split(".")
        if parts[0] == "_blocks":
            block = int(parts[1])
            name = (_OTHER_BLOCKS if block else _FIRST_BLOCK)[parts[2]]
            renamed[f"{places[block]}.{name}.{parts[3]}"] = value
        else:
            renamed[f"{_OUTSIDE[parts[0]]}.{parts[1]}"] = value
    return renamed
