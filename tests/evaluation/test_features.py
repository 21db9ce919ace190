"""EfficientNet-Lite0: the mapping of its weights is right if it knows what is on a photograph."""

from __future__ import annotations

import numpy as np
import pytest
import skimage.data
import sklearn.datasets
import torch
from timm.data import ImageNetInfo

from aligntok.errors import UserError
from aligntok.evaluation import features
from aligntok.evaluation.features import EfficientNetLite0, extract, to_uint8


@pytest.fixture(scope="module")
def network() -> EfficientNetLite0:
    return EfficientNetLite0()


def square(photo: np.ndarray, size: int = 256) -> torch.Tensor:
    """Centre square of [H, W, 3] in 0..255 -> [1, 3, size, size] in [-1, 1]."""
    image = torch.from_numpy(photo.copy()).permute(2, 0, 1)[None].float()
    side = min(image.shape[2:])
    top, left = (image.shape[2] - side) // 2, (image.shape[3] - side) // 2
    image = image[:, :, top : top + side, left : left + side]
    return (
        torch.nn.functional.interpolate(image, size=(size, size), mode="bicubic", antialias=True).clamp(0, 255) / 127.5
        - 1
    )


PHOTOGRAPHS = {
    "chelsea": (skimage.data.chelsea, "Egyptian cat"),
    "coffee": (skimage.data.coffee, "espresso"),
    "rocket": (skimage.data.rocket, "missile"),
    "china": (lambda: sklearn.datasets.load_sample_image("china.jpg"), "palace"),
    "flower": (lambda: sklearn.datasets.load_sample_image("flower.jpg"), "daisy"),
}


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_knows_photographs(network, name):
    photo, expected = PHOTOGRAPHS[name]
    top = network.logits(square(photo())).topk(5).indices[0].tolist()
    words = [ImageNetInfo("imagenet-1k").index_to_description(index) for index in top]
    assert any(word.startswith(expected) for word in words), words


def test_features_are_the_classifier_input(network):
    image = square(skimage.data.coffee(), 64)
    pooled = network(image)
    assert pooled.shape == (1, network.dimension) and pooled.dtype == torch.float32
    torch.testing.assert_close(network.network.classifier(pooled), network.logits(image))


def test_folding_norms_changes_nothing(network, monkeypatch):
    image = square(skimage.data.coffee(), 96)
    monkeypatch.setattr(features, "_fold_norms", lambda network: None)
    torch.testing.assert_close(network(image), EfficientNetLite0()(image), atol=1e-4, rtol=1e-4)


def test_a_tensor_and_its_file_give_equal_features(network):
    image = torch.rand(1, 3, 48, 48) * 2.2 - 1.1  # beyond [-1, 1] too: a file clips
    saved = to_uint8(image).float() / 127.5 - 1
    assert torch.equal(network(image), network(saved))


def test_to_uint8_rounds_and_clips():
    values = torch.tensor([-5.0, -1.0, -0.5 / 127.5, 0.0, 1.0, 2.0])
    assert to_uint8(values).tolist() == [0, 0, 127, 128, 255, 255]
    every = torch.arange(256).float() / 127.5 - 1
    assert torch.equal(to_uint8(every), torch.arange(256, dtype=torch.uint8))


def test_extract_joins_batches(network):
    images = torch.rand(3, 3, 32, 40) * 2 - 1
    joined = extract(network.train(), iter([images[:2], images[2:]]))
    torch.testing.assert_close(joined, network(images), atol=1e-5, rtol=1e-4)
    with pytest.raises(UserError, match="at least one batch"):
        extract(network, [])


def test_refuses_other_shapes(network):
    with pytest.raises(UserError, match="expected images"):
        network(torch.zeros(3, 32, 32))


def test_protocol_names_filter_and_weights(network):
    for part in ("EfficientNet-Lite0", "bicubic", "224x224", "1280"):
        assert part in network.protocol
