"""What is found, used and left out: links, hidden folders, strays, names with dots, labels; and who is told."""

import io
import json
import os
import shutil
import tarfile
import warnings
from pathlib import Path

import pytest
from helpers import write_pictures
from PIL import Image

from aligntok.data.images import ImageSet, load_center_crops, open_images
from aligntok.data.loading import report_skipped
from aligntok.data.shards import read_class_names
from aligntok.errors import UserError

CASES = Path(__file__).parent / "cases"


def opened(path: Path) -> tuple[ImageSet, str]:
    """The set, and everything that was said of it."""
    said: list[str] = []
    return open_images(str(path), say=said.append), "\n".join(said)


def write_tar(path: Path, names: dict[str, bytes | int | None]) -> Path:
    """A tar of members: bytes as they are, a number as its text, None as a small picture of the name's own suffix."""
    with tarfile.open(path, "w") as tar:
        for name, content in names.items():
            if content is None:
                buffer = io.BytesIO()
                Image.new("RGB", (4, 4), "red").save(buffer, "JPEG" if name.lower().endswith("jpg") else "PNG")
                content = buffer.getvalue()
            data = str(content).encode() if isinstance(content, int) else content
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture
def pictures(tmp_path) -> Path:
    return write_pictures(tmp_path / "pictures", 20)


def test_class_folders_that_are_links_are_entered(pictures, tmp_path):
    (tmp_path / "set").mkdir()
    for name in ("disc", "square"):
        (tmp_path / "set" / name).symlink_to(pictures / name)
    found, said = opened(tmp_path / "set")
    assert len(found) == 20 and found.classes == ["disc", "square"] and said == "images: set: 20 found, 20 used"
    shutil.copytree(pictures / "disc", tmp_path / "set" / "real")
    assert len(opened(tmp_path / "set")[0]) == 30


def test_links_that_lead_back_and_links_to_nothing_are_named(pictures):
    (pictures / "disc" / "again").symlink_to(pictures)
    (pictures / "disc" / "gone.png").symlink_to(pictures / "nowhere.png")
    found, said = opened(pictures)
    assert len(found) == 20
    assert (
        "  a link that leads back above itself: disc/again/" in said and "  1 a link to nothing: disc/gone.png" in said
    )


def test_hidden_and_tool_folders_are_no_classes(pictures):
    for place in (".ipynb_checkpoints", "@eaDir", "square/.thumbs"):
        (pictures / place).mkdir()
        shutil.copy(pictures / "disc/000.png", pictures / place / "a.png")
    shutil.copy(pictures / "disc/000.png", pictures / "disc/._000.png")
    found, said = opened(pictures)
    assert found.classes == ["disc", "square"] and len(found) == 20
    assert "24 found, 20 used, 4 left out" in said
    assert "  4 hidden or a tool's: .ipynb_checkpoints/, @eaDir/" in said
    assert said.startswith("WARNING: "), "a sixth of the set is missing"


def test_a_stray_beside_class_folders_is_left_out_and_many_are_refused(pictures):
    shutil.copy(pictures / "disc/000.png", pictures / "stray.png")
    found, said = opened(pictures)
    assert found.classes == ["disc", "square"] and len(found) == 20
    assert "  1 beside the class folders: stray.png" in said and not said.startswith("WARNING")
    for number in range(3):
        shutil.copy(pictures / "disc/000.png", pictures / f"more{number}.png")
    with pytest.raises(UserError, match="holds 4 pictures beside sub-folders with 20"):
        open_images(str(pictures))


def test_kinds_that_are_not_read_and_empty_classes_are_named(pictures):
    (pictures / "disc/a.HEIC").write_bytes(b"x")
    (pictures / "empty").mkdir()
    _, said = opened(pictures)
    assert "  1 .heic is not read: disc/a.HEIC" in said and "  class folders without pictures: empty/" in said


def test_without_a_listener_what_is_left_out_is_a_warning(pictures):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_images(str(pictures))
    (pictures / ".hidden.png").write_bytes(b"x")
    with pytest.warns(UserWarning, match="21 found, 20 used, 1 left out"):
        open_images(str(pictures))


@pytest.mark.parametrize(("broken", "told"), [(1, "1 of 20 images"), (2, "WARNING: 2 of 20 images")])
def test_unreadable_pictures_are_counted_and_many_of_them_are_a_warning(broken, told, pictures):
    for file in sorted(pictures.rglob("*.png"))[:broken]:
        file.write_bytes(b"nothing")
    images, said = open_images(str(pictures)), []
    load_center_crops(images, 16)
    report_skipped(images, said.append)
    assert said[0].startswith("skipped disc/000.png: ") and said[-1].startswith(told)


