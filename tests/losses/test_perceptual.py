"""Perceptual distances: parity with the published implementations, gradients, precision and refusals."""

from __future__ import annotations

import copy

import lpips
import pytest
import skimage.data
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st

from aligntok.config import PerceptualConfig
from aligntok.errors import UserError
from aligntok.kernels import use_implementation
from aligntok.losses import st_lpips
from aligntok.losses.perceptual import build_perceptual

KINDS = ("lpips-vgg", "lpips-alex", "st-lpips-vgg", "st-lpips-alex")


@pytest.fixture(scope="module")
def trunks(tmp_path_factory):
    """Files in torchvision's layout with random weights, since only the heads of LPIPS come in a package."""
    folder = tmp_path_factory.mktemp("trunks")
    torch.manual_seed(0)
    for network, layers in (("vgg", torchvision.models.vgg16), ("alex", torchvision.models.alexnet)):
        with torch.device("meta"):
            features = layers(weights=None).features
        features.to_empty(device="cpu")
        for parameter in features.parameters():
            torch.nn.init.normal_(parameter, std=(2 / max(parameter[0].numel(), 64)) ** 0.5)
        torch.save(
            {f"features.{key}": value for key, value in features.state_dict().items()},
            folder / f"{network}.pth",
        )
    return folder


@pytest.fixture(scope="module")
def distances(trunks):
    weights = {"lpips-vgg": str(trunks / "vgg.pth"), "lpips-alex": str(trunks / "alex.pth")}
    return {kind: build_perceptual(PerceptualConfig(kind, weights.get(kind))) for kind in KINDS}


