"""The Inception network of FID, as torch-fidelity has ported it from the TensorFlow graph of 2015-12-05.

    pooled   2048 numbers behind the last average pool           FID, precision, recall (pool_3:0 in ADM's evaluator)
    spatial  2023 = 17 x 17 x 7, behind the ReLU of Mixed_6d.branch1x1    sFID (mixed_6/conv:0 in ADM's evaluator)
    logits   1008 class scores without the bias                  Inception score

TensorFlow counts its blocks from 0 and through (mixed_3 is Mixed_6a, mixed_6 therefore Mixed_6d). Images enter as
8-bit values and are resized to 299 x 299 px by the bilinear filter of TensorFlow 1.

The weights are not part of any package: they are read from a file, or from torch.hub's cache. Only the published file,
known by its SHA-256, gives numbers the right to be called FID; others carry the checksum of theirs in their name.
"""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import torch
from torch import Tensor, nn

from aligntok.errors import UserError
from aligntok.evaluation.adm import spatial_features
from aligntok.evaluation.features import INCEPTION, to_uint8
from aligntok.runtime.files import digest
from aligntok.runtime.published import read_published
from aligntok.runtime.weights import in_short

PUBLISHED = "6726825d"  # first digits of the file's SHA-256, which its name ends with
FILES = ("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth")  # one file, two names
SPATIAL_DIMENSION = 2023


@dataclass
class InceptionFeatures:
    """What one pass gives: [B, 2048], [B, 2023] and [B, 1008], float32."""

    pooled: Tensor
    spatial: Tensor
    logits: Tensor


class Inception(nn.Module):
    """Feature extractor with the weights of a file, which is read without executing anything that it holds.

    Raises:
        UserError: torch-fidelity is absent, or the file does not hold the network's weights.
    """

    dimension = 2048

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        extractor = _require_fidelity()
        self.path, self.sha256 = Path(path).expanduser(), ""
        if not self.path.is_file():
            raise UserError(f"no Inception weights at {path}: expected a file; {how_to_get()}")
        # torch-fidelity would unpickle whatever the file holds: it is handed tensors that were read safely
        memory = BytesIO()
        torch.save(_read(self.path), memory)
        memory.seek(0)
        try:
            self.network = extractor("aligntok", ["2048", "logits_unbiased"], feature_extractor_weights_path=memory)
        except RuntimeError as error:
            raise UserError(
                f"{path} holds other weights than those of the Inception network: {in_short(error)}"
            ) from error
        self.sha256 = digest(self.path)
        self.requires_grad_(False).eval()
        self._maps: Tensor | None = None
        self.network.get_submodule("Mixed_6d.branch1x1").register_forward_hook(self._keep)

    @property
    def published(self) -> bool:
        return self.sha256.startswith(PUBLISHED)

    @property
    def name(self) -> str:
        return INCEPTION if self.published else f"Inception-{self.sha256[:8]}"

    @property
    def protocol(self) -> str:
        kind = "2015-12-05, the published weights" if self.published else "NOT the published weights"
        return (
            f"Inception ({kind}, sha256 {self.sha256[:16]}) as ported by torch-fidelity; 8-bit images, "
            "TensorFlow 1's bilinear resize to 299x299 px"
        )

    @property
    def device(self) -> torch.device:
        return self.network.get_parameter("fc.weight").device

    def train(self, mode: bool = True) -> Inception:
        """Stays in evaluation mode: BatchNorm uses its stored statistics."""
        return super().train(False)

    def _keep(self, module: nn.Module, inputs: tuple[Tensor, ...], maps: Tensor) -> None:
        self._maps = spatial_features(maps)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> pooled features [B, 2048]."""
        return self.everything(images).pooled

    @torch.no_grad()
    def everything(self, images: Tensor) -> InceptionFeatures:
        """[B, 3, H, W] in [-1, 1] -> all that ADM's protocol needs of them."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise UserError(f"expected images [B, 3, H, W], got {list(images.shape)}")
        pooled, logits = self.network(to_uint8(images.to(self.device)))
        assert self._maps is not None  # the hook has run
        spatial, self._maps = self._maps, None
        return InceptionFeatures(pooled, spatial, logits)


def find_inception(given: str | None) -> tuple[Inception | None, str]:
    """(the network, why) for a path, a URL that torch.hub downloads into its cache, or None = a file in that cache.

    Raises:
        UserError: something was given and cannot be had. Without anything given the reason is returned instead.
    """
    if given is not None:
        return Inception(_download(given) if "://" in given else given), "as given"
    for name in FILES:
        cached = hub_folder() / name
        if cached.is_file():
            try:
                return Inception(cached), f"found at {cached}"
            except UserError as error:
                return None, f"{cached} is not used: {error}"
    return None, f"no Inception weights in {hub_folder()}, so no FID, sFID, IS, precision or recall; {how_to_get()}"


def hub_folder() -> Path:
    """Where torch.hub keeps downloaded weights."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def how_to_get() -> str:
    return (
        f"torch-fidelity publishes {FILES[0]} (release v0.2.0 on GitHub): give it with --inception FILE or --inception "
        f"URL, or put it into {hub_folder()}"
    )


def _download(url: str) -> Path:
    target = hub_folder() / url.rsplit("/", 1)[1]
    if not target.is_file():
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(target), hash_prefix=PUBLISHED if PUBLISHED in url else None)
        except Exception as error:  # network, disk and checksum each raise their own
            raise UserError(f"{url} could not be downloaded ({in_short(error)}); {how_to_get()}") from error
    return target


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return read_published(path)
    except UserError as error:
        raise UserError(f"{error}; {how_to_get()}") from error


def _require_fidelity() -> type[nn.Module]:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise UserError(
            f"the Inception network is torch-fidelity's, which cannot be imported ({error}): "
            "pip install 'aligntok[fidelity]'"
        ) from error
    return FeatureExtractorInceptionV3
