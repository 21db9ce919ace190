"""Batch sources: a function of (seed, step), whichever way the pictures come."""

import os

import pytest
import torch
from helpers import write_pictures
from hypothesis import given, settings
from hypothesis import strategies as st

from aligntok.config import DataConfig
from aligntok.data.frozen import FrozenNetwork, tabulate
from aligntok.data.images import load_center_crops, open_images
from aligntok.data.sources import MemorySource, Order, StreamSource, stand_ins
from aligntok.errors import UserError
from aligntok.runtime.devices import choose_precision
from aligntok.runtime.world import World


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 40), batch=st.integers(1, 50), seed=st.integers(0, 5))
def test_every_epoch_has_every_picture_once(count, batch, seed):
    order = Order(count, batch, seed)
    stream = torch.cat([order.indices(step) for step in range(-(-3 * count // batch))])[: 3 * count]
    epochs = stream.view(3, count)
    assert all(sorted(epoch.tolist()) == list(range(count)) for epoch in epochs)
    again = Order(count, batch, seed)
    assert torch.equal(again.indices(2), order.indices(2))
    assert torch.equal(again.uniforms(2), order.uniforms(2))


@settings(max_examples=30, deadline=None)
@given(count=st.integers(1, 40), own=st.integers(1, 9), size=st.integers(1, 5), step=st.integers(0, 9))
def test_the_processes_of_a_run_share_out_the_batch_of_one(count, own, size, step):
    alone = Order(count, own * size, 0)
    shares = [Order(count, own * size, 0, World(rank, size)) for rank in range(size)]
    assert torch.equal(torch.cat([s.rows for s in shares]), alone.rows)
    assert torch.equal(torch.cat([s.indices(step) for s in shares]), alone.indices(step))
    assert torch.equal(torch.cat([s.uniforms(step) for s in shares]), alone.uniforms(step))


def test_a_batch_that_cannot_be_shared_out_is_refused():
    with pytest.raises(UserError, match=r"batch_size is 10, expected a multiple of the 4 processes: use 8 or 12"):
        Order(100, 10, 0, World(1, 4))


def test_seeds_and_steps_differ():
    a, b = Order(100, 50, 0), Order(100, 50, 1)
    assert not torch.equal(a.indices(0), b.indices(0))
    assert not torch.equal(a.uniforms(0), a.uniforms(1))
    assert not torch.equal(a.indices(0), a.indices(2))


@pytest.fixture
def images(tmp_path):
    return open_images(str(write_pictures(tmp_path, 10)))


def test_memory_and_stream_agree_on_centre_crops(images):
    pixels, labels = load_center_crops(images, 32)
    memory = MemorySource(pixels, labels, batch_size=4, seed=3, flip=True)
    stream = StreamSource(images, DataConfig(image_size=32, workers=0), "center", 4, 3)
    for step in (0, 1, 7):
        a, b = memory.batch(step), stream.batch(step)
        assert all(torch.equal(a[key], b[key]) for key in ("labels", "index", "flip", "rows"))
        torch.testing.assert_close(a["images"], b["images"])
    assert any(memory.batch(s)["flip"].any() for s in range(3))


def test_stream_resumes_at_any_step_with_workers(images):
    data = DataConfig(image_size=32, workers=2)
    straight = StreamSource(images, data, "random", 4, 0)
    batches = [straight.batch(step) for step in range(4)]
    resumed = StreamSource(images, data, "random", 4, 0).batch(3)
    assert torch.equal(resumed["images"], batches[3]["images"])


def test_a_corrupt_picture_in_a_stream_is_replaced_and_named(images, tmp_path):
    (tmp_path / "disc" / "000.png").write_bytes(b"junk")
    said = []
    stream = StreamSource(images, DataConfig(image_size=32, workers=0), "center", 10, 0, said.append)
    for step in range(2):
        assert stream.batch(step)["images"].shape == (10, 3, 32, 32)
    assert len(said) == 2 and "skipped disc/000.png" in said[0]
    assert said[1] == "WARNING: 1 of 10 images cannot be read and are left out"
    assert list(images.skipped) == ["disc/000.png"]


def test_a_batch_of_corrupt_pictures_is_refused(images, tmp_path):
    for entry in images.entries:
        entry.path.write_bytes(b"junk")
    with pytest.raises(UserError, match="whole batch"):
        StreamSource(images, DataConfig(image_size=32, workers=0), "center", 4, 0).batch(0)


@pytest.mark.parametrize("flip", [True, False])
def test_tables_hold_what_the_network_gives(images, flip):
    pixels, labels = load_center_crops(images, 32)
    source = MemorySource(pixels, labels, 4, 0, flip)
    precision = choose_precision("cpu", "fp32")
    network = torch.nn.Conv2d(3, 2, 5, stride=4)
    table = tabulate(network, source, precision, batch_size=3)
    online = FrozenNetwork(network, precision)
    assert table.values.shape[:2] == (2 if flip else 1, 10)
    for step in range(3):
        batch = source.batch(step)
        torch.testing.assert_close(table(batch), online(batch), atol=1e-5, rtol=1e-5)


@given(readable=st.lists(st.booleans(), min_size=1, max_size=12).filter(any))
def test_stand_ins_are_readable_and_leave_the_others_in_place(readable):
    source = stand_ins(readable)
    assert all(readable[row] for row in source)
    assert all(row == shown for row, (fine, shown) in enumerate(zip(readable, source, strict=True)) if fine)


def test_a_corrupt_picture_leaves_the_other_rows_where_they_are(images):
    whole = StreamSource(images, DataConfig(image_size=32, workers=0), "center", 10, 0).batch(0)
    bad = 4
    images.entries[int(whole["index"][bad])].path.write_bytes(b"junk")
    found = StreamSource(images, DataConfig(image_size=32, workers=0), "center", 10, 0, lambda line: None).batch(0)
    expected = whole["index"].clone()
    expected[bad] = expected[bad + 1]
    assert torch.equal(found["index"], expected)
    assert torch.equal(found["images"][bad], found["images"][bad + 1])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_worker_that_is_stuck_is_named_by_its_file(images, workers):
    stuck = images.entries[7]
    stuck.path.unlink()
    os.mkfifo(stuck.path)  # reading it waits for a writer that never comes
    stream = StreamSource(images, DataConfig(image_size=32, workers=workers, stall_timeout=1.0), "center", 10, 0)
    with pytest.raises(UserError, match=rf"torchvision .* step 0 within 1 s, waiting for {stuck.name}: check the disk"):
        stream.batch(0)
    with open(stuck.path, "wb"):  # lets the worker go
        pass


def test_without_a_limit_nothing_is_timed(images):
    stream = StreamSource(images, DataConfig(image_size=32, workers=0, stall_timeout=0.0), "center", 10, 0)
    assert stream.batch(0)["images"].shape == (10, 3, 32, 32)
