"""The captions of a small set: which pictures they count, and sets of too few."""

import itertools

import pytest
from helpers import of_text, tiny_recipe, write_pictures
from text_encoders import WORDS, write_encoder

from aligntok.commands.quickstart import quickstart
from aligntok.data.images import open_images
from aligntok.errors import UserError
from aligntok.evaluation.words import Words
from aligntok.runtime.devices import choose_precision


@pytest.fixture
def recipe(tmp_path):
    """Of 24 pictures with a caption each: that of number n is the n-th."""
    pictures, texts = write_pictures(tmp_path / "pictures", 24), itertools.permutations(WORDS[4:], 3)
    for file in sorted(pictures.rglob("*.png")):
        file.with_suffix(".txt").write_text(" ".join(next(texts)))
    return of_text(tiny_recipe(tmp_path / "run", pictures), write_encoder(tmp_path / "encoder", "bert"))


def test_pictures_without_a_caption_and_those_that_cannot_be_read_take_no_part(recipe):
    images = open_images(recipe.data.path)
    recipe.data.held_out = 0.25
    every = Words(images, recipe, choose_precision("cpu", "fp32"))
    images.entries[3].path.with_suffix(".txt").unlink()
    images.entries[10].path.write_bytes(b"no picture")
    some = Words(images, recipe, choose_precision("cpu", "fp32"))
    kept = [number for number in range(24) if number not in (3, 10)]
    assert some.captions == [every.captions[number] for number in kept] and len(some.texts) == 22
    assert some.crops.equal(every.crops[kept]) and some.labels.equal(every.labels[kept])
    assert {kept[place] for place in some.trained_on.tolist()} == set(every.trained_on.tolist()) - {3, 10}


def test_too_few_captions_are_refused_before_anything_is_trained(recipe, tmp_path):
    for file in tmp_path.rglob("pictures/*/*.txt"):
        file.write_text("a red cat")
    with pytest.raises(UserError, match="1 distinct captions, expected at least 10"):
        quickstart(recipe, "aligntok quickstart --text")
    assert not (tmp_path / "run" / "stage1").exists()
