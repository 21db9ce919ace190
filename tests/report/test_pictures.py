"""Pictures: right bytes, right place, the same every time, and clear refusals."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from aligntok.errors import UserError
from aligntok.report import pictures


def decode(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def random_images(count: int, height: int = 16, width: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_to_uint8_rounds_clamps_and_moves_channels_last():
    images = torch.tensor([-1.0, -0.9961, 0.0, 1.0, 7.0, -7.0]).view(1, 1, 2, 3).expand(1, 3, 2, 3)
    pixels = pictures.to_uint8(images)
    assert pixels.shape == (1, 2, 3, 3) and pixels.dtype == torch.uint8
    assert pixels[0, :, :, 1].flatten().tolist() == [0, 0, 128, 255, 255, 0]


def test_bytes_survive_the_way_to_png_and_back():
    bytes_in = torch.arange(256).repeat(3, 1).view(1, 3, 16, 16)
    strip = decode(pictures.strip(bytes_in / 127.5 - 1))
    assert np.array(strip)[..., 0].flatten().tolist() == list(range(256))


@settings(deadline=None, max_examples=20)
@given(
    counts=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    height=st.integers(4, 20),
    width=st.integers(4, 20),
    scale=st.integers(1, 3),
)
def test_every_picture_of_a_grid_is_where_it_belongs(counts, height, width, scale):
    rows = [random_images(count, height, width, seed) for seed, count in enumerate(counts)]
    flat = [row.mean((2, 3), keepdim=True).expand(row.shape) for row in rows]  # enlarging keeps a flat colour
    gap = 5
    image = pictures.sheet(flat, [""] * len(flat), scale, gap=gap)
    for i, row in enumerate(flat):
        for j, tile in enumerate(pictures.to_uint8(row)):
            x, y = 3 * gap + j * (width * scale + gap), 3 * gap + i * (height * scale + gap)
            box = np.array(image)[y : y + height * scale, x : x + width * scale]
            assert box.shape[:2] == (height * scale, width * scale) and (box == tile[0, 0].numpy()).all()
    assert image.getpixel((gap, gap)) == pictures.PAPER


def test_grid_has_ink_for_labels_and_headings_and_cuts_long_ones():
    rows = [torch.ones(3, 3, 32, 32)]  # white pictures: all that is not white is writing
    blank = pictures.sheet(rows, [""])
    labelled = pictures.sheet(rows, ["a label that is much longer than the pictures are wide"])
    headed = pictures.sheet(rows, [""], headings={0: ["one", "two", "three"]})
    assert blank.getextrema() == ((255, 255),) * 3
    assert labelled.getextrema()[0][0] < 100 and labelled.width < blank.width + 2.5 * 64 + 20
    assert headed.getextrema()[0][0] < 200 and headed.height > blank.height and headed.width == blank.width
    assert labelled.crop((labelled.width - blank.width + 12, 0, *labelled.size)).getextrema()[0] == (255, 255)


def test_strip_leaves_transparent_gaps():
    strip = decode(pictures.strip(random_images(3), gap=4))
    assert strip.size == (3 * 16 + 2 * 4, 16) and strip.mode == "RGBA"
    alpha = [strip.getpixel((x, 8))[3] for x in range(strip.width)]
    assert alpha == [255] * 16 + [0] * 4 + [255] * 16 + [0] * 4 + [255] * 16


def test_preview_shrinks_the_longer_side_only_above_the_limit():
    assert pictures.preview(random_images(1, 40, 80), 20).shape == (1, 3, 10, 20)
    small = random_images(1, 16, 20)
    assert pictures.preview(small, 20) is small


def test_same_tensors_give_the_same_bytes():
    rows = [random_images(3), random_images(3, seed=1)]
    assert pictures.grid(rows, ["a", "b"]) == pictures.grid([row.clone() for row in rows], ["a", "b"])
    tokens = torch.randn(4, 16, 24, generator=torch.Generator().manual_seed(2))
    assert torch.equal(pictures.pca_colors(tokens, (4, 4)), pictures.pca_colors(tokens.clone(), (4, 4)))


def test_by_class_splits_class_by_class():
    samples = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 3, 2, 2)
    rows = pictures.by_class(samples, ["cat", "dog"], columns=2)
    assert [row[:, 0, 0, 0].tolist() for row in rows] == [[0, 1], [3, 4]]
    with pytest.raises(UserError, match="6 pictures do not divide into 4 classes"):
        pictures.by_class(samples, ["a", "b", "c", "d"])


def structured_tokens(noise: float = 0.0, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Three factors of falling strength in 24 channels, and the factors."""
    generator = torch.Generator().manual_seed(seed)
    factors = torch.randn(6, 16, 3, generator=generator) * torch.tensor([3.0, 2.0, 1.0])
    mixing = torch.linalg.qr(torch.randn(24, 24, generator=generator))[0][:3]
    return factors @ mixing + noise * torch.randn(6, 16, 24, generator=generator), factors


