"""WebDataset tars: one, several, a pattern; and an index that is never believed when the tar has changed."""

import io
import json
import os
import tarfile

import numpy as np
import pytest
from PIL import Image

from aligntok.data import shards
from aligntok.data.images import open_images
from aligntok.errors import UserError


def write_tar(path, labels, prefix="", start=0):
    """A tar with one 8 x 8 picture per label, its red value saying which it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number, label in enumerate(labels, start):
            data = io.BytesIO()
            Image.new("RGB", (8, 8), (number, 0, 0)).save(data, "PNG")
            for name, content in ((f"{number:04d}.png", data.getvalue()), (f"{number:04d}.cls", str(label).encode())):
                info = tarfile.TarInfo(prefix + name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def _reds(images):
    return [int(np.array(images.open(i))[0, 0, 0]) for i in range(len(images))]


@pytest.fixture
def three(tmp_path):
    for shard in range(3):
        write_tar(tmp_path / f"s-{shard:02d}.tar", [shard, shard, 0], start=10 * shard)
    return tmp_path


@pytest.mark.parametrize("pattern", ["", "s-{00..02}.tar", "s-{00,01,02}.tar", "s-0{0..2}.tar"])
def test_folder_and_patterns_give_all_pictures_in_order(three, pattern):
    images = open_images(str(three / pattern) if pattern else str(three))
    assert _reds(images) == [0, 1, 2, 10, 11, 12, 20, 21, 22]
    assert images.labels.tolist() == [0, 0, 0, 1, 1, 0, 2, 2, 0]
    assert images.entries[3].name == "s-01.tar/0010.png" and images.classes == ["class 0", "class 1", "class 2"]


def test_class_names_lie_beside_the_shards(three):
    (three / "classes.json").write_text(json.dumps({"classes": ["a", "b", "c"]}))
    assert open_images(str(three)).classes == ["a", "b", "c"]


def test_names_with_folders_and_dots(tmp_path):
    write_tar(tmp_path / "a.tar", [1, 0], prefix="./v1.0/")
    images = open_images(str(tmp_path / "a.tar"))
    assert images.labels.tolist() == [1, 0] and images.entries[0].name == "./v1.0/0000.png"


def test_the_index_is_used_while_the_tar_is_the_same_and_never_after(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "a.tar", [0, 1])
    first = open_images(str(path))
    assert (tmp_path / "a.tar.index.json").is_file()
    scanned = []
    real = shards._scan
    monkeypatch.setattr(shards, "_scan", lambda p: [scanned.append(p), real(p)][1])
    assert open_images(str(path)).entries == first.entries and not scanned
    write_tar(path, [0, 1], start=5)  # same size, another time
    os.utime(path, ns=(0, 1))
    assert _reds(open_images(str(path))) == [5, 6] and len(scanned) == 1
    write_tar(path, [0] * 30)  # another size, same time
    os.utime(path, ns=(0, 1))
    assert len(open_images(str(path))) == 30 and len(scanned) == 2


@pytest.mark.parametrize("content", [b"", b"[]", b'{"version": 1}', b"\xff\xfe"])
def test_a_damaged_index_is_made_anew(tmp_path, content):
    path = write_tar(tmp_path / "a.tar", [0, 1])
    (tmp_path / "a.tar.index.json").write_bytes(content)
    assert len(open_images(str(path))) == 2
    assert len(json.loads((tmp_path / "a.tar.index.json").read_text())["pictures"]) == 2


def test_without_permission_beside_the_tar_the_index_goes_to_the_cache(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "data" / "a.tar", [0, 1])
    monkeypatch.setenv("ALIGNTOK_CACHE", str(tmp_path / "cache"))
    real = shards.write_bytes

    def refusing(place, data):
        if place.parent == path.parent:
            raise UserError("read-only")
        real(place, data)

    monkeypatch.setattr(shards, "write_bytes", refusing)
    open_images(str(path))
    assert len(list((tmp_path / "cache" / "tar-indices").iterdir())) == 1
    monkeypatch.setattr(shards, "_scan", lambda p: pytest.fail("scanned again"))
    assert len(open_images(str(path))) == 2


def test_the_embedded_set_leaves_no_index(monkeypatch):
    monkeypatch.setattr(shards, "write_bytes", lambda *a: pytest.fail("wrote an index into the package"))
    assert len(open_images("embedded")) == 1306


def test_progress_counts_tars(three):
    seen = []
    open_images(str(three), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("s-{00..04}.tar", r"2 of the 5 tars .* do not exist \(s-03.tar, s-04.tar\)"),
        ("s-{02..00}.tar", "is no range"),
        ("s-{x}.tar", "is no range"),
        ("s-{00..02}.zip", "do not end in .tar"),
    ],
)
def test_wrong_patterns_are_refused(three, pattern, message):
    with pytest.raises(UserError, match=message):
        open_images(str(three / pattern))


def test_tars_and_images_in_one_folder_are_refused(three):
    Image.new("RGB", (4, 4)).save(three / "stray.png")
    with pytest.raises(UserError, match=r"3 \.tar files and 1 images"):
        open_images(str(three))


def test_compressed_and_truncated_tars_are_refused(tmp_path):
    path = write_tar(tmp_path / "a.tar", range(5))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 3 + 100])
    with pytest.raises(UserError, match="not a WebDataset tar that can be read"):
        open_images(str(path))
    with tarfile.open(path, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("x.png"))
    with pytest.raises(UserError, match="not a WebDataset tar that can be read"):
        open_images(str(path))
