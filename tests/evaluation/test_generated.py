"""ADM's protocol on sets: known sets, a reference batch in and out, bounded memory, statistics of others refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from inception_weights import TinyInception

from aligntok.errors import UserError
from aligntok.evaluation import generated
from aligntok.evaluation.adm import Moments, read_samples
from aligntok.evaluation.distances import FeatureSet
from aligntok.evaluation.generated import (
    ImageFeatures,
    check_images,
    check_moments,
    check_statistics,
    compare_with_batch,
    compare_with_set,
    require_enough,
)
from aligntok.evaluation.inception import SPATIAL_DIMENSION, Inception
from aligntok.evaluation.reconstruction import ReconstructionMetrics
from aligntok.evaluation.reference import ReferenceBatch, read_reference


def pictures(count: int, seed: int, low: int = 0) -> torch.Tensor:
    return torch.randint(low, 256, (count, 3, 16, 16), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@pytest.fixture(scope="module")
def network():
    return TinyInception()


@pytest.fixture(autouse=True)
def few_features(monkeypatch):
    """32 numbers in the place of 2048 and 2023: the eigenvalues of the real ones take seconds."""
    monkeypatch.setattr(TinyInception, "dimension", 32)
    monkeypatch.setattr(generated, "SPATIAL_DIMENSION", 24)
    whole = TinyInception.everything

    def first(self, images):
        found = whole(self, images)
        return replace(found, pooled=found.pooled[:, :32], spatial=found.spatial[:, :24])

    monkeypatch.setattr(TinyInception, "everything", first)


def features(network, images: torch.Tensor, batch: int = 7, kept: int = 1000) -> ImageFeatures:
    return ImageFeatures(network, [], kept).add_all(images.split(batch))


def test_a_set_against_itself_and_against_a_brighter_one(network):
    real = features(network, pictures(60, 0))
    same = compare_with_set(features(network, pictures(60, 0), batch=60), real)["generation, ADM protocol"]
    assert list(same.values) == ["gFID", "gKID", "sFID", "IS", "precision", "recall"]
    assert same.values["gFID"] == pytest.approx(0, abs=1e-6) and same.values["sFID"] == pytest.approx(0, abs=1e-6)
    assert same.values["precision"] == same.values["recall"] == 1
    brighter = compare_with_set(features(network, pictures(60, 1, low=200)), real)["generation, ADM protocol"]
    assert brighter.values["gFID"] > 0.5 and brighter.values["sFID"] > 0.5
    assert brighter.values["precision"] == brighter.values["recall"] == 0
    assert "the published weights" in same.protocol and "60 samples, 60 reference images" in same.protocol


def write_reference(path, network, images: torch.Tensor) -> None:
    found = features(network, images)
    arrays = {
        "mu": found.pooled.statistics.mean,
        "sigma": found.pooled.statistics.cov,
        "mu_s": found.spatial.mean,
        "sigma_s": found.spatial.cov,
    }
    np.savez(path, arr_0=images.permute(0, 2, 3, 1).numpy(), **{key: value.numpy() for key, value in arrays.items()})


def test_a_reference_batch_gives_the_numbers_of_its_images(network, tmp_path):
    real, made = pictures(50, 0), features(network, pictures(40, 1, low=20))
    write_reference(tmp_path / "r.npz", network, real)
    batch = read_reference(tmp_path / "r.npz")
    assert batch.size == (16, 16) and batch.images == 50
    check_statistics(batch, network)
    check_images(batch.images, batch.size, 16)
    images = ImageFeatures(network, [], 1000).add_all(read_samples(tmp_path / "r.npz", 9))
    check_moments(batch, images)
    found = compare_with_batch(made, batch, images)["generation, ADM protocol"]
    expected = compare_with_set(made, features(network, real))["generation, ADM protocol"].values
    assert found.values == pytest.approx({name: expected[name] for name in expected if name != "gKID"})
    assert batch.sha256[:16] in found.protocol


@pytest.mark.parametrize("name", ["pooled", "spatial"])
def test_moments_of_another_extractor_are_refused(name, network):
    """A share of the images that the moments are of passes, as in ADM's file; other features do not."""
    real = pictures(400, 0, low=200)
    everything = features(network, real)
    moments = {"pooled": everything.pooled.statistics, "spatial": everything.spatial}
    batch = ReferenceBatch(**moments, images=40, size=(16, 16), sha256="")
    share = features(network, real[:40])
    check_moments(batch, share)
    other = Moments(moments[name].mean.flip(0), moments[name].cov)  # the same network's, in another order
    with pytest.raises(UserError, match=f"{'mu' if name == 'pooled' else 'mu_s'} is .* over its own 40 images"):
        check_moments(replace(batch, **{name: other}), share)


