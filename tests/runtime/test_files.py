"""Folders take the place of folders like them, and of nothing else."""

import json
from pathlib import Path

import pytest
import torch

from aligntok.errors import UserError
from aligntok.runtime.clock import Clock
from aligntok.runtime.files import read_document, unfinished_folder, write_folder

MODEL = {"model": {"weight": torch.ones(2)}}


def manifest(kind: str = "aligntok.tokenizer", **more) -> dict:
    return {"config": {"format": kind, **more}}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def refused(place: Path, message: str, documents: dict) -> None:
    """`write_folder` to `place` is refused, nothing changes and nothing is left beside it."""
    before, beside = contents(place) if place.is_dir() else place.read_bytes(), sorted(place.parent.iterdir())
    with pytest.raises(UserError, match=message) as raised:
        write_folder(place, MODEL, documents)
    assert "\n" not in str(raised.value) and str(place) in str(raised.value)
    assert (contents(place) if place.is_dir() else place.read_bytes()) == before
    assert sorted(place.parent.iterdir()) == beside


def test_a_folder_of_the_same_names_is_replaced(tmp_path):
    place = tmp_path / "t"
    write_folder(place, MODEL, manifest(version=1))
    write_folder(place, MODEL, manifest(version=2))
    assert json.loads((place / "config.json").read_text())["version"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t"]
    assert sorted(contents(place)) == ["config.json", "model.safetensors"]


def test_an_empty_folder_may_be_there(tmp_path):
    (tmp_path / "t").mkdir()
    write_folder(tmp_path / "t", MODEL, manifest())
    assert sorted(contents(tmp_path / "t")) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize(
    ("names", "told"),
    [(["thesis.tex"], r"\(thesis\.tex\)"), (["a", "b", "c", "d", "model.safetensors"], r"\(a, b, c, \.\.\.\)")],
)
def test_other_peoples_files_are_named_and_kept(names, told, tmp_path):
    place = tmp_path / "precious"
    place.mkdir()
    for name in names:
        (place / name).write_text("mine")
    refused(place, told + ".*give another place", manifest())


def test_a_folder_inside_counts_as_well(tmp_path):
    (tmp_path / "precious" / "photos").mkdir(parents=True)
    refused(tmp_path / "precious", r"\(photos\)", manifest())


def test_a_file_is_not_replaced_by_a_folder(tmp_path):
    file = tmp_path / "source.pt"
    file.write_bytes(b"weights")
    refused(file, "is a file", manifest())
    entered = False
    with pytest.raises(UserError, match="is a file"), unfinished_folder(file):
        entered = True
    assert not entered, "refused before anything is made"


@pytest.mark.parametrize("there", [manifest("aligntok.generator"), {"config": {"model_type": "dinov2"}}])
def test_another_format_is_not_replaced(there, tmp_path):
    write_folder(tmp_path / "t", MODEL, there)
    refused(tmp_path / "t", r"says format .* and 'aligntok\.tokenizer' is to be written", manifest())


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_a_manifest_that_cannot_be_read_is_not_replaced(text, tmp_path):
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "config.json").write_text(text)
    refused(tmp_path / "t", "cannot be read", manifest())


def test_files_that_appear_while_the_new_folder_is_filled_are_kept(tmp_path):
    place = tmp_path / "t"
    with pytest.raises(UserError, match="note"), unfinished_folder(place) as unfinished:
        (unfinished / "new").write_text("new")
        place.mkdir()
        (place / "note").write_text("mine")
    assert contents(place) == {"note": b"mine"} and [path.name for path in tmp_path.iterdir()] == ["t"]


def test_who_asks_for_it_replaces_files_of_other_names(tmp_path):
    place = tmp_path / "step-1"
    for name in ("old", "new"):
        with unfinished_folder(place, replaces_any=True) as unfinished:
            (unfinished / name).write_text(name)
    assert contents(place) == {"new": b"new"} and [path.name for path in tmp_path.iterdir()] == ["step-1"]


def test_a_link_to_a_folder_stays_one(tmp_path):
    """The folder may lie on a larger disk."""
    disk, link = tmp_path / "disk" / "t", tmp_path / "t"
    write_folder(disk, MODEL, manifest(version=1))
    link.symlink_to(disk)
    write_folder(link, MODEL, manifest(version=2))
    assert link.is_symlink() and json.loads((disk / "config.json").read_text())["version"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "t"]
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["t"]


def test_a_document_that_is_not_there_is_empty_and_another_thing_is_refused(tmp_path):
    file = tmp_path / "times.json"
    assert read_document(file) == {}
    file.write_text('{"a": 1}')
    assert read_document(file) == {"a": 1}
    for text, message in (("null", "holds a NoneType in JSON, expected an object"), ("{", "cannot be read as JSON")):
        file.write_text(text)
        with pytest.raises(UserError, match=message) as raised:
            Clock(file)
        assert "\n" not in str(raised.value) and str(file) in str(raised.value)
