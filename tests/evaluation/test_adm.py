"""ADM's protocol: known answers, torch-fidelity as second opinion, files that stream, and what is refused."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_prc import calculate_precision_recall_full

from aligntok.errors import UserError
from aligntok.evaluation.adm import (
    InceptionScore,
    Moments,
    precision_recall,
    radii,
    read_samples,
    refuse_as_originals,
    sample_shape,
    spatial_features,
    write_sample_batches,
    write_samples,
)
from aligntok.evaluation.distances import GaussianStatistics, frechet_distance


def gaussian(n: int, d: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def score(logits: torch.Tensor, split: int, sizes: list[int] | None = None) -> float:
    metric = InceptionScore(split)
    for batch in logits.split(sizes or len(logits)):
        metric.add(batch)
    assert metric.count == len(logits)
    return metric.compute()


def test_inception_score_of_known_distributions():
    assert score(torch.zeros(30, 10), 10) == pytest.approx(1.0)  # uniform: nothing is recognised
    certain = 1e3 * torch.eye(10).repeat(3, 1)
    assert score(certain, 30) == pytest.approx(10.0)  # certain and balanced: as many as classes
    assert score(certain[:1].expand(30, 10), 30) == pytest.approx(1.0)  # certain, one class only
    halves = torch.tensor([[0.0, 0.0, -1e3, -1e3], [-1e3, -1e3, 0.0, 0.0]]).repeat(5, 1)
    assert score(halves, 10) == pytest.approx(2.0)


@settings(max_examples=20)
@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=5), seed=st.integers(0, 9))
def test_inception_score_streams(sizes, seed):
    logits = 3 * gaussian(sum(sizes) + 2, 6, seed)
    splits = [logits[start : start + 4] for start in range(0, len(logits), 4)]
    theirs = [isc_features_to_metric(part, splits=1, shuffle=False)["inception_score_mean"] for part in splits]
    assert score(logits, 4, [2, *sizes]) == pytest.approx(np.mean(theirs), rel=1e-9)


def test_precision_and_recall_of_known_sets():
    a = gaussian(60, 4, 0)
    assert precision_recall(a, a.clone()) == (1.0, 1.0)
    assert precision_recall(a, a + 1000) == (0.0, 0.0)
    one_mode = a[:20] * 1e-3  # samples of one spot: all are plausible, most of the reference is not covered
    precision, recall = precision_recall(a, one_mode)
    assert precision == 1.0 and recall < 0.1
    assert precision_recall(one_mode, a) == (recall, precision)
    line = torch.tensor([[0.0], [1.0], [3.0], [6.0], [10.0]])
    assert radii(line, 2).tolist() == [3.0, 2.0, 3.0, 4.0, 7.0]


@pytest.mark.parametrize("shift", [0.0, 0.7, 2.0])
def test_precision_and_recall_are_torch_fidelitys(shift):
    reference, samples = gaussian(90, 5, 0), gaussian(70, 5, 1, shift)
    ours = precision_recall(reference, samples, block=17)
    assert ours == pytest.approx(calculate_precision_recall_full(samples, reference))
    assert 0 < ours[0] < 1


def test_frechet_distance_to_known_moments():
    """Against N(0, I) the distance of N(m, s^2 I) is d (m^2 + (s - 1)^2)."""
    standard = Moments(torch.zeros(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64))
    other = Moments(torch.full((3,), 2.0, dtype=torch.float64), 9 * torch.eye(3, dtype=torch.float64))
    assert frechet_distance(standard, other) == pytest.approx(3 * (4 + 4))
    sampled = GaussianStatistics(3)
    for batch in gaussian(40_000, 3, 0).split(999):
        sampled.add(batch)
    assert frechet_distance(standard, sampled) < 2e-3


def test_spatial_features_are_in_adms_order():
    maps = torch.randn(2, 9, 3, 4)
    expected = maps.permute(0, 2, 3, 1).numpy()[..., :7].reshape(2, -1)
    assert np.array_equal(spatial_features(maps).numpy(), expected)
    assert spatial_features(torch.zeros(1, 128, 17, 17)).shape == (1, 2023)


def test_samples_there_and_back(tmp_path):
    images = torch.randint(0, 256, (7, 3, 5, 4), dtype=torch.uint8)
    write_samples(tmp_path / "s.npz", images)
    with np.load(tmp_path / "s.npz") as arrays:
        assert arrays.files == ["arr_0"] and np.array_equal(arrays["arr_0"], images.permute(0, 2, 3, 1).numpy())
    batches = list(read_samples(tmp_path / "s.npz", 3))
    assert [len(batch) for batch in batches] == [3, 3, 1] and torch.equal(torch.cat(batches), images)
    np.savez_compressed(tmp_path / "c.npz", images.permute(0, 2, 3, 1).numpy())
    assert torch.equal(torch.cat(list(read_samples(tmp_path / "c.npz", 2))), images)


def test_samples_of_a_stream(tmp_path):
    images = torch.randint(0, 256, (7, 3, 5, 5), dtype=torch.uint8)
    write_sample_batches(tmp_path / "s.npz", images.split(3), 7)
    assert sample_shape(tmp_path / "s.npz") == (7, 5, 5)
    assert torch.equal(torch.cat(list(read_samples(tmp_path / "s.npz"))), images)
    before = (tmp_path / "s.npz").read_bytes()

    def failing():
        raise UserError("nothing can be drawn")
        yield

    with pytest.raises(UserError, match="nothing can be drawn"):
        write_sample_batches(tmp_path / "new" / "s.npz", failing(), 7)

    def interrupted():
        yield images
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_sample_batches(tmp_path / "s.npz", interrupted(), 14)
    for batches, count, message in (
        (images.split(3), 9, "7 images were made"),
        ([], 0, "0 images were made"),
        ([images, images[..., :4]], 14, "do not fit into one file"),
    ):
        with pytest.raises(UserError, match=message):
            write_sample_batches(tmp_path / "s.npz", batches, count)
    assert [path.name for path in tmp_path.iterdir()] == ["s.npz"]  # no half-written copies
    assert (tmp_path / "s.npz").read_bytes() == before


def test_refusals(tmp_path):
    np.savez(tmp_path / "f.npz", np.zeros((4, 2, 2, 3)))
    with pytest.raises(UserError, match="expected uint8"):
        next(read_samples(tmp_path / "f.npz"))
    np.savez(tmp_path / "o.npz", np.array([None, {}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="as objects"):
        next(read_samples(tmp_path / "o.npz"))
    np.savez(tmp_path / "x.npz", other=np.zeros(3))
    with pytest.raises(UserError, match=r"holds other\.npy, expected arr_0"):
        next(read_samples(tmp_path / "x.npz"))
    (tmp_path / "b.npz").write_bytes(b"no zip")
    with pytest.raises(UserError, match=r"cannot be read as \.npz"):
        sample_shape(tmp_path / "b.npz")
    with pytest.raises(UserError, match="validation images themselves"):
        refuse_as_originals(tmp_path / "VIRTUAL_imagenet256_labeled.npz")
    refuse_as_originals(tmp_path)
    with pytest.raises(UserError, match="no neighbour number 3"):
        precision_recall(gaussian(3, 2, 0), gaussian(9, 2, 0))
    with pytest.raises(UserError, match="features"):
        precision_recall(gaussian(9, 2, 0), gaussian(9, 3, 0))
    with pytest.raises(UserError, match="C >= 7"):
        spatial_features(torch.zeros(1, 6, 2, 2))
    with pytest.raises(UserError, match="uint8 images"):
        write_samples(tmp_path / "n.npz", torch.zeros(1, 3, 2, 2))
    with pytest.raises(UserError, match="at least one sample"):
        InceptionScore().compute()
    with pytest.raises(UserError, match="finite logits"):
        InceptionScore().add(torch.full((1, 2), float("nan")))
