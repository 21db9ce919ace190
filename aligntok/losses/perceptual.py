"""Perceptual distances: LPIPS (Zhang et al., CVPR 2018) and its shift-tolerant variant, as one frozen module.

    d(x, y) = sum_l mean_hw sum_c w_lc (f_lc(x) / |f_l(x)| - f_lc(y) / |f_l(y)|)^2

with f_l five feature maps of a frozen classifier, |.| the norm over channels at a pixel, and w learned from
human judgements. The features are computed in the precision of the surrounding autocast, the normalisation
and the sums in float32. The heads w of LPIPS ship with the `lpips` package; its trunks are torchvision's
ImageNet weights, downloaded or given by path. ST-LPIPS needs one file only (aligntok.losses.st_lpips).
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources

import torch
import torchvision
from torch import Tensor, nn

from aligntok.config import PerceptualConfig
from aligntok.errors import UserError
from aligntok.kernels import lpips_distance
from aligntok.losses import st_lpips
from aligntok.runtime.autocast import without_autocast
from aligntok.runtime.published import read_published
from aligntok.runtime.weights import in_short

# The published scaling of [-1, 1] images: the `lpips` package, ScalingLayer
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)

# Smallest side for which every layer has an output (tests try it and the size below)
_SMALLEST = {"lpips-vgg": 16, "lpips-alex": 31, "st-lpips-vgg": 18, "st-lpips-alex": 21}
# torchvision: constructor, weights, and the indices of the compared ReLUs in `features` (the `lpips`
# package's slices)
_TORCHVISION = {
    "vgg": (torchvision.models.vgg16, torchvision.models.VGG16_Weights.IMAGENET1K_V1, (3, 8, 15, 22, 29)),
    "alex": (torchvision.models.alexnet, torchvision.models.AlexNet_Weights.IMAGENET1K_V1, (1, 4, 7, 9, 11)),
}


class PerceptualDistance(nn.Module):
    """forward(x, y): two batches [B, 3, H, W] in [-1, 1] -> distances [B], float32, 0 for equal images.

    Frozen and in evaluation mode whatever train() is called with. Differentiable in x and y; where only x
    needs a gradient, y goes through the trunk apart from it and leaves no graph, which halves the backward
    pass.
    """

    shift: Tensor
    scale: Tensor

    def __init__(
        self, name: str, layers: nn.Sequential, taps: Sequence[int], heads: Sequence[Tensor], smallest: int
    ) -> None:
        super().__init__()
        self.name = name
        self.smallest = smallest
        self.taps = tuple(taps)
        # Channels-last: about twice as fast as the default on a CPU, and what tensor cores want on a GPU
        self.layers = layers[: self.taps[-1] + 1].to(memory_format=torch.channels_last)
        self.heads = nn.ParameterList([nn.Parameter(head) for head in heads])
        self.register_buffer("shift", torch.tensor(_SHIFT).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(_SCALE).view(1, 3, 1, 1))
        self.requires_grad_(False).eval()

    @property
    def label(self) -> str:
        """Name of the metric: "LPIPS" or "ST-LPIPS"; `name` says the network too."""
        return self.name.rsplit("-", 1)[0].upper()

    def train(self, mode: bool = True) -> PerceptualDistance:
        """Stays in evaluation mode: the distance must not depend on what the trainer calls."""
        return super().train(False)

    def features(self, images: Tensor) -> list[Tensor]:
        """The compared feature maps, [B, C_l, H_l, W_l] each."""
        maps = (images - self.shift) / self.scale
        found = []
        for index, layer in enumerate(self.layers):
            maps = layer(maps)
            if index in self.taps:
                found.append(maps)
        return found

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        self._check(x, y)
        pairs = zip(self.features(x), self.features(y), self.heads, strict=True)
        with without_autocast(x.device.type):
            return torch.stack([lpips_distance(fx, fy, head) for fx, fy, head in pairs]).sum(0)

    def _check(self, x: Tensor, y: Tensor) -> None:
        if x.shape != y.shape or x.ndim != 4 or x.shape[1] != 3:
            raise UserError(f"expected two equal shapes [B, 3, H, W], got {list(x.shape)} and {list(y.shape)}")
        if min(x.shape[2:]) < self.smallest:
            raise UserError(
                f"{self.name} needs images of at least {self.smallest} x {self.smallest} px, "
                f"got {x.shape[2]} x {x.shape[3]}"
            )


def build_perceptual(config: PerceptualConfig) -> PerceptualDistance:
    """The distance named by `config.kind`, with its weights; "none" is the caller's business.

    On the meta device (`with torch.device("meta")`) no weights are read.

    Raises UserError: unknown kind; weights neither downloadable nor given; a file that does not fit.
    """
    kind = config.kind
    if kind not in _SMALLEST:
        raise UserError(f"unknown perceptual loss {kind!r}; the known ones are {', '.join(_SMALLEST)}")
    network = kind.rsplit("-", 1)[1]
    if torch.get_default_device().type == "meta":
        layers, taps, heads = _without_weights(kind, network)
    elif kind.startswith("st-"):
        layers, taps, heads = st_lpips.load(network, config.weights)
    else:
        layers, taps, heads = _load_lpips(network, config.weights)
    return PerceptualDistance(kind, layers, taps, heads, _SMALLEST[kind])


def _without_weights(kind: str, network: str) -> tuple[nn.Sequential, tuple[int, ...], list[Tensor]]:
    if kind.startswith("st-"):
        layers, taps = st_lpips.alex_layers() if network == "alex" else st_lpips.vgg_layers()
    else:
        constructor, _, taps = _TORCHVISION[network]
        layers = constructor(weights=None).features
    widths = [next(x.out_channels for x in layers[tap::-1] if isinstance(x, nn.Conv2d)) for tap in taps]
    return layers, taps, [torch.empty(width) for width in widths]


def _load_lpips(network: str, path: str | None) -> tuple[nn.Sequential, tuple[int, ...], list[Tensor]]:
    """torchvision's trunk and the heads of the `lpips` package."""
    constructor, weights, taps = _TORCHVISION[network]
    state = _trunk_state(network, weights, path)
    with torch.device("meta"):  # the classifier of VGG16 is never built
        layers = constructor(weights=None).features
    trunk = {
        key.removeprefix("features."): value.float()  # a file may hold half precision, and images are float32
        for key, value in state.items()
        if key.startswith("features.")
    }
    try:
        layers.load_state_dict(trunk, assign=True)
    except RuntimeError as error:
        raise UserError(f"{path} does not hold torchvision's {constructor.__name__}: {in_short(error)}") from error
    with resources.as_file(resources.files("lpips") / "weights" / "v0.1" / f"{network}.pth") as file:
        heads = torch.load(file, map_location="cpu", weights_only=True)
    return layers, taps, [heads[f"lin{index}.model.1.weight"].flatten() for index in range(len(taps))]


def _trunk_state(network: str, weights: torchvision.models.WeightsEnum, path: str | None) -> dict[str, Tensor]:
    try:
        if path is not None:
            return read_published(path)
        return weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except Exception as error:  # unpickling, zip, network: each raises its own
        raise UserError(
            f"the {network} trunk of LPIPS could not be {'read from ' + path if path else 'downloaded'} "
            f"({type(error).__name__}: {error}). torchvision calls its file {weights.url.rsplit('/', 1)[1]}: "
            "give it with losses.perceptual.weights=/path/to/file, or set "
            f"losses.perceptual.kind=st-lpips-{network}"
        ) from error
