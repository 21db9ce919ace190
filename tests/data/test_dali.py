"""DALI: the same batches as worker processes with Pillow, for every step, process and kind of file."""

import os
import subprocess
import sys

import pytest
import torch
from photographs import every_kind, write_photographs

from aligntok.config import DataConfig
from aligntok.data import dali
from aligntok.data.dali import DaliSource
from aligntok.data.dali_graph import refusal
from aligntok.data.images import open_images
from aligntok.data.sources import StreamSource
from aligntok.errors import UserError
from aligntok.runtime.world import World

NUMBERS = ("labels", "index", "flip", "rows")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    return write_photographs(tmp_path_factory.mktemp("photographs"))


def _data(size, **changes):
    return DataConfig(image_size=size, **({"workers": 1} | changes))


def _both(folder, size, crop="random", batch=9, say=print):
    """(DALI, Pillow) with an image set each."""
    fast = DaliSource(open_images(str(folder)), _data(size), crop, batch, 0, say=say)
    return fast, StreamSource(open_images(str(folder)), _data(size, workers=0), crop, batch, 0, say=say)


def _differences(a, b):
    """Mean absolute difference of every picture in steps of 1/255; everything else must be equal."""
    assert a["images"].shape == b["images"].shape and a["images"].dtype == torch.float32
    for key in NUMBERS:
        assert torch.equal(a[key], b[key])
    return (a["images"] - b["images"]).abs().mean((1, 2, 3)) * 127.5


@pytest.mark.parametrize("crop", ["random", "center"])
@pytest.mark.parametrize("size", [64, 256])
def test_photographs_are_cut_alike(photographs, crop, size):
    fast, slow = _both(photographs, size, crop)
    for step in range(2):
        assert _differences(fast.batch(step), slow.batch(step)).max() < 2
    assert not fast.by_pillow


@pytest.mark.parametrize("crop", ["random", "center"])
def test_every_kind_of_file_looks_alike(tmp_path, crop):
    kinds = every_kind()
    for name, data in kinds.items():
        (tmp_path / name).write_bytes(data)
    said = []
    fast, slow = _both(tmp_path, 32, crop, len(kinds), said.append)
    assert _differences(fast.batch(0), slow.batch(0)).max() < 2
    fast.batch(1)
    assert fast.by_pillow["transparency"] == 6 and fast.by_pillow["CMYK"] == 2
    assert len(said) == len(fast.by_pillow) and sum("CMYK" in line for line in said) == 1


def test_any_step_can_be_asked_for(photographs):
    images = open_images(str(photographs))
    straight = DaliSource(images, _data(48), "random", 4, 5)
    batches = [straight.batch(step) for step in range(6)]
    again = DaliSource(images, _data(48, workers=2), "random", 4, 5)
    for step in (4, 5, 1, 2, 2):
        assert all(torch.equal(value, batches[step][key]) for key, value in again.batch(step).items())
    assert any(batch["flip"].any() for batch in batches) and not all(batch["flip"].all() for batch in batches)


def test_batches_stay_as_they_were_handed_out(photographs):
    source = DaliSource(open_images(str(photographs)), _data(48), "random", 4, 0)
    first = source.batch(0)["images"]
    copy = first.clone()
    for step in range(1, 6):
        source.batch(step)
    assert torch.equal(first, copy)


def test_processes_share_out_the_batch_of_one(photographs):
    images = open_images(str(photographs))
    alone = DaliSource(images, _data(48), "random", 6, 0).batch(3)
    shares = [DaliSource(images, _data(48), "random", 6, 0, world=World(rank, 2)).batch(3) for rank in range(2)]
    assert all(torch.equal(torch.cat([share[key] for share in shares]), alone[key]) for key in alone)


def _damage(folder, broken):
    for number, data in broken.items():
        (folder / f"{number:02d}.jpg").write_bytes(data)


