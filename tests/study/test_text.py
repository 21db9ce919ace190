"""The study of text to image from end to end at a few steps: rows with captions, what is found of them, the report."""

import dataclasses
import itertools
import json

import pytest
import torch
from helpers import caption, of_text, seeded_encoder, tiny_config, tiny_recipe, write_pictures
from text_encoders import WORDS, write_encoder

from aligntok.cli import main
from aligntok.config import DecoderConfig, EvaluationConfig, VAEConfig
from aligntok.errors import UserError
from aligntok.evaluation.words import Words
from aligntok.models.generator import Generator
from aligntok.runtime.devices import choose_precision
from aligntok.study import measure, rows, run
from aligntok.study.measure import pictures_of
from aligntok.study.rows import TEXT, Row, choose


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """(output, recipe) of a finished study of two rows."""
    folder = tmp_path_factory.mktemp("study")
    images = caption(write_pictures(folder / "images", count=40))
    texts = itertools.permutations(WORDS[4:], 3)  # forty captions that the encoder tells apart
    for file in sorted(images.rglob("*.txt")):
        file.write_text(" ".join(next(texts)))
    recipe = of_text(tiny_recipe(folder / "base", images, stage3={"steps": 0}), write_encoder(folder / "e", "bert"))
    base = dataclasses.asdict(recipe)
    base["generator"] |= {"snapshot_every": 2}
    rival = {key: base["tokenizer"][key] for key in ("crop", "losses", "training")} | {"kind": "vae"}
    decoder = DecoderConfig(base_channels=8, channel_multipliers=(1, 1, 1, 1, 2), blocks=1, groups=4)
    vae = dataclasses.asdict(VAEConfig(latent_channels=tiny_config().adapter.latent_channels, networks=decoder))

    def tiny(name):
        plain = {key: value for key, value in base.items() if key != "rival"}
        return plain | ({"rival": rival | {"vae": vae, "stage": {"steps": 4, "gan_start": 2}}} if name == "vae" else {})

    patch = pytest.MonkeyPatch()
    for module in (rows, run):
        patch.setattr(module, "values_of", tiny)
    patch.setattr(run, "choose_precision", lambda device: choose_precision(device, "fp32"))
    patch.setattr(measure, "Encoder", seeded_encoder)
    options = ["--output", str(folder / "out"), "--seeds", "[1]", "--samples", "12", "--text", "true"]
    assert main(["study", *options, "--only", "[vae,aligntok]"]) == 0
    yield folder / "out", recipe
    patch.undo()


def test_rows_read_captions_and_say_what_is_found(study):
    output, _ = study
    for name in ("vae", "aligntok"):
        row = Row(name, 1, output, text=True)
        measures = json.loads((row.folder / "measures.json").read_text())
        assert set(measures["generations"]) == {"2/4/1", "4/4/1", "4/4/2"}  # no sweep over sampling steps
        assert all(0 <= values["found"] <= 1 for values in (measures["perfect"], *measures["generations"].values()))
        assert Generator(row.folder / "generator").text is not None
        assert len(pictures_of(row)["samples"]) == len(EvaluationConfig().prompts)
        assert "captions as in the reference" in measures["protocols"]["generation"]


def test_the_report_has_captions_and_their_verdicts(study):
    text = (study[0] / "study.md").read_text()
    for line in ("# The laptop study of text to image", "aligntok study --text true", "caption found of 10",
                 "| AlignTok / VAE |", "a purple flower"):  # fmt: skip
        assert line in text
    assert "VA-VAE, ViT" not in text


def test_a_study_is_of_classes_or_of_captions(study, capsys):
    output, _ = study
    assert main(["study", "--output", str(output), "--only", "[vae]", "--samples", "12"]) == 2
    assert "holds a study of budget 1, samples 12, text True" in capsys.readouterr().err
    assert choose(None, text=True) == list(TEXT)
    with pytest.raises(UserError, match="no row rae in the study; its rows are vae, va_vae, flux, aligntok"):
        choose(["rae"], text=True)


def test_words_are_found_in_features_that_say_them(study):
    """Features that are the captions' own, turned and noisy, find their caption; those of other pictures do not."""
    from aligntok.data.images import open_images, told_before

    recipe = study[1]
    words = Words(open_images(recipe.data.path, say=told_before), recipe, choose_precision("cpu", "fp32"))
    torch.manual_seed(0)
    features = words.texts @ torch.randn(32, 48) + 0.01 * torch.randn(len(words.texts), 48)
    words.fit(features)
    order = torch.arange(len(features))
    assert words.found(features, order)[0] > 0.9
    assert words.found(features.roll(7, 0), order)[0] < 0.5
