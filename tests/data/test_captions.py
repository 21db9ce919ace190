"""Captions of every source: the right ones for each picture, and what cannot be used counted and named."""

import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import write_pictures
from PIL import Image

from aligntok.config.parsing import parse_recipe
from aligntok.data import shards
from aligntok.data.caption_lists import read_list
from aligntok.data.captions import Captions, read_captions
from aligntok.data.found import Found
from aligntok.data.images import open_images
from aligntok.errors import UserError


@pytest.fixture
def folder(tmp_path) -> Path:
    """disc/000.png, disc/002.png, square/001.png, square/003.png"""
    return write_pictures(tmp_path / "set", 4)


def write(path: Path, *texts: str | bytes) -> None:
    path.write_bytes(b"".join(t if isinstance(t, bytes) else t.encode() for t in texts))


def read(path: Path, source: str | Path | None = None) -> tuple[Captions, list[str]]:
    said: list[str] = []
    images = open_images(str(path), say=lambda line: None)
    return read_captions(images, None if source is None else str(source), said.append), said


def write_tar(path: Path, members: dict[str, bytes | str | None]) -> Path:
    """None: a picture."""
    picture = io.BytesIO()
    Image.new("RGB", (4, 4)).save(picture, "PNG")
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            data = picture.getvalue() if content is None else content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_text_files_beside_the_pictures(folder):
    for name, text in (
        ("disc/000", "a disc"),
        ("disc/002", "two\n\n  a  second\tone \n"),
        ("square/001", "\ufeffsquare"),
    ):
        write(folder / f"{name}.txt", text)
    write(folder / "square/003.json", '{"caption": "of\\nJSON", "url": "x"}')
    write(folder / "square/001.json", '{"caption": "loses"}')
    captions, said = read(folder)
    assert captions.texts == [["a disc"], ["two", "a second one"], ["square"], ["of JSON"]]
    assert said == ["captions: set: 5 captions of 4 images, from files beside the pictures"]
    assert captions.starts().tolist() == [0, 1, 3, 4, 5] and captions.flat()[2] == "a second one"
    assert captions.subset([3, 1]).texts == [["of JSON"], ["two", "a second one"]]


def test_tux_paint_translations_are_no_captions(folder):
    write(folder / "disc/000.txt", "A coin.\naf.utf8=munt\nen_GB.utf8=A coin, old.\nca@valencia.utf8=Moneda\n")
    assert read(folder)[0].texts[0] == ["A coin."]


def test_what_cannot_be_used_is_counted_and_named(folder):
    write(folder / "disc/000.txt", "café")
    write(folder / "disc/002.txt", " \n ")
    write(folder / "square/001.txt", "caf\xe9".encode("latin-1"))
    write(folder / "square/nobody.txt", "lone")
    write(folder / "square/.hidden.txt", "lone")
    captions, said = read(folder)
    assert captions.texts == [["café"], [], [], []] and captions.pictures == [0]
    assert said == [
        "WARNING: captions: set: 1 captions of 1 images, from files beside the pictures, 3 without any are left out",
        "  1 with an empty caption: disc/002.png",
        "  1 caption files without a picture: nobody.txt",
        "  1 whose caption is not UTF-8: square/001.png",
        "  1 without a caption: square/003.png",
    ]


def test_without_a_single_caption_it_says_what_was_expected(folder, tmp_path):
    with pytest.raises(UserError, match=r"no captions for the 4 images of set \(4 without a caption.*NAME.txt beside"):
        read(folder)
    write(tmp_path / "list.jsonl", '{"file_name": "elsewhere.png", "text": "x"}\n')
    with pytest.raises(UserError, match=r"no captions in .*list.jsonl .*1 rows that name no picture.*file_name"):
        read(folder, tmp_path / "list.jsonl")


def test_captions_in_tars_and_their_index(tmp_path, monkeypatch):
    members = {"a.png": None, "a.txt": "one", "b.input.png": None, "b.json": '{"caption": ["two", "three"]}'}
    members |= {"v1.5.png": None, "v1.5.txt": b"\xff", "d.png": None, "gone.txt": "lone", "__MACOSX/._a.txt": "junk"}
    path = write_tar(tmp_path / "s.tar", members)
    captions, said = read(path)
    assert captions.texts == [["one"], ["two", "three"], [], []]
    assert said[1:] == [
        "  1 caption files without a picture: s.tar/gone.txt",
        "  1 whose caption is not UTF-8: v1.5.png",
        "  1 without a caption: d.png",
    ]
    held = json.loads((tmp_path / "s.tar.index.json").read_text())
    assert held["version"] == 3 and [place and place[0] for place in held["captions"]] == ["txt", "json", "txt", None]
    monkeypatch.setattr(shards, "_scan", lambda p: pytest.fail("scanned again"))
    assert read(path)[0].texts == captions.texts


