"""The choice of the loader: made by the data and the machine, said with its reason, refused where it cannot be had."""

import sys
from contextlib import nullcontext

import pytest
import torch
from helpers import write_pictures
from photographs import write_photographs

from aligntok.config import DataConfig
from aligntok.data.dali import DaliSource
from aligntok.data.images import open_images
from aligntok.data.loading import build_source
from aligntok.data.sources import MemorySource, StreamSource
from aligntok.errors import UserError
from aligntok.runtime.world import World


def _bar(title):
    return nullcontext(lambda done, total: None)


def _build(folder, crop="random", world=None, **data):
    said = []
    config = DataConfig(**({"image_size": 32, "workers": 0} | data))
    return build_source(open_images(str(folder)), config, crop, 4, 0, said.append, _bar, world), "\n".join(said)


def test_jpegs_are_streamed_by_dali(tmp_path):
    source, said = _build(write_photographs(tmp_path))
    assert isinstance(source, DaliSource)
    assert (
        "random crops never repeat" in said
        and "loader: DALI on the CPU, 1 threads (100% of the images are JPEG)" in said
    )


def test_other_files_are_streamed_by_workers(tmp_path):
    source, said = _build(write_pictures(tmp_path))
    assert isinstance(source, StreamSource)
    assert "loader: torchvision, 0 worker processes with Pillow (0% of the images are JPEG" in said


def test_centre_crops_that_fit_stay_in_memory_and_others_do_not(tmp_path):
    folder = write_pictures(tmp_path)
    source, said = _build(folder, "center")
    assert isinstance(source, MemorySource) and "loader: memory" in said
    source, said = _build(folder, "center", memory_limit_gib=0.0)
    assert isinstance(source, StreamSource) and "exceed data.memory_limit_gib" in said


def test_without_dali_auto_says_why_and_an_explicit_wish_is_refused(tmp_path, monkeypatch):
    folder = write_photographs(tmp_path)
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    source, said = _build(folder)
    assert isinstance(source, StreamSource) and "nvidia.dali does not import" in said and "aligntok[dali]" in said
    for crop in ("random", "center"):
        with pytest.raises(UserError, match=r"data.loader is dali, but .*aligntok\[dali\]"):
            _build(folder, crop, loader="dali")


def test_explicit_wishes_are_met(tmp_path):
    folder = write_photographs(tmp_path)
    assert isinstance(_build(folder, loader="torchvision")[0], StreamSource)
    assert isinstance(_build(folder, loader="dali")[0], DaliSource)
    with pytest.raises(UserError, match="expected auto, dali or torchvision"):
        _build(folder, loader="pillow")


@pytest.mark.parametrize("options", [{"crop": "center"}, {"loader": "dali"}, {"loader": "torchvision"}])
def test_the_world_is_handed_on(tmp_path, options):
    folder = write_photographs(tmp_path)
    alone, second = _build(folder, **options)[0].batch(1), _build(folder, world=World(1, 2), **options)[0].batch(1)
    assert second["rows"].tolist() == [2, 3] and torch.equal(second["index"], alone["index"][2:])
