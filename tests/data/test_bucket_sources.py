"""Batches of one size each: what is cut, from memory and streamed, in one process and several, and from any step on."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from aligntok.config import DataConfig
from aligntok.data.bucket_sources import BucketsInMemory, BucketStream
from aligntok.data.buckets import Bucket, Buckets, assign_buckets, bucket_table, told_sizes
from aligntok.data.frozen import FrozenNetwork, tabulate_buckets
from aligntok.data.geometry import center_window, cut, random_window
from aligntok.data.images import open_images
from aligntok.data.loading import build_bucket_source
from aligntok.data.text_beside import _coming, pictures_of
from aligntok.errors import UserError
from aligntok.runtime.devices import choose_precision
from aligntok.runtime.world import World

SHAPES = [(40, 40), (90, 60), (30, 60), (70, 105), (64, 33), (41, 40)]  # width, height
EXPECTED = [(32, 32), (32, 48), (64, 32), (48, 32), (32, 64), (32, 32)]  # height, width
TABLE = bucket_table("short_side", 32)
DATA = DataConfig(image_size=32, workers=0, memory_limit_gib=0.0)


def disc(width: int, height: int, colour: int) -> Image.Image:
    """In the middle, on white."""
    image, radius = Image.new("RGB", (width, height), "white"), min(width, height) * 0.4
    box = (width / 2 - radius, height / 2 - radius, width / 2 + radius, height / 2 + radius)
    ImageDraw.Draw(image).ellipse(box, fill=(colour, 0, 0))
    return image


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(24):
        disc(*SHAPES[number % len(SHAPES)], 5 * number).save(folder / f"{number:02d}.png")
    return open_images(str(folder), say=lambda line: None)


@pytest.fixture(scope="module")
def buckets(images):
    return Buckets(TABLE, assign_buckets(images, TABLE, lambda line: None))


def memory(images, buckets, seed=0, world=None, batch=4) -> BucketsInMemory:
    return BucketsInMemory(images, buckets, batch, seed, True, world)


def stream(images, buckets, seed=0, world=None, batch=4, data=DATA) -> BucketStream:
    return BucketStream(images, buckets, data, batch, seed, pytest.fail, world)


def equal(one, two) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_pictures_keep_their_shape(images, buckets):
    """A disc stays one, in the middle of a crop whose sides are those of the picture's bucket."""
    source, seen = memory(images, buckets), set()
    assert [buckets.size(number) for number in range(6)] == EXPECTED
    for step in range(40):
        batch = source.batch(step)
        size = tuple(batch["images"].shape[-2:])
        assert {EXPECTED[number % 6] for number in batch["index"].tolist()} == {size}
        for image, number in zip(batch["images"], batch["index"].tolist(), strict=True):
            rows, columns = torch.nonzero(image[1] < 0, as_tuple=True)
            sides = [int(where.max() - where.min()) + 1 for where in (rows, columns)]
            assert abs(sides[0] - sides[1]) <= 1, (number, sides)
            assert float(rows.float().mean()) == pytest.approx((size[0] - 1) / 2, abs=0.6)
            assert float(columns.float().mean()) == pytest.approx((size[1] - 1) / 2, abs=0.6)
            assert sides[0] == pytest.approx(0.8 * min(size), abs=2.5), "the picture just covers its crop"
            seen.add(number)
    assert seen == set(range(24))


def test_streamed_batches_are_those_from_memory(images, buckets):
    one, two = memory(images, buckets), stream(images, buckets)
    assert all(equal(one.batch(step), two.batch(step)) for step in range(12))
    workers = stream(images, buckets, data=DataConfig(image_size=32, workers=1))
    assert all(equal(one.batch(step), workers.batch(step)) for step in range(3))


@pytest.mark.parametrize("make", [memory, stream])
def test_a_batch_is_that_of_all_processes_and_of_a_resumed_run(make, images, buckets):
    alone = make(images, buckets, seed=3)
    shares = [make(images, buckets, seed=3, world=World(rank, 2)) for rank in (0, 1)]
    for step in range(14):
        expected = alone.batch(step)
        parts = [share.batch(step) for share in shares]
        assert equal({key: torch.cat([part[key] for part in parts]) for key in expected}, expected)
        assert equal(make(images, buckets, seed=3).batch(step), expected), "resumed here"
    assert not equal(make(images, buckets, seed=4).batch(0), alone.batch(0))


@pytest.mark.parametrize("make", [memory, stream])
def test_which_pictures_come_next_is_known(make, images, buckets):
    source = make(images, buckets)
    for step in range(6):
        coming = _coming(source, step)
        assert torch.equal(coming, source.batch(step)["index"])