def test_pca_recovers_the_strongest_directions_in_order():
    tokens, factors = structured_tokens(noise=0.05)
    colors = pictures.pca_colors(tokens, (4, 4))
    assert colors.shape == (6, 3, 4, 4) and colors.min() == -1 and colors.max() == 1
    scores = colors.flatten(2).transpose(1, 2).reshape(-1, 3).double()
    joint = torch.corrcoef(torch.cat([scores, factors.reshape(-1, 3).double()], dim=1).T)[:3, 3:].abs()
    assert (joint.diagonal() > 0.8).all()


def test_pca_agrees_with_a_second_implementation():
    from sklearn.decomposition import PCA

    tokens, _ = structured_tokens(noise=0.5)
    flat = tokens.reshape(-1, 24)
    expected = torch.from_numpy(PCA(3, svd_solver="full").fit_transform(flat.double().numpy()))
    colors = pictures.pca_colors(tokens, (4, 4)).flatten(2).transpose(1, 2).reshape(-1, 3)
    for channel in range(3):
        inside = colors[:, channel].abs() < 1  # outside, the robust range has clipped
        pair = torch.stack([expected[inside, channel], colors[inside, channel].double()])
        assert torch.corrcoef(pair)[0, 1].abs() > 0.999999


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 1000))
def test_pca_alignment_undoes_any_rotation_of_a_space(seed):
    tokens, _ = structured_tokens(noise=0.1)
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(24, 24, generator=generator))[0]
    reference = pictures.pca_colors(tokens, (4, 4))
    aligned = pictures.pca_colors(5 * tokens @ rotation + 3, (4, 4), reference)
    assert (aligned - reference).abs().mean() < 0.1


def test_pca_alignment_brings_swapped_and_flipped_components_back():
    tokens, factors = structured_tokens()
    swapped = factors[..., [2, 0, 1]] * torch.tensor([-4.0, 0.5, -1.0])
    reference = pictures.pca_colors(tokens, (4, 4))
    alone = (pictures.pca_colors(swapped, (4, 4)) - reference).abs().mean()
    aligned = (pictures.pca_colors(swapped, (4, 4), reference) - reference).abs().mean()
    assert aligned < 0.15 < 0.4 < alone


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_pca_of_few_channels_and_of_constants_is_grey_where_nothing_varies(channels):
    tokens = torch.randn(3, 4, channels, generator=torch.Generator().manual_seed(0))
    colors = pictures.pca_colors(tokens, (2, 2))
    assert all(colors[:, c].std() > 0.1 for c in range(channels))
    assert not colors[:, channels:].any()
    assert not pictures.pca_colors(torch.full((3, 4, channels), 0.1), (2, 2)).any()