def test_an_index_of_the_version_before_is_made_anew(tmp_path):
    path = write_tar(tmp_path / "s.tar", {"a.png": None, "a.txt": "one"})
    open_images(str(path))
    place = tmp_path / "s.tar.index.json"
    old = json.loads(place.read_text())
    del old["captions"], old["lone_captions"]
    place.write_text(json.dumps(old | {"version": 2}))
    assert read(path)[0].texts == [["one"]]


def test_several_tars_and_parts_of_a_set(tmp_path):
    for shard in (0, 1):
        write_tar(tmp_path / f"{shard}.tar", {"x.png": None, "x.txt": f"x of {shard}", "y.png": None, "y.txt": "y"})
    images = open_images(str(tmp_path), say=lambda line: None)
    seen = []
    assert read_captions(images.subset([2, 0]), progress=lambda *at: seen.append(at)).texts == [["x of 1"], ["x of 0"]]
    assert seen == [(1, 2), (2, 2)]


def test_the_embedded_set_has_a_caption_for_every_picture():
    captions, said = read(Path("embedded"))
    assert captions.count == len(captions) == 1306 and captions.texts[2] == ["second place medal"]
    assert len(said) == 1


ROWS = [("disc/000.png", ["one"]), ("disc/002.png", ["two", "three"]), ("001.png", ["four"])]
EXPECTED = [["one"], ["two", "three"], ["four"], []]


def as_lines(path: Path, name: str, caption: str) -> Path:
    rows = [{name: picture, caption: texts if len(texts) > 1 else texts[0]} for picture, texts in ROWS]
    write(path / "list.jsonl", "\n\n".join(map(json.dumps, rows)))
    return path / "list.jsonl"


def as_parquet(path: Path, name: str, caption: str) -> Path:
    pairs = [(picture, text) for picture, texts in ROWS for text in texts]
    pq.write_table(
        pa.table({name: [p for p, _ in pairs], "url": ["x"] * 4, caption: [t for _, t in pairs]}), path / "t.parquet"
    )
    return path / "t.parquet"


def as_parquets(path: Path, name: str, caption: str) -> Path:
    (path / "tables").mkdir()
    for number, (picture, texts) in enumerate(ROWS):
        pq.write_table(pa.table({name: [picture], caption: [texts]}), path / "tables" / f"{number}.parquet")
    return path / "tables"


def as_list(path: Path, name: str, caption: str) -> Path:
    write(path / "list.json", json.dumps([{name: picture, caption: texts} for picture, texts in ROWS]))
    return path / "list.json"


@pytest.mark.parametrize("layout", [as_lines, as_parquet, as_parquets, as_list])
@pytest.mark.parametrize(
    ("name", "caption"), [("file_name", "text"), ("path", "TEXT"), ("image", "caption"), ("image_path", "captions")]
)
def test_lists_of_all_layouts_and_columns(folder, tmp_path, layout, name, caption):
    source, done = str(layout(tmp_path, name, caption)), []
    read_captions(open_images(str(folder), say=print), source, print, lambda *at: done.append(at))
    assert done == [(0, 4), (3, 4)]
    captions, said = read(folder, source)
    assert captions.texts == EXPECTED and said[1:] == ["  1 without a caption: square/003.png"]


def test_coco_and_names_with_captions(folder, tmp_path):
    images = [{"id": 7, "file_name": "disc/000.png"}, {"id": 9, "file_name": "disc/002.png"}]
    told = [(9, "two"), (7, "one"), (9, "three "), (8, "of no image")]
    annotations = [{"image_id": number, "id": 1, "caption": text} for number, text in told]
    write(tmp_path / "coco.json", json.dumps({"images": images, "annotations": annotations, "info": {}}))
    captions, said = read(folder, tmp_path / "coco.json")
    assert captions.texts == [["one"], ["two", "three"], [], []]
    assert "  1 rows without the name of a picture: row 4" in said
    write(
        tmp_path / "names.json",
        json.dumps({"disc/000.png": "one", "disc/002.png": ["two", "three"], "001.png": "four"}),
    )
    assert read(folder, tmp_path / "names.json")[0].texts == EXPECTED