def test_latents_of_a_table_are_those_of_the_network(images, buckets):
    source, precision = memory(images, buckets), choose_precision("cpu", "fp32")
    torch.manual_seed(0)
    network, done = torch.nn.Conv2d(3, 2, 16, stride=16), []
    table = tabulate_buckets(network, source, precision, lambda *at: done.append(at))
    assert done[-1] == (48, 48) and done == sorted(done)
    in_loop, shapes, flips = FrozenNetwork(network, precision), set(), 0
    for step in range(20):
        batch = source.batch(step)
        torch.testing.assert_close(table(batch), in_loop(batch), rtol=1e-4, atol=1e-5)
        shapes.add(tuple(table(batch).shape[1:]))
        flips += int(batch["flip"].sum())
    assert 20 < flips < 60
    assert shapes == {(2, height // 16, width // 16) for height, width in EXPECTED}


@pytest.fixture
def damaged(tmp_path):
    """A picture in two and the only one of its size have a header and no end."""
    for number in range(6):
        disc(*((40, 40) if number < 5 else (40, 80)), 9).save(tmp_path / f"{number}.png")
    for number in (1, 3, 5):
        file = tmp_path / f"{number}.png"
        file.write_bytes(file.read_bytes()[:-30])
    return open_images(str(tmp_path), say=lambda line: None)


def test_pictures_that_cannot_be_decoded(damaged):
    buckets = Buckets(TABLE, assign_buckets(damaged, TABLE, lambda line: None))
    source = BucketsInMemory(damaged, buckets, 3, 0, False)
    assert source.sizes == {(32, 32): 3} and source.order.count == 3
    assert pictures_of(source, damaged, torch.arange(10, 16)).tolist() == [10, 12, 14]
    assert sorted(source.batch(0)["index"].tolist()) == [0, 1, 2]
    assert set(damaged.skipped) == {"1.png", "3.png", "5.png"}
    with pytest.raises(UserError, match="none of the 1 images"):
        BucketsInMemory(damaged.subset([5]), Buckets(TABLE, buckets.numbers[5:]), 1, 0, False)


def test_a_stream_puts_another_picture_of_the_size_in_the_place_of_an_unreadable_one(damaged):
    square, said = damaged.subset([0, 1, 2, 3, 4]), []
    buckets = Buckets(TABLE, assign_buckets(square, TABLE, lambda line: None))
    source = BucketStream(square, buckets, DATA, 5, 0, said.append)
    assert set(source.batch(0)["index"].tolist()) == {0, 2, 4}
    assert {line.split(":")[0] for line in said} >= {"skipped 1.png", "skipped 3.png"}


@contextmanager
def bar(title):
    yield lambda *at: None


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({}, BucketsInMemory, "loader: memory (0.00 GiB of centre crops"),
        ({"memory_limit_gib": 0.0}, BucketStream, "with Pillow (DALI is not used with data.buckets)"),
        ({"memory_limit_gib": 0.0, "loader": "torchvision"}, BucketStream, "(as data.loader says)"),
    ],
)
def test_the_loader_is_chosen_and_said(changes, kind, words, images, buckets):
    data, said = DataConfig(image_size=32, workers=0, **changes), []
    source = build_bucket_source(images, buckets, data, 4, 0, said.append, bar)
    assert type(source) is kind and words in " ".join(said)
    assert sum(source.sizes.values()) == 24
    assert buckets.gib == pytest.approx(sum(3 * h * w for h, w in EXPECTED) * 4 / 2**30)


def test_one_line_says_the_sizes():
    assert told_sizes({Bucket(32, 48): 1200, Bucket(32, 32): 1}) == "2 sizes: 1,200 of 48 x 32, 1 of 32 x 32"
    assert told_sizes({Bucket(32, 32): 7}) == "1 size: 7 of 32 x 32"


def test_a_crop_of_any_size_is_resizing_all_and_cropping():
    """On grey noise: what overshoots is cut off between the two passes, whose order Pillow chooses by their cost."""
    for shape in ((33, 47), (200, 90), (129, 131), (40, 300)):
        picture = Image.fromarray(np.random.default_rng(0).integers(90, 165, (*shape, 3)).astype(np.uint8))
        for size in ((48, 32), (32, 80)):
            for place in (center_window(*picture.size, size), random_window(*picture.size, size, 0.3, 0.8)):
                whole = picture
                for _ in range(place.halvings):
                    whole = whole.resize((whole.width // 2, whole.height // 2), Image.Resampling.BOX)
                whole = whole.resize((place.width, place.height), Image.Resampling.BICUBIC)
                assert place.width == size[1] or place.height == size[0], "one side just covers"
                expected = whole.crop((place.left, place.top, place.left + size[1], place.top + size[0]))
                difference = np.array(cut(picture, place)).astype(int) - np.array(expected)
                assert difference.shape == (*size, 3) and abs(difference).max() <= 1
