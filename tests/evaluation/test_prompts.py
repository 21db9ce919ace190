"""Files of prompts: every layout, what is wrong with one, and what a choice of them is."""

import hashlib
import json

import pytest

from aligntok.errors import UserError
from aligntok.evaluation.prompts import read_prompts


def written(tmp_path, name: str, data: str | bytes):
    (tmp_path / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    return tmp_path / name


def test_lines_of_a_text_file_with_its_hash(tmp_path):
    file = written(tmp_path, "p.txt", "a red fox\r\n\n  a caf\u00e9\u2028by night \n")
    found = read_prompts(file)
    assert found.texts == ["a red fox", "a caf\u00e9\u2028by night"] and len(found) == 2
    assert found.records == [{"prompt": text} for text in found.texts]
    assert (found.name, found.empty) == ("p.txt", 1)
    assert found.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert found.protocol == f"prompts p.txt, n=2, sha256 {found.sha256[:16]}, 1 empty ones left out"


def test_json_lines_keep_their_other_keys(tmp_path):
    lines = [{"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a bench"}, {"prompt": ""}]
    found = read_prompts(written(tmp_path, "m.jsonl", "\n".join(map(json.dumps, lines)) + "\n"))
    assert found.texts == ["a bench"] and found.records == lines[:1] and found.empty == 1


def test_captions_of_coco(tmp_path):
    notes = [{"image_id": 7, "id": 1, "caption": "A dog. "}, {"image_id": 9, "id": 2, "caption": "A cat."}]
    found = read_prompts(written(tmp_path, "c.json", json.dumps({"images": [], "annotations": notes})))
    assert found.texts == ["A dog.", "A cat."]
    assert found.records[0] == {"image_id": 7, "id": 1, "caption": "A dog. ", "prompt": "A dog."}


def test_lists_and_tables(tmp_path):
    assert read_prompts(written(tmp_path, "h.json", '["one", "two"]')).texts == ["one", "two"]
    found = read_prompts(written(tmp_path, "p.tsv", 'Prompt\tCategory\na "b" c\tArts\n'))
    assert found.records == [{"prompt": 'a "b" c', "Category": "Arts"}]


def test_a_folder_of_text_files_in_the_order_of_its_numbers(tmp_path):
    for name, text in (("10", "ten\n"), ("9", "nine\nlines"), ("partiprompts1", "p")):
        written(tmp_path, f"{name}.txt", text)
    found = read_prompts(tmp_path)
    assert found.texts == ["nine lines", "ten", "p"]
    assert [record["item_id"] for record in found.records] == ["9", "10", "partiprompts1"]
    before = found.sha256
    written(tmp_path, "9.txt", "other")
    assert read_prompts(tmp_path).sha256 != before


def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path):
    assert read_prompts(written(tmp_path, "p.txt", b"\xef\xbb\xbfa fox")).texts == ["a fox"]


@pytest.mark.parametrize(
    ("name", "data", "told"),
    [
        ("p.txt", b"", "holds nothing"),
        ("p.json", b"", "holds nothing"),
        ("p.tsv", b"", "holds nothing"),
        ("p.txt", b"\n \n", "only empty prompts \\(2\\)"),
        ("p.txt", "a fox".encode("utf-16"), "is not UTF-8 \\(byte 0"),
        ("p.txt", b"caf\xe9", "is not UTF-8 \\(byte 3"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": ', "line 2 is no JSON"),
        ("p.jsonl", b'{"text": "a"}', 'line 1 has no text under "prompt"'),
        ("p.jsonl", b'{"prompt": 3}', 'line 1 has no text under "prompt"'),
        ("p.json", b'{"annotations": [{"id": 1}]}', 'annotation 0 has no text under "caption"'),
        ("p.json", b'{"images": []}', 'no "annotations"'),
        ("p.tsv", b"Text\nfox\n", "no column Prompt"),
        ("p.csv", b"fox", "no file of prompts by its name"),
    ],
)
def test_what_is_wrong_is_said(name, data, told, tmp_path):
    with pytest.raises(UserError, match=told):
        read_prompts(written(tmp_path, name, data))


def test_nothing_there(tmp_path):
    with pytest.raises(UserError, match=r"there is no file of prompts .*absent.txt"):
        read_prompts(tmp_path / "absent.txt")


def test_a_choice_is_the_same_for_a_seed_and_says_so(tmp_path):
    found = read_prompts(written(tmp_path, "p.txt", "\n".join(map(str, range(100)))))
    some = found.choose(10, seed=3)
    assert some.texts == found.choose(10, seed=3).texts != found.choose(10, seed=4).texts
    assert some.texts == sorted(some.texts, key=int) and len(set(some.texts)) == 10
    assert "n=10, drawn from 100 with seed 3" in some.protocol
    assert found.choose(100) is found
    with pytest.raises(UserError, match="101 prompts were asked for"):
        found.choose(101)
