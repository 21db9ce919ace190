"""Every metric on distributions whose answer is known, without any weights: does this installation count right?

Perceptual distances are counted over a network with a known answer, and over ST-LPIPS' layers with random weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import log10

import torch
from torch import Tensor, nn

from aligntok.evaluation.adm import InceptionScore, precision_recall
from aligntok.evaluation.alignment import cknna
from aligntok.evaluation.distances import (
    FeatureSet,
    GaussianStatistics,
    frechet_distance,
    frechet_distance_of_rows,
    kernel_distance,
)
from aligntok.evaluation.probe import linear_probe
from aligntok.evaluation.reconstruction import psnr, ssim
from aligntok.evaluation.retrieval import Pictures, measure_class_agreement, measure_retrieval
from aligntok.evaluation.trained_probe import train_probe
from aligntok.losses.perceptual import PerceptualDistance
from aligntok.losses.st_lpips import alex_layers


@dataclass(frozen=True)
class Check:
    """One metric on one distribution: what theory says, what was found, and how far apart they may be."""

    metric: str
    case: str
    expected: float
    found: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return abs(self.found - self.expected) <= self.tolerance  # False for NaN


def self_test(progress: Callable[[int, int], None] | None = None) -> list[Check]:
    """All checks, in seconds; deterministic."""
    groups = (_reconstruction, _perceptual, _frechet, _kernel, _scores, _neighbours, _alignment, _probes, _captions)
    checks: list[Check] = []
    for done, group in enumerate(groups, start=1):
        checks += group()
        if progress is not None:
            progress(done, len(groups))
    return checks


def _normal(n: int, d: int, seed: int) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _reconstruction() -> Iterator[Check]:
    black, grey = torch.full((1, 3, 32, 32), -1.0), torch.full((1, 3, 32, 32), -0.8)
    yield Check("PSNR [dB]", "an error of a tenth of the range", 20.0, psnr(black, grey).item(), 1e-4)
    noise = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = psnr(torch.zeros(1, 3, 32, 32), noise).item()
    yield Check("PSNR [dB]", "uniform noise against its mean: 10 log10(12)", 10 * log10(12), found, 0.15)
    yield Check("SSIM", "equal images", 1.0, ssim(noise, noise).item(), 1e-5)
    # Constant images: only the luminance term is left, (2 a b + C1) / (a^2 + b^2 + C1) with C1 = 0.01^2
    flat = 1e-4 / (0.1**2 + 1e-4)
    yield Check("SSIM", "constant images 0 and 0.1", flat, ssim(black, grey).item(), 1e-4)


def _perceptual() -> Iterator[Check]:
    # A network that only passes its input on; red against a brighter green is (1, 0, 0) against (0, 1, 0)
    plain = PerceptualDistance("LPIPS", nn.Sequential(nn.Identity()), [0], [torch.tensor([0.25, 0.5, 2.0])], smallest=1)
    red, green = (plain.shift + plain.scale * colour.view(1, 3, 1, 1).expand(1, 3, 4, 4) for colour in torch.eye(3)[:2])
    yield Check(
        "LPIPS", "features at right angles: w1 + w2", 0.75, plain(red, 3 * green - 2 * plain.shift).item(), 1e-5
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers, taps = alex_layers()
    heads = [torch.ones(width) for width in (64, 192, 384, 256, 256)]
    distance = PerceptualDistance("ST-LPIPS", layers, taps, heads, smallest=21)
    image, noise = torch.randn(2, 1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    levels = torch.tensor([0.0, 0.1, 0.2, 0.4]).view(-1, 1, 1, 1)
    found = distance(image.expand(4, -1, -1, -1), image + levels * noise)
    yield Check("LPIPS", "equal images, random weights", 0.0, found[0].item(), 1e-6)
    growing = (found.diff() > 0).double().mean().item()
    yield Check("LPIPS", "more noise is further away, random weights", 1.0, growing, 0.0)


def _frechet() -> Iterator[Check]:
    mean, scales = torch.tensor([1.0, 2.0, 0.0, 0.0]).double(), torch.tensor([1.0, 2.0, 3.0, 0.5]).double()
    points = _normal(60_000, 4, 0)
    theory = float(mean.square().sum() + (scales - 1).square().sum())
    streamed = FeatureSet(4, kept=100)
    for batch in (points * scales + mean).split(997):
        streamed.add(batch)
    found = frechet_distance(GaussianStatistics.of(_normal(60_000, 4, 1)), streamed.statistics)
    yield Check("Frechet distance", "two Gaussians: |m|^2 + sum (s - 1)^2", theory, found, 0.15)
    same = GaussianStatistics.of(points)
    yield Check("Frechet distance", "a set and itself", 0.0, frechet_distance(same, same), 1e-9)
    # Variances over n - 1 are 2 and 18, so (18^0.5 - 2^0.5)^2 = 8; over n they are 1 and 9, which gives 4
    near, far = torch.tensor([[-1.0], [1.0]]).double(), torch.tensor([[-3.0], [3.0]]).double()
    found = frechet_distance(GaussianStatistics.of(near), GaussianStatistics.of(far))
    yield Check("Frechet distance", "two points each: covariances over n - 1", 8.0, found, 1e-9)
    few, more = _normal(20, 40, 2), 2 * _normal(30, 40, 3) + 1
    moments = frechet_distance(GaussianStatistics.of(few), GaussianStatistics.of(more))
    found = frechet_distance_of_rows(few, more)
    yield Check("Frechet distance", "of rows: as of their moments", moments, found, 1e-6 * moments)


def _kernel() -> Iterator[Check]:
    same = kernel_distance(_normal(2000, 8, 0), _normal(2000, 8, 1), subsets=50)
    spread = 4 * same.std / 50**0.5  # of the mean over subsets that hardly overlap
    yield Check("kernel distance", "two sets of one Gaussian: unbiased, so 0", 0.0, same.mean, spread)
    # x = c against y = -c, constant: k(x, x) + k(y, y) - 2 k(x, y) = 2 * (c^2 + 1)^3 - 2 * (1 - c^2)^3, c = 1
    ones = torch.ones(10, 8, dtype=torch.float64)
    yield Check("kernel distance", "two opposite points: 2 * 2^3", 16.0, kernel_distance(ones, -ones).mean, 1e-9)


def _scores() -> Iterator[Check]:
    certain, unsure = InceptionScore(100), InceptionScore(100)
    certain.add(1e3 * torch.eye(10).repeat(20, 1))
    unsure.add(torch.zeros(200, 10))
    yield Check("Inception score", "certain and balanced: the number of classes", 10.0, certain.compute(), 1e-9)
    yield Check("Inception score", "uniform: 1", 1.0, unsure.compute(), 1e-9)


def _neighbours() -> Iterator[Check]:
    a = _normal(300, 6, 0)
    for name, other, expected in (("equal sets", a.clone(), 1.0), ("sets far apart", a + 1000, 0.0)):
        for metric, found in zip(("precision", "recall"), precision_recall(a, other), strict=True):
            yield Check(metric, name, expected, found, 0.0)
    half = torch.cat([a[:150], a[:150] + 1000])  # half of the samples are impossible
    yield Check("precision", "half of the samples are far away", 0.5, precision_recall(a[:150], half)[0], 0.0)
    yield Check("recall", "half of the reference is far away", 0.5, precision_recall(half, a[:150])[1], 0.0)
    # 9 has its third neighbour at a distance of 3 and its fifth at 5: 13 is beyond reach for k = 3, not for k = 5
    line = torch.arange(10.0).double()[:, None]
    beyond = torch.cat([line, torch.full_like(line, 13.0)])
    yield Check("precision", "half are reached by k = 5, not by k = 3", 0.5, precision_recall(line, beyond)[0], 0.0)
    yield Check("recall", "half are reached by k = 5, not by k = 3", 0.5, precision_recall(beyond, line)[1], 0.0)


def _alignment() -> Iterator[Check]:
    a = _normal(1000, 16, 0)
    rotation = torch.linalg.qr(_normal(16, 16, 2))[0]
    yield Check("CKNNA", "features and themselves", 1.0, cknna(a, a), 1e-9)
    yield Check("CKNNA", "features and themselves rotated", 1.0, cknna(a, a @ rotation), 1e-9)
    yield Check("CKNNA", "independent features", 0.0, cknna(a, _normal(1000, 16, 1)), 0.02)


def _probes() -> Iterator[Check]:
    labels = torch.arange(600) % 3
    centres = 20 * torch.eye(3, 8, dtype=torch.float64)
    clear, noise = _normal(600, 8, 0) + centres[labels], _normal(600, 8, 1)
    yield Check("linear probe", "classes far apart", 1.0, linear_probe(clear, labels).mean, 0.0)
    yield Check("linear probe", "noise, three classes", 1 / 3, linear_probe(noise, labels).mean, 0.08)
    for name, x, expected, tolerance in (("classes far apart", clear, 1.0, 0.0), ("noise", noise, 1 / 3, 0.12)):
        found = train_probe((x[:400], labels[:400]), (x[400:], labels[400:]), epochs=20)
        yield Check("trained probe", name, expected, found.accuracy, tolerance)


def _looked_up(table: dict[str, Tensor], names: list[str]) -> Tensor:
    return torch.stack([table[name] for name in names])


def _captions() -> Iterator[Check]:
    # Image features that a rotation turns into text features; a third of the captions is what the map is fitted on
    n = 900
    features, captions = _normal(n, 12, 0), [f"picture {number}" for number in range(n)]
    turned, order = features @ torch.linalg.qr(_normal(12, 12, 1))[0], _normal(n, 1, 2)[:, 0].argsort()
    fitted, held_out, made = (Pictures(features, captions).subset(rows) for rows in torch.arange(n).chunk(3))
    for case, texts, expected in (
        ("a perfect map finds every caption", turned, 1.0),
        ("shuffled captions: 1 / 10", turned[order], 0.1),
    ):
        table = dict(zip(captions, texts, strict=True))
        found = measure_retrieval(fitted, held_out, made, partial(_looked_up, table))
        tolerance = 1e-3 if expected == 1 else 4 * found.extra["errors"][0].item()
        yield Check("caption retrieval", case, expected, found.values["retrieval 1 of 10"], tolerance)
    labels = torch.arange(60) % 3
    clear = _normal(60, 8, 0) + 20 * torch.eye(3, 8, dtype=torch.float64)[labels]
    asked = torch.where(torch.arange(60) < 30, labels, (labels + 1) % 3)
    real, half = (Pictures(clear, captions[:60], kind) for kind in (labels, asked))
    agreed = measure_class_agreement(real, real, half)
    share = float("nan") if agreed is None else agreed.values["class agreement"]
    yield Check("class agreement", "half of the pictures are of another class", 0.5, share, 0.0)