def test_upscale_repeats_tokens_and_mixes_with_images():
    maps = torch.tensor([[-1.0, 1.0], [0.5, -0.5]]).expand(1, 3, 2, 2)
    enlarged = pictures.upscale(maps, (8, 8))
    assert torch.equal(enlarged[0, 0, :4, :4], torch.full((4, 4), -1.0))
    assert torch.equal(enlarged[0, 0, 4:, 4:], torch.full((4, 4), -0.5))
    mixed = pictures.upscale(maps, (8, 8), blend=torch.ones(1, 3, 8, 8), weight=0.25)
    assert torch.allclose(mixed, 0.25 * enlarged + 0.75)


def test_contact_sheet_keeps_its_limit_and_its_order():
    noise = random_images(24, 32, 32)  # noise compresses worst
    rows = {"Original": noise[:12], "Stage 1": noise[12:]}
    large = pictures.contact_sheet(rows, noise, ["cat", "dog"], limit=2_000_000)
    small = pictures.contact_sheet(rows, noise, ["cat", "dog"], limit=120_000)
    assert len(small) <= 120_000 < len(large)
    assert decode(large).width > 1.7 * decode(small).width
    with pytest.raises(UserError, match="above the limit of 1,000"):
        pictures.contact_sheet(rows, limit=1_000)


def test_pictures_of_a_contact_sheet_shrink_until_it_keeps_its_limit():
    noise = random_images(4, 64, 64)
    data = pictures.contact_sheet({"Original": noise}, noise, ["cat", "dog"], limit=40_000)
    assert len(data) <= 40_000
    with pytest.raises(UserError, match="above the limit of 1,000"):
        pictures.contact_sheet({"Original": noise}, noise, ["cat", "dog"], limit=1_000)


def test_contact_sheet_without_classes_and_with_fewer_samples_than_columns():
    images = random_images(5)
    sheet = decode(pictures.contact_sheet({"Original": images}, images))
    assert sheet.height == 2 * 12 + 2 * 32 + 4


WRONG = {
    "no batch": (lambda: pictures.to_uint8(torch.zeros(3, 8, 8)), r"\(3, 8, 8\), expected images"),
    "four channels": (lambda: pictures.strip(torch.zeros(1, 4, 8, 8)), r"\(1, 4, 8, 8\)"),
    "no pictures": (lambda: pictures.strip(torch.zeros(0, 3, 8, 8)), r"\(0, 3, 8, 8\)"),
    "bytes": (lambda: pictures.strip(torch.zeros(1, 3, 8, 8, dtype=torch.uint8)), "torch.uint8"),
    "nan": (lambda: pictures.strip(torch.full((2, 3, 8, 8), float("nan"))), "2 of 2 images hold NaN"),
    "labels": (lambda: pictures.grid([torch.zeros(1, 3, 8, 8)], ["a", "b"]), "1 rows and 2 labels"),
    "no rows": (lambda: pictures.grid([], []), "0 rows"),
    "sizes": (
        lambda: pictures.grid([torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 4, 4)], ["a", "b"]),
        "different picture sizes",
    ),
    "token grid": (lambda: pictures.pca_colors(torch.zeros(2, 16, 8), (3, 4)), "grid of 3x4"),
    "nan tokens": (lambda: pictures.pca_colors(torch.full((2, 4, 8), float("nan")), (2, 2)), "NaN"),
    "reference": (
        lambda: pictures.pca_colors(torch.randn(2, 4, 8), (2, 2), torch.zeros(3, 3, 2, 2)),
        r"\(3, 3, 2, 2\), expected \(2, 3, 2, 2\)",
    ),
    "latents": (lambda: pictures.latent_tokens(torch.zeros(2, 4, 8)), "latents of shape"),
    "blend": (
        lambda: pictures.upscale(torch.zeros(1, 3, 2, 2), (8, 8), blend=torch.zeros(1, 3, 4, 4)),
        "cannot be mixed",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_refused_with_what_was_given(case):
    call, message = WRONG[case]
    with pytest.raises(UserError, match=message):
        call()