def test_unreadable_pictures_are_replaced_as_by_the_other_loader_and_named_once(tmp_path):
    whole = (write_photographs(tmp_path) / "00.jpg").read_bytes()
    _damage(tmp_path, {1: b"", 4: b"a page that says 404", 6: whole[: len(whole) // 2]})
    said = []
    fast, slow = _both(tmp_path, 48, say=said.append)
    for step in range(2):
        assert _differences(fast.batch(step), slow.batch(step)).max() < 2
    skipped = {"01.jpg", "04.jpg", "06.jpg"}
    assert set(fast.images.skipped) == set(slow.images.skipped) == skipped
    assert all(sum(f"skipped {name}" in line for line in said) == 2 for name in skipped)
    assert [line for line in said if "skipped" not in line] == [
        "WARNING: 1 of 9 images cannot be read and are left out"
    ] * 2, "by each loader, once, when a tenth is reached"


def test_a_picture_whose_damage_the_header_hides_stops_nothing(tmp_path):
    """DALI fails with the whole batch; Pillow finds the culprit, which DALI is never given again."""
    write_photographs(tmp_path)
    damaged = bytearray(every_kind()["colour.png"])
    damaged[len(damaged) // 2] ^= 0x55
    (tmp_path / "zz.png").write_bytes(damaged)
    said = []
    fast, slow = _both(tmp_path, 48, batch=5, say=said.append)
    for step in range(6):
        assert _differences(fast.batch(step), slow.batch(step)).max() < 2
    assert list(fast.images.skipped) == ["zz.png"] and sum("skipped zz.png" in line for line in said) == 2
    assert fast.by_pillow["DALI failed on their batch"] == 4
    assert fast._refused == {len(fast.images) - 1}


def test_a_batch_of_broken_pictures_is_refused(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"whole batch.*a\.jpg: not an image"):
        DaliSource(open_images(str(tmp_path)), _data(32), "center", 2, 0).batch(0)


def test_dali_that_fails_again_and_again_ends_the_run(photographs, monkeypatch):
    said = []
    source = DaliSource(open_images(str(photographs)), _data(32), "random", 4, 0, say=said.append)
    real = dali.outputs

    def failing(pipeline, device):
        real(pipeline, device)
        raise RuntimeError("Critical error in pipeline\nError: no memory left")

    monkeypatch.setattr(dali, "outputs", failing)
    monkeypatch.setattr(source, "_build", lambda: source._pipeline)
    with pytest.raises(UserError, match=r"3 batches in a row \(Error: no memory left\); data.loader=torchvision"):
        for step in range(9):
            assert len(source.batch(step)["images"]) == 4
    assert len(said) >= 3 and "although Pillow reads all of it" in said[0]


def test_a_pipeline_that_cannot_be_built_is_refused(photographs, monkeypatch):
    def failing(*arguments):
        raise RuntimeError("CUDA driver version is insufficient")

    monkeypatch.setattr(dali, "build_pipeline", failing)
    with pytest.raises(UserError, match=r"cannot run on cpu \(CUDA driver version is insufficient\); use data.loader"):
        DaliSource(open_images(str(photographs)), _data(32), "random", 4, 0)


def test_a_file_that_cannot_be_read_in_time_is_named(tmp_path):
    images = open_images(str(write_photographs(tmp_path)))
    source = DaliSource(images, _data(32, workers=2, stall_timeout=0.5), "random", 9, 0)
    (tmp_path / "03.jpg").unlink()
    os.mkfifo(tmp_path / "03.jpg")  # reading it waits for a writer that never comes
    with pytest.raises(UserError, match=r"DALI.* step 0 within 0.5 s, waiting for 03\.jpg: check the disk"):
        source.batch(0)


def test_absence_is_explained(photographs, monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    assert "pip install 'aligntok[dali]'" in refusal()
    with pytest.raises(UserError, match=r"nvidia\.dali does not import"):
        DaliSource(open_images(str(photographs)), _data(32), "random", 4, 0)


def test_nothing_of_dali_is_imported_before_it_is_used():
    program = "import sys, aligntok.data.loading; print([name for name in sys.modules if 'dali' in name])"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "['aligntok.data.dali_graph', 'aligntok.data.dali']"
