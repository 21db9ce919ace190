"""The Inception network: torch-fidelity's numbers with the same (random) weights, sFID's layer, refusals."""

from collections.abc import Iterator

import pytest
import torch
from inception_weights import write_random_weights
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from aligntok.data.geometry import to_unit_range
from aligntok.errors import UserError
from aligntok.evaluation import inception as module
from aligntok.evaluation.distances import GaussianStatistics
from aligntok.evaluation.features import EfficientNetLite0, metric_name
from aligntok.evaluation.generated import KEPT_SAMPLES, ImageFeatures, compare_with_set
from aligntok.evaluation.inception import Inception, find_inception
from aligntok.evaluation.second_opinion import torch_fidelity_numbers


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_random_weights(tmp_path_factory.mktemp("inception") / "weights.pth")


@pytest.fixture(scope="module")
def network(weights):
    return Inception(weights)


def pictures(count: int, seed: int, low: int = 0) -> torch.Tensor:
    """Blotches of colour, uint8 [count, 3, 40, 40]."""
    coarse = torch.randint(low, 256, (count, 3, 5, 5), generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse.float(), size=40, mode="bilinear").to(torch.uint8)


def in_batches(images: torch.Tensor) -> Iterator[torch.Tensor]:
    return iter(images.split(5))


def test_numbers_are_torch_fidelitys(network, monkeypatch):
    """FID, Inception score, precision and recall of one set against another, through both implementations.

    The network's first 128 pooled features on both sides: the eigenvalues of 2048 take a quarter of a minute.
    """
    whole = FeatureExtractorInceptionV3.forward

    def fewer(self, images):
        named = zip(self.features_list, whole(self, images), strict=True)
        return tuple(values[:, :128] if name == "2048" else values for name, values in named)

    monkeypatch.setattr(FeatureExtractorInceptionV3, "forward", fewer)
    monkeypatch.setattr(Inception, "dimension", 128)
    real, made = pictures(8, 0), pictures(7, 1, low=60)
    sets = [ImageFeatures(network, [], KEPT_SAMPLES).add_all(in_batches(images)) for images in (made, real)]
    for found in sets:  # torch-fidelity has no sFID to compare with
        found.spatial = GaussianStatistics.of(torch.randn(9, 3, generator=torch.Generator().manual_seed(0)))
    ours = compare_with_set(*sets)["generation, ADM protocol"]
    theirs = torch_fidelity_numbers(lambda: in_batches(made), 7, lambda: in_batches(real), 8, network)
    assert len(theirs.values) == 4 and "7 samples against 8 reference images" in theirs.protocol
    for name, value in theirs.values.items():
        assert ours.values[name] == pytest.approx(value, rel=1e-4), name
    assert ours.values.keys() - theirs.values.keys() == {metric_name(name, network) for name in ("gKID", "sFID")}
    assert ours.values[metric_name("gFID", network)] > 0.05
    assert 1 < ours.values[metric_name("IS", network)] < 7
    for part in ("NOT the published weights", "n=7", "IS in splits of 5000", "k=3, 7 samples, 8 reference images"):
        assert part in ours.protocol


def test_spatial_features_are_those_behind_mixed_6d(network):
    """17 x 17 x 7 numbers, not negative (behind the ReLU), by rows, columns, channels."""
    images, kept = to_unit_range(pictures(2, 3)), []
    handle = network.network.Mixed_6c.register_forward_hook(lambda m, i, output: kept.append(output))
    found = network.everything(images)
    handle.remove()
    branch = network.network.Mixed_6d.branch1x1
    maps = torch.relu(branch.bn(branch.conv(kept[0])))  # [2, 192, 17, 17]
    assert maps.shape == (2, 192, 17, 17) and found.spatial.shape == (2, 2023)
    torch.testing.assert_close(found.spatial.view(2, 17, 17, 7), maps[:, :7].permute(0, 2, 3, 1))
    assert found.spatial.min() == 0 < found.spatial.std() and network._maps is None
    assert found.logits.shape == (2, 1008)
    torch.testing.assert_close(found.logits, found.pooled @ network.network.fc.weight.T, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(network(images), found.pooled)


def test_only_the_published_file_is_called_fid(network, weights, monkeypatch):
    assert not network.published and network.name == f"Inception-{network.sha256[:8]}"
    assert metric_name("gFID", network) == f"gFD-{network.name}"
    monkeypatch.setattr(module, "PUBLISHED", network.sha256[:8])
    assert network.published and network.name == "Inception" and "the published weights" in network.protocol
    assert [metric_name(name, network) for name in ("rFID", "sFID", "IS")] == ["rFID", "sFID", "IS"]
    assert metric_name("rKID", EfficientNetLite0()) == "rKD-EffNetLite0"


def test_weights_are_looked_for_in_torch_hubs_cache(weights, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    absent, why = find_inception(None)
    assert absent is None and module.FILES[0] in why and "--inception" in why and str(tmp_path) in why
    cached = module.hub_folder() / module.FILES[1]
    cached.parent.mkdir(parents=True)
    cached.symlink_to(weights)
    found, why = find_inception(None)
    assert isinstance(found, Inception) and str(cached) in why
    assert isinstance(find_inception(f"https://nowhere.invalid/{module.FILES[1]}")[0], Inception)  # not fetched again
    with pytest.raises(UserError, match=r"could not be downloaded .*torch-fidelity publishes"):
        find_inception("file:///nowhere/weights.pth")
    cached.unlink()
    cached.write_bytes(b"half a download")
    absent, why = find_inception(None)
    assert absent is None and "is not used" in why


def test_refusals(tmp_path, network, monkeypatch):
    with pytest.raises(UserError, match="no Inception weights at"):
        Inception(tmp_path / "absent.pth")
    torch.save({"conv": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="holds other weights") as refused:
        Inception(tmp_path / "other.pth")
    assert "\n" not in str(refused.value)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UserError, match="no state dict"):
        Inception(tmp_path / "list.pth")
    torch.save({"harm": print}, tmp_path / "pickle.pth")  # would be executed by an unrestricted load
    with pytest.raises(UserError, match="cannot be read as weights"):
        Inception(tmp_path / "pickle.pth")
    with pytest.raises(UserError, match="expected images"):
        network(torch.zeros(3, 8, 8))
    monkeypatch.setitem(__import__("sys").modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(UserError, match=r"aligntok\[fidelity\]"):
        Inception(tmp_path / "list.pth")
