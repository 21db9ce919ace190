"""Distances between two sets of features: Frechet (as in FID) and kernel (as in KID).

    FD = |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)),
         tr (S1 S2)^(1/2) = sum_i sqrt(eig_i(S1^(1/2) S2 S1^(1/2)))
    KD = unbiased MMD^2 with the kernel (x . y / d + 1)^3, mean over random subsets

The symmetric form has real, non-negative eigenvalues; the general matrix square root of scipy, which some
releases computed wrongly, is not used. Everything is float64.

With all n and m rows at hand, centred as X and Y, the trace is |X Y^T|_* / sqrt((n - 1) (m - 1)), a sum of singular
values of an [n, m] matrix: S1 S2 has the eigenvalues of (X Y^T) (X Y^T)^T / ((n - 1) (m - 1)), and zeros. That is how
small sets are compared, for which it is much quicker.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from aligntok.errors import UserError
from aligntok.evaluation.features import FeatureExtractor, metric_name
from aligntok.evaluation.reservoir import Reservoir

# Sets up to this size have all their kernel values computed once and subsets picked from them: a third of the
# time for 1300 samples, and at most 3 x 134 MB. Larger sets compute each subset's own.
_WHOLE = 4096
KEPT = 10_000  # rows that a set keeps for kernel distances: ten times a subset, 82 MB at 2048 features


class GaussianStatistics:
    """Mean [d] and covariance [d, d] (divided by n - 1) of features that arrive in batches, in float64.

    Batches are combined by their means and centred products (Chan et al. 1979), which does not lose digits
    where the mean is large beside the spread.
    """

    def __init__(self, dimension: int) -> None:
        self.count = 0
        self._mean = torch.zeros(dimension, dtype=torch.float64)
        self._products = torch.zeros(dimension, dimension, dtype=torch.float64)

    @classmethod
    def of(cls, features: Tensor) -> GaussianStatistics:
        """Statistics of one set of features [n, d]."""
        statistics = cls(features.shape[-1])
        statistics.add(features)
        return statistics

    @property
    def dimension(self) -> int:
        return len(self._mean)

    def add(self, features: Tensor) -> None:
        """Take in a batch [n, d]. UserError on another width or on values that are not finite."""
        if features.ndim != 2 or features.shape[1] != self.dimension:
            raise UserError(f"expected features [n, {self.dimension}], got {list(features.shape)}")
        if not features.isfinite().all():
            raise UserError("the features hold values that are not finite; look at the images that gave them")
        if not len(features):
            return
        batch = features.detach().double().cpu()
        mean = batch.mean(0)
        centred = batch - mean
        self._combine(len(batch), mean, centred.T @ centred)

    def merge(self, other: GaussianStatistics) -> None:
        """Take in what another accumulator (another process) has seen."""
        if other.dimension != self.dimension:
            raise UserError(f"cannot merge statistics of width {other.dimension} into width {self.dimension}")
        if other.count:
            self._combine(other.count, other._mean, other._products)

    def _combine(self, count: int, mean: Tensor, products: Tensor) -> None:
        total = self.count + count
        difference = mean - self._mean
        self._products += products + torch.outer(difference, difference) * (self.count * count / total)
        self._mean += difference * (count / total)
        self.count = total

    @property
    def mean(self) -> Tensor:
        """[d]; UserError before the first sample."""
        if not self.count:
            raise UserError("no features were added: a mean needs at least one sample")
        return self._mean

    @property
    def cov(self) -> Tensor:
        """[d, d], unbiased; UserError with fewer than two samples."""
        if self.count < 2:
            raise UserError(f"a covariance needs at least two samples, got {self.count}")
        return self._products / (self.count - 1)

    @property
    def protocol(self) -> str:
        """Sample count, with a warning where the covariance cannot have full rank."""
        text = f"n={self.count}"
        if self.count <= self.dimension:
            text += f" (not more than d={self.dimension}: biased upwards, compare only at equal n)"
        return text


class Gaussian(Protocol):
    """A Gaussian by its mean [d] and covariance [d, d], float64."""

    @property
    def dimension(self) -> int: ...

    @property
    def mean(self) -> Tensor: ...

    @property
    def cov(self) -> Tensor: ...


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Squared Frechet (2-Wasserstein) distance of two Gaussians; rounding below zero is returned as 0."""
    if a.dimension != b.dimension:
        raise UserError(f"the two sets of features differ in width: {a.dimension} and {b.dimension}")
    values, vectors = torch.linalg.eigh(a.cov)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    middle = root @ b.cov @ root
    cross = torch.linalg.eigvalsh((middle + middle.T) / 2).clamp(min=0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace() - 2 * cross
    return max(distance.item(), 0.0)


def frechet_distance_of_rows(x: Tensor, y: Tensor) -> float:
    """`frechet_distance` of all rows [n, d] and [m, d] of two sets, n and m at least 2; quick where n m < d d."""
    (x, x_mean, x_size), (y, y_mean, y_size) = _centred(x), _centred(y)
    spread = x.square().sum() / x_size + y.square().sum() / y_size
    cross = torch.linalg.svdvals(x @ y.T).sum() / (x_size * y_size) ** 0.5
    return max(((x_mean - y_mean).square().sum() + spread - 2 * cross).item(), 0.0)


def _centred(rows: Tensor) -> tuple[Tensor, Tensor, int]:
    """Rows less their mean, in float64; the mean; their number less one."""
    rows = rows.double()
    mean = rows.mean(0)
    return rows - mean, mean, len(rows) - 1


@dataclass(frozen=True)
class KernelDistance:
    """Mean and standard deviation over subsets."""

    mean: float
    std: float
    subsets: int
    subset_size: int

    @property
    def protocol(self) -> str:
        return f"{self.subsets} subsets of {self.subset_size}"


def kernel_distance(
    x: Tensor, y: Tensor, subsets: int = 100, subset_size: int | None = None, seed: int = 0
) -> KernelDistance:
    """Unbiased MMD^2 of features [n, d] and [m, d] with the cubic polynomial kernel; may be slightly
    negative.

    Subsets are drawn without replacement with `seed`. By default they have 1000 members (KID's usual size)
    or half of the smaller set, whichever is less: larger ones would overlap so much that their spread means
    nothing.
    """
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise UserError(f"expected features [n, d] and [m, d], got {list(x.shape)} and {list(y.shape)}")
    smaller = min(len(x), len(y))
    size = min(1000, smaller // 2) if subset_size is None else subset_size
    if not 2 <= size <= smaller or subsets < 1:
        raise UserError(
            f"kernel distance: {subsets} subsets of {size} cannot be drawn from {len(x)} and {len(y)} "
            "samples (a subset needs at least 2 members, its default is half of the smaller set)"
        )
    generator = torch.Generator().manual_seed(seed)
    x, y = x.detach().double().cpu(), y.detach().double().cpu()
    whole = None
    if max(len(x), len(y)) <= _WHOLE:
        whole = _kernel(x, x), _kernel(y, y), _kernel(x, y)
    values = []
    for _ in range(subsets):
        i = torch.randperm(len(x), generator=generator)[:size]
        j = torch.randperm(len(y), generator=generator)[:size]
        if whole is not None:
            values.append(_unbiased_mmd2(whole[0][i][:, i], whole[1][j][:, j], whole[2][i][:, j]))
        else:
            values.append(_unbiased_mmd2(_kernel(x[i], x[i]), _kernel(y[j], y[j]), _kernel(x[i], y[j])))
    found = torch.stack(values)
    return KernelDistance(found.mean().item(), found.std(correction=0).item(), subsets, size)


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _unbiased_mmd2(xx: Tensor, yy: Tensor, xy: Tensor) -> Tensor:
    """From the kernel values [n, n] of equally large sets: the sums within a set leave the diagonal out."""
    n = len(xy)
    within = (xx.sum() - xx.diagonal().sum() + yy.sum() - yy.diagonal().sum()) / (n * (n - 1))
    return within - 2 * xy.mean()


class FeatureSet:
    """Features [n, dimension] of a set of images that arrive in batches: moments of all of them, and `kept` rows.

    Memory does not grow with n beyond `kept`; the rows are a uniform sample (all of them up to that number).
    """

    def __init__(self, dimension: int, kept: int = KEPT) -> None:
        self.statistics = GaussianStatistics(dimension)
        self._reservoir = Reservoir(kept, dimension)

    def add(self, features: Tensor) -> None:
        """Take in a batch. UserError on another width or on values that are not finite."""
        features = features.cpu()
        self.statistics.add(features)
        self._reservoir.add(features)

    @property
    def count(self) -> int:
        return self.statistics.count

    @property
    def rows(self) -> Tensor:
        """[min(n, kept), dimension] float32."""
        return self._reservoir.rows

    @property
    def complete(self) -> bool:
        """Whether all rows were kept."""
        return len(self.rows) == self.count

    @property
    def sampled(self) -> str:
        """What to print where not all rows were kept."""
        return "" if self.complete else f" on a uniform sample of {len(self.rows)}"

    def frechet_distance(self, other: FeatureSet) -> float:
        """Of all rows of both sets, whether or not they were kept."""
        d = self.statistics.dimension
        few = min(self.count, other.count) > 1 and self.count * other.count < d * d
        if few and self.complete and other.complete and d == other.statistics.dimension:
            return frechet_distance_of_rows(self.rows, other.rows)
        return frechet_distance(self.statistics, other.statistics)


def set_distances(
    reference: FeatureSet, found: FeatureSet, extractor: FeatureExtractor, prefix: str, seed: int = 0
) -> tuple[dict[str, float], str]:
    """Both distances under their full names, and the protocol to print with them; see `feature_distances`."""
    kernel = kernel_distance(reference.rows, found.rows, seed=seed)
    metrics = {
        metric_name(f"{prefix}FID", extractor): reference.frechet_distance(found),
        metric_name(f"{prefix}KID", extractor): kernel.mean,
    }
    frechet_name, kernel_name = metrics
    protocol = (
        f"{extractor.protocol}; {frechet_name}: reference {reference.statistics.protocol}, "
        f"against {found.statistics.protocol}; "
        f"{kernel_name}: {kernel.protocol}{found.sampled}, seed {seed}, sd {kernel.std:.2g}"
    )
    return metrics, protocol


def feature_distances(
    reference: Tensor, features: Tensor, extractor: FeatureExtractor, prefix: str, seed: int = 0
) -> tuple[dict[str, float], str]:
    """Both distances of features [n, d] and [m, d] in memory, and the protocol to print with them.

    `prefix` is "r" for reconstructions and "g" for generated images: {"rFD-EffNetLite0": ...,
    "rKD-EffNetLite0": ...}; with ADM's Inception network they are called rFID and rKID.
    """
    return set_distances(_whole_set(reference), _whole_set(features), extractor, prefix, seed)


def _whole_set(features: Tensor) -> FeatureSet:
    found = FeatureSet(features.shape[-1], kept=len(features))
    found.add(features)
    return found
