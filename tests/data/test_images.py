"""Image sets: every kind of file that users have, and the broken ones."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from helpers import write_pictures
from PIL import Image

from aligntok.data.geometry import (
    center_crop,
    center_window,
    cut,
    random_crop,
    random_window,
    to_tensor,
    to_unit_range,
)
from aligntok.data.images import load_center_crops, open_images
from aligntok.errors import UserError


def test_embedded_set_is_complete():
    images = open_images("embedded")
    assert len(images) == 1306
    assert len(images.classes) == 12 and images.classes[1] == "animal"
    assert images.labels.bincount().tolist() == [85, 136, 47, 115, 97, 61, 214, 300, 68, 64, 47, 72]
    assert images.open(5).size == (128, 128)


def test_folder_of_folders_gives_classes(tmp_path):
    images = open_images(str(write_pictures(tmp_path, 7)))
    assert images.classes == ["disc", "square"]
    assert images.labels.bincount().tolist() == [4, 3]


def test_flat_folder_is_one_class(tmp_path):
    images = open_images(str(write_pictures(tmp_path, 4, classes=("disc",)) / "disc"))
    assert images.classes == ["all"] and images.labels.tolist() == [0] * 4


def test_tar_with_and_without_class_names(tmp_path):
    path = tmp_path / "set.tar"
    with tarfile.open(path, "w") as tar:
        for key, label in (("a", 1), ("b", 0)):
            data = io.BytesIO()
            Image.new("RGB", (8, 8), (label * 255, 0, 0)).save(data, "PNG")
            for name, content in ((f"{key}.png", data.getvalue()), (f"{key}.cls", str(label).encode())):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    images = open_images(str(path))
    assert images.labels.tolist() == [1, 0] and images.classes == ["class 0", "class 1"]
    assert np.array(images.open(0))[0, 0].tolist() == [255, 0, 0]
    path.with_suffix(".json").write_text(json.dumps({"classes": ["dark", "red"]}))
    assert open_images(str(path)).classes == ["dark", "red"]


def test_unreadable_images_are_skipped_counted_and_named(tmp_path):
    write_pictures(tmp_path, 6)
    (tmp_path / "disc" / "broken.png").write_bytes(b"not a picture")
    whole = (tmp_path / "square" / "001.png").read_bytes()
    (tmp_path / "square" / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "square" / "empty.jpg").write_bytes(b"")
    images = open_images(str(tmp_path))
    pixels, labels = load_center_crops(images, 16)
    assert pixels.shape == (6, 3, 16, 16) and len(labels) == 6
    assert {name.split("/")[-1].split("\\")[-1] for name in images.skipped} == {
        "broken.png",
        "truncated.png",
        "empty.jpg",
    }


def test_one_pixel_and_long_thin_images(tmp_path):
    Image.new("RGB", (1, 1), (9, 8, 7)).save(tmp_path / "one.png")
    Image.new("RGB", (500, 3), (9, 8, 7)).save(tmp_path / "thin.png")
    pixels, _ = load_center_crops(open_images(str(tmp_path)), 32)
    assert pixels.shape == (2, 3, 32, 32)
    assert (pixels == torch.tensor([9, 8, 7]).view(3, 1, 1)).all()


def test_a_strip_costs_what_its_crop_costs(tmp_path):
    """60,000 x 1 pixels in 258 bytes: resized whole it would be 3.8 million pixels wide."""
    import resource

    Image.new("RGB", (60_000, 1), (9, 8, 7)).save(tmp_path / "strip.png")
    Image.new("RGB", (1, 60_000), (9, 8, 7)).save(tmp_path / "tower.png")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pixels, _ = load_center_crops(open_images(str(tmp_path)), 64)
    assert (pixels == torch.tensor([9, 8, 7]).view(3, 1, 1)).all()
    with Image.open(tmp_path / "strip.png") as strip:
        assert random_crop(strip, 64, 0.7, 0.2).getpixel((5, 5)) == (9, 8, 7)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024  # KiB


@pytest.mark.parametrize("size", [(33, 47), (200, 90), (129, 131), (40, 300)])
def test_resizing_the_region_is_resizing_all_and_cropping(size):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size, 3)).astype(np.uint8))
    for place in (center_window(*picture.size, 32), random_window(*picture.size, 32, 0.3, 0.8)):
        whole = picture
        for _ in range(place.halvings):
            whole = whole.resize((whole.width // 2, whole.height // 2), Image.Resampling.BOX)
        whole = whole.resize((place.width, place.height), Image.Resampling.BICUBIC)
        expected = whole.crop((place.left, place.top, place.left + 32, place.top + 32))
        difference = np.array(cut(picture, place)).astype(int) - np.array(expected)
        assert abs(difference).max() <= 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "nowhere", "does not exist"),
        (lambda p: p, "no images in"),
        (
            lambda p: [(p / "a.zip").write_bytes(b""), p / "a.zip"][1],
            "expected a folder of images or a WebDataset",
        ),
        (lambda p: [(p / "a.tar").write_bytes(b"junk" * 300), p / "a.tar"][1], "not a WebDataset tar"),
    ],
)
def test_refusals(tmp_path, make, message):
    with pytest.raises(UserError, match=message):
        open_images(str(make(tmp_path)))


def test_a_set_of_broken_images_only_is_refused_with_the_first_reason(tmp_path):
    (tmp_path / "x.png").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"none of the 1 images.*x\.png"):
        load_center_crops(open_images(str(tmp_path)), 16)


def test_split_is_a_partition_and_always_the_same(tmp_path):
    images = open_images(str(write_pictures(tmp_path, 20)))
    training, held_out = images.split(0.25)
    names = [[e.name for e in part.entries] for part in (training, held_out)]
    assert len(names[1]) == 5 and not set(names[0]) & set(names[1]) and len({*names[0], *names[1]}) == 20
    assert names[1] == [e.name for e in images.split(0.25)[1].entries]


def test_center_crop_takes_the_middle_and_random_crop_both_ends():
    wide = Image.fromarray(np.tile(np.arange(96, dtype=np.uint8), (32, 1))).convert("RGB")
    assert np.array(center_crop(wide, 32))[0, :, 0].tolist() == list(range(32, 64))
    assert np.array(random_crop(wide, 32, 0.0, 0.0))[0, 0, 0] == 0
    assert np.array(random_crop(wide, 32, 0.999, 0.999))[0, -1, 0] == 95


def test_unit_range():
    assert to_unit_range(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1.0, 1.0]
    assert to_tensor(Image.new("RGB", (5, 2), (1, 2, 3)))[:, 0, 0].tolist() == [1, 2, 3]
