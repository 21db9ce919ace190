"""Aspect-ratio buckets: the table, the nearest one, sizes from headers, and batches of one bucket each."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from aligntok.data.buckets import (
    NONE,
    Bucket,
    BucketOrder,
    assign_buckets,
    bucket_table,
    nearest_bucket,
)
from aligntok.data.images import Entry, open_images
from aligntok.data.picture_sizes import Sizes, picture_size, read_sizes, save_sizes, saved_sizes
from aligntok.errors import UserError
from aligntok.runtime.world import World


@given(st.sampled_from(["area", "short_side"]), st.integers(2, 64).map(lambda n: 16 * n))
def test_tables_are_whole_symmetric_and_within_their_limits(mode, size):
    table = bucket_table(mode, size)
    assert Bucket(size, size) in table and len(set(table)) == len(table) <= 17
    assert {Bucket(width, height) for height, width in table} == set(table)
    for height, width in table:
        assert height % 16 == width % 16 == 0 and 0.5 <= height / width <= 2
        if mode == "short_side":
            assert min(height, width) == size
        elif size >= 256:
            assert 0.94 < height * width / size**2 < 1.06


def test_the_tables_of_512():
    assert bucket_table("short_side", 512)[:5] == [(512, 1024), (512, 896), (512, 768), (512, 640), (512, 512)]
    assert bucket_table("area", 512)[:5] == [(384, 688), (416, 624), (448, 592), (480, 544), (512, 512)]
    assert len(bucket_table("area", 512, step=16)) > len(bucket_table("area", 512))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("square", 256), "data.buckets is 'square', expected area or short_side"),
        (("area", 250), "the size of buckets is 250, expected a multiple of 16: use 240 or 256"),
        (("area", 256, 8), "the step of buckets is 8, expected a multiple of 16: use 16"),
    ],
)
def test_other_tables_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        bucket_table(*arguments)


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (600, 600, (512, 512)),
        (1200, 1500, (512, 640)),
        (1500, 1200, (640, 512)),
        (100, 199, (512, 1024)),
        (100, 260, (512, 1024)),  # loses 23 %
        (100, 270, None),  # would lose 26 %
        (3000, 100, None),
    ],
)
def test_the_nearest_bucket(height, width, expected):
    table = bucket_table("short_side", 512)
    number = nearest_bucket(height, width, table)
    assert number == NONE if expected is None else table[number] == expected


def save(folder, name, size, orientation=None):
    image, exif = Image.new("RGB", size), Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    image.save(folder / name, exif=exif)


def test_pictures_get_buckets_from_their_headers(tmp_path):
    save(tmp_path, "a.jpg", (64, 48))
    save(tmp_path, "b.jpg", (64, 48), orientation=6)
    save(tmp_path, "c.png", (64, 48), orientation=8)
    save(tmp_path, "d.webp", (50, 50))
    save(tmp_path, "e.png", (400, 20))
    (tmp_path / "f.jpg").write_bytes(b"junk")
    images, said, done = open_images(str(tmp_path), say=lambda line: None), [], []
    table = bucket_table("short_side", 64)
    buckets = assign_buckets(images, table, said.append, lambda *at: done.append(at))
    shown = [None if number == NONE else tuple(table[number]) for number in buckets.tolist()]
    assert shown == [(64, 80), (80, 64), (80, 64), (64, 64), None, None]
    assert said == [
        f"buckets: {tmp_path.name}: 4 of 6 images in 3 sizes",
        "  1 too long or too high for any bucket: e.png (400 x 20)",
        "  1 whose size cannot be read: f.jpg (not an image that Pillow knows)",
    ]
    assert done == [(6, 6)]
    sizes = read_sizes(images)
    parts = [read_sizes(images.subset(part)) for part in ([0, 1], [], [2, 3, 4, 5])]
    together = Sizes.of_parts(parts)
    assert torch.equal(together.pixels, sizes.pixels) and together.reasons == sizes.reasons
    assert torch.equal(assign_buckets(images, table, said.append, sizes=together), buckets) and said[:3] == said[3:]
    with pytest.raises(UserError, match=r"none of the 2 images of .* fits a bucket \(1 too long"):
        assign_buckets(images.subset([4, 5]), table, said.append)


def test_sizes_are_kept_for_the_same_set(tmp_path):
    sizes, file = Sizes(torch.tensor([[3, 4], [0, 0]], dtype=torch.int32), {1: "gone"}), tmp_path / "a" / "sizes"
    assert saved_sizes(file, "these") is None
    save_sizes(file, sizes, "these")
    found = saved_sizes(file, "these")
    assert found is not None and torch.equal(found.pixels, sizes.pixels) and found.reasons == sizes.reasons
    assert saved_sizes(file, "others") is None
    file.write_bytes(file.read_bytes()[:20])
    assert saved_sizes(file, "these") is None, "damaged: read again"


def test_headers_in_tars_long_ones_and_files_that_are_gone(tmp_path):
    embedded = open_images("embedded")
    assert picture_size(embedded.entries[700]) == (128, 128)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "x" * 60_000
    Image.new("RGB", (30, 20)).save(tmp_path / "a.jpg", exif=exif, icc_profile=b"x" * 60_000)
    assert picture_size(Entry("a.jpg", tmp_path / "a.jpg", 0)) == (30, 20)
    assert "No such file" in picture_size(Entry("b.jpg", tmp_path / "b.jpg", 0))


BUCKETS = torch.tensor([0] * 17 + [2] * 40 + [5] * 3 + [2] * 4)


def test_a_batch_has_one_bucket_and_every_picture_its_turn():
    order = BucketOrder(BUCKETS, 4, seed=1)
    seen, steps = Counter(), 16 * 40  # forty epochs
    for step in range(steps):
        indices = order.indices(step)
        assert len(indices) == 4 and set(BUCKETS[indices].tolist()) == {order.bucket(step)}
        seen.update(indices.tolist())
    assert set(seen) == set(range(64)) and set(seen.values()) <= {38, 39, 40, 41, 42}
    first = [order.bucket(step) for step in range(16)]
    assert set(first) >= {0, 2} and first != sorted(first)


@settings(max_examples=20)
@given(st.integers(0, 200), st.integers(0, 3))
def test_a_batch_depends_on_seed_and_step_alone_and_processes_share_it_out(step, seed):
    straight = BucketOrder(BUCKETS, 6, seed)
    for before in range(max(0, step - 12), step):
        straight.indices(before)
    expected = straight.indices(step)
    assert torch.equal(BucketOrder(BUCKETS, 6, seed).indices(step), expected), "resumed"
    shares = [BucketOrder(BUCKETS, 6, seed, World(rank, 3)) for rank in range(3)]
    assert torch.equal(torch.cat([share.indices(step) for share in shares]), expected)
    assert torch.equal(torch.cat([share.uniforms(step) for share in shares]), straight.uniforms(step))
    assert {share.bucket(step) for share in shares} == {straight.bucket(step)}


def test_seeds_differ_and_small_sets_have_batches():
    orders = [BucketOrder(BUCKETS, 4, seed) for seed in (0, 1)]
    assert any(not torch.equal(*(order.indices(step) for order in orders)) for step in range(4))
    small = BucketOrder(torch.tensor([3, 3, 1]), 8, 0)
    found = Counter(small.bucket(step) for step in range(300))
    assert found.keys() == {1, 3} and 1.5 < found[3] / found[1] < 2.7
    with pytest.raises(AssertionError, match="without a bucket are left out"):
        BucketOrder(torch.tensor([0, NONE]), 1, 0)