def test_statistics_that_cannot_be_compared_are_refused(network, tmp_path, monkeypatch):
    write_reference(tmp_path / "r.npz", network, pictures(10, 0))
    batch = read_reference(tmp_path / "r.npz")
    with pytest.raises(UserError, match="images of 16x8 px, the samples have 16x16 px"):
        check_images(10, (8, 16), 16)
    with pytest.raises(UserError, match="3 reference images"):
        check_images(3, (16, 16), 16)
    with pytest.raises(UserError, match="holds others"):
        monkeypatch.setattr(network, "sha256", "f" * 64)
        check_statistics(batch, network)
    monkeypatch.setattr(Inception, "dimension", 32)
    with pytest.raises(UserError, match="no Inception weights here"):
        check_statistics(batch, None)
    monkeypatch.undo()  # 2048 and 2023 features again
    wrong = "another extractor .* mu has 32 values, expected 2048; mu_s has 24 values, expected 2023"
    for weights in (network, None):
        with pytest.raises(UserError, match=wrong):
            check_statistics(batch, weights)
    with pytest.raises(UserError, match=r"expected 2048$"):
        check_statistics(replace(batch, spatial=None), network)


def numbers_kept(thing: object, seen: set[int]) -> int:
    """Elements of all tensors, and of all lists, that can be reached from an object."""
    if id(thing) in seen or isinstance(thing, torch.nn.Module):
        return 0
    seen.add(id(thing))
    if isinstance(thing, torch.Tensor):
        return thing.numel()
    if isinstance(thing, list | tuple | set):
        return len(thing) + sum(numbers_kept(part, seen) for part in thing)
    inside = list(thing.values()) if isinstance(thing, dict) else list(getattr(thing, "__dict__", {}).values())
    return sum(numbers_kept(part, seen) for part in inside)


def test_memory_does_not_grow_with_the_images(network, monkeypatch):
    monkeypatch.setattr(FeatureSet.__init__, "__defaults__", (20,))
    found, metrics = ImageFeatures(network, [network], 20), ReconstructionMetrics(None, [network])
    sizes = []
    for round_ in range(6):
        for images in pictures(40, round_).split(10):
            found.add(images)
            values = images.float() / 127.5 - 1
            metrics.add(values, values.flip(0))
        sizes.append((numbers_kept(found, set()), numbers_kept(metrics, set())))
    assert found.count == metrics.count == 240 and len(set(sizes)) == 1 and min(sizes[0]) > 32 * 32
    assert set(metrics.compute()) == {"PSNR [dB]", "SSIM", "rFID", "rKID"}
    assert "on a uniform sample of 20" in metrics.protocol and "n=240" in metrics.protocol
    real = features(network, pictures(50, 9))
    found.others = []
    assert "20 samples, 50 reference images" in compare_with_set(found, real)["generation, ADM protocol"].protocol


def test_too_few_images(network):
    require_enough(4, "samples")
    with pytest.raises(UserError, match=r"3 samples: .* at least 4"):
        require_enough(3, "samples")
    assert SPATIAL_DIMENSION == 17 * 17 * 7
