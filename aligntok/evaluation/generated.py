"""ADM's protocol on sets of any size: what is kept of generated and of real images, and the numbers between them.

    gFID, gKID  Frechet and kernel distance of pooled features         sFID  Frechet distance of spatial features
    IS          of the generated images alone, in splits of 5,000      precision, recall  with k = 3 neighbours

Moments are exact whatever the number of images. Precision and recall need the features themselves: of all generated
images up to 50,000 and of 10,000 real ones, which are ADM's own numbers, and of uniform samples of that size beyond.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from aligntok.data.geometry import to_unit_range
from aligntok.errors import UserError
from aligntok.evaluation.adm import (
    NEIGHBOURS,
    SPLIT,
    InceptionScore,
    precision_recall,
)
from aligntok.evaluation.distances import FeatureSet, Gaussian, GaussianStatistics, frechet_distance, set_distances
from aligntok.evaluation.features import FeatureExtractor, metric_name
from aligntok.evaluation.inception import SPATIAL_DIMENSION, Inception
from aligntok.evaluation.reference import ReferenceBatch
from aligntok.evaluation.tokenizer import Measured

KEPT_SAMPLES = 50_000  # pooled features for precision and recall: ADM's sample count, 410 MB
KEPT_REFERENCE = 10_000  # images of ADM's reference batch
APART = 5  # standard errors: chance alone goes further once in a million batches, even if features vary along one line


class ImageFeatures:
    """What the protocol keeps of one set of images that arrive in batches."""

    def __init__(self, inception: Inception | None, others: Sequence[FeatureExtractor], kept: int) -> None:
        self.inception, self.others = inception, [(found, FeatureSet(found.dimension)) for found in others]
        self.count = 0
        if inception is not None:
            self.pooled = FeatureSet(inception.dimension, kept)
            self.spatial = GaussianStatistics(SPATIAL_DIMENSION)
            self.score = InceptionScore()

    def add(self, images: Tensor) -> None:
        """Take in a batch uint8 [B, 3, H, W]."""
        values = to_unit_range(images)
        for extractor, features in self.others:
            features.add(extractor(values))
        if self.inception is not None:
            found = self.inception.everything(values)
            self.pooled.add(found.pooled)
            self.spatial.add(found.spatial.cpu())
            self.score.add(found.logits.cpu())
        self.count += len(images)

    def add_all(self, batches: Iterable[Tensor]) -> ImageFeatures:
        for images in batches:
            self.add(images)
        return self


def check_images(count: int, size: tuple[int, int], expected: int) -> None:
    """UserError unless images of (height, width) in a file are enough, and as large as samples of side `expected`."""
    if size != (expected, expected):
        raise UserError(
            f"the reference holds images of {size[1]}x{size[0]} px, the samples have {expected}x{expected} px: "
            "give images of the samples' size, or a folder of larger ones, which are cut to it"
        )
    require_enough(count, "reference images")


def check_statistics(reference: ReferenceBatch, inception: Inception | None) -> None:
    """UserError unless a file's moments can be compared with those of features of `inception`."""
    of_other = [
        f"{name} has {moments.dimension} values, expected {expected}"
        for name, moments, expected in (
            ("mu", reference.pooled, (inception or Inception).dimension),
            ("mu_s", reference.spatial, SPATIAL_DIMENSION),
        )
        if moments is not None and moments.dimension != expected
    ]
    if of_other:
        raise UserError(f"the reference holds features of another extractor than Inception: {'; '.join(of_other)}")
    if inception is None:
        raise UserError(
            "the reference holds moments of the Inception network's features, and there are no Inception weights here: "
            "give them with --inception, or images as --reference"
        )
    if not inception.published:
        raise UserError(
            f"the reference was made with the published Inception weights, and {inception.path} holds others "
            f"(sha256 {inception.sha256[:16]}): their features cannot be compared"
        )