def images(count: int = 2, height: int = 64, width: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def photograph() -> torch.Tensor:
    """The astronaut's face as numbers 0..255, [1, 3, 129, 129]."""
    return torch.from_numpy(skimage.data.astronaut()[100:229, 150:279].copy()).permute(2, 0, 1)[None].float()


@pytest.mark.parametrize("network", ["vgg", "alex"])
def test_lpips_matches_the_lpips_package(distances, trunks, network):
    ours = distances[f"lpips-{network}"]
    theirs = lpips.LPIPS(net=network, pnet_rand=True, verbose=False)
    state = torch.load(trunks / f"{network}.pth", weights_only=True)
    for name, parameter in theirs.net.named_parameters():
        parameter.data.copy_(state["features." + name.split(".", 1)[1]])
    x, y = images(seed=1, width=80), images(seed=2, width=80)
    torch.testing.assert_close(ours(x, y), theirs(x, y).flatten(), rtol=1e-5, atol=1e-6)


# Printed by the authors' package stlpips-pytorch 0.0.2, LPIPS(net=..., variant="shift_tolerant"), for
# photograph() without its last row and column against itself plus Gaussian noise of the given standard
# deviation (one generator, seed 0, in this order; clipped to 0..255), and against the photograph moved by
# one column.
PUBLISHED = {
    "st-lpips-alex": ({5: 0.0212976, 15: 0.2651264, 40: 0.6071639}, 0.0037699),
    "st-lpips-vgg": ({5: 0.0664939, 15: 0.3386500, 40: 0.7719225}, 0.0087199),
}


@pytest.mark.parametrize("kind", PUBLISHED)
def test_st_lpips_matches_published_implementation(distances, kind):
    noisy, shifted = PUBLISHED[kind]
    whole = photograph()
    x = whole[:, :, :128, :128]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for deviation, expected in noisy.items():
            y = (x + deviation * torch.randn(x.shape, generator=generator)).clamp(0, 255)
            assert distances[kind](x / 127.5 - 1, y / 127.5 - 1).item() == pytest.approx(expected, rel=1e-4)
        moved = distances[kind](x / 127.5 - 1, whole[:, :, :128, 1:] / 127.5 - 1).item()
    assert moved == pytest.approx(shifted, rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_images_and_symmetry(distances, kind):
    x, y = images(seed=1), images(seed=2)
    with torch.no_grad():
        assert distances[kind](x, x).abs().max() < 1e-6
        torch.testing.assert_close(distances[kind](x, y), distances[kind](y, x))


@pytest.mark.parametrize("kind", KINDS)
def test_per_sample(distances, kind):
    """Each image's distance is its own, whatever it is batched with."""
    x, y = images(3, seed=1), images(3, seed=2)
    with torch.no_grad():
        together = distances[kind](x, y)
        alone = torch.cat([distances[kind](x[i : i + 1], y[i : i + 1]) for i in range(3)])
    assert together.shape == (3,)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_reaches_the_image_only(distances, kind):
    x, y = images(seed=1).requires_grad_(), images(seed=2)
    distance = distances[kind](x, y).sum()
    distance.backward()
    assert x.grad.isfinite().all() and x.grad.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in distances[kind].parameters())
    with torch.no_grad():  # a small step against the gradient comes closer
        step = x - 1e-2 * x.grad / x.grad.abs().max()
        assert distances[kind](step, y).sum() < distance


@pytest.mark.parametrize("kind", KINDS)
def test_flat_images_give_no_nan(distances, kind):
    """Where every channel is zero the norm has no derivative; the square root of a sum of squares would
    give NaN."""
    x = torch.full((1, 3, 64, 64), -1.0, requires_grad=True)
    distances[kind](x, torch.full((1, 3, 64, 64), 1.0)).backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_and_channels_last(distances, kind):
    x, y = photograph()[:, :, :64, :64] / 127.5 - 1, photograph()[:, :, 64:128, :64] / 127.5 - 1
    with torch.no_grad():
        expected = distances[kind](x, y)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        low = distances[kind](x, y)
    low.backward()
    assert low.dtype == torch.float32 and x.grad.isfinite().all()
    torch.testing.assert_close(low, expected, rtol=0.05, atol=0.005)


def test_fused_distance_gives_the_same_numbers(distances):
    """The Triton kernel in place of the reference, through all layers, with the gradient of the image."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    distance = copy.deepcopy(distances["st-lpips-vgg"]).to(device)
    found = {}
    for implementation in ("reference", "triton"):
        x, y = images(1, 32, 32, seed=1).to(device).requires_grad_(), images(1, 32, 32, seed=2).to(device)
        with use_implementation(implementation):
            value = distance(x, y)
        found[implementation] = value.detach(), *torch.autograd.grad(value.sum(), x)
    for fused, reference in zip(found["triton"], found["reference"], strict=True):
        assert (fused - reference).abs().max() < 1e-4 * reference.abs().max()


@settings(max_examples=8, deadline=None)
@given(height=st.integers(31, 70), width=st.integers(31, 70))
def test_any_size(distances, height, width):
    with torch.no_grad():
        assert distances["st-lpips-alex"](images(1, height, width), images(1, height, width, 1)).item() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_smallest_size_is_exact(distances, kind):
    distance = distances[kind]
    size = distance.smallest
    assert all(maps.numel() for maps in distance.features(images(1, size, size)))
    with pytest.raises(RuntimeError):
        distance.features(images(1, size - 1, size - 1))
    with pytest.raises(UserError, match=f"at least {size} x {size} px"):
        distance(images(1, size - 1, 64), images(1, size - 1, 64))


def test_stays_in_evaluation_mode(distances):
    wrapped = torch.nn.ModuleList([distances["st-lpips-alex"]]).train()
    assert not any(module.training for module in wrapped[0].modules())


@pytest.mark.parametrize("size", [(3, 3), (4, 7), (9, 8)])
def test_blur_pool_is_a_binomial_average(size):
    """Against [1 2 1] x [1 2 1] / 16 summed by hand, with its gradient, in both precisions of a CPU."""
    blur = st_lpips.BlurPool(2)
    maps = torch.rand(1, 2, *size, dtype=torch.float32)
    padded = torch.nn.functional.pad(maps, (2, 2, 2, 2), mode="reflect")
    expected = sum(
        row * column * padded[:, :, i : i + size[0] + 2 : 2, j : j + size[1] + 2 : 2] / 16
        for i, row in enumerate((1, 2, 1))
        for j, column in enumerate((1, 2, 1))
    )
    torch.testing.assert_close(blur(maps), expected)
    assert blur(maps.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (PerceptualConfig("ssim"), "lpips-vgg, lpips-alex"),
        (PerceptualConfig("lpips-vgg", "/no/such/file.pth"), "vgg16-397923af.pth"),
        (PerceptualConfig("st-lpips-alex", "/no/such/file.pth"), "no file at"),
    ],
)
def test_refusals(config, message):
    with pytest.raises(UserError, match=message):
        build_perceptual(config)


def test_a_failed_download_says_both_ways_out(monkeypatch):
    def fail(self, *args, **options):
        raise OSError("no network")

    monkeypatch.setattr(torchvision.models.AlexNet_Weights, "get_state_dict", fail)
    with pytest.raises(UserError, match=r"no network.*weights=/path/to/file.*st-lpips-alex"):
        build_perceptual(PerceptualConfig("lpips-alex"))


def test_weights_of_another_network_are_refused(trunks):
    with pytest.raises(UserError, match="vgg16"):
        build_perceptual(PerceptualConfig("lpips-vgg", str(trunks / "alex.pth")))


def test_shapes_must_agree(distances):
    with pytest.raises(UserError, match="equal shapes"):
        distances["st-lpips-alex"](images(1), images(2))


def test_a_first_call_under_inference_mode_leaves_nothing_that_training_cannot_use():
    st_lpips.blur_matrix.cache_clear()
    blur = st_lpips.BlurPool(3)
    maps = images(height=9, width=7).requires_grad_()
    with torch.inference_mode():
        expected = blur(maps)
    found = blur(maps)
    assert torch.equal(found, expected)
    found.sum().backward()
    assert maps.grad is not None and maps.grad.sum() > 0


def test_a_trunk_in_half_precision_compares_float32_images(distances, trunks, tmp_path):
    state = torch.load(trunks / "alex.pth", weights_only=True)
    torch.save({name: value.half() for name, value in state.items()}, tmp_path / "half.pth")
    found = build_perceptual(PerceptualConfig("lpips-alex", str(tmp_path / "half.pth")))(images(), images(seed=1))
    torch.testing.assert_close(found, distances["lpips-alex"](images(), images(seed=1)), rtol=1e-2, atol=0)


def test_a_downloaded_trunk_is_not_unpickled_freely(monkeypatch):
    asked = {}

    def load(url, **options):
        asked.update(options)
        raise OSError("seen")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", load)
    with pytest.raises(UserError, match="seen"):
        build_perceptual(PerceptualConfig("lpips-alex"))
    assert asked["weights_only"] is True and asked["check_hash"] is True
