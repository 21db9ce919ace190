"""Streamed centre crops are those that are loaded at once; broken pictures are left out and named."""

import pytest
import torch
from helpers import write_pictures

from aligntok.data.geometry import center_crop, to_tensor
from aligntok.data.images import load_center_crops, open_images, stream_crops
from aligntok.errors import UserError


@pytest.mark.parametrize("batch_size", [1, 4, 5, 64])
def test_batches_are_the_crops_in_order(tmp_path, batch_size):
    write_pictures(tmp_path, 11)
    (tmp_path / "disc" / "004.png").write_bytes(b"broken")
    images, seen = open_images(str(tmp_path)), []
    batches = list(stream_crops(images, 32, batch_size, lambda done, total: seen.append((done, total))))
    readable = [number for number, entry in enumerate(images.entries) if entry.name != "disc/004.png"]
    expected = torch.stack([to_tensor(center_crop(images.open(number), 32)) for number in readable])
    labels = torch.tensor([images.entries[number].label for number in readable])
    assert torch.equal(torch.cat([pixels for pixels, _ in batches]), expected) and len(expected) == 10
    assert torch.equal(torch.cat([found for _, found in batches]), labels)
    assert all(len(pixels) == batch_size for pixels, _ in batches[:-1])
    assert all(a.equal(b) for a, b in zip(load_center_crops(images, 32), (expected, labels), strict=True))
    assert seen[-1] == (11, 11) and list(images.skipped) == ["disc/004.png"]


def test_the_last_picture_may_be_the_broken_one(tmp_path):
    write_pictures(tmp_path, 4)
    (tmp_path / "square" / "zzz.png").write_bytes(b"broken")
    assert sum(len(pixels) for pixels, _ in stream_crops(open_images(str(tmp_path)), 32, 64)) == 4


def test_nothing_readable(tmp_path):
    (tmp_path / "a.png").write_bytes(b"broken")
    with pytest.raises(UserError, match="none of the 1 images"):
        list(stream_crops(open_images(str(tmp_path)), 32))