def test_a_folder_of_text_files(folder, tmp_path):
    (tmp_path / "texts" / "disc").mkdir(parents=True)
    write(tmp_path / "texts" / "disc" / "000.txt", "one\ntwo")
    write(tmp_path / "texts" / "003.txt", "three")
    write(tmp_path / "texts" / "gone.txt", "lone")
    captions, said = read(folder, tmp_path / "texts")
    assert captions.texts == [["one", "two"], [], [], ["three"]]
    assert "  1 rows that name no picture of the set: gone (gone.txt)" in said


def test_keys_of_img2dataset_name_pictures_in_tars(tmp_path):
    for shard in (0, 1):
        write_tar(tmp_path / f"{shard:05d}.tar", {f"{shard:05d}000{i}.jpg": None for i in (1, 2)})
    keys = ["000000001", "000010002", "000019999"]
    pq.write_table(pa.table({"key": keys, "caption": ["one", "two", None]}), tmp_path / "00000.parquet")
    captions, said = read(tmp_path, tmp_path)
    assert captions.texts == [["one"], [], [], ["two"]]
    assert "  1 rows that name no picture of the set: 000019999 (row 3 of 00000.parquet)" in said


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("./a/x.png", 0),
        ("a\\x.png", 0),
        ("/data/train/a/x.png", 0),
        ("a/x", 0),
        ("train/a/x", 0),
        ("y.png", 2),
        ("v1.2", 3),
        ("x.png", None),  # two of them
        ("b/y.png", None),  # another folder's
        ("y.jpg", None),
    ],
)
def test_names_of_pictures(tmp_path, name, number):
    write(tmp_path / "list.jsonl", json.dumps({"file": name, "text": "t"}))
    texts = read_list(str(tmp_path / "list.jsonl"), ["a/x.png", "b/x.png", "a/y.png", "c/v1.2.png"], Found())
    assert [n for n, own in enumerate(texts) if own] == ([] if number is None else [number])


def test_bad_rows_are_counted_and_named(folder, tmp_path):
    row = json.dumps({"file": "001.png", "text": "four"})
    lines = [row, row, '{"file": "001.png", "text": "other"}', '{"file": "001.png", "text": " "}', '{"text": "x"}']
    lines += ["{", "[1]", '{"file": "x.png", "text": "t"}', '{"file": "000.png"}']
    write(tmp_path / "l.jsonl", "\n".join(lines).encode() + b'\n{"file": "001.png", "text": "\xe9"}')
    captions, said = read(folder, tmp_path / "l.jsonl")
    assert captions.texts[2] == ["four", "other"] and captions.count == 2
    assert said[1:] == [
        "  1 rows that say the same again: 001.png (line 2)",
        "  2 rows without a caption: 001.png (line 4), 000.png (line 9)",
        "  1 rows without the name of a picture: line 5",
        "  2 rows that are no JSON objects: line 6, line 7",
        "  1 rows that name no picture of the set: x.png (line 8)",
        "  1 rows that are not UTF-8: line 10",
        "  3 without a caption: disc/000.png, disc/002.png, square/003.png",
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.jsonl", None, r"the path does not exist; data.captions takes a \.jsonl"),
        ("l.csv", b"a,b", r"is a \.csv file; data.captions takes"),
        ("l.json", b"[1", "holds no captions that can be read"),
        ("l.json", b'[["a.png", "b"]]', "holds no captions that can be read"),
        ("l.parquet", b"junk", "cannot be read as Parquet"),
    ],
)
def test_lists_that_cannot_be_read_are_one_line(folder, tmp_path, name, content, message):
    if content is not None:
        write(tmp_path / name, content)
    with pytest.raises(UserError, match=message) as raised:
        read(folder, tmp_path / name)
    assert "\n" not in str(raised.value)


def test_columns_and_folders_without_captions_are_told(folder, tmp_path):
    pq.write_table(pa.table({"URL": ["x"], "TEXT": ["y"]}), tmp_path / "laion.parquet")
    with pytest.raises(UserError, match=r"has the columns URL, TEXT: expected one of file_name, .* and one of caption"):
        read(folder, tmp_path / "laion.parquet")
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match=r"holds no \.parquet and no \.txt files"):
        read(folder, tmp_path / "none")


def test_captions_are_a_field_of_a_recipe(tmp_path):
    assert parse_recipe("train-generator", []).data.captions is None
    recipe = parse_recipe("train-generator", ["--data.captions", "~/list.jsonl"])
    assert recipe.data.captions == str(Path.home() / "list.jsonl")
    (tmp_path / "r.yaml").write_text("data:\n  captions: /data/x.parquet\n")
    assert parse_recipe("plan", ["--config", str(tmp_path / "r.yaml")]).data.captions == "/data/x.parquet"