def compare_with_set(samples: ImageFeatures, reference: ImageFeatures, seed: int = 0) -> dict[str, Measured]:
    """Every number between two sets of images whose features were taken by the same networks."""
    found = {}
    if samples.inception is not None:
        metrics, protocol = set_distances(reference.pooled, samples.pooled, samples.inception, "g", seed)
        found["generation, ADM protocol"] = _adm_numbers(
            samples,
            reference.spatial,
            reference.pooled.rows,
            metrics,
            f"{protocol}; reference {reference.count} images",
        )
    for (extractor, made), (_, real) in zip(samples.others, reference.others, strict=True):
        found[f"generation, {extractor.name}"] = Measured(*set_distances(real, made, extractor, "g", seed))
    return found


def check_moments(reference: ReferenceBatch, own: ImageFeatures) -> None:
    """UserError unless a reference batch's moments may be those of `own`, the features of the images in its file.

    Their mean differs from a batch's by chance at most, for which sqrt(tr(sigma) / n) is the scale: the images are
    those that the moments are of, or n drawn from them.
    """
    for name, stated, found in (
        ("mu", reference.pooled, own.pooled.statistics),
        ("mu_s", reference.spatial, own.spatial),
    ):
        if stated is None:
            continue
        chance = float(stated.cov.trace().clamp(min=0) / own.count) ** 0.5
        apart = float((stated.mean - found.mean).norm())
        if apart > APART * chance:
            raise UserError(
                f"the reference batch's {name} is {apart:.3g} away from the mean over its own {own.count} images, "
                f"expected at most {APART * chance:.3g}: it holds features of another extractor; give ADM's own file, "
                "or one of the images alone"
            )


def compare_with_batch(
    samples: ImageFeatures, reference: ReferenceBatch, images: ImageFeatures | None
) -> dict[str, Measured]:
    """Every number that a file with moments allows.

    The features of its `images` (None: it has none) serve precision and recall, and sFID where spatial moments lack.
    """
    inception = samples.inception
    assert inception is not None  # check_statistics
    distance = frechet_distance(reference.pooled, samples.pooled.statistics)
    protocol = f"{inception.protocol}; {samples.pooled.statistics.protocol}; {reference.protocol}"
    spatial: Gaussian | None = reference.spatial
    if spatial is None and images is not None:
        spatial, protocol = images.spatial, f"{protocol}; sFID against these images, {images.spatial.protocol}"
    real = None if images is None else images.pooled.rows
    found = _adm_numbers(samples, spatial, real, {metric_name("gFID", inception): distance}, protocol)
    found.left_out = {metric_name(name, inception): reason for name, reason in reference.left_out.items()}
    return {"generation, ADM protocol": found}


def _adm_numbers(
    samples: ImageFeatures,
    spatial: Gaussian | None,
    real: Tensor | None,
    metrics: dict[str, float],
    protocol: str,
) -> Measured:
    """`metrics` and IS, with sFID against `spatial`, precision and recall against pooled features `real` [n, 2048]."""
    inception, made = samples.inception, samples.pooled.rows
    assert inception is not None
    more, device = {}, inception.device  # distances of 50,000 points are work for where the network is
    if spatial is not None:
        more["sFID"] = frechet_distance(spatial, samples.spatial)
        protocol += f"; sFID: first 7 channels behind Mixed_6d.branch1x1, {samples.spatial.protocol}"
    more["IS"] = samples.score.compute()
    protocol += f"; IS in splits of {SPLIT}"
    if real is not None:
        more["precision"], more["recall"] = precision_recall(real.to(device), made.to(device))
        counts = f"{len(made)} samples, {len(real)} reference images"
        protocol += f"; precision and recall: k={NEIGHBOURS}, {counts}"
    return Measured(metrics | {metric_name(name, inception): value for name, value in more.items()}, protocol)


def require_enough(count: int, what: str) -> None:
    """UserError where there are too few images for a covariance, a subset of two and a third neighbour."""
    if count <= NEIGHBOURS:
        raise UserError(
            f"{count} {what}: covariances, kernel subsets and neighbours need at least {NEIGHBOURS + 1}, and numbers "
            "that can be compared with published ones 50,000"
        )
