"""Pictures with prompts in every layout, what is wrong with one, and the layouts of GenEval and DPG-Bench."""

import json

import numpy as np
import pytest
from PIL import Image
from prompted_folders import write_picture, write_sampled

from aligntok.errors import UserError
from aligntok.evaluation.benchmark_folders import write_dpg, write_geneval
from aligntok.evaluation.prompted import open_prompted
from aligntok.evaluation.prompts import read_prompts

RECORDS = [{"prompt": text} for text in ("a red fox", "a dog", "a red fox")]


def prompts_of(tmp_path, *records: dict):
    file = tmp_path / "mine.jsonl"
    file.write_text("\n".join(map(json.dumps, records)))
    return read_prompts(file)


def test_what_sample_writes(tmp_path):
    found = open_prompted(write_sampled(tmp_path / "drawn", RECORDS))
    assert len(found) == 6 and found.texts == ["a red fox"] * 2 + ["a dog"] * 2 + ["a red fox"] * 2
    assert [file.name for file in found.files[1]] == ["00001-0.png", "00001-1.png"]
    assert found.prompts.records == RECORDS and found.prompts.name == "drawn/prompts.jsonl"
    assert len(found.images()) == 6
    batches = list(found.batches(4))
    assert [len(pictures) for pictures, _ in batches] == [4, 2] and batches[1][1] == ["a red fox"] * 2
    assert batches[0][0][0].size == (32, 32)


def test_the_file_of_prompts_gives_records_places_and_hash(tmp_path):
    drawn = write_sampled(tmp_path / "drawn", RECORDS[1:] + RECORDS[:1])
    file = prompts_of(tmp_path, {"prompt": "unused"}, *({"n": n} | record for n, record in enumerate(RECORDS)))
    found = open_prompted(drawn, file)
    assert found.prompts.sha256 == file.sha256 and found.places == [1, 2, 3]
    assert [record["n"] for record in found.prompts.records] == [0, 1, 2]
    assert found.files[1][0].name == "00000-0.png"  # the dog, which the folder has first
    assert "n=3, 3 of its 4 prompts have pictures" in found.prompts.protocol
    with pytest.raises(UserError, match=r"'a red fox', which mine.jsonl does not have so often"):
        open_prompted(drawn, prompts_of(tmp_path, *RECORDS[:2]))
    with pytest.raises(UserError, match=r"'a dog', which mine.jsonl does not have: give the file"):
        open_prompted(drawn, prompts_of(tmp_path, *RECORDS[:1]))


def test_genevals_layout_comes_back_as_it_was_written(tmp_path):
    records = [
        {"tag": "counting", "include": [{"class": "cat", "count": 2}], "prompt": "two cats"},
        {"tag": "colors", "include": [{"class": "car", "count": 1, "color": "red"}], "prompt": "a red car"},
    ]
    drawn = write_sampled(tmp_path / "drawn", [{"prompt": r["prompt"]} for r in records], each=4)
    pictures = open_prompted(drawn, prompts_of(tmp_path, *records))
    told = write_geneval(pictures, tmp_path / "geneval")
    assert "8 pictures of 2 prompts" in told and "published" not in told
    assert json.loads((tmp_path / "geneval/00001/metadata.jsonl").read_text()) == records[1]
    assert sorted(p.name for p in (tmp_path / "geneval/00000/samples").iterdir()) == [f"{i:04d}.png" for i in range(4)]
    back = open_prompted(tmp_path / "geneval")
    assert back.prompts.texts == ["two cats", "a red car"] and back.places == [0, 1]
    assert back.files[1][3].read_bytes() == (drawn / "00001-3.png").read_bytes()
    with pytest.raises(UserError, match="is not empty"):
        write_geneval(pictures, tmp_path / "geneval")
    with pytest.raises(UserError, match='no "tag" and "include"'):
        write_geneval(open_prompted(drawn), tmp_path / "other")


def test_dpgs_grid_goes_row_by_row(tmp_path):
    for name, text in (("7", "seven"), ("partiprompts3", "three")):
        (tmp_path / "prompts").mkdir(exist_ok=True)
        (tmp_path / "prompts" / f"{name}.txt").write_text(text)
    file = read_prompts(tmp_path / "prompts")
    for each, sizes in ((4, (64, 64)), (2, (64, 64)), (1, (32, 32))):
        drawn = write_sampled(tmp_path / f"drawn{each}", [{"prompt": "three"}, {"prompt": "seven"}], each)
        told = write_dpg(open_prompted(drawn, file), tmp_path / f"dpg{each}")
        assert f"--resolution 32 --pic-num {each}" in told
        assert sorted(p.name for p in (tmp_path / f"dpg{each}").iterdir()) == ["7.png", "partiprompts3.png"]
        grid = Image.open(tmp_path / f"dpg{each}" / "7.png")
        assert grid.size == sizes
        for number in range(each):  # cells of the scorer: left to right, then down
            left, top = number % 2 * 32, number // 2 * 32
            cell = np.asarray(grid.crop((left, top, left + 32, top + 32)))
            np.testing.assert_array_equal(cell, np.asarray(Image.open(drawn / f"00001-{number}.png")))


@pytest.mark.parametrize(
    ("records", "each", "told"),
    [
        (RECORDS[:1], 1, 'no "item_id" that can name a file'),
        ([{"prompt": "a", "item_id": "../a"}], 1, 'no "item_id"'),
        ([{"prompt": "a", "item_id": "1"}, {"prompt": "b", "item_id": "1"}], 1, "2 prompts have 1 ids"),
        ([{"prompt": "a", "item_id": "1"}], 5, "expected 1 to 4"),
    ],
)
def test_what_dpg_cannot_hold(records, each, told, tmp_path):
    with pytest.raises(UserError, match=told):
        write_dpg(open_prompted(write_sampled(tmp_path / "drawn", records, each)), tmp_path / "dpg")
    assert not (tmp_path / "dpg").exists()


def test_dpg_needs_equal_squares(tmp_path):
    drawn = write_sampled(tmp_path / "drawn", [{"prompt": "a", "item_id": "1"}])
    write_picture(drawn / "00000-1.png", 0, 64)
    with pytest.raises(UserError, match=r"00000-1.png has 64x64 px, expected 32x32"):
        write_dpg(open_prompted(drawn), tmp_path / "dpg")


def test_missing_and_broken_pictures(tmp_path):
    drawn = write_sampled(tmp_path / "drawn", RECORDS)
    (drawn / "00001-0.png").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"00001-0.png cannot be read \(not an image"):
        list(open_prompted(drawn).batches(8))
    (drawn / "00001-0.png").unlink()
    with pytest.raises(UserError, match=r"1 of the pictures .*00001-0.png"):
        open_prompted(drawn)
    (drawn / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(UserError, match="'a' has no \"pictures\""):
        open_prompted(drawn)


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match="is no folder"):
        open_prompted(tmp_path / "absent")
    write_picture(tmp_path / "x/a.png", 0)
    with pytest.raises(UserError, match="nothing says which prompt"):
        open_prompted(tmp_path / "x")
    (tmp_path / "x/00000").mkdir()
    with pytest.raises(UserError, match=r"metadata.jsonl cannot be read"):
        open_prompted(tmp_path / "x")
    (tmp_path / "x/00000/metadata.jsonl").write_text("[]")
    with pytest.raises(UserError, match='no text under "prompt"'):
        open_prompted(tmp_path / "x")
    (tmp_path / "x/00000/metadata.jsonl").write_text('{"prompt": "a"}')
    with pytest.raises(UserError, match="samples has no pictures"):
        open_prompted(tmp_path / "x")
