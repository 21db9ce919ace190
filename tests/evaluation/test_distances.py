"""Frechet and kernel distances: known answers, scipy's square root, torchmetrics, and streaming."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.image.fid import _compute_fid
from torchmetrics.image.kid import poly_mmd

from aligntok.errors import UserError
from aligntok.evaluation import distances
from aligntok.evaluation.distances import (
    FeatureSet,
    GaussianStatistics,
    feature_distances,
    frechet_distance,
    frechet_distance_of_rows,
    kernel_distance,
)


def samples(n: int, d: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, generator=generator) / d**0.5
    return (torch.randn(n, d, generator=generator) @ mixing) * scale + shift


def known(mean: torch.Tensor, cov: torch.Tensor) -> GaussianStatistics:
    """Statistics of 2 d points that have exactly this mean and covariance."""
    d = len(mean)
    root = torch.linalg.cholesky(cov.double())
    points = torch.cat([root.T, -root.T]) * ((2 * d - 1) / 2) ** 0.5
    return GaussianStatistics.of(points + mean)


def test_diagonal_gaussians_have_a_closed_form():
    """sum (m1 - m2)^2 + sum (s1 - s2)^2."""
    m1, m2 = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([1.0, 1.0, -1.0])
    s1, s2 = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 2.0, 0.5])
    a, b = known(m1, torch.diag(s1**2)), known(m2, torch.diag(s2**2))
    torch.testing.assert_close(a.mean, m1.double())
    torch.testing.assert_close(a.cov, torch.diag(s1**2).double())
    expected = ((m1 - m2) ** 2).sum() + ((s1 - s2) ** 2).sum()
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-10)


@pytest.mark.parametrize("n", [200, 20])  # 20 samples in 32 dimensions: both covariances are singular
def test_matches_scipy_and_torchmetrics(n):
    a, b = GaussianStatistics.of(samples(n, 32, 0)), GaussianStatistics.of(samples(n + 5, 32, 1, 1.3, 0.2))
    theirs = _compute_fid(a.mean, a.cov, b.mean, b.cov).item()
    root = scipy.linalg.sqrtm((a.cov @ b.cov).numpy()).real
    scipys = (a.mean - b.mean).square().sum() + (a.cov + b.cov).trace() - 2 * np.trace(root)
    ours = frechet_distance(a, b)
    assert ours == pytest.approx(scipys.item(), rel=1e-5)
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert ours == pytest.approx(frechet_distance(b, a), rel=1e-6)


def test_equal_sets_are_at_distance_zero():
    rows = samples(100, 16, 0)
    a = GaussianStatistics.of(rows)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance_of_rows(rows, rows) == pytest.approx(0, abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(2, 40), m=st.integers(2, 40), d=st.integers(1, 40), seed=st.integers(0, 100))
def test_rows_and_moments_give_the_same_distance(n, m, d, seed):
    x, y = samples(n, d, seed), samples(m, d, seed + 1, 1.3, 0.2)
    expected = frechet_distance(GaussianStatistics.of(x), GaussianStatistics.of(y))
    assert frechet_distance_of_rows(x, y) == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_sets_are_compared_by_their_rows_where_there_are_few_and_all_are_kept(monkeypatch):
    def of(rows, **options):
        found = FeatureSet(rows.shape[1], **options)
        found.add(rows)
        return found

    x, y = samples(15, 16, 0), samples(17, 16, 1)
    moments = of(x).statistics, of(y).statistics
    with monkeypatch.context() as without:
        without.setattr(distances, "frechet_distance", None)
        assert of(x).frechet_distance(of(y)) == pytest.approx(frechet_distance(*moments), rel=1e-6)
    monkeypatch.setattr(distances, "frechet_distance_of_rows", None)
    assert of(x, kept=9).frechet_distance(of(y)) == frechet_distance(*moments)
    many = samples(18, 16, 1)
    assert of(x).frechet_distance(of(many)) == frechet_distance(moments[0], of(many).statistics)
    with pytest.raises(UserError, match="width"):
        of(x).frechet_distance(of(samples(3, 4, 0)))
    with pytest.raises(UserError, match="at least two"):
        of(x[:1]).frechet_distance(of(y))


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(0, 7), min_size=1, max_size=6), split=st.integers(0, 6))
def test_streaming_and_merging_equal_one_batch(sizes, split):
    data = samples(sum(sizes) + 2, 5, 3, shift=1000.0)  # a large mean: the naive sum of squares would lose digits
    batches = data.split([2, *sizes])
    first, second = GaussianStatistics(5), GaussianStatistics(5)
    for index, batch in enumerate(batches):
        (first if index < split else second).add(batch)
    first.merge(second)
    assert first.count == len(data)
    np.testing.assert_allclose(first.mean, data.double().mean(0), rtol=1e-12)
    np.testing.assert_allclose(first.cov, np.cov(data.double().T.numpy()), rtol=1e-8, atol=1e-9)


def test_too_few_samples():
    statistics = GaussianStatistics(4)
    with pytest.raises(UserError, match="at least one"):
        _ = statistics.mean
    statistics.add(torch.zeros(1, 4))
    with pytest.raises(UserError, match="at least two samples, got 1"):
        _ = statistics.cov
    statistics.add(torch.zeros(3, 4))
    assert "compare only at equal n" in statistics.protocol
    statistics.add(torch.zeros(3, 4))
    assert statistics.protocol == "n=7"


def test_refusals():
    statistics = GaussianStatistics(4)
    with pytest.raises(UserError, match=r"\[n, 4\]"):
        statistics.add(torch.zeros(2, 5))
    with pytest.raises(UserError, match="not finite"):
        statistics.add(torch.tensor([[0.0, 1.0, float("nan"), 0.0]]))
    with pytest.raises(UserError, match="merge"):
        statistics.merge(GaussianStatistics(3))
    with pytest.raises(UserError, match="width"):
        frechet_distance(GaussianStatistics.of(samples(9, 4, 0)), GaussianStatistics.of(samples(9, 3, 0)))
    with pytest.raises(UserError, match="half of the smaller set"):
        kernel_distance(samples(3, 4, 0), samples(9, 4, 0))
    with pytest.raises(UserError, match="50"):
        kernel_distance(samples(30, 4, 0), samples(40, 4, 0), subset_size=50)


def test_kernel_distance_matches_torchmetrics():
    """With subsets as large as the sets there is only one subset, which torchmetrics can be given too."""
    x, y = samples(60, 24, 0), samples(60, 24, 1, 1.2, 0.1)
    found = kernel_distance(x, y, subsets=3, subset_size=60)
    assert found.mean == pytest.approx(poly_mmd(x.double(), y.double()).item(), rel=1e-9)
    assert found.std == pytest.approx(0, abs=1e-9)


def test_kernel_distance_is_unbiased_and_seeded():
    pool = samples(400, 8, 0)
    x, y = pool[:200], pool[200:]
    same = kernel_distance(x, y, subsets=20, seed=1)
    assert abs(same.mean) < 3 * same.std
    assert same == kernel_distance(x, y, subsets=20, seed=1)
    assert same != kernel_distance(x, y, subsets=20, seed=2)
    assert kernel_distance(x, y + 1, subsets=5).mean > 10 * abs(same.mean)
    assert same.subset_size == 100 and same.protocol == "20 subsets of 100"


def test_large_sets_take_the_same_subsets(monkeypatch):
    x, y = samples(50, 8, 0), samples(60, 8, 1)
    whole = kernel_distance(x, y, subsets=5)
    monkeypatch.setattr(distances, "_WHOLE", 55)
    parts = kernel_distance(x, y, subsets=5)
    assert (parts.mean, parts.std) == pytest.approx((whole.mean, whole.std), rel=1e-9)


def test_names_and_protocol():
    class Extractor:
        name, dimension, protocol = "Toy", 4, "four numbers"

    metrics, protocol = feature_distances(samples(40, 4, 0), samples(30, 4, 1), Extractor(), prefix="g")
    assert list(metrics) == ["gFD-Toy", "gKD-Toy"]
    for part in ("four numbers", "n=40", "n=30", "100 subsets of 15", "seed 0"):
        assert part in protocol
