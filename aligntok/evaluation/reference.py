"""What an .npz offers as the reference of generated images: images, moments of others' features, or both.

    arr_0, mu, sigma, mu_s, sigma_s   ADM's reference batch        gFID, sFID, IS, precision, recall
    arr_0                             images like a folder's       those and gKID, and all of EfficientNet-Lite0
    mu, sigma                         pytorch-fid, clean-fid       gFID, IS
    mu, sigma, mu_s, sigma_s                                       gFID, sFID, IS
    arr_0, mu, sigma                                               all five; sFID against the file's own images

Moments are those of a training set, so all these are refused where reconstructions are compared with their originals.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from aligntok.errors import UserError
from aligntok.evaluation.adm import Moments, check_samples
from aligntok.evaluation.npz import held_by, member, numbers, opened, require_whole
from aligntok.runtime.files import digest

_POOLED, _SPATIAL = ("mu", "sigma"), ("mu_s", "sigma_s")
_ASYMMETRY = 1e-3  # of the largest value: more is no rounding


@dataclass(frozen=True)
class ReferenceBatch:
    """Moments of pooled and, where the file has them, of spatial features; its images; its SHA-256."""

    pooled: Moments
    spatial: Moments | None
    images: int  # 0 = none in the file
    size: tuple[int, int] | None  # (height, width) of the images
    sha256: str

    @property
    def protocol(self) -> str:
        sha256 = f"sha256 {self.sha256[:16]}"
        if not self.images:
            names = ", ".join(_POOLED if self.spatial is None else _POOLED + _SPATIAL)
            return f"reference moments {sha256} ({names}), not verified: no images beside them to measure"
        kind = "ADM reference batch" if self.spatial else "reference batch without mu_s and sigma_s,"
        return f"{kind} {sha256}, {self.images} images for precision and recall"

    @property
    def left_out(self) -> dict[str, str]:
        """Numbers that cannot be taken against this reference, and why."""
        if self.images:
            return {}
        images = "no images (arr_0) in the reference file"
        spatial = {"sFID": f"no spatial moments (mu_s, sigma_s) and {images}"} if self.spatial is None else {}
        return spatial | dict.fromkeys(("precision", "recall"), images)


def read_reference(path: str | Path) -> ReferenceBatch | None:
    """The moments of a file; its images are left on the disk for `read_samples`. None: it has images alone.

    Raises:
        UserError: neither images nor moments, half a pair of them, or what is there is damaged or does not fit.
    """
    with opened(path) as archive:
        require_whole(archive, path)
        names = {key for key in ("arr_0", *_POOLED, *_SPATIAL) if f"{key}.npy" in archive.namelist()}
        _check_names(names, archive, path)
        images, size = 0, None
        if "arr_0" in names:
            with member(archive, "arr_0", path) as (_, shape, dtype):
                check_samples(path, shape, dtype)
                images, size = shape[0], (shape[1], shape[2])
        if "mu" not in names:
            return None
        pooled = _moments(archive, _POOLED, path)
        spatial = _moments(archive, _SPATIAL, path) if "mu_s" in names else None
    return ReferenceBatch(pooled, spatial, images, size, digest(path))


def _check_names(names: set[str], archive: zipfile.ZipFile, path: str | Path) -> None:
    if not names:
        raise UserError(
            f"{path} holds {held_by(archive)}, expected images (arr_0), moments (mu and sigma, for sFID mu_s and "
            "sigma_s too), or both"
        )
    for pair in (_POOLED, _SPATIAL):
        for here, there in (pair, pair[::-1]):
            if here in names and there not in names:
                raise UserError(f"{path} holds {here} and lacks {there}: a mean and its covariance belong together")
    if "mu_s" in names and "mu" not in names:
        raise UserError(f"{path} holds mu_s and sigma_s and lacks mu and sigma, without which there is no gFID")


def _moments(archive: zipfile.ZipFile, pair: tuple[str, str], path: str | Path) -> Moments:
    """A mean [d] and a covariance [d, d] of the file."""
    mean, cov = (numbers(archive, name, path) for name in pair)
    if mean.ndim != 1 or not len(mean) or cov.shape != (len(mean), len(mean)):
        raise UserError(
            f"{path}: {pair[0]} {list(mean.shape)} and {pair[1]} {list(cov.shape)} do not fit: expected [d] and [d, d]"
        )
    if _no_covariance(cov):
        raise UserError(f"{path}: {pair[1]} is no covariance: it is not symmetric, or has a negative variance")
    return Moments(mean, cov)


def _no_covariance(cov: Tensor) -> bool:
    return bool((cov - cov.T).abs().max() > _ASYMMETRY * cov.abs().max() or cov.diagonal().min() < 0)