def test_names_with_dots_and_parts_of_samples_in_tars(tmp_path):
    copied = [shutil.copy(CASES / "tars" / name, tmp_path) for name in ("mixed.tar", "input_jpg.tar")]
    mixed, said = opened(Path(copied[0]))
    assert len(mixed) == 8 and "8 found, 8 used" in said
    inputs, _ = opened(Path(copied[1]))
    assert len(inputs) > 0 and all(entry.name.endswith(".input.jpg") for entry in inputs.entries)
    assert all(inputs.open(index) is not None for index in range(len(inputs)))


def test_labels_are_found_by_any_spelling_of_their_key(tmp_path):
    names = {"v1.2_01.png": None, "v1.2_01.cls": 1, "v1.2_02.png": None, "v1.2_02.cls": 2}
    names |= {"b.input.jpg": None, "b.cls": 3, "A.jpg": None, "A.CLS": 4, "dir.x/c.png": None, "dir.x/c.cls": 5}
    found, _ = opened(write_tar(tmp_path / "a.tar", names))
    assert {e.name: e.label for e in found.entries} == {
        "v1.2_01.png": 1,
        "v1.2_02.png": 2,
        "b.input.jpg": 3,
        "A.jpg": 4,
        "dir.x/c.png": 5,
    }


def test_a_sample_has_one_picture_and_the_others_are_named(tmp_path):
    names = {"a.input.jpg": None, "a.target.jpg": None, "b.seg.png": None, "b.jpg": None}
    found, said = opened(write_tar(tmp_path / "a.tar", names))
    assert [entry.name for entry in found.entries] == ["a.input.jpg", "b.jpg"]
    assert "a.target.jpg (used: a.input.jpg), b.seg.png (used: b.jpg)" in said and said.startswith("WARNING")


def test_pictures_without_a_label_where_others_have_one_are_left_out(tmp_path):
    names = {"a.png": None, "a.cls": 1, "b.png": None, "._a.png": None, "__MACOSX/a.png": None}
    path = write_tar(tmp_path / "a.tar", names)
    for _ in range(2):  # the second time from the index
        found, said = opened(path)
        assert [entry.label for entry in found.entries] == [1]
        assert "  1 without a label, where others have one: b.png" in said and "  2 hidden or a tool's" in said


@pytest.mark.parametrize("label", [b"-1", b"1.5", b"cat", b""])
def test_a_label_that_is_no_class_is_refused(label, tmp_path):
    path = write_tar(tmp_path / "a.tar", {"a.png": None, "a.cls": label})
    with pytest.raises(UserError, match=r"a\.cls holds .* expected the number of a class"):
        open_images(str(path))


def test_a_label_beyond_the_names_is_refused_and_the_list_alone_is_taken(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"a.png": None, "a.cls": 2})
    path.with_suffix(".json").write_text('["x", "y"]')
    with pytest.raises(UserError, match=r"names 2 classes, 0 to 1, but the label of a\.png is 2"):
        open_images(str(path))
    path.with_suffix(".json").write_text('["x", "y", "z"]')
    assert open_images(str(path)).classes == ["x", "y", "z"]
    path.with_suffix(".json").write_text('{"total": 1}')  # some other tool's
    assert open_images(str(path)).classes == ["class 0", "class 1", "class 2"]


@pytest.mark.parametrize(
    "content", ["null", "3", '"cats"', "[]", "[1, 2]", '["a", null]', "{}", '{"classes": 3}', "{", "\x00"]
)
def test_class_names_that_are_none(content, tmp_path):
    file = tmp_path / "classes.json"
    file.write_text(content)
    with pytest.raises(UserError, match="names of") as caught:
        read_class_names(file)
    assert "\n" not in str(caught.value) and "classes.json" in str(caught.value)


def test_a_set_is_what_is_in_it_and_not_where_it_lies(pictures, tmp_path, monkeypatch):
    copy, link = tmp_path / "copy", tmp_path / "link"
    shutil.copytree(pictures, copy)
    link.symlink_to(pictures)
    monkeypatch.chdir(tmp_path)
    spelled = ["pictures", "pictures/", "./copy/../pictures", str(pictures), "link", "copy"]
    assert len({open_images(path).identity() for path in spelled}) == 1
    Image.new("RGB", (9, 9)).save(copy / "disc/000.png")
    assert open_images("copy").identity() != open_images("pictures").identity()
    os.rename(pictures / "disc/000.png", pictures / "disc/zzz.png")
    assert open_images("pictures").identity() != open_images("link/").identity() or link.resolve() == pictures
    tar = write_tar(tmp_path / "a.tar", {"a.png": None})
    shutil.copy(tar, tmp_path / "b.tar")
    assert open_images("a.tar").identity() == open_images("b.tar").identity()
    (tmp_path / "b.json").write_text(json.dumps(["named"]))
    assert open_images("a.tar").identity() != open_images("b.tar").identity()
